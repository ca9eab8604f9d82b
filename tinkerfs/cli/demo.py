"""The command `tinkerfs demo`."""

import os
import tempfile
import time
from typing import Any

import click

from tinkerfs.cli.daemon import serve_option, start_in_background
from tinkerfs.cli.options import mountpoint_argument, settings_options
from tinkerfs.config import Settings
from tinkerfs.fuse.mounted_fd import parse_fd

_FLAGS = (
    "read_only",
    "allow_other",
    "ttl_s",
    "trash_s",
    "uid",
    "gid",
    "umask",
    "log_file",
    "log_level",
)

_TOUR = """\
A sample account with {runs} training runs is mounted on {path}. In another terminal:

  cat {path}/README.md
  ls -l {path}/runs
  cd {path}/runs/{run} && ls -R
  cat checkpoints/weights/*/info.json
  rm -r checkpoints/weights/{checkpoint}        deletes that checkpoint of the sample account
"""

_EXPORT_TOUR = """\
This service has no archives. Its training checkpoints are exported, which a write starts:

  echo 1h > checkpoints/weights/{checkpoint}/export
  cat checkpoints/weights/{checkpoint}/export
  ls -l checkpoints/weights/{checkpoint}/files/
"""

#: Duration of each of the two steps of an export, seconds: long enough to be seen.
_EXPORT_STEP_S = 2.0


@click.command(short_help="Mount a sample account; needs no key and no network.")
@mountpoint_argument()
@click.option(
    "--detach", is_flag=True, help="Return when the mount is ready; `tinkerfs umount` ends it."
)
@serve_option
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Number of training runs.",
)
@click.option(
    "--checkpoints",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Number of checkpoints per run.",
)
@click.option(
    "--profile",
    type=click.Choice(("official", "official-0.36")),
    default="official",
    show_default=True,
    help="Service to emulate; official-0.36 has exports instead of archives.",
)
@settings_options(*_FLAGS)
def demo(
    mountpoint: str,
    detach: bool,
    serve: str | None,
    runs: int,
    checkpoints: int,
    profile: str,
    **settings: Any,
) -> None:
    """Mount an embedded server with sample runs on the empty directory MOUNTPOINT.

    The mount behaves like that of a real account, and sends nothing over the network. Runs until
    Ctrl-C, which unmounts; with --detach, until `tinkerfs umount MOUNTPOINT`.
    """
    from tinkerfs.fuse import preflight  # lazy: not needed for --help

    preflight.check_system()
    if detach and serve is None:
        start_in_background(mountpoint)
        return

    # lazy: imports the FUSE adapter and the server
    from tinkerfs.cli import mount_process
    from tinkerfs.demo.exports import ExportOptions
    from tinkerfs.demo.server import DemoServer
    from tinkerfs.fuse import session

    session.block_signals()  # before the threads of the server start
    server = DemoServer(
        runs=runs,
        checkpoints=checkpoints,
        profile=profile,
        exports=ExportOptions(load_s=_EXPORT_STEP_S, save_s=_EXPORT_STEP_S),
        reference_time_s=time.time(),
    )

    def ready(path: str) -> None:
        run = sorted(os.listdir(f"{path}/runs"))[0]
        directory = f"{path}/runs/{run}/checkpoints/weights"
        checkpoint = (
            next(iter(sorted(os.listdir(directory))), "NAME")
            if os.path.isdir(directory)
            else "NAME"
        )
        click.echo(_TOUR.format(runs=runs, path=path, run=run, checkpoint=checkpoint))
        if "GET archive" in server.profile.missing:
            click.echo(_EXPORT_TOUR.format(checkpoint=checkpoint))
        click.echo("Press Ctrl-C to unmount.")

    with server, tempfile.TemporaryDirectory(prefix="tinkerfs-demo-") as cache_dir:
        os.environ.update(server.environment)  # a key of the embedded server, not a secret
        # The sample account has its own key and temporary cache, not those of the user.
        settings |= {
            "base_url": server.base_url,
            "cache_dir": cache_dir,
            "api_key_file": None,
        }
        mount_process.run_foreground(
            Settings(**settings),
            serve or mountpoint,
            check_key=False,
            # A descriptor has no path, below which the tour could name files.
            ready=ready if serve is None and parse_fd(mountpoint) is None else None,
        )
