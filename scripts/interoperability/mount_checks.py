"""Mount the servers of other projects; walk, read and change their accounts.

    mount_checks.py SCRIPT PYTHON ...      the script of each server, and its interpreter

A script serves a generated account and prints the expected data. This program mounts the account
with the command `tinkerfs`, and checks it through the kernel as a user does.
"""

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinkerfs import name_encoding

HIDDEN = {".content", ".tinkerfs"}


def directory_of(tinker_path: str) -> str:
    """Return the path of a checkpoint below /runs, which resolves even if unlisted."""
    run_id, kind, name = tinker_path.removeprefix("tinker://").split("/")
    if kind == "checkpoints":  # hatchery's paths have no kind; most count as training checkpoints
        kind = "sampler_weights" if name.startswith("known") else "weights"
    return f"{run_id}/checkpoints/{kind}/{name_encoding.encode(name)}"


class Steps:
    """The checks of a mount of one server.

    Args:
        root: The mountpoint.
        expected: The data that the script of the server printed.
    """

    def __init__(self, root: Path, expected: dict[str, Any]) -> None:
        self.root, self.expected = root, expected
        self.paths = [p for run in expected["runs"].values() for p in run["checkpoints"]]

    def path_of(self, tinker_path: str) -> Path:
        """Return the directory of a checkpoint."""
        return self.root / "runs" / directory_of(tinker_path)

    def runs(self) -> None:
        """All runs resolve, and are listed if the server supports listing."""
        listed = set(os.listdir(self.root / "runs"))
        assert listed == (set(self.expected["runs"]) if self.expected["lists_runs"] else set())
        for run_id in self.expected["runs"]:
            info = json.loads((self.root / "runs" / run_id / "info.json").read_text())
            assert info["training_run_id"] == run_id
        assert error_of(lambda: os.stat(self.root / "runs" / "no-such-run")) == errno.ENOENT

    def checkpoints(self) -> None:
        """Each run lists exactly its checkpoints, and each resolves by its path."""
        for run_id, run in self.expected["runs"].items():
            top = self.root / "runs" / run_id / "checkpoints"
            found = [file.read_text().strip() for file in sorted(top.rglob("tinker_path"))]
            assert sorted(found) == sorted(run["checkpoints"]), (found, run["checkpoints"])
        for path in self.paths:
            assert (self.path_of(path) / "tinker_path").read_text() == f"{path}\n"

    def walk(self) -> None:
        """Every file in a walk can be read, and has the size that stat() reports."""
        unlisted = [] if self.expected["lists_runs"] else list(self.expected["runs"])
        count = 0
        for start in (self.root, *(self.root / "runs" / run_id for run_id in unlisted)):
            for top, directories, files in os.walk(start, onerror=_raise):
                directories[:] = [name for name in directories if name not in HIDDEN]
                for name in files:
                    path = Path(top, name)
                    if stat.S_ISREG(path.lstat().st_mode):
                        assert path.stat().st_size == len(path.read_bytes()), path
                        count += 1
        assert count > 4 * len(self.paths)

    def views(self) -> None:
        """The views show the same checkpoints; views without a listing are empty."""
        all_paths = {str(self.path_of(path).resolve()) for path in self.paths}
        view = self.root / "checkpoints"
        found = {str(link.resolve()) for link in view.iterdir()}
        assert found == (all_paths if self.expected["lists_runs"] else set())
        models = {str(path.resolve()) for path in (self.root / "models").rglob("model_*")}
        assert len(models) == len(self.expected["runs"]) * self.expected["lists_runs"]
        for name in ("published", "expiring", "sessions", "samplers"):
            assert os.listdir(self.root / name) == []

    def samplers(self) -> None:
        """A sampler resolves by its id, and links to its checkpoint."""
        for sampler_id, path in self.expected["samplers"].items():
            sampler = self.root / "samplers" / sampler_id
            assert json.loads((sampler / "info.json").read_text())["sampler_id"] == sampler_id
            if path is not None:
                assert (sampler / "checkpoint" / "tinker_path").read_text().strip() == path
        assert error_of(lambda: os.stat(self.root / "samplers" / "none")) == errno.ENOENT

    def archives(self) -> None:
        """An archive has the bytes of the server, by its URL and as a file."""
        for path, digest in self.expected["archives"].items():
            checkpoint = self.path_of(path)
            with urllib.request.urlopen(
                (checkpoint / "archive_url").read_text().strip()
            ) as response:
                assert hashlib.sha256(response.read()).hexdigest() == digest
            with (checkpoint / "archive.tar").open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest
            files = {file.name: file.read_bytes() for file in (checkpoint / "files").iterdir()}
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
            assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
            assert json.loads((checkpoint / "tensors.json").read_text())["tensors"]

    def unsupported(self) -> None:
        """An unsupported request fails with ENOTSUP, changes nothing, and is reported."""
        path = self.paths[0]
        checkpoint = self.path_of(path)
        for control, value in (("published", "1\n"), ("expires_at", "30d\n")):
            before = (checkpoint / control).read_text()
            code = error_of(lambda c=control, v=value: (checkpoint / c).write_text(v))  # type: ignore[misc]
            assert code == errno.ENOTSUP, (control, code)
            assert (checkpoint / control).read_text() == before
        without = next(p for p in self.paths if p not in self.expected["archives"])
        assert error_of((self.path_of(without) / "archive_url").read_text) == errno.ENOTSUP
        errors = (self.root / ".tinkerfs" / "errors").read_text()
        assert "this server has no such endpoint" in errors

    def removal(self) -> None:
        """A checkpoint is deleted if the server supports it, and remains otherwise."""
        checkpoint = self.path_of(self.paths[-1])
        code = removal_error_of(checkpoint)
        assert code == (None if self.expected["deletes"] else errno.ENOTSUP), code
        assert checkpoint.exists() != self.expected["deletes"]
        remaining = self.paths[: len(self.paths) - self.expected["deletes"]]
        run_id = self.paths[-1].removeprefix("tinker://").partition("/")[0]
        listed = [c["tinker_path"] for c in self.listed(run_id)]
        assert sorted(listed) == sorted(p for p in remaining if p.startswith(f"tinker://{run_id}/"))

    def refused_deletions(self) -> None:
        """The server rejects the same deletions as the embedded server."""
        for path, wanted in self.expected["refused_deletions"].items():
            assert self.request("DELETE", path)[0] == wanted, path

    def listed(self, run_id: str) -> list[dict[str, Any]]:
        """Request the checkpoints of a run from the server."""
        _status, body = self.request("GET", f"{run_id}/checkpoints")
        found: list[dict[str, Any]] = json.loads(body)["checkpoints"]
        return found

    def request(self, method: str, path: str) -> tuple[int, bytes]:
        """Send a request about a run to the server; return the status and the body."""
        url = f"{self.expected['base_url']}/api/v1/training_runs/{path}"
        request = urllib.request.Request(url, method=method, headers={"X-API-Key": "tml-interop"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def error_of(act: Callable[[], Any]) -> int | None:
    """Call a function; return the errno of its OSError, or None."""
    try:
        act()
    except OSError as error:
        return error.errno
    return None


_REMOVER = """
import shutil, sys
try:
    shutil.rmtree(sys.argv[1])
except OSError as error:
    sys.exit(error.errno)
"""


def removal_error_of(checkpoint: Path) -> int | None:
    """Remove a directory; return the errno of the failure, or None.

    The removal runs in a new process group, because a group that has read all files of a checkpoint
    must not remove it.
    """
    command = [sys.executable, "-S", "-E", "-c", _REMOVER, str(checkpoint)]
    return subprocess.run(command, start_new_session=True, check=False).returncode or None


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def served(python: str, script: str, directory: Path) -> Iterator[dict[str, Any]]:
    """Run the script of a server; yield the data that it prints."""
    command = [python, script, str(directory)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()  # the script exits


@contextmanager
def mounted(base_url: str, directory: Path) -> Iterator[Path]:
    """Mount a server; yield the mountpoint. The cache stays in `directory`."""
    root = directory / "mnt"
    root.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "HOME": str(directory),
        "TINKER_API_KEY": "tml-interop",
        "TINKER_BASE_URL": base_url,
        "TINKERFS_CACHE_DIR": str(directory / "cache"),
        "TINKERFS_ARCHIVE_BURST": "0",
        "TINKERFS_LOG_FILE": str(directory / "log"),
    }
    tinkerfs = [sys.executable, "-m", "tinkerfs"]
    subprocess.run([*tinkerfs, "mount", str(root)], env=environment, check=True)
    try:
        yield root
    finally:
        subprocess.run([*tinkerfs, "umount", str(root)], env=environment, check=True)


def check_server(name: str, script: str, python: str) -> int:
    """Check one server; return the number of failed steps."""
    failures = 0
    with tempfile.TemporaryDirectory() as home:
        account = Path(home, "account")
        account.mkdir()
        with (
            served(python, script, account) as expected,
            mounted(expected["base_url"], Path(home)) as at,
        ):
            steps = Steps(at, expected)
            for step in (
                steps.runs,
                steps.checkpoints,
                steps.walk,
                steps.views,
                *([steps.samplers] * bool(expected["samplers"])),
                *([steps.archives] * bool(expected["archives"])),
                steps.unsupported,
                steps.removal,
                *([steps.refused_deletions] * bool(expected.get("refused_deletions"))),
            ):
                started = time.monotonic()
                try:
                    step()
                except Exception as error:  # noqa: BLE001 - continue with the others
                    failures += 1
                    print(f"{name}: FAIL {step.__name__}: {type(error).__name__}: {error}"[:500])
                else:
                    print(f"{name}: ok {step.__name__} in {time.monotonic() - started:.1f} s")
            if failures:
                print((at / ".tinkerfs" / "errors").read_text())
            stats = json.loads((at / ".tinkerfs" / "stats.json").read_text())
            print(f"{name}: calls {json.dumps(stats['api_requests'])}", flush=True)
    return failures


def main() -> int:
    """Check every server in the arguments."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwind the stack, which unmounts
    scripts, pythons = sys.argv[1::2], sys.argv[2::2]
    failures = 0
    for script, python in zip(scripts, pythons, strict=True):
        failures += check_server(Path(script).stem.removesuffix("_server"), script, python)
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
