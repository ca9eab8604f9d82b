"""Load the adapters of a mount with vLLM's own modules, in both layouts of experts.

    python -m scripts.interoperability.vllm_engine PYTHON

PYTHON is the interpreter of the loaders. cookbook.py creates a tiny adapter for each model family,
and vllm_adapter.py loads it from two mounts, one for each `--moe-layout`. No GPU and no model are
needed, because only the code is run that reads an adapter and fills the buffers of its layers.
"""

import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from scripts.interoperability.families import COOKBOOK_SCRIPT, attempt, serve
from scripts.interoperability.mount_checks import mounted
from scripts.interoperability.peft_loaders import KEY, Loaders
from tests.support.faulty_server import FaultyServer

VLLM_SCRIPT = Path(__file__).with_name("vllm_adapter.py")
EXPERTS = 4

#: Modules that vLLM refuses, by family.
REFUSED = {"gpt_oss": ["lm_head"], "kimi_k2": ["lm_head"]}


def check(
    name: str, base: Path, view: str, home: Path, roots: dict[str, Path], vllm: Loaders
) -> str:
    """Check one family; return a summary.

    Args:
        base: directory of the base model.
        view: path of the adapter below a mount.
        home: directory of the adapters that the cookbook has created.
        roots: the mountpoints by layout.

    Raises:
        AssertionError, RuntimeError: vLLM refuses an adapter, or loads it wrongly.
    """
    has_experts = any(part in name for part in ("moe", "gpt_oss", "kimi", "nemotron"))
    more = {"base": str(base), "count": EXPERTS if has_experts else 0}
    refused = REFUSED.get(name, [])
    for layout, root in roots.items():
        found = vllm.ask("names", name, root / view, is_packed=layout == "packed", **more)
        assert found["refused"] == refused, (layout, found)
    summary = "refuses lm_head" if refused else f"{found['modules']} modules"
    if has_experts:
        for layout, root in roots.items():
            other = vllm.ask("names", name, root / view, is_packed=layout == "peft", **more)
            assert any(each not in refused for each in other["refused"]), (layout, other)
        packed, peft = roots["packed"] / view, roots["peft"] / view
        found = vllm.ask("experts", name, packed, peft=str(peft), **more)
        assert found["difference"] == 0, found
        summary += f"; experts of {found['layers']} layers equal in both layouts"
    if name.startswith("qwen3_5"):
        stored = str(home / name / "adapter")
        found = vllm.ask("linear_attention", name, roots["peft"] / view, stored=stored, **more)
        assert found["difference"] < 1e-6, found
        summary += f"; in_proj_qkvz of {found['layers']} layers within {found['difference']:.0e}"
        split = vllm.ask("names", name, home / name / "peft", is_packed=False, **more)
        assert split["refused"] == ["in_proj_k", "in_proj_q", "in_proj_v"], split
    return summary


def check_all(python: str) -> int:
    """Check all families; return the number of failures.

    Raises:
        ChildProcessError: the packages are missing, or the process has died.
    """
    failures = 0
    with (
        tempfile.TemporaryDirectory() as directory,
        Loaders(python, COOKBOOK_SCRIPT) as cookbook,
        Loaders(python, VLLM_SCRIPT) as vllm,
        FaultyServer(runs=0, api_key=KEY) as server,
    ):
        home = Path(directory)
        print(f"vllm: vllm {vllm.about['version']}")
        views = {}
        for name in vllm.about["families"]:
            base = cookbook.about["bases"][name]
            cookbook.ask("make", name, home)
            views[name] = (home / "bases" / base, serve(server, base, home / name / "adapter"))
        os.environ["TINKERFS_BASE_MODELS"] = str(home / "bases")
        homes = {layout: home / f"mount-{layout}" for layout in ("peft", "packed")}
        for each in homes.values():
            each.mkdir()
        os.environ["TINKERFS_MOE_LAYOUT"] = "peft"
        with mounted(server.base_url, homes["peft"]) as peft:
            os.environ["TINKERFS_MOE_LAYOUT"] = "packed"
            with mounted(server.base_url, homes["packed"]) as packed:
                roots = {"peft": peft, "packed": packed}
                for name, (base, view) in views.items():
                    work = partial(check, name, base, view, home, roots, vllm)
                    failures += attempt(f"vllm {name}", work)
    return failures


def main() -> int:
    """Run all checks; return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        failures = check_all(sys.argv[1])
    except ChildProcessError as error:
        print(f"vllm: FAIL {error}")
        failures = 1
    print("interop: all passed" if not failures else f"interop: {failures} FAILED")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
