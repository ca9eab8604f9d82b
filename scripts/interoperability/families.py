"""Compare converted adapters with those of tinker_cookbook, for every model family.

The interpreter given as an argument runs cookbook.py, which creates for each family a tiny
base model and an adapter in Tinker's names, and converts the adapter with the cookbook. This script
converts the same adapter with `tinkerfs.weights.peft_adapter`, and reads it from `/adapters` of a
mount. All tensors and `adapter_config.json` must be equal, except for the parts of `in_proj_qkv`,
which the cookbook does not join. The factors of a tied output layer must be refused. Where PEFT and
transformers know the family, the loaded adapter must give the logits of a model merged by the
cookbook.

It also uploads an adapter from the mount with `hf upload`.
"""

import errno
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.interoperability.hub import Hub
from scripts.interoperability.mount_checks import mounted
from scripts.interoperability.peft_loaders import KEY, Loaders
from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.content import Content, Data
from tinkerfs.weights.base_models import _KNOWN, BaseModels
from tinkerfs.weights.peft_adapter import ConversionError, convert
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, header_length, parse_tensors

COOKBOOK_SCRIPT = Path(__file__).with_name("cookbook.py")
#: Families that the cookbook refuses to convert.
REFUSED = ("deepseek_v3",)


def converted(source: Path, base: str, models: BaseModels) -> tuple[Path, str]:
    """Convert an adapter into a directory beside it; return the directory and a summary."""
    data = (source / "adapter_model.safetensors").read_bytes()
    length = header_length(data[:LENGTH_BYTES], len(data))
    header = data[LENGTH_BYTES : LENGTH_BYTES + length]
    config = json.loads((source / "adapter_config.json").read_text())
    known = models.get(base)
    assert known is not None, f"{base} is unknown"
    adapter = convert(header, len(data), config, known)
    assert adapter.config is not None

    def read_source(buffer: memoryview, start: int) -> None:
        buffer[:] = data[start : start + len(buffer)]

    result = bytearray(adapter.extents.size_bytes)
    adapter.extents.read_into(memoryview(result), 0, read_source)
    directory = source.with_name(f"{source.name}-converted")
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(result)
    (directory / "adapter_config.json").write_bytes(adapter.config)
    return directory, fates_of(header, len(data), bytes(result))


def refused(source: Path, base: str, models: BaseModels) -> str:
    """Convert an adapter that must be refused; return the message."""
    try:
        converted(source, base, models)
    except ConversionError as error:
        return str(error)
    raise AssertionError("refused only by the cookbook")


def fates_of(header: bytes, size_bytes: int, result: bytes) -> str:
    """Say what became of the tensors of an adapter."""
    length = header_length(result[:LENGTH_BYTES], len(result))
    outputs = parse_tensors("it", result[LENGTH_BYTES : LENGTH_BYTES + length], len(result))
    counts = dict.fromkeys(("kept", "renamed", "split", "repeated", "dropped"), 0)
    for name, tensor in parse_tensors("it", header, size_bytes).items():
        if name in outputs:
            counts["kept"] += 1
        elif tensor.data_offsets[0] == tensor.data_offsets[1]:
            counts["dropped"] += 1
        elif len(tensor.shape) == 3:
            counts["split" if tensor.shape[0] > 1 else "repeated"] += 1
        else:
            counts["renamed"] += 1
    fates = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
    return f"{fates}; {len(outputs)} tensors, a header of {length} bytes"


def check_family(name: str, base: str, loaders: Loaders, home: Path) -> str:
    """Check one family; return a summary.

    Raises:
        AssertionError, ConversionError, RuntimeError: the results differ, or only one is refused.
    """
    models = BaseModels(str(home / "bases"), str(home / "no-cache"))
    refusal = loaders.ask("make", name, home)["refusal"]
    if refusal is not None:
        return f"refused by both: {refused(home / name / 'adapter', base, models)}"
    directory, fates = converted(home / name / "adapter", base, models)
    count = loaders.ask("compare", name, directory)["tensors"]
    fates += f"; {count} equal"
    tied = home / name / "tied"
    if tied.exists():
        message = refused(tied, base, models)
        assert "train_unembed=False" in message, message
        fates += "; refused with the tied output layer"
    loadable = home / name / "loadable"
    if loadable.exists():
        directory, _ = converted(loadable, base, models)
        loaded = loaders.ask("load", name, directory)
        fates += f"; PEFT loads {loaded['tensors']}, logits within {loaded['difference']:.0e}"
    return fates


def check_models(offered: list[str], home: Path) -> str:
    """Check the shipped table against the models of the service; return a summary.

    Raises:
        AssertionError: the table has a model that the service does not offer.
    """
    models = BaseModels(None, str(home / "no-cache"))
    unknown = [name for name in offered if models.get(name) is None]
    surplus = {name for names, _, _ in _KNOWN for name in names} - set(offered)
    assert not surplus, f"the service does not offer {sorted(surplus)}"
    known = len(offered) - len(unknown)
    return f"{known} models known without a directory; unknown: {', '.join(unknown)}"


def serve(server: FaultyServer, base: str, source: Path) -> str:
    """Serve an adapter as the checkpoint of a new run; return its path below a mount."""
    files: dict[str, Content] = {path.name: Data(path.read_bytes()) for path in source.iterdir()}
    run = server.account.add_run(base_model=base)
    server.account.add_checkpoint(run.id, "sampler_weights/final", files=files)
    return f"adapters/{run.id}@sampler_weights@final"


def read_errno(path: Path) -> int | None:
    """Read a file; return the errno, None if it can be read."""
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


def check_view(name: str, paths: dict[str, str], loaders: Loaders, root: Path) -> str:
    """Check an adapter in `/adapters`; return a summary.

    Args:
        paths: the paths below the mount, by directory of the family.
        root: the mountpoint.

    Raises:
        AssertionError, OSError, RuntimeError: the view differs from what the cookbook makes.
    """
    view = root / paths["adapter"]
    if name in REFUSED:
        code = read_errno(view / "adapter_model.safetensors")
        assert code == errno.EOPNOTSUPP, code
        errors = (root / ".tinkerfs/errors").read_text()
        assert "DeepSeek V3" in errors, errors
        return "refused in the mount"
    count = loaders.ask("compare", name, view)["tensors"]
    fates = f"{count} equal in the mount"
    assert view.resolve().is_relative_to(root / "adapters"), view.resolve()
    if "loadable" in paths:
        loaded = loaders.ask("load", name, root / paths["loadable"])
        fates += f"; PEFT loads {loaded['tensors']}, logits within {loaded['difference']:.0e}"
    if "tied" in paths:
        code = read_errno(root / paths["tied"] / "adapter_model.safetensors")
        assert code == errno.EOPNOTSUPP, code
    return fates


def check_all(python: str) -> int:
    """Check all families; return the number of failures.

    Raises:
        ChildProcessError: the packages are missing, or the process has died.
    """
    failures = 0
    with tempfile.TemporaryDirectory() as directory, Loaders(python, COOKBOOK_SCRIPT) as loaders:
        home = Path(directory)
        print("families:", ", ".join(f"{k} {v}" for k, v in loaders.about["versions"].items()))
        for name, base in loaders.about["bases"].items():
            failures += attempt(name, partial(check_family, name, base, loaders, home))
        offered = loaders.about["models"]
        failures += attempt("models", partial(check_models, offered, home))
        os.environ["TINKERFS_BASE_MODELS"] = str(home / "bases")
        with FaultyServer(runs=0, api_key=KEY) as server:
            served = {
                name: {
                    kind: serve(server, base, home / name / kind)
                    for kind in ("adapter", "loadable", "tied")
                    if (home / name / kind).exists()
                }
                for name, base in loaders.about["bases"].items()
            }
            with mounted(server.base_url, home) as root, Hub() as hub:
                for name, paths in served.items():
                    failures += attempt(name, partial(check_view, name, paths, loaders, root))
                hf = str(Path(python).with_name("hf"))
                view = root / served["gpt_oss"]["adapter"]
                failures += attempt("hf upload", partial(hub.upload, hf, view, home))
    return failures


def attempt(name: str, check: Callable[[], str]) -> int:
    """Run a check and print its summary; return 1 if it failed."""
    started = time.monotonic()
    try:
        summary = check()
    except (AssertionError, ConversionError, OSError, RuntimeError) as error:
        print(f"families: FAIL {name}: {error}"[:500])
        return 1
    print(f"families: ok {name}: {summary}, {time.monotonic() - started:.1f} s")
    return 0


def main() -> int:
    """Run all checks; return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        failures = check_all(sys.argv[1])
    except ChildProcessError as error:
        print(f"families: FAIL {error}")
        failures = 1
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
