"""Accounts of a demo server, mounted in a separate process, with helpers for assertions.

Run as a program it mounts: `python -m tests.support.account MOUNTPOINT SETTINGS-AS-JSON`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.faulty_server import FaultyServer
from tests.support.mount import BINDINGS, ROOT, force_unmount

#: Difficult names that a server may send.
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
    "\ud800",  # not a surrogate escape of a byte
    ".hidden",
    ".git",
    "._resource",
    "info.json",
    "checkpoint\\name",
    "\u202egnp.exe",
)


def can_be_listed(profile, name):
    """Return whether a server can list a name: a bare id with a slash means a kind and a name."""
    return profile.listed_ids == "kind/name" or "/" not in name


def lists_last_checkpoints(profile):
    """Return whether the runs of a server have their last checkpoints."""
    return "last_checkpoint" not in profile.nulls and "GET training_runs" not in profile.missing


def checkpoint_ids(server):
    """Return every checkpoint of the server as `<run>/<kind>/<name>`."""
    return {f"{run.id}/{c.id}" for run in server.account.runs() for c in run.checkpoints}


def deletes(server):
    """Return the number of delete requests to the server."""
    return sum(1 for e in server.journal.entries("api") if e.endpoint == "DELETE checkpoint")


def api_calls(server):
    """Return the number of API requests by endpoint."""
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
def mounted(server, directory, binding, **settings):
    """Mount the account of a server, and yield the mountpoint.

    Args:
        server: a FaultyServer.
        directory: parent of the mountpoint, the cache and the log.
        binding: the FUSE binding.
        settings: fields of Settings; `lookup_timeout_s` of `session.serve`; `clock_offset_file`, a
            file with the seconds that the mount's clock is ahead; and `constants`, values by
            `<module>.<NAME>`.
    """
    directory.mkdir(exist_ok=True)
    mountpoint, cache_dir, log = directory / "mnt", directory / "cache", directory / "log"
    mountpoint.mkdir(exist_ok=True)
    cache_dir.mkdir(mode=0o700, exist_ok=True)
    values = {"base_url": server.base_url, "cache_dir": str(cache_dir), **settings}
    environment = {"TINKERFS_FUSE_BINDING": binding, "HOME": str(directory), **server.environment}
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


@dataclass
class Account:
    """A mounted account, and a shell in it."""

    server: FaultyServer
    root: Path

    def path(self, path):
        return self.root / path

    def sh(self, script, *, shell=("bash", "-c"), timeout_s=60, cwd=None, **kwargs):
        """Run a script at the root of the mount in a new session, and return its result."""
        return subprocess.run(
            [*shell, script],
            cwd=self.root if cwd is None else cwd,
            env={**os.environ, "LC_ALL": "C", "MNT": str(self.root)},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout_s,
            check=False,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            **kwargs,
        )

    def start(self, *command):
        """Start a command at the root of the mount in a new session."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )

    def python(self, code, **kwargs):
        return self.sh(code, shell=(sys.executable, "-S", "-E", "-c"), **kwargs)

    def refresh(self):
        self.path(".tinkerfs/refresh").write_bytes(b"1")

    def new_run(self, *names, **fields):
        """Add a run with checkpoints `<kind>/<name>`; return its directory relative to the root."""
        run_id = new_run(self.server, *names, **fields)
        self.refresh()
        self.server.journal.clear()
        return f"runs/{run_id}"

    def checkpoint_ids(self, run=None):
        """Return the checkpoints of the server: of a run, by its directory, or all."""
        found = checkpoint_ids(self.server)
        if run is None:
            return found
        prefix = run.partition("/")[2] + "/"
        return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}

    def errors(self):
        return self.path(".tinkerfs/errors").read_text(errors="surrogateescape")

    def changes(self):
        return self.path(".tinkerfs/changes").read_text(errors="surrogateescape")

    def eventually(self, condition, timeout_s=5.0):
        """Wait until a condition is true; return False if it is not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def needs(tools):
    """Skip the test if a tool is not installed; in CI, fail it."""
    for tool in tools:
        if shutil.which(tool) is None:
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f"{tool} is not installed")


def quoted(*paths):
    return " ".join(shlex.quote(str(path)) for path in paths)


#: Marks tests that may depend on the FUSE binding; the others run under one.
every_binding = pytest.mark.parametrize("make_account", BINDINGS, indirect=True, scope="module")


@pytest.fixture(scope="module", params=BINDINGS[-1:])
def make_account(request, tmp_path_factory):
    """A factory of mounted accounts, with settings and server arguments."""
    with ExitStack() as stack:

        def make(settings=None, **options):
            server = stack.enter_context(FaultyServer(**options))
            directory = tmp_path_factory.mktemp(request.param)
            root = stack.enter_context(
                mounted(server, directory, request.param, **(settings or {}))
            )
            return Account(server, root)

        yield make


@pytest.fixture(scope="module")
def account(make_account):
    """An account of 3 runs with 4 checkpoints each."""
    return make_account(runs=3, checkpoints=4)


def _serve(mountpoint, values):
    import importlib
    import logging

    from tinkerfs.app import open_app
    from tinkerfs.clock import SYSTEM_CLOCK, Clock
    from tinkerfs.config import Settings
    from tinkerfs.fuse import binding, session
    from tinkerfs.fuse.passthrough import Passthrough
    from tinkerfs.operating_system import time_with_suspend

    logging.basicConfig(level=logging.WARNING, format="%(relativeCreated)d %(name)s %(message)s")
    session.block_signals()
    bounds = {name: values.pop(name) for name in ("lookup_timeout_s",) if name in values}
    for name, value in values.pop("constants", {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    offset_file, clock = values.pop("clock_offset_file", None), SYSTEM_CLOCK
    if offset_file is not None:
        offset_s = lambda: float(Path(offset_file).read_text())  # noqa: E731
        clock = Clock(
            now=lambda: time.time() + offset_s(),
            with_suspend=lambda: time_with_suspend() + offset_s(),
        )
    settings = Settings(**values)
    with open_app(settings, clock) as parts:
        session.serve(
            parts.filesystem,
            binding.load_binding(),
            str(Path(mountpoint).resolve()),
            Passthrough(parts.telemetry),
            operation_log=parts.telemetry.operations,
            timeout_s=settings.timeout_s,
            **bounds,
            read_only=settings.read_only,
            allow_other=settings.allow_other,
            xattr=settings.xattr,
            ready=lambda: print("ready", flush=True),
        )


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
