"""Load adapters through a mount with PEFT, transformers and safetensors; count what it costs.

    interop_loaders.py PYTHON       what runs interop_adapter.py, which has these packages

That makes adapters of tiny models, the embedded server serves them as archives, and that loads
them by their paths below the mount and compares them to what was saved.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from interop_mount import mounted

from tinkerfs.demo.content import Content, Data
from tinkerfs.demo.server import DemoServer

LOADS = Path(__file__).with_name("interop_adapter.py")
KIND, NAME = "sampler_weights", "final"
KEY = "tml-interop"  # which interop_mount mounts with
#: What a first load may fetch over the sizes of the files.
MOST = 1.1
#: What is loaded from where, where nothing is kept yet; where another mount has left it.
FIRST = (
    ("peft", "runs"),
    ("peft", "adapters"),
    ("transformers", "adapters"),
    ("load_file", "runs"),
    ("safe_open", "adapters"),
    ("merge", "runs"),
)
SECOND = (("peft", "runs"), ("transformers", "adapters"))


class Loaders:
    """The process that has the packages, asked a line at a time."""

    def __init__(self, python: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        # A name that is taken for one of the hub's fails at once.
        environment = kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [python, "-W", "ignore::FutureWarning", str(LOADS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        self.about = self._answer()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()  # whatever it does: it has nothing to save, and nothing waits for it
        self._process.communicate()

    def ask(self, step: str, model: str, path: Path) -> Any:
        """Have a step done; return what it tells.

        Raises:
            ChildProcessError: The process is there no more.
            RuntimeError: The step failed, for this reason.
        """
        assert self._process.stdin is not None
        request = {"step": step, "model": model, "path": str(path)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{LOADS.name} ended, exit {self._process.wait(10)}")
        return json.loads(line)


class Adapter:
    """An adapter that is made, and served as a checkpoint of a run of its own.

    Args:
        model: the name of its base.
        loaders: what makes and loads it.
        server: what serves it.
        folder: where it is made.
    """

    def __init__(self, model: str, loaders: Loaders, server: DemoServer, folder: Path) -> None:
        self._model, self._loaders, self._server = model, loaders, server
        loaders.ask("make", model, folder)
        files: dict[str, Content] = {
            name: Data((folder / "adapter" / name).read_bytes())
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        files["checkpoint_complete"] = Data(b"")
        self._size_bytes = sum(content.size_bytes for content in files.values())
        run = server.account.add_run(base_model=f"tiny/{model}")
        server.account.add_checkpoint(
            run.id, f"{KIND}/{NAME}", files=files, size_bytes=self._size_bytes
        )
        self._places = {
            "runs": f"runs/{run.id}/checkpoints/{KIND}/{NAME}/files",
            "adapters": f"adapters/{run.id}@{KIND}@{NAME}",
        }

    def load(self, root: Path, step: str, below: str, *, is_kept: bool) -> str:
        """Load it below a mount; return what came of it and what it cost."""
        journal = self._server.journal
        journal.wait_until_idle()
        journal.clear()
        told = self._loaders.ask(step, self._model, root / self._places[below])
        journal.wait_until_idle()
        archives, store = journal.count("GET archive"), journal.entries("store")
        fetched = sum(entry.sent_bytes for entry in store)
        cost = (
            f"tensors equal: {told['tensors']}; API calls: {journal.count('api')},"
            f" for an archive: {archives}; bytes fetched: {fetched} of {self._size_bytes},"
            f" requests: {len(store)}"
        )
        if is_kept:
            assert (archives, len(store)) == (0, 0), f"fetched again: {cost}"
        else:
            assert archives == 1, f"not one call for the archive: {cost}"
            assert fetched <= MOST * self._size_bytes, f"fetched too much: {cost}"
        return cost


def try_loads(adapters: dict[str, Adapter], root: Path, *, is_first: bool) -> int:
    """Load every adapter below a mount; return how many loads failed."""
    failures = 0
    for model, adapter in adapters.items():
        for number, (step, below) in enumerate(FIRST if is_first else SECOND):
            what = f"{model}, {step} below /{below}" + ("" if is_first else ", mounted anew")
            started = time.monotonic()
            try:
                cost = adapter.load(root, step, below, is_kept=not is_first or number > 0)
            except (AssertionError, RuntimeError) as error:  # the others are tried too
                failures += 1
                print(f"loaders: FAIL {what}: {error}"[:500])
            else:
                print(f"loaders: ok {what}: {cost}, {time.monotonic() - started:.1f} s")
    if failures:
        print((root / ".tinkerfs" / "errors").read_text())
    return failures


def try_all(python: str) -> int:
    """Load every adapter below two mounts, one after the other, of one cache.

    Returns:
        How many loads failed.

    Raises:
        ChildProcessError: The packages are not there, or what uses them died.
        RuntimeError: An adapter cannot be made.
    """
    failures = 0
    with (
        tempfile.TemporaryDirectory() as home,
        DemoServer(runs=0, api_key=KEY) as server,
        Loaders(python) as loaders,
    ):
        print("loaders:", ", ".join(f"{k} {v}" for k, v in loaders.about["versions"].items()))
        adapters = {
            model: Adapter(model, loaders, server, Path(home, model))
            for model in loaders.about["models"]
        }
        for is_first in (True, False):
            with mounted(server.base_url, Path(home)) as root:
                failures += try_loads(adapters, root, is_first=is_first)
    return failures


def main() -> int:
    """Try what there is."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # after which nothing stays mounted
    try:
        failures = try_all(sys.argv[1])
    except (ChildProcessError, RuntimeError) as error:
        print(f"loaders: FAIL {error}")
        failures = 1
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
