"""Write manual pages and shell completions of the command line, for packages.

    python -m scripts.manual_pages DIRECTORY

The texts are those of `--help`, so the two never differ. `build_hook.py` calls this for a wheel.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from tinkerfs import __version__
from tinkerfs.cli.main import cli

#: Shell -> the file of its completions, relative to the prefix.
COMPLETIONS = {
    "bash": "share/bash-completion/completions/tinkerfs",
    "zsh": "share/zsh/site-functions/_tinkerfs",
    "fish": "share/fish/vendor_completions.d/tinkerfs.fish",
}

FILES = (
    ("/etc/tinkerfs.toml", "Options of all users."),
    ("~/.config/tinkerfs/config.toml", "Options of this user, which override the former."),
    ("~/.tinker/credentials.json", "The key that `tinker auth login` stored."),
)


def files() -> Iterator[tuple[str, str]]:
    """Yield the path and the content of each file, relative to the prefix."""
    for ctx in contexts(click.Context(cli, info_name="tinkerfs", **cli.context_settings)):
        yield f"share/man/man1/{page_name(ctx)}.1", manual_page(ctx)
    yield "share/man/man8/mount.tinkerfs.8", ".so man1/tinkerfs-mount.1\n"
    for shell, path in COMPLETIONS.items():
        kind = get_completion_class(shell)
        assert kind is not None
        yield path, kind(cli, {}, "tinkerfs", "_TINKERFS_COMPLETE").source()


def contexts(ctx: click.Context) -> Iterator[click.Context]:
    """Yield the context of a command, and of each command below it."""
    yield ctx
    if isinstance(ctx.command, click.Group):
        for name in ctx.command.list_commands(ctx):
            command = ctx.command.get_command(ctx, name)
            assert command is not None
            yield from contexts(click.Context(command, info_name=name, parent=ctx))


def page_name(ctx: click.Context) -> str:
    """Return the name of a command's page, such as "tinkerfs-cache-info"."""
    return ctx.command_path.replace(" ", "-")


def manual_page(ctx: click.Context) -> str:
    """Return the page of a command in the man macros of roff, see man(7)."""
    command, name = ctx.command, page_name(ctx)
    summary = command.get_short_help_str(200).rstrip(".")
    usage = " ".join(command.collect_usage_pieces(ctx))
    lines = [
        f'.TH {quoted(name.upper())} 1 "" {quoted(f"tinkerfs {__version__}")} "User Commands"',
        ".SH NAME",
        rf"{escaped(name)} \- {escaped(summary[:1].lower() + summary[1:])}",
        ".SH SYNOPSIS",
        rf"\fB{escaped(ctx.command_path)}\fR {escaped(usage)}",
        ".SH DESCRIPTION",
        *paragraphs(command.help or ""),
    ]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for each in contexts(ctx):
            if each.parent is ctx and not each.command.hidden:
                short = each.command.get_short_help_str(200)
                lines += item(each.command_path, short)
    lines.append(".SH OPTIONS")
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None:
            lines += item(*record)
    if command.epilog:
        lines += [".SH NOTES", *paragraphs(command.epilog)]
    lines.append(".SH FILES")
    for path, text in FILES:
        lines += item(path, text)
    pages = [page_name(each) for each in contexts(ctx.find_root()) if each.parent is not None]
    others = [each for each in ("tinkerfs", *pages) if each != name]
    lines += [".SH SEE ALSO", ",\n".join(rf"\fB{escaped(each)}\fR(1)" for each in others)]
    return "\n".join(lines) + "\n"


def paragraphs(text: str) -> Iterator[str]:
    r"""Yield the lines of a help text; a paragraph after a line with `\b` is kept as it is."""
    for number, block in enumerate(text.strip().split("\n\n")):
        if number:
            yield ".PP"
        lines = block.split("\n")
        if lines[0].strip() == "\b":
            yield from (".nf", *(escaped(line) for line in lines[1:]), ".fi")
        else:
            yield escaped(" ".join(line.strip() for line in lines))


def item(term: str, text: str) -> Iterator[str]:
    """Yield the lines of an entry of a list."""
    yield from (".TP", rf"\fB{escaped(term)}\fR", escaped(" ".join(text.split())))


def escaped(text: str) -> str:
    """Return text in which no character has a meaning for roff."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    text = text.replace("`", r"\(ga").replace("~", r"\(ti").replace("^", r"\(ha")
    return rf"\&{text}" if text.startswith(".") else text


def quoted(text: str) -> str:
    """Return an argument of a macro."""
    return f'"{escaped(text)}"'


def write(directory: Path) -> list[str]:
    """Write all files below a directory; return their paths, relative to it."""
    written = []
    for path, content in files():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        written.append(path)
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
