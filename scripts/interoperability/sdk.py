"""Run the official client of each given environment against the embedded server.

sdk_client.py tests the library of the client, inside the environment. This script tests its
command line, and checks the state of the server after every command.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.sample_data import Checkpoint, Run

CLIENT = Path(__file__).with_name("sdk_client.py")


def expected_of(server: FaultyServer) -> dict[str, Any]:
    """Return the data that the client must find, from the account of the server."""
    account = server.account
    sessions = {}
    for session_id in account.session_ids():
        session = account.session(session_id)
        assert session is not None
        sessions[session_id] = {
            "run_ids": session.run_ids,
            "samplers": session.samplers,
            "display_name": session.display_name,
        }
    return {
        "runs": [_run(run) for run in account.runs()],
        "foreign": account.foreign_run_ids,
        "sessions": sessions,
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "id": run.id,
        "base_model": run.base_model,
        "owner": run.owner,
        "lora_rank": run.lora_rank,
        "time_s": run.last_request_time_s,
        "user_metadata": run.user_metadata,
        "checkpoints": [_checkpoint(run, checkpoint) for checkpoint in run.checkpoints],
    }


def _checkpoint(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "path": f"tinker://{run.id}/{checkpoint.id}",
        "time_s": checkpoint.time_s,
        "size_bytes": checkpoint.size_bytes,
        "is_public": checkpoint.is_public,
        "expires_at_s": checkpoint.expires_at_s,
    }


class CommandLine:
    """The `tinker` command of one environment, and its server."""

    def __init__(self, venv: Path, server: FaultyServer, home: Path) -> None:
        self.server, self._home = server, home
        self._command = str(venv / "bin" / "tinker")
        run = next(r for r in server.account.runs() if any("ext" in c.kind for c in r.checkpoints))
        self.run = run
        self.environment = environment(server, home)

    def tinker(self, *args: str) -> str:
        """Run a command; return its standard output."""
        done = subprocess.run(
            [self._command, *args],
            env=self.environment,
            cwd=self._home,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        # Version 0.38 rarely aborts at exit, after it has finished and printed everything.
        is_late_abort = done.returncode == -signal.SIGABRT and done.stdout and not done.stderr
        if done.returncode and not is_late_abort:
            msg = f"tinker {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            raise AssertionError(msg)
        return done.stdout

    def path(self, checkpoint_id: str) -> str:
        """Return the tinker path of a checkpoint of the chosen run."""
        return f"tinker://{self.run.id}/{checkpoint_id}"

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        """Return the record of a checkpoint of the chosen run."""
        return self.server.account.checkpoint(self.run.id, checkpoint_id)

    def run_list(self) -> None:
        """`run list` shows every run."""
        listed = json.loads(self.tinker("--format", "json", "run", "list", "--limit", "0"))
        assert [r["training_run_id"] for r in listed["runs"]] == self.server.account.run_ids
        text = self.tinker("run", "list")
        assert self.run.id[:8] in text, text

    def run_info(self) -> None:
        """`run info` shows one run."""
        found = json.loads(self.tinker("--format", "json", "run", "info", self.run.id))
        assert (found["training_run_id"], found["lora_rank"]) == (self.run.id, self.run.lora_rank)

    def checkpoint_list(self) -> None:
        """`checkpoint list` shows the checkpoints of all runs, and of one run."""
        args = ("--format", "json", "checkpoint", "list")
        all_records = json.loads(self.tinker(*args, "--limit", "0"))["checkpoints"]
        expected = [f"tinker://{r.id}/{c.id}" for r, c in self.server.account.checkpoints()]
        assert [c["tinker_path"] for c in all_records] == expected
        run_records = json.loads(self.tinker(*args, "--run-id", self.run.id))["checkpoints"]
        ids = [c.id for c in self.run.checkpoints]
        assert sorted(c["checkpoint_id"] for c in run_records) == sorted(ids)

    def checkpoint_info(self) -> None:
        """`checkpoint info` shows one checkpoint."""
        args = ("--format", "json", "checkpoint", "info", self.path("weights/0001"))
        record, found = self.checkpoint("weights/0001"), json.loads(self.tinker(*args))
        assert record is not None
        assert found["size_bytes"] == record.size_bytes, found

    def publish_and_unpublish(self) -> None:
        """`checkpoint publish` and `unpublish` reach the server."""
        record = self.checkpoint("sampler_weights/0001")
        assert record is not None
        record.is_public = False
        self.tinker("checkpoint", "publish", self.path("sampler_weights/0001"))
        assert record.is_public
        self.tinker("checkpoint", "unpublish", self.path("sampler_weights/0001"))
        assert not record.is_public

    def set_ttl(self) -> None:
        """`checkpoint set-ttl` sets an expiry, and removes it."""
        record = self.checkpoint("weights/0001")
        assert record is not None
        self.tinker("checkpoint", "set-ttl", self.path("weights/0001"), "--ttl", "7200")
        assert abs((record.expires_at_s or 0) - time.time() - 7200) < 60
        self.tinker("checkpoint", "set-ttl", self.path("weights/0001"), "--remove")
        assert record.expires_at_s is None

    def download_external(self) -> None:
        """`checkpoint download` of external weights downloads identical files."""
        self.tinker("checkpoint", "download", self.path("external_weights/export"), "-o", "ext")
        directory = self._home / "ext" / f"{self.run.id}_external_weights_export"
        if not directory.exists():
            (directory,) = (self._home / "ext").iterdir()
        self.compare(directory, "external_weights/export")

    def download_archive(self) -> None:
        """`checkpoint download` of a training checkpoint unpacks its archive."""
        self.tinker("checkpoint", "download", self.path("weights/0001"), "-o", "tar")
        (directory,) = (self._home / "tar").iterdir()
        self.compare(directory, "weights/0001")

    def delete(self) -> None:
        """`checkpoint delete` deletes only the named checkpoint."""
        self.tinker("checkpoint", "delete", "-y", self.path("weights/0001"))
        assert self.checkpoint("weights/0001") is None
        assert self.checkpoint("sampler_weights/0001") is not None

    def compare(self, directory: Path, checkpoint_id: str) -> None:
        """Compare the files below a directory with those of a checkpoint."""
        record = self.checkpoint(checkpoint_id)
        assert record is not None
        files = self.server.files(self.run.id, checkpoint_id)
        found = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
        assert sorted(found) == sorted(files)
        for name, content in files.items():
            expected = hashlib.sha256(content.read(0, content.size_bytes)).hexdigest()
            assert hashlib.sha256(found[name].read_bytes()).hexdigest() == expected, name


def environment(server: FaultyServer, home: Path) -> dict[str, str]:
    """Return environment variables for this server, without settings of the user."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER", "PYTHON"))}
    proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    for name in proxies:
        inherited.pop(name, None)
    return inherited | server.environment | {"HOME": str(home)}


def check_library(venv: Path, home: Path, *, requires_token: bool = False) -> list[str]:
    """Run sdk_client.py inside an environment; return one line per step.

    Args:
        requires_token: Whether the server accepts the key only in exchange for a token.
    """
    with FaultyServer(
        runs=45, checkpoints=6, prefix="/services/tinker-prod", requires_token=requires_token
    ) as server:
        command = ["timeout", "100", str(venv / "bin" / "python"), str(CLIENT)]
        done = subprocess.run(
            command,
            input=json.dumps(expected_of(server)),
            env=environment(server, home),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        if done.returncode:
            lines.append(f"FAIL library: exit {done.returncode}")
        if not lines:
            lines.append("FAIL library: no step ran")
        if any(entry.had_key for entry in server.journal.entries("store")):
            lines.append("FAIL the key was sent to the store")
        if requires_token:
            lines = [f"{line}, with tokens" for line in lines]
            if not server.journal.count("POST auth/token"):
                lines.append("FAIL the client did not exchange its key")
        unknown = {e.path for e in server.journal.entries("?")}
        lines += [f"FAIL the server does not know {path}" for path in sorted(unknown)]
    return lines


def check_command_line(venv: Path, home: Path, *, has_archives: bool) -> list[str]:
    """Run the commands of an environment; return one line per step."""
    with FaultyServer(runs=25, checkpoints=6) as server:
        command = CommandLine(venv, server, home)
        steps: list[Callable[[], None]] = [
            command.run_list,
            command.run_info,
            command.checkpoint_list,
            command.checkpoint_info,
            command.publish_and_unpublish,
            command.set_ttl,
            command.download_archive if has_archives else command.download_external,
            command.delete,
        ]
        return [_run_step(step) for step in steps]


def _run_step(step: Callable[[], None]) -> str:
    try:
        step()
    except Exception as error:  # noqa: BLE001 - run the other steps too, and print a summary
        return f"FAIL command {step.__name__}: {type(error).__name__}: {error}"
    return f"ok command {step.__name__}"


def main() -> int:
    """Test every environment in the arguments."""
    failures = 0
    for venv in (Path(name).resolve() for name in sys.argv[1:]):
        script = "import importlib.metadata as m; print(m.version('tinker'))"
        python = str(venv / "bin" / "python")
        version = subprocess.check_output([python, "-c", script], text=True).strip()
        has_archives = tuple(map(int, version.split(".")[:2])) < (0, 36)
        with tempfile.TemporaryDirectory() as home:
            lines = check_library(venv, Path(home))
            lines += check_library(venv, Path(home), requires_token=True)
            lines += check_command_line(venv, Path(home), has_archives=has_archives)
        failed = [line for line in lines if line.startswith("FAIL")]
        for line in lines:
            print(f"tinker {version}: {line}")
        print(f"tinker {version}: {len(lines) - len(failed)} of {len(lines)} passed", flush=True)
        failures += len(failed)
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
