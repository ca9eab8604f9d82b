"""`tinkerfs cache` while a mount uses the same cache."""

import json
import os

from tests.support.account import make_account
from tests.support.mount import tinkerfs

__all__ = ["make_account"]

SIZE_BYTES = 9 << 20


def test_cleared_or_corrupt_blocks_are_downloaded_again(make_account, tmp_path):
    account = make_account(runs=1, checkpoints=3, size_bytes=SIZE_BYTES, settings={"xattr": True})
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **account.server.environment}
    run_id = account.server.account.run_ids[0]
    names = sorted(os.listdir(account.path(f"runs/{run_id}/checkpoints/sampler_weights")))
    one = account.path(f"runs/{run_id}/checkpoints/sampler_weights/{names[0]}")
    member = one / "files/adapter_model.safetensors"
    expected = member.read_bytes()

    def run_cache(command, *arguments):
        done = tinkerfs("cache", command, str(one), "--json", *arguments, env=env)
        return done.returncode, json.loads(done.stdout)

    code, report = run_cache("info")
    assert code == 0
    [row] = report["checkpoints"]
    assert row["checkpoint"] == f"tinker://{run_id}/sampler_weights/{names[0]}"
    # cached_bytes includes tar headers; on disk, each block has a checksum and a partial page.
    cached_bytes = int(os.getxattr(member, "user.tinkerfs.cached_bytes"))
    assert cached_bytes == len(expected)
    assert cached_bytes < row["cached_bytes"] == row["total_bytes"] < cached_bytes + (1 << 16)
    assert cached_bytes < row["disk_bytes"] < cached_bytes + (1 << 20)

    with member.open("rb", buffering=0) as reader:
        reader.read(1)
        assert run_cache("info")[1]["checkpoints"][0]["is_open"]
        account.server.journal.clear()
        done = tinkerfs("cache", "clear", str(one), env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert run_cache("info")[1]["checkpoints"] == []
        # Drop the bytes from the page cache of the kernel, which has all of them.
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(reader.fileno(), len(expected), 0) == expected
    account.server.journal.wait_until_idle()
    assert account.server.journal.entries("store"), "the cleared blocks were downloaded again"

    [data, *_] = (account.root.parent / "cache/blocks").glob("*/0")
    with data.open("r+b") as file:
        file.write(b"spoilt")
    code, report = run_cache("verify")
    [corrupt] = report["corrupt"]
    assert (code, corrupt["checkpoint"], corrupt["start"]) == (1, row["checkpoint"], 0)
    assert run_cache("verify")[1]["corrupt"] == []
    assert member.read_bytes() == expected


def test_info_resolves_mount_paths_without_key_or_archive(make_account, tmp_path):
    account = make_account(runs=2, checkpoints=2, size_bytes=5000)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    runs = [account.path(f"runs/{run_id}") for run_id in account.server.account.run_ids]
    one, other = (f"tinker://{run.name}/sampler_weights/final" for run in runs)
    for run in runs:
        (run / "latest_sampler/files/adapter_config.json").read_bytes()
    checkpoint = runs[0] / "checkpoints/sampler_weights/final"
    adapter = account.path(f"adapters/{runs[0].name}@sampler_weights@final")
    unread = runs[0] / "latest/files/adapter_model.safetensors"
    (tmp_path / "link").symlink_to(checkpoint)
    list(account.path("adapters").iterdir())

    def run_cache(path):
        done = tinkerfs("cache", "info", "--json", path, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        return {row["checkpoint"] for row in json.loads(done.stdout)["checkpoints"]}

    account.server.journal.wait_until_idle()
    account.server.journal.clear()
    for path in (
        *(
            checkpoint,
            checkpoint / "files",
            checkpoint / "files/adapter_config.json",
            checkpoint / "archive.tar",
        ),
        *(runs[0], runs[0] / "checkpoints", checkpoint.parent, runs[0] / "latest_sampler", adapter),
        *(tmp_path / "link", checkpoint / "../../../latest_sampler/info.json"),
    ):
        assert run_cache(path) == {one}, path
    assert run_cache(unread) == run_cache(checkpoint.parent.with_name("weights")) == set()
    assert run_cache(account.root) == {one, other}
    assert not account.server.journal.count("GET archive")
    assert not account.server.journal.entries("store")

    done = tinkerfs("cache", "clear", checkpoint.with_name("nonsense"), env=env)
    assert done.returncode == 1
    assert done.stderr == f"tinkerfs: {checkpoint.with_name('nonsense')}: no such file\n"
    assert run_cache(account.root) == {one, other}


def test_flag_overrides_cache_of_mount_and_variable_does_not(make_account, tmp_path):
    account = make_account(runs=1, checkpoints=1)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TINKERFS_CACHE_DIR": "variable"}

    def cache_of(*arguments):
        done = tinkerfs("cache", "info", account.root, "--json", *arguments, env=env)
        report = json.loads(done.stdout)
        return report["cache_dir"], report["max_bytes"]

    directory, max_bytes = cache_of()
    assert directory == str(account.root.parent / "cache")
    assert cache_of(f"--cache-dir={tmp_path}") == (str(tmp_path), max_bytes)
    assert cache_of("--cache-size", "1k") == (directory, 1024)
