"""The first open by name of a file whose archive is not built yet: it waits for it."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.account import make_account, quoted
from tests.support.mount import interrupt_after

__all__ = ["make_account"]

#: Who waits is the same under each binding.
pytestmark = pytest.mark.parametrize("make_account", ["mfusepy3"], indirect=True, scope="module")

#: Much less than the archive takes, and than what is "at once" here.
LOOKUP_TIMEOUT_S = 0.2
AT_ONCE_S = 2.0

#: As PEFT's `PeftConfig._get_peft_type` and `load_peft_weights` look for an adapter; else the hub.
PEFT = """
import json, os, sys
from safetensors import safe_open
path = sys.argv[1]
if not os.path.isfile(os.path.join(path, "adapter_config.json")):
    sys.exit("asks the hub for adapter_config.json")
config = json.load(open(os.path.join(path, "adapter_config.json")))
file = os.path.join(path, "adapter_model.safetensors")
if not os.path.exists(file):
    sys.exit("asks the hub for adapter_model.safetensors")
with safe_open(file, framework="np") as weights:
    print(config["peft_type"], len(list(weights.keys())) > 0)
"""

PROGRAMS = {
    "os.path.exists": (
        "import os, sys; print(os.path.exists(f'{sys.argv[1]}/adapter_config.json'))",
        "True",
    ),
    "os.path.exists of nothing": (
        "import os, sys; print(os.path.exists(f'{sys.argv[1]}/adapter_model.bin'))",
        "False",
    ),
    "safetensors": (
        "import sys; from safetensors import safe_open\n"
        "with safe_open(f'{sys.argv[1]}/adapter_model.safetensors', framework='np') as weights:\n"
        "    print(len(list(weights.keys())) > 0)",
        "True",
    ),
    "PEFT": (PEFT, "LORA True"),
}


@pytest.fixture(scope="module")
def account(make_account):
    return make_account(
        runs=1, checkpoints=1, settings={"lookup_timeout_s": LOOKUP_TIMEOUT_S, "archive_burst": 0}
    )


@pytest.fixture
def late(account):
    """A checkpoint's `files/` and the same in /adapters, whose archive is built once it is let."""
    run = account.new_run("sampler_weights/late", "sampler_weights/other")
    rule = account.server.faults.add("GET archive", times=None, hang=True)
    yield run, rule
    account.server.faults.clear()


def places(account, run):
    return {
        "files": account.path(f"{run}/checkpoints/sampler_weights/late/files"),
        "adapters": account.path(f"adapters/{run[5:]}@sampler_weights@late"),
    }


def started(program, place):
    return subprocess.Popen(
        [sys.executable, "-c", program, place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def waits(process):
    """Return whether a process is there for longer than a lookup elsewhere may wait."""
    try:
        process.wait(5 * LOOKUP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "adapters") for name in PROGRAMS), ("os.path.exists", "files")],
)
def test_first_open_by_name_waits_for_the_archive(account, late, name, place):
    run, rule = late
    program, expected = PROGRAMS[name]
    with started(program, places(account, run)[place]) as process:
        rule.wait_for(1)
        assert waits(process), process.communicate()
        account.server.faults.clear()
        printed, told = process.communicate(timeout=20)
    assert (printed, told) == (f"{expected}\n", "")
    assert account.server.journal.count("GET archive") == 1


def test_waiting_lookups_hold_up_nothing_else(account, late):
    run, rule = late
    exists, _ = PROGRAMS["os.path.exists"]
    missing, _ = PROGRAMS["os.path.exists of nothing"]
    place = places(account, run)["files"]
    programs = [exists, exists, missing]
    processes = [started(program, place) for program in programs]
    try:
        rule.wait_for(1)
        assert all(map(waits, processes))
        began = time.monotonic()
        done = account.sh(
            f"ls -lR {run} && ls -ld {quoted(place)}/ {quoted(place.parent)}/other/files/ "
            f"&& cat {run}/checkpoints/*/*/tinker_path && ls {run[:5]}nothing"
        )
        took_s = time.monotonic() - began
        assert done.returncode == 2, done.stderr
        assert "No such file" in done.stderr
        assert took_s < AT_ONCE_S
        account.server.faults.clear()
        printed = [process.communicate(timeout=20)[0] for process in processes]
        assert printed == ["True\n", "True\n", "False\n"]
    finally:
        for process in processes:
            process.kill()
            process.wait(20)


def test_ctrl_c_ends_a_lookup_that_waits(account, late):
    run, rule = late
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    code += PROGRAMS["os.path.exists"][0]
    with started(code, places(account, run)["files"]) as process:
        rule.wait_for(1)
        assert waits(process)
        assert interrupt_after(process, 0.0) < AT_ONCE_S
        assert process.returncode == -signal.SIGINT
