"""Real mounts for tests, in a separate process, which are always unmounted.

Run as a program it serves the file system in memory: `python -m tests.support.mount MOUNTPOINT`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tinkerfs.fuse import mount_table

ROOT = Path(__file__).parents[2]
BINDINGS = ("fusepy", "mfusepy2", "mfusepy3")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    assert mount_table.wait_until(condition, timeout_s), "timed out"


def force_unmount(mountpoint: str) -> None:
    while mount_table.find_mount(mountpoint) is not None:
        with contextlib.suppress(OSError):
            mount_table.unmount(mountpoint, lazy=True)


@contextlib.contextmanager
def memory_mount(mountpoint: Path, binding: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Serve the file system in memory until the block ends."""
    log = mountpoint.with_name(f"{mountpoint.name}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.mount", str(mountpoint), *options],
            cwd=ROOT,
            env=os.environ | {"TINKERFS_FUSE_BINDING": binding},
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", log.read_text()
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
        force_unmount(str(mountpoint))


def tinkerfs(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run the command line like a user."""
    command = (sys.executable, "-m", "tinkerfs", *arguments)
    return run(*command, timeout_s=timeout_s, env=dict(os.environ if env is None else env))


def run(
    *command: str | Path, timeout_s: float = 60.0, **kwargs: object
) -> subprocess.CompletedProcess[str]:
    """Run a command in a new session, and return its result."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [str(part) for part in command],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout_s,
        check=False,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


@contextlib.contextmanager
def running(
    commands: Sequence[Sequence[str | Path]],
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start commands that may hang; kill the remaining ones at the end."""
    processes = [
        subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(20)


def interrupt_after(process: subprocess.Popen[bytes], delay_s: float) -> float:
    """Send Ctrl-C after a delay, and return how long the process then took to exit, seconds."""
    time.sleep(delay_s)
    assert process.poll() is None, "the process did not wait"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(20)
    return time.monotonic() - started


def _serve() -> None:
    import argparse
    import logging

    from tests.support.memoryfs import MemoryFileSystem
    from tinkerfs.fuse import binding, session
    from tinkerfs.fuse.passthrough import Passthrough
    from tinkerfs.operation_log import OperationLog, log_operation
    from tinkerfs.telemetry import Telemetry

    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--many", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--backing", default="/dev/null")
    parser.add_argument("--allow-other", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG, format="%(relativeCreated)d %(name)s %(message)s")
    session.block_signals()
    operation_log = OperationLog()
    operation_log.subscribe(log_operation)
    session.serve(
        MemoryFileSystem(arguments.many, backing=arguments.backing),  # type: ignore[arg-type]
        binding.load_binding(),
        arguments.mountpoint,
        Passthrough(Telemetry()),
        operation_log=operation_log,
        timeout_s=arguments.timeout,
        read_only=arguments.read_only,
        allow_other=arguments.allow_other,
        ready=lambda: print("ready", flush=True),
    )


if __name__ == "__main__":
    _serve()
