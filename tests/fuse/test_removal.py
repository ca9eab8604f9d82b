"""Removal with common tools: accidents delete nothing, and deliberate removal its arguments.

Each attempt runs in a new session, like a command of an interactive shell.
"""

import os
import signal
import sys
import time

import pytest

from tests.support.account import account, deletes, every_binding, make_account, needs, quoted

__all__ = ["account", "make_account"]

CHECKPOINTS = 12

ACCIDENTS = {
    "rm mount": "rm -rf $MNT",
    "rm names of mount": "rm -rf $MNT/*",
    "rm names of mount, dotted too": "rm -rf $MNT/* $MNT/.[!.]*",
    "rm runs": "rm -rf $MNT/runs",
    "rm names of runs": "rm -rf $MNT/runs/*",
    "rm run": "rm -rf $RUN",
    "rm with --one-file-system": "rm -rf --one-file-system $MNT/runs",
    "find mount": "find $MNT -delete",
    "find runs": "find $MNT/runs -delete",
    "find run": "find $RUN -delete",
    "find files": "find $MNT -type f -delete",
    "find -exec": "find $MNT -exec rm -rf {} \\;",
    "find -exec below runs": "find $MNT/runs -mindepth 1 -exec rm -rf {} \\;",
    "find -exec +": "find $MNT -exec rm -rf {} +",
    "find -depth -exec": "find $MNT -depth -exec rm -rf {} \\;",
    "xargs": "find $MNT | xargs -n1 rm -rf",
    "xargs, four at a time": "find $MNT/runs -print0 | xargs -0 -n1 -P4 rm -rf",
    "loop": 'for f in $(find $MNT); do rm -rf "$f"; done',
    "loop over runs": 'for f in $MNT/runs/*; do rm -rf "$f"; done',
    "loop in dash": "dash -c 'for f in $(find $MNT); do rm -rf \"$f\"; done'",
    "rmdir up and down": "find $MNT -depth -type d -exec rmdir {} \\;",
    "rmtree mount": "$PYTHON -c 'import shutil; shutil.rmtree(\"'$MNT'\", ignore_errors=True)'",
    "rmtree runs": "$PYTHON -c 'import shutil; shutil.rmtree(\"'$MNT'/runs\", ignore_errors=True)'",
    "rmtree run": "$PYTHON -c 'import shutil; shutil.rmtree(\"'$RUN'\", ignore_errors=True)'",
    "perl mount": "perl -MFile::Path=remove_tree -e 'remove_tree($ARGV[0])' $MNT",
    "perl runs": "perl -MFile::Path=remove_tree -e 'remove_tree($ARGV[0])' $MNT/runs",
    "perl run": "perl -MFile::Path=remove_tree -e 'remove_tree($ARGV[0])' $RUN",
    "busybox rm mount": "busybox rm -rf $MNT",
    "busybox rm runs": "busybox rm -rf $MNT/runs",
    "busybox rm run": "busybox rm -rf $RUN",
    # Debian's busybox has no `find -delete`, which removes in the order of -depth.
    "busybox find -depth -exec": "busybox find $MNT -depth -exec busybox rm -rf {} \\;",
    "busybox find run -depth -exec": "busybox find $RUN -depth -exec busybox rm -rf {} \\;",
    "busybox find -exec": "busybox find $MNT -exec busybox rm -rf {} \\;",
    "busybox xargs": "busybox find $MNT/runs | busybox xargs -n1 busybox rm -rf",
    "rsync --remove-source-files": "rsync -a --remove-source-files $MNT/runs/ $OUT/copy/",
    "git clean mount": (
        "git init -q $OUT/r && git --git-dir=$OUT/r/.git --work-tree=$MNT clean -ffdxq"
    ),
    "git clean runs": (
        "git init -q $OUT/r && git --git-dir=$OUT/r/.git --work-tree=$MNT/runs clean -ffdxq"
    ),
    "rclone sync": (
        "mkdir $OUT/empty; rclone --config /dev/null --retries 1 sync --links $OUT/empty $MNT/runs"
    ),
    "rclone sync run": (
        "mkdir $OUT/empty; rclone --config /dev/null --retries 1 sync --links $OUT/empty $RUN"
    ),
    "rclone purge": "rclone --config /dev/null --retries 1 purge $RUN",
    "mv run": "mv $RUN $OUT/moved",
    "mv runs": "mv $MNT/runs $OUT/moved",
}


TOOLS = ("busybox", "dash", "git", "perl", "rclone", "rsync")

#: Tools that exit with status 0 even on errors, or report errors only as text.
SILENT = ("rmtree", "perl", "loop", "-exec", "rmdir")


@pytest.fixture(scope="module")
def spare(make_account):
    """Return an account for tests that delete checkpoints."""
    return make_account(runs=1, checkpoints=2)


@pytest.mark.parametrize("name", ACCIDENTS)
def test_accidental_removal_deletes_nothing(account, name, tmp_path):
    before = account.checkpoint_ids()
    assert len(before) == CHECKPOINTS
    run = account.path(f"runs/{account.server.account.run_ids[1]}")
    needs(tool for tool in TOOLS if tool in ACCIDENTS[name])
    account.server.journal.clear()
    assignments = (
        f"export RUN={quoted(run)} OUT={quoted(tmp_path)} PYTHON={quoted(sys.executable)}\n"
    )
    done = account.sh(assignments + ACCIDENTS[name], cwd=tmp_path)
    assert account.checkpoint_ids() == before
    assert deletes(account.server) == 0
    assert {entry.method for entry in account.server.journal.entries("api")} <= {"GET", "POST"}
    assert done.returncode != 0 or any(word in name for word in SILENT), done
    if "rmdir" not in name:
        assert "peration not permitted" in done.stderr or "rmtree" in name, done


@pytest.mark.parametrize("option", ["--delete", "--delete-before", "--delete-delay"])
def test_rsync_delete_onto_the_mount_deletes_nothing(account, option, tmp_path):
    # rsync removes directories first, in reverse order: sessions/ is first, and is rejected.
    needs(["rsync"])
    before = account.checkpoint_ids()
    (tmp_path / "empty").mkdir()
    done = account.sh(f"rsync -a {option} {quoted(tmp_path / 'empty')}/ $MNT/")
    assert "Operation not permitted" in done.stderr
    assert account.checkpoint_ids() == before
    assert deletes(account.server) == 0


def test_rsync_delete_onto_runs_stops_within_one_run(make_account, tmp_path):
    needs(["rsync"])
    account = make_account(runs=3, checkpoints=4)
    (tmp_path / "empty").mkdir()
    done = account.sh(f"rsync -a --delete {quoted(tmp_path / 'empty')}/ $MNT/runs/")
    assert "Operation not permitted" in done.stderr
    lost = {run.id: 4 - len(run.checkpoints) for run in account.server.account.runs()}
    assert sorted(lost.values()) in ([0, 0, 0], [0, 0, 4]), lost


@every_binding
def test_errors_explain_refusal_and_deliberate_removal(account):
    run = account.server.account.run_ids[0]
    account.sh(f"rm -rf runs/{run}")
    records = account.errors()
    assert f"/runs/{run}/info.json\tunlink\tEPERM\tonly checkpoints can be removed" in records
    assert "this process group was refused a removal less than a minute ago" in records
    assert "rm -r runs/<run_id>/checkpoints/<kind>/<name>" in records


@every_binding
def test_refusal_blocks_only_its_own_process_group(spare):
    run = spare.new_run("weights/1", "weights/2")
    one, two = f"{run}/checkpoints/weights/1", f"{run}/checkpoints/weights/2"
    done = spare.sh(f"rm -f README.md; rm -r {quoted(one)}")
    assert done.returncode == 1
    assert "less than a minute ago" in spare.errors()
    assert spare.checkpoint_ids(run) == {"weights/1", "weights/2"}
    assert spare.sh(f"rm -r {quoted(two)}").returncode == 0
    assert spare.checkpoint_ids(run) == {"weights/1"}


def everything_listed_is_gone(spare, run, *gone):
    for name in gone:
        assert spare.eventually(
            lambda name=name: not spare.path(f"{run}/checkpoints/{name}").exists()
        )


NAMES = ("weights/0001", "weights/old-1", "weights/old-2", "sampler_weights/0001")

DELIBERATE = {
    "rm one": ("rm -r $CK/weights/0001", {"weights/0001"}),
    "rm -rf one": ("rm -rf $CK/weights/0001", {"weights/0001"}),
    "rm one, with a slash": ("rm -r $CK/weights/0001/", {"weights/0001"}),
    "rm several": (
        "rm -r $CK/weights/0001 $CK/sampler_weights/0001",
        {"weights/0001", "sampler_weights/0001"},
    ),
    "rm glob": ("rm -r runs/*/checkpoints/weights/old-*", {"weights/old-1", "weights/old-2"}),
    "rm a kind": ("rm -r $CK/weights", {"weights/0001", "weights/old-1", "weights/old-2"}),
    "rm checkpoints": ("rm -r $CK", set(NAMES)),
    "find": ("find $CK/weights/0001 -delete", {"weights/0001"}),
    "find -exec": (
        "find $CK -type d -name 'old-*' -prune -exec rm -r {} +",
        {"weights/old-1", "weights/old-2"},
    ),
    "loop": (
        'for c in $CK/weights/old-*; do rm -r "$c"; done',
        {"weights/old-1", "weights/old-2"},
    ),
    "by hand": (
        "cd $CK/weights/0001 && rm info.json archive_url published expires_at tinker_path files"
        " archive.tar tensors.json export && cd .. && rmdir 0001",
        {"weights/0001"},
    ),
    "rmtree": (
        "$PYTHON -c 'import shutil, sys; shutil.rmtree(sys.argv[1])' $CK/weights/0001",
        {"weights/0001"},
    ),
    "glob and rmtree": (
        "$PYTHON -c 'import glob, shutil, sys\n"
        'for name in glob.glob(sys.argv[1] + "/weights/old-*"): shutil.rmtree(name)\' $CK',
        {"weights/old-1", "weights/old-2"},
    ),
    "perl": (
        "perl -MFile::Path=remove_tree -e 'remove_tree($ARGV[0])' $CK/weights/0001",
        {"weights/0001"},
    ),
    "busybox": ("busybox rm -r $CK/weights/0001", {"weights/0001"}),
    "dash": ("dash -c 'rm -r $CK/weights/old-*'", {"weights/old-1", "weights/old-2"}),
}


@pytest.mark.parametrize("name", DELIBERATE)
def test_deliberate_removal_deletes_only_its_arguments(spare, name):
    run = spare.new_run(*NAMES)
    before = spare.checkpoint_ids()
    script, gone = DELIBERATE[name]
    needs(tool for tool in TOOLS if tool in script)
    done = spare.sh(f"export CK={quoted(run + '/checkpoints')} PYTHON={sys.executable}\n{script}")
    assert done.stderr == ""
    assert done.returncode == 0
    run_id = run.partition("/")[2]
    assert before - spare.checkpoint_ids() == {f"{run_id}/{name}" for name in gone}
    assert deletes(spare.server) == len(gone)
    for name in gone:
        checkpoint = spare.path(f"{run}/checkpoints/{name}")
        assert spare.eventually(lambda checkpoint=checkpoint: not checkpoint.exists())
    left = set(NAMES) - gone
    for name in left:
        assert (spare.path(run) / "checkpoints" / name / "info.json").stat().st_size
    records = [line for line in spare.changes().splitlines() if run_id in line]
    assert len(records) == len(gone)
    assert all(line.endswith("done") and "\tdelete\t" in line for line in records)
    spare.server.account.remove_run(run_id)


def test_latest_link_is_updated_at_once_by_deletion(spare):
    run = spare.new_run("weights/1", "weights/2")
    assert spare.sh(f"readlink {run}/latest").stdout == "checkpoints/weights/2\n"
    assert spare.sh(f"rm -r {run}/checkpoints/weights/2").returncode == 0
    assert spare.eventually(
        lambda: spare.sh(f"readlink {run}/latest").stdout == "checkpoints/weights/1\n"
    )
    assert spare.sh(f"rm -r {run}/checkpoints/weights/1").returncode == 0
    assert spare.eventually(lambda: not spare.path(f"{run}/latest").is_symlink())
    assert spare.sh(f"ls {run}").stdout == "checkpoints\ninfo.json\n"
    assert spare.sh(f"ls {run}/checkpoints").stdout == ""


def test_removal_through_a_link_deletes_nothing(spare):
    run = spare.new_run("weights/1")
    done = spare.sh(f"rm -r {run}/latest")
    assert "Operation not permitted" in done.stderr
    assert spare.checkpoint_ids(run) == {"weights/1"}


@every_binding
def test_rmdir_of_checkpoint_with_files_raises_enotempty(spare):
    run = spare.new_run("weights/1")
    checkpoint = f"{run}/checkpoints/weights/1"
    done = spare.sh(
        f"rmdir {checkpoint} {run}/checkpoints/weights {run}/checkpoints; echo $?;"
        f" rm -r {checkpoint}"
    )
    assert done.stderr.count("Directory not empty") == 3
    assert done.stdout == "1\n"
    assert done.returncode == 0
    assert spare.checkpoint_ids(run) == set()
    done = spare.sh(f"rmdir {run}/checkpoints/weights && rmdir {run}/checkpoints")
    assert done.returncode == 0, done.stderr


def test_unlink_without_rmdir_only_hides(spare):
    run = spare.new_run("weights/1")
    checkpoint = f"{run}/checkpoints/weights/1"
    done = spare.sh(f"rm {checkpoint}/info.json; ls {checkpoint}; cat {checkpoint}/info.json")
    assert "info.json" not in done.stdout
    assert "No such file or directory" in done.stderr
    assert "info.json" in spare.sh(f"ls {checkpoint}").stdout, (
        "another process group sees all files"
    )
    assert spare.sh(f"cat {checkpoint}/tinker_path").stdout.endswith("/weights/1\n")
    assert deletes(spare.server) == 0


@pytest.mark.parametrize(
    "later", ["find $CK -type d -empty -delete", "rmdir $CK/weights/1", "rmdir -p $CK/weights/1"]
)
def test_rmdir_by_another_process_group_deletes_nothing(spare, later):
    run = spare.new_run("weights/1", "weights/2")
    assignments = f"CK={quoted(run + '/checkpoints')}\n"
    assert spare.sh(assignments + "rm $CK/weights/1/*").returncode == 0
    spare.sh(assignments + later)
    assert deletes(spare.server) == 0
    assert spare.checkpoint_ids(run) == {"weights/1", "weights/2"}
    assert spare.sh(assignments + "rm $CK/weights/1/*; rmdir $CK/weights/1").returncode == 0
    assert spare.checkpoint_ids(run) == {"weights/2"}


@every_binding
def test_open_file_stays_readable_after_removal(spare):
    run = spare.new_run("weights/1")
    checkpoint = spare.path(f"{run}/checkpoints/weights/1")
    with open(checkpoint / "info.json", "rb") as file:
        first = file.read(10)
        assert spare.sh(f"rm -r {quoted(checkpoint)}").returncode == 0
        assert first + file.read() != b""
        file.seek(0)
        assert b'"base_model"' in file.read()
    assert not [name for name in checkpoint.parent.parent.rglob("*") if "fuse_hidden" in name.name]


@pytest.mark.parametrize(
    ("response", "message", "detail"),
    [
        ({"status": 403, "body": {"detail": "ask your administrator"}}, "Permission denied", "ask"),
        ({"status": 409, "body": {"detail": "in use"}}, "Device or resource busy", "in use"),
        (
            {"status": 425, "body": {"detail": "being made"}},
            "Device or resource busy",
            "being made",
        ),
        ({"status": 500, "body": {"detail": "disk on fire"}}, "Input/output error", "fire"),
    ],
)
def test_rejected_deletion_fails_and_restores_the_files(spare, response, message, detail):
    run = spare.new_run("weights/1", "weights/2")
    checkpoint = f"{run}/checkpoints/weights/1"
    rule = spare.server.faults.add(
        "DELETE checkpoint",
        times=None,
        when=lambda entry: entry.path.endswith("weights/1"),
        headers={"x-should-retry": "false"},
        **response,
    )
    try:
        done = spare.sh(f"rm -r {checkpoint} {run}/checkpoints/weights/2")
        assert done.returncode == 1
        assert f"cannot remove '{checkpoint}': {message}" in done.stderr
        # A rejection by the server does not block the rest of the command.
        assert spare.checkpoint_ids(run) == {"weights/1"}
        assert spare.sh(f"ls {checkpoint}").stdout.split() == [
            "archive.tar",
            "archive_url",
            "expires_at",
            "export",
            "files",
            "info.json",
            "published",
            "tensors.json",
            "tinker_path",
        ]
        lines = [line for line in spare.changes().splitlines() if checkpoint in line]
        assert len(lines) == 1
        assert "failed: " in lines[0]
        assert detail in lines[0]
        assert any(checkpoint in line and detail in line for line in spare.errors().splitlines())
    finally:
        rule.remove()
    assert spare.sh(f"rm -r {checkpoint}").returncode == 0
    assert spare.checkpoint_ids(run) == set()


def test_removal_of_already_deleted_checkpoint_succeeds(spare):
    run = spare.new_run("weights/1")
    checkpoint = f"{run}/checkpoints/weights/1"
    spare.sh(f"ls {checkpoint}")
    spare.server.account.delete_checkpoint(run.partition("/")[2], "weights/1")
    done = spare.sh(f"rm -r {checkpoint}")
    assert "No such file or directory" in done.stderr
    assert deletes(spare.server) == 0
    assert spare.eventually(lambda: not spare.path(checkpoint).exists())


def test_removal_of_resaved_checkpoint_fails(spare):
    run = spare.new_run("weights/1")
    checkpoint = f"{run}/checkpoints/weights/1"
    spare.sh(f"ls {checkpoint}")
    spare.server.account.add_checkpoint(run.partition("/")[2], "weights/1", time_s=time.time() + 9)
    done = spare.sh(f"rm -r {checkpoint}")
    assert "Device or resource busy" in done.stderr
    assert deletes(spare.server) == 0
    assert "saved again" in spare.changes()
    assert spare.checkpoint_ids(run) == {"weights/1"}


@every_binding
def test_interrupted_deletion_is_recorded_in_changes(spare):
    run = spare.new_run("weights/1")
    checkpoint = f"{run}/checkpoints/weights/1"
    rule = spare.server.faults.add("DELETE checkpoint", hang=True)
    process = spare.start("rm", "-r", checkpoint)
    rule.wait_for(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 5.0
    assert process.returncode == -signal.SIGINT
    lines = [line for line in spare.changes().splitlines() if checkpoint in line]
    assert lines[0].endswith("in flight (its caller: EINTR)")
    rule.release()
    assert spare.eventually(lambda: "done (its caller: EINTR)" in spare.changes())
    assert spare.checkpoint_ids(run) == set()
    assert "rm[" in lines[0]


def test_deletion_that_times_out_is_recorded_in_changes(make_account):
    account = make_account(runs=0, settings={"timeout_s": 3.0})
    run = account.new_run("weights/1")
    checkpoint = f"{run}/checkpoints/weights/1"
    rule = account.server.faults.add("DELETE checkpoint", hang=True, times=None)
    try:
        done = account.sh(f"rm -r {checkpoint}")
        assert "Connection timed out" in done.stderr
        assert done.returncode == 1
        assert account.eventually(lambda: "failed: " in account.changes())
        assert account.sh(f"cat {checkpoint}/published").stdout == "0\n"
    finally:
        rule.remove()


def test_deleted_name_is_gone_despite_concurrent_listing(account):
    run = account.new_run(*[f"weights/{number}" for number in range(5)])
    directory = account.path(f"{run}/checkpoints/weights")
    os.stat(
        directory / "0/info.json"
    )  # readdirplus includes attributes for a process that called stat() on a file
    with os.scandir(directory) as entries:
        assert account.sh(f"rm -r {run}/checkpoints/weights/3").returncode == 0
        assert not (directory / "3").exists()
        names = [entry.name for entry in entries]
    assert {"0", "1", "2", "4"} <= set(names)
    assert not (directory / "3").exists()
