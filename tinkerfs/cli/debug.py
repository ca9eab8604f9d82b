"""The command `tinkerfs debug bundle`: what to attach to a bug report, without secrets."""

import io
import os
import tarfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import click

from tinkerfs.cli.options import mountpoint_argument, settings_options
from tinkerfs.errors import StartupError
from tinkerfs.formatting import format_size
from tinkerfs.printable import escape_control_chars


@click.group(short_help="Collect what a bug report needs, without secrets.")
def debug() -> None:
    """Collect what a bug report needs, also from a mount that hangs."""


@debug.command()
@mountpoint_argument(required=False)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="The archive to write; by default tinkerfs-debug-<time>.tar.gz in the working directory.",
)
@click.option(
    "--log",
    "log_file",
    metavar="FILE",
    help="Log to include if a mount does not report its own, for example because it is dead.",
)
@settings_options("config")
def bundle(
    mountpoint: str | None, output: str | None, log_file: str | None, **_settings: Any
) -> None:
    """Write a tar.gz with the state of the mount at MOUNTPOINT, or of all your mounts.

    It has the versions, the settings and their sources, the result of `tinkerfs doctor` (which
    sends an API request), the cached weights, and the mount table. Of each mount it has the
    statistics, errors, changes, the end of the log, and the stacks of the daemon's threads. The
    mount may hang or be dead.

    Keys, signed URLs, passwords and the values of environment variables are removed, and the
    archive is searched for them before it is written. It contains paths and the names of runs and
    checkpoints. Its mode is 0600; an existing file is not overwritten.

    \b
        tinkerfs debug bundle
        tinkerfs debug bundle ~/tinker -o report.tar.gz
    """  # noqa: D301
    from tinkerfs.cli import debug_parts  # lazy: imports the FUSE adapter

    path = os.path.abspath(output or time.strftime("tinkerfs-debug-%Y%m%d-%H%M%S.tar.gz"))
    secrets, parts = debug_parts.collect(mountpoint, log_file, click.get_current_context())
    archive = make_archive(parts)
    sizes = check_archive(archive, secrets)
    write_archive(path, archive)
    click.echo(f"{escape_control_chars(path)} ({format_size(len(archive))}) contains:")
    for name, size_bytes in sizes.items():
        click.echo(f"  {format_size(size_bytes):>10}  {escape_control_chars(name)}")
    searched = ", ".join(sorted(set(secrets.values()))) or "no key or password is configured here"
    click.echo(f"searched every byte for secrets, and found none: {searched}")
    click.echo("paths, servers, and the names of runs and checkpoints are in it: read it first")


def make_archive(parts: Iterable[tuple[str, str]]) -> bytes:
    """Return a tar.gz of (name, text) pairs."""
    now, buffer = time.time(), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in parts:
            content = text.encode("utf-8", "backslashreplace")
            member = tarfile.TarInfo(f"tinkerfs-debug/{name}")
            member.size, member.mode, member.mtime = len(content), 0o600, now
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def check_archive(content: bytes, secrets: Mapping[str, str]) -> dict[str, int]:
    """Search an archive for secrets; return the sizes of its members by name.

    Args:
        secrets: descriptions of the secrets by their value.

    Raises:
        StartupError: a member contains a secret.
    """
    from tinkerfs.cli.known_secrets import found_in

    sizes: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            text = file.read() if file is not None else b""
            found = found_in(text, secrets) + found_in(os.fsencode(member.name), secrets)
            if found:
                raise StartupError(
                    f"{member.name} would contain {', '.join(found)}; no file was written"
                    " (hint: this is a bug in tinkerfs, please report it)"
                )
            sizes[member.name.partition("/")[2]] = len(text)
    return sizes


def write_archive(path: str, content: bytes) -> None:
    """Write a new file of mode 0600.

    Raises:
        StartupError: the file exists or cannot be written.
    """
    from tinkerfs.safe_open import open_regular

    try:
        fd = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(content)
        except BaseException:
            os.unlink(path)
            raise
    except OSError as error:
        raise StartupError(
            f"{path} cannot be written: {error.strerror} (hint: choose another file with -o)"
        ) from None
