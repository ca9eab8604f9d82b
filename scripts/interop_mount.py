"""Mount tinkerfs on the real servers of others, and walk, read and change all there is.

    interop_mount.py SCRIPT PYTHON ...      each server's script, and what runs it

The script serves an account of its own and tells what it has; this looks at the account as a user
does, through the kernel, by way of the `tinkerfs` command.
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


def folder_of(tinker_path: str) -> str:
    """Return the folder of a checkpoint below /runs, which its kind and name always resolve to."""
    run_id, kind, name = tinker_path.removeprefix("tinker://").split("/")
    if kind == "checkpoints":  # hatchery's paths have no kind; it takes nearly all for training
        kind = "sampler_weights" if name.startswith("known") else "weights"
    return f"{run_id}/checkpoints/{kind}/{name_encoding.encode(name)}"


class Steps:
    """What is tried on a mount of one server.

    Args:
        root: the mountpoint.
        truth: what the server told of itself.
    """

    def __init__(self, root: Path, truth: dict[str, Any]) -> None:
        self.root, self.truth = root, truth
        self.paths = [p for run in truth["runs"].values() for p in run["checkpoints"]]

    def place(self, tinker_path: str) -> Path:
        """Return the folder of a checkpoint."""
        return self.root / "runs" / folder_of(tinker_path)

    def runs(self) -> None:
        """The server's runs are listed, where it lists them, and all resolve."""
        listed = set(os.listdir(self.root / "runs"))
        assert listed == (set(self.truth["runs"]) if self.truth["lists_runs"] else set())
        for run_id in self.truth["runs"]:
            info = json.loads((self.root / "runs" / run_id / "info.json").read_text())
            assert info["training_run_id"] == run_id
        assert error_of(lambda: os.stat(self.root / "runs" / "no-such-run")) == errno.ENOENT

    def checkpoints(self) -> None:
        """Each run shows its own checkpoints, every one once, and each resolves by its path."""
        for run_id, run in self.truth["runs"].items():
            top = self.root / "runs" / run_id / "checkpoints"
            found = [file.read_text().strip() for file in sorted(top.rglob("tinker_path"))]
            assert sorted(found) == sorted(run["checkpoints"]), (found, run["checkpoints"])
        for path in self.paths:
            assert (self.place(path) / "tinker_path").read_text() == f"{path}\n"

    def walk(self) -> None:
        """Everything that a walk comes to can be read, and is as long as it was told to be."""
        unlisted = [] if self.truth["lists_runs"] else list(self.truth["runs"])
        count = 0
        for start in (self.root, *(self.root / "runs" / run_id for run_id in unlisted)):
            for top, folders, files in os.walk(start, onerror=_raise):
                folders[:] = [name for name in folders if name not in HIDDEN]
                for name in files:
                    path = Path(top, name)
                    if stat.S_ISREG(path.lstat().st_mode):
                        assert path.stat().st_size == len(path.read_bytes()), path
                        count += 1
        assert count > 4 * len(self.paths)

    def views(self) -> None:
        """The views show the same checkpoints; what the server has no listing for is empty."""
        expected = {str(self.place(path).resolve()) for path in self.paths}
        view = self.root / "checkpoints"
        found = {str(link.resolve()) for link in view.iterdir()}
        assert found == (expected if self.truth["lists_runs"] else set())
        models = {str(path.resolve()) for path in (self.root / "models").rglob("model_*")}
        assert len(models) == len(self.truth["runs"]) * self.truth["lists_runs"]
        for name in ("published", "expiring", "sessions", "samplers"):
            assert os.listdir(self.root / name) == []

    def samplers(self) -> None:
        """A sampler resolves by its id, and leads to what it serves."""
        for sampler_id, path in self.truth["samplers"].items():
            sampler = self.root / "samplers" / sampler_id
            assert json.loads((sampler / "info.json").read_text())["sampler_id"] == sampler_id
            if path is not None:
                assert (sampler / "checkpoint" / "tinker_path").read_text().strip() == path
        assert error_of(lambda: os.stat(self.root / "samplers" / "none")) == errno.ENOENT

    def archives(self) -> None:
        """An archive is the server's to the last byte, by its URL and as a file."""
        for path, digest in self.truth["archives"].items():
            place = self.place(path)
            with urllib.request.urlopen((place / "archive_url").read_text().strip()) as answer:
                assert hashlib.sha256(answer.read()).hexdigest() == digest
            with (place / "archive.tar").open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest
            files = {file.name: file.read_bytes() for file in (place / "files").iterdir()}
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
            assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
            assert json.loads((place / "tensors.json").read_text())["tensors"]

    def lacks(self) -> None:
        """What the server has not is ENOTSUP, changes nothing, and is told."""
        path = self.paths[0]
        place = self.place(path)
        for control, value in (("published", "1\n"), ("expires_at", "30d\n")):
            before = (place / control).read_text()
            code = error_of(lambda c=control, v=value: (place / c).write_text(v))  # type: ignore[misc]
            assert code == errno.ENOTSUP, (control, code)
            assert (place / control).read_text() == before
        without = next(p for p in self.paths if p not in self.truth["archives"])
        assert error_of((self.place(without) / "archive_url").read_text) == errno.ENOTSUP
        told = (self.root / ".tinkerfs" / "errors").read_text()
        assert "this server has no such endpoint" in told

    def removal(self) -> None:
        """A checkpoint is deleted where the server can, and stays where it cannot."""
        place = self.place(self.paths[-1])
        code = removal_error_of(place)
        assert code == (None if self.truth["deletes"] else errno.ENOTSUP), code
        assert place.exists() != self.truth["deletes"]
        left = self.paths[: len(self.paths) - self.truth["deletes"]]
        run_id = self.paths[-1].removeprefix("tinker://").partition("/")[0]
        listed = [c["tinker_path"] for c in self.listed(run_id)]
        assert sorted(listed) == sorted(p for p in left if p.startswith(f"tinker://{run_id}/"))

    def refused_deletions(self) -> None:
        """What the server refuses to delete it refuses as the embedded server does."""
        for path, wanted in self.truth["refused_deletions"].items():
            assert self.request("DELETE", path)[0] == wanted, path

    def listed(self, run_id: str) -> list[dict[str, Any]]:
        """Return the checkpoints of a run as the server itself lists them."""
        _status, body = self.request("GET", f"{run_id}/checkpoints")
        found: list[dict[str, Any]] = json.loads(body)["checkpoints"]
        return found

    def request(self, method: str, path: str) -> tuple[int, bytes]:
        """Ask the server itself about a run; return the status and the body."""
        url = f"{self.truth['base_url']}/api/v1/training_runs/{path}"
        request = urllib.request.Request(url, method=method, headers={"X-API-Key": "tml-interop"})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def error_of(act: Callable[[], Any]) -> int | None:
    """Do something; return the errno that it failed with."""
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


def removal_error_of(place: Path) -> int | None:
    """Remove a directory; return the errno that it failed with.

    By a process group of its own: one that read what a copy reads may not remove it.
    """
    command = [sys.executable, "-S", "-E", "-c", _REMOVER, str(place)]
    return subprocess.run(command, start_new_session=True, check=False).returncode or None


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def served(python: str, script: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Run a server's script; yields what it tells of itself."""
    command = [python, script, str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()  # which ends it


@contextmanager
def mounted(base_url: str, folder: Path) -> Iterator[Path]:
    """Mount a server; yields the mountpoint. What is cached stays in the folder."""
    root = folder / "mnt"
    root.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "TINKER_API_KEY": "tml-interop",
        "TINKER_BASE_URL": base_url,
        "TINKERFS_CACHE_DIR": str(folder / "cache"),
        "TINKERFS_ARCHIVE_BURST": "0",
        "TINKERFS_LOG_FILE": str(folder / "log"),
    }
    tinkerfs = [sys.executable, "-m", "tinkerfs"]
    subprocess.run([*tinkerfs, "mount", str(root)], env=environment, check=True)
    try:
        yield root
    finally:
        subprocess.run([*tinkerfs, "umount", str(root)], env=environment, check=True)


def try_server(name: str, script: str, python: str) -> int:
    """Try one server; return how many steps failed."""
    failures = 0
    with tempfile.TemporaryDirectory() as home:
        account = Path(home, "account")
        account.mkdir()
        with served(python, script, account) as truth, mounted(truth["base_url"], Path(home)) as at:
            steps = Steps(at, truth)
            for step in (
                steps.runs,
                steps.checkpoints,
                steps.walk,
                steps.views,
                *([steps.samplers] * bool(truth["samplers"])),
                *([steps.archives] * bool(truth["archives"])),
                steps.lacks,
                steps.removal,
                *([steps.refused_deletions] * bool(truth.get("refused_deletions"))),
            ):
                started = time.monotonic()
                try:
                    step()
                except Exception as error:  # noqa: BLE001 - the others are tried too
                    failures += 1
                    print(f"{name}: FAIL {step.__name__}: {type(error).__name__}: {error}"[:500])
                else:
                    print(f"{name}: ok {step.__name__} in {time.monotonic() - started:.1f} s")
            if failures:
                print((at / ".tinkerfs" / "errors").read_text())
            stats = json.loads((at / ".tinkerfs" / "stats.json").read_text())
            print(f"{name}: calls {json.dumps(stats['calls'])}", flush=True)
    return failures


def main() -> int:
    """Try every server that the command line names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # after which nothing stays mounted
    scripts, pythons = sys.argv[1::2], sys.argv[2::2]
    failures = 0
    for script, python in zip(scripts, pythons, strict=True):
        failures += try_server(Path(script).stem.removeprefix("interop_"), script, python)
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
