"""The first open by name of a file waits until its archive is built."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support.account import make_account, quoted
from tests.support.mount import interrupt_after

__all__ = ["make_account"]

#: Timeout of a lookup, seconds: longer than a busy machine pauses, shorter than the archive build,
#: which takes as long as a test wants.
LOOKUP_TIMEOUT_S = 1.0
AT_ONCE_S = 5.0

#: The steps of PEFT's `PeftConfig._get_peft_type` and `load_peft_weights`; else PEFT uses the hub.
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
        runs=1,
        checkpoints=1,
        settings={"lookup_timeout_s": LOOKUP_TIMEOUT_S, "archive_build_limit": 0},
    )


@pytest.fixture
def late_run(account):
    """Return a run with a checkpoint, and the fault that holds its archive build."""
    run = account.new_run("sampler_weights/late", "sampler_weights/other")
    rule = account.server.faults.add("GET archive", times=None, hang=True)
    yield run, rule
    account.server.faults.clear()


def files_of(account, run):
    return {
        "files": account.path(f"{run}/checkpoints/sampler_weights/late/files"),
        "adapters": account.path(f"adapters/{run[5:]}@sampler_weights@late"),
    }


def started(program, path):
    return subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def are_waiting(*processes):
    """Return whether processes run for longer than the timeout of other lookups."""
    time.sleep(2 * LOOKUP_TIMEOUT_S)
    return all(process.poll() is None for process in processes)


@pytest.mark.parametrize(
    ("name", "path"),
    [*((name, "adapters") for name in PROGRAMS), ("os.path.exists", "files")],
)
def test_first_open_by_name_waits_for_the_archive(account, late_run, name, path):
    run, rule = late_run
    program, expected = PROGRAMS[name]
    with started(program, files_of(account, run)[path]) as process:
        rule.wait_for(1)
        assert are_waiting(process), process.communicate()
        account.server.faults.clear()
        printed, stderr = process.communicate(timeout=20)
    assert (printed, stderr) == (f"{expected}\n", "")
    assert account.server.journal.count("GET archive") == 1


def test_waiting_lookups_do_not_delay_others(account, late_run):
    run, rule = late_run
    exists, _ = PROGRAMS["os.path.exists"]
    missing, _ = PROGRAMS["os.path.exists of nothing"]
    path = files_of(account, run)["files"]
    programs = [exists, exists, missing]
    processes = [started(program, path) for program in programs]
    try:
        rule.wait_for(1)
        assert are_waiting(*processes)
        began = time.monotonic()
        done = account.sh(
            f"ls -lR {run} && ls -ld {quoted(path)}/ {quoted(path.parent)}/other/files/ "
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


def test_ctrl_c_interrupts_a_waiting_lookup(account, late_run):
    run, rule = late_run
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    code += PROGRAMS["os.path.exists"][0]
    with started(code, files_of(account, run)["files"]) as process:
        rule.wait_for(1)
        assert are_waiting(process)
        assert interrupt_after(process, 0.0) < AT_ONCE_S
        assert process.returncode == -signal.SIGINT
