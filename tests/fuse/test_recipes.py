"""Every recipe of docs/examples.md: its output, and its requests as the page describes them."""

import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.support.account import account, api_calls, make_account, needs

__all__ = ["account", "make_account"]

PAGE = Path(__file__).parents[2] / "docs" / "examples.md"
RUNS, CHECKPOINTS = 10, 5
_BLOCK = re.compile(r"^```(bash|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: Times that depend on the time of the test.
_NOW = re.compile(r"^20\d\d-\d\d-\d\d \d\d:\d\d  ", re.MULTILINE)

RUNS_LISTED = {"GET training_runs": 1}
ALL_LISTED = RUNS_LISTED | {"GET training_runs/{run}/checkpoints": RUNS}
#: A stat of a checkpoint's directory requests the attributes of all its files.
INFOS = {"POST weights_info": RUNS * CHECKPOINTS + 1}


def recipes():
    """Return the sections of the page by heading; each has code blocks as (language, text)."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    before = parts[0]
    return {"": _BLOCK.findall(before)} | {
        heading: _BLOCK.findall(text)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


RECIPES = recipes()
PRELUDE = RECIPES[""][0][1]


def script_of(heading, number=0):
    """Return a recipe's script and its documented output, None if there is none."""
    blocks = RECIPES[heading]
    scripts = [index for index, (language, _) in enumerate(blocks) if language == "bash"]
    at = scripts[number]
    output = blocks[at + 1][1] if blocks[at + 1 :] and blocks[at + 1][0] == "text" else None
    return blocks[at][1], output


@pytest.fixture
def sample(make_account, request):
    """Return the sample account of the page; the optional parameter has settings of the mount."""
    settings = getattr(request, "param", None)
    return make_account(settings, runs=RUNS, checkpoints=CHECKPOINTS)


@pytest.fixture
def run_recipe(sample, tmp_path):
    """Return a function that runs scripts of a recipe, checks the output, and counts requests."""

    def run_scripts(heading, number=0, *, status=0, message=""):
        needs(["jq", "curl"])
        scripts = [script_of(heading, index) for index in range(number + 1)]
        texts, output = [text for text, _ in scripts], scripts[-1][1]
        if output is not None:
            output = "".join(each or "" for _, each in scripts)
        sample.refresh()
        sample.server.journal.clear()
        done = subprocess.run(
            ["bash", "-c", "\n".join([PRELUDE, *texts])],
            cwd=sample.root,
            env={
                **os.environ,
                **sample.server.environment,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "LC_ALL": "C.UTF-8",
                "TZ": "UTC",
                "HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        sample.server.journal.wait_until_idle()
        assert done.returncode == status
        assert done.stderr == "" if not message else message in done.stderr
        if output is not None and not message:
            actual, expected = (_NOW.sub("<time>", text) for text in (done.stdout, output))
            assert actual == expected, f"the output differs from docs/examples.md: {heading}"
        return done.stdout, api_calls(sample.server)

    return run_scripts


def unexpected(calls, allowed):
    """Return requests beyond those allowed."""
    return {endpoint: n for endpoint, n in calls.items() if n > allowed.get(endpoint, 0)}


def test_newest_sampler_checkpoint(sample, run_recipe):
    output, calls = run_recipe("The newest sampler checkpoint of a run")
    run = sample.server.account.runs()[0]
    newest = max(
        (c for c in run.checkpoints if c.kind == "sampler_weights"), key=lambda c: c.time_s
    )
    assert output == f"tinker://{run.id}/{newest.id}\n"
    allowed = RUNS_LISTED | {"GET training_runs/{run}/checkpoints": 1}
    assert unexpected(calls, allowed) == {}


def test_checkpoints_over_1_gb(sample, run_recipe):
    run = sample.server.account.runs()[3]
    sample.server.account.add_checkpoint(run.id, "weights/huge", size_bytes=17 << 30)
    sample.server.account.add_checkpoint(run.id, "weights/large", size_bytes=1_100_000_000)
    sample.server.account.add_checkpoint(run.id, "weights/less", size_bytes=990_000_000)
    output, calls = run_recipe("All checkpoints over 1 GB")
    assert [line.split("/")[-1] for line in output.splitlines()] == ["huge", "large"]
    assert unexpected(calls, ALL_LISTED | {"POST weights_info": 1000}) == {}


def test_publish_every_final(sample, run_recipe):
    runs = sample.server.account.runs()
    were = sum(c.is_public for run in runs for c in run.checkpoints if c.name == "final")
    _shown, calls = run_recipe("Publish every `final`")
    finals = [c for run in runs for c in run.checkpoints if c.name == "final"]
    assert len(finals) > RUNS
    assert all(c.is_public for c in finals)
    assert calls["POST publish"] == len(finals) - were
    others = [c for run in runs for c in run.checkpoints if c.name != "final"]
    assert not all(c.is_public for c in others)


@pytest.mark.parametrize("sample", [{"trash_s": 30 * 86_400.0}], indirect=True)
def test_restore_from_trash(sample, run_recipe):
    _shown, calls = run_recipe("Undo a deletion")
    assert calls["PUT ttl"] == 2
    assert "DELETE checkpoint" not in calls
    # One listing before each change, one at the start, and one after the last change.
    assert calls["GET training_runs/{run}/checkpoints"] == 4


def test_delete_all_but_the_last_three(sample, run_recipe):
    heading = "Delete all but the last three of a run"
    run = sample.server.account.runs()[0]
    before = sorted(run.checkpoints, key=lambda c: c.time_s)
    names, calls = run_recipe(heading)
    assert calls["GET training_runs/{run}/checkpoints"] == 1
    assert len(run.checkpoints) == CHECKPOINTS, "a dry run"
    wanted = [f"runs/{run.id}/checkpoints/{c.id}" for c in reversed(before[:-3])]
    assert names.splitlines() == wanted
    _names, calls = run_recipe(heading, 1)
    assert sorted(run.checkpoints, key=lambda c: c.time_s) == before[-3:]
    assert calls["DELETE checkpoint"] == CHECKPOINTS - 3
    assert sum(len(run.checkpoints) for run in sample.server.account.runs()) == 48
    _names, calls = run_recipe(heading, 1)
    assert "DELETE checkpoint" not in calls, "nothing is left to delete"


def test_set_expiry_of_seven_days(sample, run_recipe):
    checkpoints = [c for run in sample.server.account.runs() for c in run.checkpoints]
    had = {id(c): c.expires_at_s for c in checkpoints if c.expires_at_s is not None}
    _shown, calls = run_recipe("Set an expiry of 7 days where there is none")
    for c in checkpoints:
        wanted = had.get(id(c), time.time() + 7 * 86_400)
        assert c.expires_at_s == pytest.approx(wanted, abs=60)
    assert calls["PUT ttl"] == len(checkpoints) - len(had)


def test_list_checkpoints_that_expire_this_week(sample, run_recipe):
    run = sample.server.account.runs()[0]
    soon = time.time() + 3 * 86_400
    sample.server.account.add_checkpoint(run.id, "weights/soon", expires_at_s=soon)
    sample.server.account.add_checkpoint(run.id, "weights/sooner", expires_at_s=soon - 7200)
    sample.server.account.add_checkpoint(run.id, "weights/later", expires_at_s=soon + 5 * 86_400)
    output, calls = run_recipe("Checkpoints that expire this week")
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(soon))
    assert [line.split("@")[-1] for line in output.splitlines()] == ["sooner", "soon"]
    assert output.splitlines()[1].startswith(f"{day}  {run.id}@weights@")
    assert unexpected(calls, RUNS_LISTED | {"GET checkpoints": 1}) == {}


def test_runs_by_base_model(sample, run_recipe):
    output, calls = run_recipe("Runs by base model")
    counts = {name: int(count) for count, name in map(str.split, output.splitlines())}
    models = [run.base_model for run in sample.server.account.runs()]
    assert counts == {model: models.count(model) for model in models}
    assert unexpected(calls, RUNS_LISTED) == {}


def test_compare_two_runs(run_recipe):
    output, calls = run_recipe("Compare the settings of two runs", status=1)
    assert output
    assert unexpected(calls, RUNS_LISTED) == {}


def test_table_of_rank_size_and_time(sample, run_recipe):
    output, calls = run_recipe("A table of rank, size and time")
    run = sample.server.account.runs()[0]
    table = [line.split("\t") for line in output.splitlines()]
    assert [row[3] for row in table] == [f"tinker://{run.id}/{c.id}" for c in run.checkpoints]
    assert [int(row[1]) for row in table] == [c.size_bytes for c in run.checkpoints]
    assert {int(row[0]) for row in table} == {run.lora_rank}
    allowed = {"GET training_runs/{run}/checkpoints": 1, "POST weights_info": CHECKPOINTS}
    assert unexpected(calls, RUNS_LISTED | allowed) == {}


def test_watch_a_live_run(make_account):
    account = make_account(runs=0, settings={"ttl_s": 0.1})
    run = account.new_run("weights/0001")
    run_id = run.partition("/")[2]
    script, _ = script_of("Watch a live run and act on each new checkpoint")
    with subprocess.Popen(
        ["bash", "-c", PRELUDE + script],
        cwd=account.root,
        env={**os.environ, "pause": "0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as watcher:
        for name in ("0001", "0002", "final"):
            account.server.account.add_checkpoint(run_id, f"weights/{name}")
            account.server.account.add_checkpoint(run_id, f"sampler_weights/{name}")
            line = watcher.stdout.readline()
            assert line == f"new: tinker://{run_id}/sampler_weights/{name}\n"
        assert watcher.communicate(timeout=20)[0] == ""
        assert watcher.returncode == 0


def test_download(sample, run_recipe, tmp_path):
    _shown, calls = run_recipe("Download a checkpoint")
    with tarfile.open(tmp_path / "checkpoint.tar") as archive:
        assert "adapter_model.safetensors" in archive.getnames()
    allowed = {"GET training_runs/{run}/checkpoints": 1, "GET archive": 1}
    assert unexpected(calls, RUNS_LISTED | allowed) == {}


def test_copy_that_resumes(sample, run_recipe, tmp_path):
    _shown, calls = run_recipe("Copy a checkpoint, and resume after an interruption")
    assert f"{tmp_path}/adapter/adapter_model.safetensors: " in (tmp_path / "get.log").read_text()
    allowed = {
        "GET training_runs/{run}": 1,
        "GET training_runs/{run}/checkpoints": 1,
        "GET archive": 1,
    }
    assert unexpected(calls, RUNS_LISTED | allowed) == {}


def test_copy_with_weights(sample, run_recipe, tmp_path):
    needs(["restic", "rsync"])
    heading = "Keep a copy or a backup with the weights"
    allowed = RUNS_LISTED | {
        "GET training_runs/{run}": 1,
        "GET training_runs/{run}/checkpoints": 1,
        "POST weights_info": CHECKPOINTS,
    }
    _shown, calls = run_recipe(heading)
    assert unexpected(calls, allowed) == {}
    _shown, calls = run_recipe(heading, 2)
    assert unexpected(calls, allowed | {"GET archive": 1}) == {}
    run = sample.server.account.runs()[0]
    for name, content in sample.server.files(run.id, run.newest("sampler_weights").id).items():
        copied = tmp_path / "with-weights/files" / name
        assert copied.read_bytes() == content.read(0, content.size_bytes)


def test_search_requests_no_archive(sample, run_recipe):
    needs(["rg"])
    _shown, calls = run_recipe("Search without requesting archives")
    allowed = ALL_LISTED | {"POST weights_info": RUNS * CHECKPOINTS}
    assert unexpected(calls, allowed) == {}


def test_path_with_colons(sample, run_recipe, tmp_path):
    needs(["make", "rclone"])
    _shown, calls = run_recipe("Name a path with colons")
    assert (tmp_path / "rclone.log").read_text().count("ERROR") == 0
    allowed = {"GET training_runs/{run}/checkpoints": 1, "GET archive": 1}
    assert unexpected(calls, RUNS_LISTED | allowed) == {}


def test_prefetched_weights(sample, run_recipe):
    _shown, calls = run_recipe("Prefetch the weights before a GPU job starts")
    allowed = {
        "GET training_runs/{run}": 2,
        "GET training_runs/{run}/checkpoints": 2,
        "GET archive": 1,
    }
    assert unexpected(calls, RUNS_LISTED | allowed) == {}


def test_timeline_of_a_session(sample, run_recipe, tmp_path):
    _shown, calls = run_recipe("The timeline of a session")
    newest = sample.server.account.session_ids()[0]
    content = sample.server.trace(newest)
    assert (tmp_path / "session.pftrace").read_bytes() == content.read(0, content.size_bytes)
    allowed = {"POST sessions/search": 1, "GET trace_export": 1}
    assert unexpected(calls, RUNS_LISTED | allowed) == {}


def test_cost_of_storage(sample, run_recipe):
    _shown, calls = run_recipe("What the stored bytes cost a month", 2)
    sessions = len(sample.server.account.session_ids())
    allowed = {
        "GET billing/usage/checkpoints/current": 1,
        "POST sessions/search": 1,
        "GET sessions/{session}": sessions,
        "POST weights_info": RUNS * CHECKPOINTS,
    }
    assert unexpected(calls, ALL_LISTED | allowed) == {}


def test_cost_of_storage_without_permission_to_ask(sample, run_recipe):
    heading = "What the stored bytes cost a month"
    by_given_rate, _calls = run_recipe(heading)
    sample.server.faults.add(
        "GET billing/usage/checkpoints/current", status=403, body={"detail": "administrators only"}
    )
    output, _calls = run_recipe(heading, 1, message="403")
    assert output == 2 * by_given_rate


def test_storage_by_run(sample, run_recipe):
    _shown, calls = run_recipe("Storage by run")
    assert unexpected(calls, ALL_LISTED | {"POST weights_info": RUNS * CHECKPOINTS}) == {}


def test_every_recipe_is_run(make_account):
    actual = {heading for heading in RECIPES if heading}
    source = Path(__file__).read_text()
    assert {heading for heading in actual if f'"{heading}"' not in source} == set()
