"""The `tinkerfs` command: which commands there are, and what a failure of any looks like.

Every command stands in a module of its own that is imported when the command is run or asked for
its help, so that `tinkerfs --help` and completion stay quick. No module here imports HTTP, FUSE or
SQLite at its top.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from tinkerfs import __version__
from tinkerfs.errors import TinkerfsError
from tinkerfs.printable import printable

#: Command -> its module, the object in it, and its line in the help (tested to be its own).
COMMANDS: dict[str, tuple[str, str, str]] = {
    "mount": ("mount", "mount", "Mount the account on a folder."),
    "umount": ("umount", "umount", "Unmount, and wait until it is gone."),
    "status": ("status", "status", "Show what mounts do, and what they wait for."),
    "prefetch": ("prefetch", "prefetch", "Pull weights into the cache, before they are read."),
    "get": ("get", "get", "Copy a checkpoint's files out; needs no mount."),
    "undelete": ("undelete", "undelete", "Restore what was removed with --trash."),
    "cache": ("cache", "cache", "Look at the weights kept on disk, check or clear them."),
    "path": ("paths", "path", "Print the file path of a tinker path."),
    "url": ("paths", "url", "Print the tinker path of a file path."),
    "doctor": ("doctor", "doctor", "Check everything that a mount needs."),
    "demo": ("demo", "demo", "Mount a sample account: no key, no network needed."),
    "demo-server": (
        "demo_server",
        "demo_server",
        "Serve a sample account as the Tinker API does, until interrupted.",
    ),
    "completion": ("completion", "completion", "Print the completion script of a shell."),
}

_EPILOG = """\b
Exit codes:
  0  done
  1  it failed or was refused; one line on standard error says why
  2  the command line was not understood
  130  interrupted by Ctrl-C

`tinkerfs SOURCE MOUNTPOINT -o OPTIONS` means `mount`, as mount(8) and fstab call it; SOURCE is a
URL, or `tinker` for the configured server."""

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """Commands by name, imported when wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"tinkerfs.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take `SOURCE MOUNTPOINT ...` for a mount."""
        return super().parse_args(ctx, _as_command(args))


def _as_command(args: list[str]) -> list[str]:
    """Return `tinkerfs mount ...` for what mount(8) says: `tinkerfs SOURCE MOUNTPOINT -o ...`."""
    if len(args) >= 2 and args[0] not in COMMANDS:
        source, rest = args[0], args[1:]
        if source == "tinker":
            return ["mount", *rest]
        if "://" in source:
            return ["mount", "--base-url", source, *rest]
    return args


@click.group(
    cls=LazyGroup,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Tinker training runs and checkpoints as files.

    \b
        tinkerfs mount ~/tinker        mount the account of the key that is configured
        ls ~/tinker/runs               ... and look around
        tinkerfs demo ~/tinker         try it without a key
        tinkerfs doctor                find out why it does not work
    """  # noqa: D301


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    The one place where failures become a line on standard error and an exit code.
    """
    try:
        cli.main(args=args, prog_name="tinkerfs", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help as it is: no line of ours
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
        # Whoever read our output has left (`| head`): nothing is wrong, and the interpreter's last
        # flush must not say otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_EXIT_FAILED)
    except OSError as error:
        _fail(f"{error.filename or 'failed'}: {error.strerror or error}", _EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    click.echo(f"tinkerfs: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)
