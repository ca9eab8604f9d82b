"""Export a training checkpoint with the official client, tinker_cookbook and tinkerfs.

    exports.py VENV PYTHON       the official client, and an interpreter that has tinker_cookbook

The embedded server has no archives here. Every program must write the files of the checkpoint, end
its session with success, and leave no export on the server.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyrage

from scripts.interoperability.sdk import CommandLine, environment
from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.exports import ExportOptions

CHECKPOINT = "weights/0001"
#: Long enough for a client to poll each future more than once.
STEP_S = 0.5
TIMEOUT_S = 60
COOKBOOK = """
import sys
from tinker_cookbook import weights
weights.download(tinker_path=sys.argv[1], output_dir=sys.argv[2])
"""


class Programs:
    """The programs that export, and their server.

    Args:
        venv: Environment of the official client.
        cookbook: Interpreter of an environment that has tinker_cookbook.
        server: A server without archives.
        home: Directory for the results and for the home directories.
    """

    def __init__(self, venv: Path, cookbook: str, server: FaultyServer, home: Path) -> None:
        self._server, self._home, self._cookbook = server, home, cookbook
        self._recipients: list[list[str]] = []
        self._client = CommandLine(venv, server, home)
        self._path = self._client.path(CHECKPOINT)
        server.behaviour.exports.encrypt = self._encrypt

    def official(self) -> None:
        """`tinker checkpoint download` writes the files."""
        with self._exports(1):
            self._download_officially("official")
        assert not self._recipients

    def cookbook(self) -> None:
        """`weights.download` of the cookbook decrypts the files with its own key."""
        with self._exports(1):
            result = self._home / "cookbook"
            self._run(self._cookbook, "-c", COOKBOOK, self._path, result, home="cookbook-home")
        self._check_encryption()
        self._client.compare(self._home / "cookbook", CHECKPOINT)

    def tinkerfs_beside_official(self) -> None:
        """`tinkerfs get --export` writes the files while the official client exports them too."""
        with self._exports(2), ThreadPoolExecutor() as executor:
            futures = [
                executor.submit(self._download_officially, "beside"),
                executor.submit(self._get, "plain", "--export"),
            ]
            for future in futures:
                future.result()
        assert not self._recipients

    def tinkerfs_encrypted(self) -> None:
        """`tinkerfs get --export` decrypts the files with the key of the user."""
        identity = pyrage.x25519.Identity.generate()
        key = self._home / "key.txt"
        key.write_text(f"{identity}\n")
        recipient = str(identity.to_public())
        with self._exports(1):
            flags = ("--export", "--age-recipient", recipient, "--age-identity", key)
            self._get("encrypted", *flags)
        assert self._recipients[0] == [recipient]
        self._check_encryption()

    def _download_officially(self, name: str) -> None:
        self._client.tinker("checkpoint", "download", self._path, "-o", name)
        (directory,) = (self._home / name).iterdir()
        self._client.compare(directory, CHECKPOINT)

    def _get(self, name: str, *flags: str | Path) -> None:
        # Each result has its own cache, so that nothing is read from an earlier one.
        command = (sys.executable, "-m", "tinkerfs", "get", *flags)
        self._run(*command, self._path, self._home / name, home=f"{name}-home")
        (self._home / name / ".tinkerfs-get").unlink()  # the record of what was copied
        self._client.compare(self._home / name, CHECKPOINT)

    def _run(self, *command: str | Path, home: str) -> None:
        directory = self._home / home
        directory.mkdir()
        done = subprocess.run(
            command,
            env=environment(self._server, directory) | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{command[0]}: exit {done.returncode}\n{done.stdout}")

    def _encrypt(self, data: bytes, recipients: Sequence[str]) -> bytes:
        self._recipients.append(list(recipients))
        keys = [pyrage.x25519.Recipient.from_str(each) for each in recipients]
        encrypted: bytes = pyrage.encrypt(data, keys)
        return encrypted

    def _check_encryption(self) -> None:
        """Check that every file was encrypted for one and the same recipient."""
        calls, self._recipients = self._recipients, []
        names = self._server.files(self._client.run.id, CHECKPOINT)
        assert len(calls) == len(names), calls
        assert len(calls[0]) == 1, calls
        assert all(recipients == calls[0] for recipients in calls), calls

    @contextmanager
    def _exports(self, count: int) -> Iterator[None]:
        """Check what some exports send and leave behind."""
        account, journal = self._server.account, self._server.journal
        before, known = self._checkpoints(), set(account.session_ids())
        journal.clear()
        yield
        assert journal.count("POST save_weights_external") == count
        assert journal.count("POST retrieve_future") > 2 * count
        unknown = {entry.path for entry in journal.entries("?")}
        assert not unknown, f"the server does not know {sorted(unknown)}"
        assert not any(entry.had_key for entry in journal.entries("store"))
        sessions = [account.session(each) for each in account.session_ids() if each not in known]
        reasons = [((each and each.status) or {}).get("reason") for each in sessions]
        assert reasons == [{"type": "success"}] * count, reasons
        # The run of an exporting session stays, without checkpoints.
        assert self._checkpoints() == before, "the checkpoints differ from those before"

    def _checkpoints(self) -> list[tuple[str, str, float | None]]:
        """Return every checkpoint of the account, with its expiry."""
        found = self._server.account.checkpoints()
        return [(run.id, each.id, each.expires_at_s) for run, each in found]


def main() -> int:
    """Run every program; return 1 if one failed."""
    venv, cookbook = Path(sys.argv[1]).resolve(), os.path.abspath(sys.argv[2])
    options = ExportOptions(load_s=STEP_S, save_s=STEP_S)
    failures = 0
    with (
        FaultyServer(runs=3, checkpoints=6, profile="official-0.36", exports=options) as server,
        tempfile.TemporaryDirectory() as home,
    ):
        programs = Programs(venv, cookbook, server, Path(home))
        steps: list[Callable[[], None]] = [
            programs.official,
            programs.cookbook,
            programs.tinkerfs_beside_official,
            programs.tinkerfs_encrypted,
        ]
        for step in steps:
            start_s = time.monotonic()
            try:
                step()
            except Exception as error:  # noqa: BLE001 - run the other steps too
                failures += 1
                print(f"exports: FAIL {step.__name__}: {type(error).__name__}: {error}", flush=True)
            else:
                duration_s = time.monotonic() - start_s
                print(f"exports: ok {step.__name__} ({duration_s:.1f} s)", flush=True)
    print("exports: all passed" if not failures else f"exports: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
