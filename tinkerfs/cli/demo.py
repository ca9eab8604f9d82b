"""`tinkerfs demo`."""

import click

from tinkerfs.cli.options import as_arguments, mountpoint_argument, resolve, settings_options

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
A sample account of {runs} training runs is mounted on {path}. In another terminal:

  cat {path}/README.md
  ls -l {path}/runs
  cd {path}/runs/{run} && ls -R
  cat checkpoints/weights/*/info.json
  rm -r checkpoints/weights/{checkpoint}        deletes that checkpoint, here of the sample
"""


@click.command(short_help="Mount a sample account: no key, no network needed.")
@mountpoint_argument()
@click.option(
    "--detach", is_flag=True, help="Return once it is mounted; `tinkerfs umount` ends it."
)
@click.option("--foreground", is_flag=True, hidden=True)
@click.option(
    "--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Training runs."
)
@click.option(
    "--checkpoints",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Checkpoints of each run.",
)
@settings_options(*_FLAGS)
def demo(
    mountpoint: str,
    detach: bool,
    foreground: bool,
    runs: int,
    checkpoints: int,
    **flags: str | bool | None,
) -> None:
    """Mount an embedded server with sample runs on the empty folder MOUNTPOINT.

    Everything is as with a real account, and nothing leaves this machine. Stays until Ctrl-C, which
    unmounts; with --detach until `tinkerfs umount MOUNTPOINT`.
    """
    from tinkerfs.cli import mount_process

    if detach and not foreground:
        arguments = [f"--runs={runs}", f"--checkpoints={checkpoints}"]
        arguments += as_arguments(flags, (), None)
        mount_process.start_in_background("demo", mountpoint, arguments)
        return

    import os
    import tempfile
    import time

    from tinkerfs.demo.server import DemoServer
    from tinkerfs.fuse import session

    session.block_signals()  # before the server's threads start
    server = DemoServer(runs=runs, checkpoints=checkpoints, reference_time_s=time.time())

    def ready(path: str) -> None:
        run = sorted(os.listdir(f"{path}/runs"))[0]
        folder = f"{path}/runs/{run}/checkpoints/weights"
        checkpoint = (
            next(iter(sorted(os.listdir(folder))), "NAME") if os.path.isdir(folder) else "NAME"
        )
        click.echo(_TOUR.format(runs=runs, path=path, run=run, checkpoint=checkpoint))
        click.echo("Ctrl-C ends it.")

    with server, tempfile.TemporaryDirectory(prefix="tinkerfs-demo-") as cache_dir:
        os.environ.update(server.environment)  # the key is the server's own, and of no worth
        # The sample's cache is not the user's, and goes with it.
        base = {"base_url": server.base_url, "cache_dir": cache_dir}
        settings = resolve({**flags, **base})
        mount_process.run_foreground(
            settings, mountpoint, check_key=False, ready=None if foreground else ready
        )
