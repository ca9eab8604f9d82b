"""The `tinkerfs` command: the table of subcommands, and error reporting.

Each subcommand is defined in its own module, which is imported when the subcommand runs or prints
its help. `tinkerfs --help` and shell completion import none of them and stay fast. No module of
this package imports HTTP, FUSE or SQLite at module level.
"""

import getopt
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from tinkerfs import __version__
from tinkerfs.errors import TinkerfsError
from tinkerfs.printable import escape_control_chars

#: Command -> module, attribute, and short help; a test compares it with the command's own.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "mount": ("mount", "mount", "Mount the account on a directory."),
    "umount": ("umount", "umount", "Unmount, and wait until the daemon has exited."),
    "status": ("status", "status", "Show the state, statistics and pending requests of mounts."),
    "stats": ("stats", "stats", "Show the activity of a mount, a line per interval."),
    "profile": (
        "profile",
        "profile",
        "Show which operations, paths and processes take the time.",
    ),
    "prefetch": ("prefetch", "prefetch", "Download weights into the cache before they are read."),
    "get": ("get", "get", "Copy a checkpoint's files to a directory; needs no mount."),
    "undelete": ("undelete", "undelete", "Restore checkpoints that were removed under --trash."),
    "cache": ("cache", "cache", "Show, verify or clear the weights cached on disk."),
    "path": ("paths", "path", "Print the file path for a tinker path."),
    "url": ("paths", "url", "Print the tinker path for a file path."),
    "serve": ("serve", "serve", "Serve the account over WebDAV and to a browser; needs no FUSE."),
    "proxy-config": (
        "proxy_config",
        "proxy_config",
        "Write the configuration of a caching proxy for weights.",
    ),
    "doctor": ("doctor", "doctor", "Check the requirements of a mount."),
    "debug": ("debug", "debug", "Collect what a bug report needs, without secrets."),
    "demo": ("demo", "demo", "Mount a sample account; needs no key and no network."),
    "demo-server": (
        "demo_server",
        "demo_server",
        "Run a Tinker API server with a sample account.",
    ),
    "completion": ("completion", "completion", "Print a shell completion script."),
}

_EPILOG = """\b
Exit codes:
  0  success
  1  failure; one line on standard error gives the reason
  2  invalid command line, environment variable or configuration file
  130  interrupted by Ctrl-C

`tinkerfs SOURCE MOUNTPOINT -o OPTIONS`, the form that mount(8) and fstab use, is the same as
`tinkerfs mount`. SOURCE is a URL, or `tinker` for the configured server. Under the name
mount.tinkerfs it takes the arguments of a helper of mount(8)."""

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A command group that imports its commands on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command and return it; return None for an unknown name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"tinkerfs.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; translate `SOURCE MOUNTPOINT ...` to `mount`."""
        args = _as_command(args)
        ctx.obj = tuple(args)  # for a daemon, which runs the command again
        return super().parse_args(ctx, args)


def _as_command(args: list[str]) -> list[str]:
    """Translate the form of mount(8), `SOURCE MOUNTPOINT -o ...`, to `mount ...`."""
    if len(args) >= 2 and args[0] not in COMMANDS:
        source, rest = args[0], args[1:]
        if source == "tinker":
            return ["mount", "--source", source, *rest]
        if "://" in source:
            return ["mount", "--source", source, "--base-url", source, *rest]
    return args


def _parse_helper_arguments(args: Sequence[str]) -> list[str]:
    """Translate the arguments of a helper of mount(8) to `SOURCE MOUNTPOINT -o OPTIONS`.

    mount(8) runs `/sbin/mount.TYPE SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`
    for a type that the kernel does not know.
    """
    try:
        flags, positional = getopt.gnu_getopt(list(args), "sfnvN:o:t:")
    except getopt.GetoptError as error:
        _fail(f"{error} (see mount(8), EXTERNAL HELPERS)", _EXIT_USAGE)
    names = [flag for flag, _ in flags]
    if len(positional) != 2:
        _fail("usage: mount.tinkerfs SOURCE MOUNTPOINT [-o OPTIONS]", _EXIT_USAGE)
    if "-f" in names:  # mount --fake does everything but mount
        sys.exit(0)
    if positional[0] != "tinker" and "://" not in positional[0]:
        _fail(f"unknown source {positional[0]!r} (hint: `tinker`, or a URL)", _EXIT_USAGE)
    options = [value for flag, value in flags if flag == "-o"]
    options += ["sloppy"] if "-s" in names else []
    return [*positional, "-o", ",".join(options)]


@click.group(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Tinker training runs and checkpoints as files.

    \b
        tinkerfs mount ~/tinker        mount the account of the configured key
        ls ~/tinker/runs               list its training runs
        tinkerfs demo ~/tinker         try it without a key
        tinkerfs doctor                diagnose problems
    """  # noqa: D301


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Every failure is reported here, as one line on standard error and an exit code.
    """
    if args is None and os.path.basename(sys.argv[0]).startswith("mount."):
        args = _parse_helper_arguments(sys.argv[1:])
    try:
        cli.main(args=args, prog_name="tinkerfs", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help text, without an error line
        sys.exit(_EXIT_USAGE)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "tinkerfs"
        _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", _EXIT_USAGE)
    except click.ClickException as error:
        _fail(error.format_message(), _EXIT_FAILED)
    except TinkerfsError as error:
        _fail(str(error), _EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_EXIT_INTERRUPTED)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of standard output has exited (`| head`), which is not an error. The
        # interpreter flushes standard output at exit; that flush must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_EXIT_FAILED)
    except OSError as error:
        _fail(f"{error.filename or 'failed'}: {error.strerror or error}", _EXIT_FAILED)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"tinkerfs: {escape_control_chars(' '.join(message.split()))}", err=True)
    sys.exit(code)
