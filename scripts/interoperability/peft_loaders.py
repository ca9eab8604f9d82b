"""Load adapters through a mount with PEFT, transformers and safetensors.

    peft_loaders.py PYTHON       the interpreter for peft_adapter.py, with these packages

peft_adapter.py creates adapters of tiny models, and the embedded server serves them as archives.
Then peft_adapter.py loads them from the mount, and compares them with the saved adapters.
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

from scripts.interoperability.mount_checks import mounted
from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.content import Content, Data

ADAPTER_SCRIPT = Path(__file__).with_name("peft_adapter.py")
KIND, NAME = "sampler_weights", "final"
KEY = "tml-interop"  # the key of the mounts of mount_checks
#: Maximum ratio of downloaded bytes to file sizes in a first load.
MAX_OVERHEAD = 1.1
#: (loader, view) pairs for an empty cache, and for the cache of an earlier mount.
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
    """A script in the environment of the loaders; exchanges lines of JSON.

    Args:
        python: Interpreter of the environment.
        script: The script.
    """

    def __init__(self, python: str, script: Path) -> None:
        self._script = script
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        # Offline, so that a path mistaken for a name on the hub fails at once.
        environment = inherited | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [python, "-W", "ignore::FutureWarning", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        self.about = self._read_reply()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()  # it has no state to save
        self._process.communicate()

    def ask(self, step: str, model: str, path: Path, **more: object) -> Any:
        """Send a request for a step; return the reply.

        Args:
            more: other fields of the request.

        Raises:
            ChildProcessError: The process has exited.
            RuntimeError: The step failed; the message is that of the process.
        """
        assert self._process.stdin is not None
        request = {"step": step, "model": model, "path": str(path), **more}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._read_reply()
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def _read_reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(
                f"{self._script.name} exited with status {self._process.wait(10)}"
            )
        return json.loads(line)


class Adapter:
    """A generated adapter, served as the checkpoint of a new run.

    Args:
        model: Name of the base model.
        loaders: The process that creates and loads the adapter.
        server: The server of the adapter.
        directory: Directory in which the adapter is saved.
    """

    def __init__(self, model: str, loaders: Loaders, server: FaultyServer, directory: Path) -> None:
        self._model, self._loaders, self._server = model, loaders, server
        loaders.ask("make", model, directory)
        files: dict[str, Content] = {
            name: Data((directory / "adapter" / name).read_bytes())
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        files["checkpoint_complete"] = Data(b"")
        self._size_bytes = sum(content.size_bytes for content in files.values())
        run = server.account.add_run(base_model=f"{model}/base")
        server.account.add_checkpoint(
            run.id, f"{KIND}/{NAME}", files=files, size_bytes=self._size_bytes
        )
        self._paths = {
            "runs": f"runs/{run.id}/checkpoints/{KIND}/{NAME}/files",
            "adapters": f"adapters/{run.id}@{KIND}@{NAME}",
        }

    def load(self, root: Path, step: str, below: str, *, is_cached: bool) -> str:
        """Load the adapter below a mount; return a summary of the requests."""
        journal = self._server.journal
        journal.wait_until_idle()
        journal.clear()
        reply = self._loaders.ask(step, self._model, root / self._paths[below])
        journal.wait_until_idle()
        archives, store = journal.count("GET archive"), journal.entries("store")
        fetched = sum(entry.sent_bytes for entry in store)
        cost = (
            f"tensors equal: {reply['tensors']}; API calls: {journal.count('api')},"
            f" for an archive: {archives}; bytes fetched: {fetched} of {self._size_bytes},"
            f" requests: {len(store)}"
        )
        if is_cached:
            assert (archives, len(store)) == (0, 0), f"downloaded again: {cost}"
        else:
            assert archives == 1, f"not exactly one request for the archive: {cost}"
            assert fetched <= MAX_OVERHEAD * self._size_bytes, f"downloaded too much: {cost}"
        return cost


def check_loads(adapters: dict[str, Adapter], root: Path, *, is_first: bool) -> int:
    """Load every adapter below a mount; return the number of failed loads."""
    failures = 0
    for model, adapter in adapters.items():
        for number, (step, below) in enumerate(FIRST if is_first else SECOND):
            what = f"{model}, {step} below /{below}" + ("" if is_first else ", mounted again")
            started = time.monotonic()
            try:
                cost = adapter.load(root, step, below, is_cached=not is_first or number > 0)
            except (AssertionError, RuntimeError) as error:  # continue with the others
                failures += 1
                print(f"loaders: FAIL {what}: {error}"[:500])
            else:
                print(f"loaders: ok {what}: {cost}, {time.monotonic() - started:.1f} s")
    if failures:
        print((root / ".tinkerfs" / "errors").read_text())
    return failures


def check_all(python: str) -> int:
    """Load every adapter from two successive mounts with one cache.

    Returns:
        The number of failed loads.

    Raises:
        ChildProcessError: The packages are missing, or the process has died.
        RuntimeError: An adapter cannot be created.
    """
    failures = 0
    with (
        tempfile.TemporaryDirectory() as home,
        FaultyServer(runs=0, api_key=KEY) as server,
        Loaders(python, ADAPTER_SCRIPT) as loaders,
    ):
        print("loaders:", ", ".join(f"{k} {v}" for k, v in loaders.about["versions"].items()))
        os.environ["TINKERFS_BASE_MODELS"] = home
        adapters = {
            model: Adapter(model, loaders, server, Path(home, model))
            for model in loaders.about["models"]
        }
        for is_first in (True, False):
            with mounted(server.base_url, Path(home)) as root:
                failures += check_loads(adapters, root, is_first=is_first)
    return failures


def main() -> int:
    """Run all checks; return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwind the stack, which unmounts
    try:
        failures = check_all(sys.argv[1])
    except (ChildProcessError, RuntimeError) as error:
        print(f"loaders: FAIL {error}")
        failures = 1
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
