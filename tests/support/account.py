"""Accounts of a demo server, mounted by a process of their own, and what became of them.

Run as a program it mounts: `python -m tests.support.account MOUNTPOINT SETTINGS-AS-JSON`.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests.support.mount import ROOT, force_unmount

#: Names that a server may send, and a file system must bear.
HOSTILE_NAMES = (
    "a/b",
    "../../etc/passwd",
    "..",
    ".",
    "%2F",
    "%~",
    "100%",
    "%41",
    "nul\0nul",
    "new\nline",
    "tab\t",
    " ",
    "-rf",
    "*",
    "$(touch x)",
    "x" * 255,
    "x" * 256,
    "x" * 300,
    "ü" * 200,
    "\udcff\udcfe",  # the bytes FF FE
    "\ud800",  # stands for no byte
    ".hidden",
    ".git",
    "._resource",
    "info.json",
    "checkpoint\\name",
    "\u202egnp.exe",
)


def checkpoint_ids(server):
    """Every checkpoint that the server has, as `<run>/<kind>/<name>`."""
    return {f"{run.id}/{c.id}" for run in server.account.runs() for c in run.checkpoints}


def deletes(server):
    """How many deletions the server was asked for."""
    return sum(1 for e in server.journal.entries("api") if e.endpoint == "DELETE checkpoint")


def api_calls(server):
    """How many calls of the API there were, by endpoint."""
    calls = {}
    for entry in server.journal.entries("api"):
        calls[entry.endpoint] = calls.get(entry.endpoint, 0) + 1
    return calls


def new_run(server, *names, **fields):
    """Add a run with checkpoints `<kind>/<name>`; return its id."""
    run = server.account.add_run(**fields)
    for name in names:
        server.account.add_checkpoint(run.id, name)
    return run.id


@contextmanager
def mounted(server, folder, binding, **settings):
    """Mount the account of a server; yields the mountpoint.

    Args:
        server: a DemoServer.
        folder: where mountpoint, cache and log are made.
        binding: the FUSE binding.
        settings: fields of Settings.
    """
    folder.mkdir(exist_ok=True)
    mountpoint, cache_dir, log = folder / "mnt", folder / "cache", folder / "log"
    mountpoint.mkdir(exist_ok=True)
    cache_dir.mkdir(mode=0o700, exist_ok=True)
    values = {"base_url": server.base_url, "cache_dir": str(cache_dir), **settings}
    environment = {"TINKERFS_FUSE_BINDING": binding, "HOME": str(folder), **server.environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.account", str(mountpoint), json.dumps(values)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", log.read_text()
        yield mountpoint
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait(10)
            process.stdout.close()
            force_unmount(str(mountpoint))
    assert process.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def _serve(mountpoint, values):
    import logging

    from tinkerfs.adapters import binding, mounting
    from tinkerfs.adapters.compose import compose
    from tinkerfs.settings import Settings

    logging.basicConfig(level=logging.WARNING, format="%(relativeCreated)d %(name)s %(message)s")
    mounting.block_signals()
    settings = Settings(**values)
    with compose(settings) as parts:
        mounting.serve(
            parts.filesystem,
            binding.load(),
            str(Path(mountpoint).resolve()),
            timeout_s=settings.timeout_s,
            read_only=settings.read_only,
            allow_other=settings.allow_other,
            ready=lambda: print("ready", flush=True),
        )


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
