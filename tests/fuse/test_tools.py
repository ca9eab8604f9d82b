"""Tools that list and read: correct output, and no more requests than documented."""

import json
import os
import sys
import tarfile

import pytest

from tests.support.account import account, api_calls, every_binding, make_account, needs

__all__ = ["account", "make_account"]

RUNS, CHECKPOINTS = 3, 4


@pytest.fixture(scope="module")
def warm(account):
    """Return an account with cached weights infos."""
    account.sh("cat runs/*/checkpoints/*/*/info.json")
    account.server.journal.wait_until_idle()
    return account


def calls_of(account, script):
    """Run a script with only weights infos cached; return the result and the requests."""
    account.refresh()
    account.server.journal.clear()
    done = account.sh(script)
    account.server.journal.wait_until_idle()
    return done, api_calls(account.server)


def training_count(account):
    """Return the number of checkpoints with the control `export`."""
    checkpoints = [c for run in account.server.account.runs() for c in run.checkpoints]
    return sum(checkpoint.kind == "weights" for checkpoint in checkpoints)


ALL_LISTED = {"GET training_runs": 1, "GET training_runs/{run}/checkpoints": RUNS}


def on_disk(size_bytes):
    """Return what du counts for a size: whole blocks of 512 bytes."""
    return -(-size_bytes // 512) * 512


def generated_bytes(account, directory):
    """Return what du counts for the regular files below a directory, without following links."""
    walk = os.walk(account.path(directory))
    paths = [os.path.join(top, name) for top, _directories, files in walk for name in files]
    return sum(on_disk(os.lstat(path).st_size) for path in paths if not os.path.islink(path))


def test_du_counts_stored_and_generated_bytes(warm):
    done, calls = calls_of(warm, "du -s --block-size=1 runs && du -sh runs")
    checkpoints = [c for run in warm.server.account.runs() for c in run.checkpoints]
    stored = sum(on_disk(checkpoint.size_bytes) for checkpoint in checkpoints)
    assert done.returncode == 0, done
    exact, human = done.stdout.splitlines()
    assert int(exact.split()[0]) == stored + generated_bytes(warm, "runs")
    assert int(exact.split()[0]) - stored < 4096 * len(checkpoints)
    assert human.split()[0].endswith("M")
    assert calls == ALL_LISTED


def test_du_of_one_checkpoint_has_apparent_size(warm, tmp_path):
    run = warm.server.account.runs()[0]
    checkpoint = run.checkpoints[0]
    path = f"runs/{run.id}/checkpoints/{checkpoint.id}"
    done = warm.sh(f"du -s --block-size=1 {path}; du -sb {path}; du -sb {tmp_path}")
    stored, apparent, empty = (int(line.split()[0]) for line in done.stdout.splitlines())
    assert stored == on_disk(checkpoint.size_bytes) + generated_bytes(warm, path)
    sizes = [os.lstat(warm.path(f"{path}/{name}")).st_size for name in os.listdir(warm.path(path))]
    # Before coreutils 9.2, du also counts the apparent size of directories.
    assert apparent == sum(sizes) + checkpoint.size_bytes * bool(empty)


@every_binding
def test_df_shows_size_without_requests(warm):
    done, calls = calls_of(warm, "df -P . && df -h . && df -i . && stat -f .")
    assert done.returncode == 0, done
    row = done.stdout.splitlines()[1].split()
    assert row[0] == "tinkerfs"
    assert int(row[1]) > 0
    assert 0 <= int(row[3]) <= int(row[1])
    assert calls == {}


def test_ls_l_sorts_by_times_of_the_account(warm):
    done, _calls = calls_of(warm, "ls -t runs")
    assert done.stdout.split() == warm.server.account.run_ids
    run = warm.server.account.runs()[0]
    by_time = sorted(
        (c for c in run.checkpoints if c.kind == "weights"), key=lambda c: c.time_s, reverse=True
    )
    done = warm.sh(f"ls -t runs/{run.id}/checkpoints/weights")
    assert done.stdout.split() == [checkpoint.name for checkpoint in by_time]


@every_binding
def test_ls_lR_shows_everything_with_listing_requests_only(warm):
    done, calls = calls_of(warm, "ls -lR --time-style=+%s runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert calls == ALL_LISTED
    for run in warm.server.account.runs():
        for checkpoint in run.checkpoints:
            assert f"runs/{run.id}/checkpoints/{checkpoint.id}:" in done.stdout
    assert done.stdout.count("archive_url -> ../../../../../.content/") == RUNS * CHECKPOINTS
    files = RUNS * CHECKPOINTS * 4 + training_count(warm)
    assert done.stdout.count("-rw-r--r-- 1 ") == files
    again, calls = warm.sh("ls -lR --time-style=+%s runs"), api_calls(warm.server)
    assert again.stdout == done.stdout
    assert calls == ALL_LISTED, "the second ls -lR sends no request"


@every_binding
def test_cold_ls_lR_requests_each_weights_info_once(make_account):
    account = make_account(runs=RUNS, checkpoints=CHECKPOINTS)
    done, calls = calls_of(account, "ls -lR runs")
    assert done.returncode == 0
    assert calls == {**ALL_LISTED, "POST weights_info": RUNS * CHECKPOINTS}
    _done, calls = calls_of(account, "ls -lR runs; grep -r lora_rank runs")
    assert calls == ALL_LISTED


@every_binding
def test_plain_ls_requests_no_weights_info(make_account):
    account = make_account(runs=RUNS, checkpoints=CHECKPOINTS)
    done, calls = calls_of(account, "ls -R runs && ls -a runs/*/checkpoints/*/* && find runs")
    assert done.returncode == 0
    assert done.stdout.count("info.json\n") > RUNS * CHECKPOINTS
    assert calls == ALL_LISTED


def test_find_ls_shows_every_entry(warm):
    done, calls = calls_of(warm, "find runs -ls")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    inodes = [line.split()[0] for line in lines]
    assert len(set(inodes)) == len(inodes)
    kinds = sum(len({c.kind for c in run.checkpoints}) for run in warm.server.account.runs())
    entries = RUNS * CHECKPOINTS * 9 + training_count(warm)
    assert len(lines) == 1 + RUNS * 5 + kinds + entries
    assert calls == ALL_LISTED


def test_find_selects_by_type_time_and_size(warm):
    count = RUNS * CHECKPOINTS
    for script, wanted in {
        "find runs -type l -name archive_url": count,
        "find runs -name published -type f -size -2": count,
        "find runs -mindepth 4 -maxdepth 4 -type d -newermt 2025-12-01": count,
        "find -L runs -maxdepth 2 -name latest -type d": RUNS,
        "find . -perm 400": 0,
        "find . -empty -type f -name refresh": 1,
        "find . -links +1 -name runs": 0,
    }.items():
        done = warm.sh(script)
        assert (done.returncode, done.stderr) == (0, ""), script
        assert len(done.stdout.splitlines()) == wanted, script


def copied(directory, warm):
    """Compare a copy of runs/ with the mount."""
    for run in warm.server.account.runs():
        assert (directory / run.id / "latest").readlink() == warm.path(
            f"runs/{run.id}/latest"
        ).readlink()
        for checkpoint in run.checkpoints:
            path = f"{run.id}/checkpoints/{checkpoint.id}"
            info = json.loads((directory / path / "info.json").read_text())
            assert info["checkpoint_id"] == checkpoint.id
            assert info["base_model"] == run.base_model
            assert (directory / path / "published").read_text() in ("0\n", "1\n")
            assert (directory / path / "archive_url").is_symlink()
            for name in ("info.json", "published", "expires_at", "tinker_path"):
                mounted = warm.path(f"runs/{path}/{name}")
                assert (directory / path / name).read_bytes() == mounted.read_bytes(), name


COPIES = {
    "cp -r": "cp -r runs $OUT/",
    "cp -a": "cp -a runs $OUT/",
    "rsync -a": "rsync -a runs $OUT/",
    # Before its first listing, the time of a directory is unknown, and tar sees it change.
    "tar": "ls runs > /dev/null; tar cf - runs | tar xf - -C $OUT",
    "cpio of find": "find runs -print0 | tar cf - --no-recursion --null -T - | tar xf - -C $OUT",
    "copytree": "$PYTHON -c 'import shutil; shutil.copytree(\"runs\", \"'$OUT'/runs\", True)'",
    "busybox cp": "busybox cp -a runs $OUT/",
}


@pytest.mark.parametrize("name", COPIES)
def test_copy_is_complete_with_listing_requests_only(warm, name, tmp_path):
    needs(tool for tool in ("busybox", "rsync") if tool in name)
    done, calls = calls_of(warm, f"OUT={tmp_path} PYTHON={sys.executable}\n{COPIES[name]}")
    assert (done.returncode, done.stderr) == (0, "")
    assert calls == ALL_LISTED
    copied(tmp_path / "runs", warm)


def test_second_rsync_copies_nothing(warm, tmp_path):
    needs(["rsync"])
    assert warm.sh(f"rsync -a runs {tmp_path}/").returncode == 0
    done = warm.sh(f"rsync -ai runs {tmp_path}/")
    assert (done.returncode, done.stdout) == (0, "")


def test_tar_keeps_times_modes_and_links(warm, tmp_path):
    run = warm.server.account.runs()[0]
    assert warm.sh(f"tar cf {tmp_path}/t runs").returncode == 0
    with tarfile.open(tmp_path / "t") as archive:
        for checkpoint in run.checkpoints:
            path = f"runs/{run.id}/checkpoints/{checkpoint.id}"
            member = archive.getmember(f"{path}/info.json")
            assert member.mtime == int(checkpoint.time_s)
            assert member.mode == 0o644
            assert archive.getmember(f"{path}/archive_url").issym()
            assert archive.getmember(path).isdir()


def test_jq_reads_wildcard_paths(warm):
    needs(["jq"])
    done = warm.sh("jq -r .checkpoint_id runs/*/checkpoints/*/*/info.json | sort")
    wanted = sorted(c.id for run in warm.server.account.runs() for c in run.checkpoints)
    assert sorted(done.stdout.split()) == wanted


def test_grep_r_reads_every_file_without_archive_request(warm):
    done, calls = calls_of(
        warm, "grep -rl lora_rank runs | wc -l; grep -rc . .tinkerfs > /dev/null"
    )
    assert int(done.stdout) == RUNS * (CHECKPOINTS + 1)
    assert calls == ALL_LISTED


def test_probes_of_software_send_no_request(warm):
    run = warm.server.account.run_ids[0]
    warm.sh(f"ls -R runs/{run}")
    warm.server.journal.clear()
    done = warm.sh(
        f"for d in . runs runs/{run} runs/{run}/checkpoints; do"
        " ls -d $d/.git $d/.Trash-0 $d/.hidden $d/._x $d/.DS_Store $d/autorun.inf; done;"
        " false"
    )
    assert done.returncode != 0
    assert api_calls(warm.server) == {}


@every_binding
def test_rm_r_of_checkpoint_sends_few_requests(warm):
    run = warm.new_run("weights/1", "weights/2")
    warm.sh(f"ls -R {run}")
    warm.server.journal.clear()
    assert warm.sh(f"rm -r {run}/checkpoints/weights/1").returncode == 0
    calls = api_calls(warm.server)
    assert calls.pop("POST weights_info", 0) <= 2, "for the checkpoint and its sibling"
    assert calls == {"GET training_runs/{run}/checkpoints": 1, "DELETE checkpoint": 1}
    warm.server.account.remove_run(run.partition("/")[2])


def test_sixteen_concurrent_cold_listings_send_one_request(warm):
    run = warm.server.account.run_ids[0]
    warm.sh(f"ls runs/{run}")
    warm.refresh()
    warm.sh("ls runs")
    warm.server.journal.clear()
    hold = warm.server.faults.add("GET training_runs/{run}/checkpoints", hang=True, times=None)
    processes = [warm.start("ls", f"runs/{run}/checkpoints") for _ in range(16)]
    hold.wait_for(1)
    hold.remove()
    outputs = {process.communicate(timeout=20)[0] for process in processes}
    assert len(outputs) == 1
    assert api_calls(warm.server) == {"GET training_runs/{run}/checkpoints": 1}


def test_python_walks_find_every_file(warm):
    code = """
import glob, os, pathlib, stat
print(len(glob.glob("runs/*/checkpoints/*/*/info.json")))
print(sum(1 for _ in pathlib.Path("runs").rglob("published")))
print(sum(len(files) for _root, _dirs, files in os.walk("runs")))
with os.scandir("runs") as runs:
    print(all(run.is_dir() and not run.is_symlink() for run in runs))
"""
    done = warm.python(code)
    count = RUNS * CHECKPOINTS
    found = done.stdout.split()
    assert found[:2] == [str(count), str(count)]
    assert found[2] == str(count * 7 + training_count(warm) + RUNS)
    assert found[3] == "True"


def test_tar_of_cold_directory_succeeds(make_account):
    """Check tar, which compares the time of a directory before and after listing it."""
    account = make_account(runs=RUNS, checkpoints=CHECKPOINTS)
    run = account.server.account.run_ids[0]
    for directory in (f"runs/{run}/checkpoints/weights", f"runs/{run}", "runs", "sessions"):
        account.refresh()
        done = account.sh(f"tar cf - {directory} | tar tf - > /dev/null; exit ${{PIPESTATUS[0]}}")
        assert (done.returncode, done.stderr) == (0, ""), directory
