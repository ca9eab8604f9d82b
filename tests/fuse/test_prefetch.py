"""`tinkerfs prefetch` and `get` of paths below a mount, and the requests of later reads."""

import json
import os
from pathlib import Path

import pytest

from tests.support.account import Account, make_account
from tests.support.mount import tinkerfs

__all__ = ["make_account"]

MIB = 1 << 20
SIZE_BYTES = 9 * MIB


@pytest.fixture
def account(make_account):
    return make_account(runs=1, checkpoints=3, size_bytes=SIZE_BYTES)


def env_of(account, tmp_path):
    """Return an environment with another home and the key, without the server or the cache."""
    key = {"TINKER_API_KEY": account.server.api_key}
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **key}


def read_all(account: Account, directory):
    """Read every file below a directory and follow links; return their contents."""
    root = account.path(directory)
    paths = [Path(at, name) for at, _, files in os.walk(root) for name in files]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def costly_calls(account):
    account.server.journal.wait_until_idle()
    entries = account.server.journal.entries()
    return [e for e in entries if e.origin == "store" or e.endpoint == "GET archive"]


#: Arguments of prefetch, and the directory with the cached files.
WAYS = {
    "checkpoint": ("{checkpoint}", "{checkpoint}/files/"),
    "files": ("{checkpoint}/files", "{checkpoint}/files/"),
    "latest": ("{run}/latest_sampler", "{run}/latest_sampler/files/"),
    "view": ("checkpoints/{name}", "{checkpoint}/files/"),
    "adapter": ("adapters/{name}", "adapters/{name}/"),
    "kind": ("{run}/checkpoints/sampler_weights", "{checkpoint}/files/"),
    "run": ("{run}", "{checkpoint}/files/"),
    "runs": ("runs", "{checkpoint}/files/"),
    "root": ("", "{checkpoint}/files/"),
}


@pytest.mark.parametrize("way", WAYS)
def test_prefetched_files_are_read_without_requests(make_account, tmp_path, way):
    account = make_account(runs=1, checkpoints=3, size_bytes=SIZE_BYTES)
    run = account.server.account.runs()[0]
    samplers = [each for each in run.checkpoints if each.kind == "sampler_weights"]
    newest = max(samplers, key=lambda each: each.time_s)
    names = {
        "run": f"runs/{run.id}",
        "checkpoint": f"runs/{run.id}/checkpoints/{newest.id}",
        "name": f"{run.id}@{newest.id.replace('/', '@')}",
    }
    argument, read = (text.format(**names) for text in WAYS[way])
    env = env_of(account, tmp_path)
    path = account.path(argument)
    assert tinkerfs("prefetch", "--check", path, env=env).returncode == 1
    assert costly_calls(account) == []
    done = tinkerfs("prefetch", path, env=env)
    assert done.returncode == 0, done.stderr
    assert tinkerfs("prefetch", "--check", path, env=env).returncode == 0
    account.server.journal.clear()
    found = read_all(account, read)
    assert (found.pop("tensors.json", None) is not None) == (way == "adapter")
    expected = account.server.files(run.id, newest.id)
    assert found == {name: c.read(0, c.size_bytes) for name, c in expected.items()}
    assert costly_calls(account) == []
    assert not (tmp_path / ".cache").exists(), "the mount's cache was used"


def test_prefetch_and_get_name_the_files_of_an_adapter(account, tmp_path):
    run = account.server.account.runs()[0]
    name = f"{run.id}@{run.checkpoints[0].id.replace('/', '@')}"
    adapter = account.path(f"adapters/{name}")
    env = env_of(account, tmp_path)
    done = tinkerfs("prefetch", "--check", "--json", adapter, env=env)
    assert [row["file"] for row in json.loads(done.stdout)["files"]] == [f"adapters/{name}/"]
    done = tinkerfs("prefetch", "--json", adapter, env=env)
    rows = json.loads(done.stdout)["files"]
    assert {row["file"] for row in rows} == {
        f"adapters/{name}/{each}" for each in os.listdir(adapter)
    }
    assert {row["checkpoint"] for row in rows} == {f"tinker://{run.id}/{run.checkpoints[0].id}"}
    assert f"adapters/{name}/adapter_model.safetensors: 9.0 MiB" in done.stderr
    config = adapter / "adapter_config.json"
    done = tinkerfs("get", "--archive", config, tmp_path / "x.tar", env=env)
    assert f"not adapters/{name}/adapter_config.json" in done.stderr
    run.base_model = "deepseek-ai/DeepSeek-V3.1"
    refused = account.path(f"adapters/{run.id}@{run.checkpoints[1].id.replace('/', '@')}")
    for arguments in (("prefetch", refused), ("get", refused, tmp_path / "out")):
        done = tinkerfs(*arguments, env=env)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert f"{refused.name}" in line
        assert "DeepSeek V3" in line


def test_prefetch_of_one_member_and_of_the_archive(account, tmp_path):
    run = account.server.account.runs()[0]
    checkpoint = f"runs/{run.id}/checkpoints/{run.checkpoints[0].id}"
    env = env_of(account, tmp_path)
    member = account.path(f"{checkpoint}/files/adapter_config.json")
    assert tinkerfs("prefetch", "--check", member, env=env).returncode == 1
    assert costly_calls(account) == [], "the mount sent no request either"
    assert tinkerfs("prefetch", member, env=env).returncode == 0
    assert tinkerfs("prefetch", "--check", member, env=env).returncode == 0
    files = account.path(f"{checkpoint}/files")
    assert tinkerfs("prefetch", "--check", files, env=env).returncode == 1
    tar = account.path(f"{checkpoint}/archive.tar")
    assert tinkerfs("prefetch", tar, env=env).returncode == 0
    for path in (tar, files):
        assert tinkerfs("prefetch", "--check", path, env=env).returncode == 0
    account.server.journal.clear()
    expected = account.server.archive(run.id, run.checkpoints[0].id)
    assert tar.read_bytes() == expected.read(0, expected.size_bytes)
    assert costly_calls(account) == []
    for none in ("files/none", "info.json"):
        done = tinkerfs("prefetch", account.path(f"{checkpoint}/{none}"), env=env)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


def test_get_accepts_path_below_a_mount(account, tmp_path):
    run = account.server.account.runs()[0]
    [first, *_] = run.checkpoints
    env = env_of(account, tmp_path)
    link = tmp_path / "link"
    link.symlink_to(account.path(f"runs/{run.id}/checkpoints"))
    done = tinkerfs("get", link / first.id, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    expected = account.server.files(run.id, first.id)
    for name, content in expected.items():
        assert (tmp_path / "out" / name).read_bytes() == content.read(0, content.size_bytes)
    member = link / first.id / "files" / "adapter_config.json"
    assert tinkerfs("get", member, tmp_path / "one", env=env).returncode == 0
    assert sorted(os.listdir(tmp_path / "one")) == [".tinkerfs-get", "adapter_config.json"]
    tar = tmp_path / "x.tar"
    done = tinkerfs("get", link / first.id / "archive.tar", tar, env=env)
    assert done.returncode == 0, done.stderr
    archive = account.server.archive(run.id, first.id)
    assert tar.read_bytes() == archive.read(0, archive.size_bytes)


def test_rejected_walk_reports_prefetch_as_hint(make_account):
    account = make_account(runs=1, checkpoints=3, settings={"archive_build_limit": 1})
    run = account.server.account.runs()[0]
    script = f"cd runs/{run.id}/checkpoints && for c in */*; do ls $c/files/; done"
    assert "Device or resource busy" in account.sh(script).stderr
    [line] = {line.partition("one process")[2] for line in account.errors().splitlines()}
    assert "tinkerfs prefetch or tinkerfs get" in line
