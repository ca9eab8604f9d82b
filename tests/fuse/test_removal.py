"""An accident deletes nothing, and what is meant deletes what it names: with the tools people use.

Each attempt is made in a session of its own, as from a shell of its own.
"""

import os
import signal
import sys
import time

import pytest

from tests.support.account import account, deletes, make_account, needs, quoted

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
    # Debian's busybox has no `find -delete`; its order is that of -depth.
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

#: They end well whatever happened, or say so in words alone.
SILENT = ("rmtree", "perl", "loop", "-exec", "rmdir")


@pytest.fixture(scope="module")
def spare(make_account):
    """An account whose checkpoints may go."""
    return make_account(runs=1, checkpoints=2)


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_deletes_nothing(account, name, tmp_path):
    before = account.checkpoint_ids()
    assert len(before) == CHECKPOINTS
    run = account.path(f"runs/{account.server.account.run_ids[1]}")
    needs(tool for tool in TOOLS if tool in ACCIDENTS[name])
    account.server.journal.clear()
    words = f"export RUN={quoted(run)} OUT={quoted(tmp_path)} PYTHON={quoted(sys.executable)}\n"
    done = account.sh(words + ACCIDENTS[name], cwd=tmp_path)
    assert account.checkpoint_ids() == before
    assert deletes(account.server) == 0
    assert {entry.method for entry in account.server.journal.entries("api")} <= {"GET", "POST"}
    assert done.returncode != 0 or any(word in name for word in SILENT), done
    if "rmdir" not in name:
        assert "peration not permitted" in done.stderr or "rmtree" in name, done


@pytest.mark.parametrize("option", ["--delete", "--delete-before", "--delete-delay"])
def test_rsync_delete_onto_the_mount_deletes_nothing(account, option, tmp_path):
    # It takes folders before files and the last one first: sessions/, which refuses.
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


def test_errors_tells_why_and_how_it_is_done_on_purpose(account):
    run = account.server.account.run_ids[0]
    account.sh(f"rm -rf runs/{run}")
    told = account.errors()
    assert f"/runs/{run}/info.json\tunlink\tEPERM\tonly checkpoints can be removed" in told
    assert "this process group was refused a removal less than a minute ago" in told
    assert "rm -r runs/<run_id>/checkpoints/<kind>/<name>" in told


def test_after_a_refusal_the_same_script_may_remove_nothing_and_another_everything(spare):
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
        " archive.tar tensors.json && cd .. && rmdir 0001",
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
def test_what_is_meant_deletes_just_what_it_names(spare, name):
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
        place = spare.path(f"{run}/checkpoints/{name}")
        assert spare.eventually(lambda place=place: not place.exists())
    left = set(NAMES) - gone
    for name in left:
        assert (spare.path(run) / "checkpoints" / name / "info.json").stat().st_size
    told = [line for line in spare.changes().splitlines() if run_id in line]
    assert len(told) == len(gone)
    assert all(line.endswith("done") and "\tdelete\t" in line for line in told)
    spare.server.account.remove_run(run_id)


def test_latest_follows_a_deletion_at_once(spare):
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


def test_a_link_is_no_way_to_a_deletion(spare):
    run = spare.new_run("weights/1")
    done = spare.sh(f"rm -r {run}/latest")
    assert "Operation not permitted" in done.stderr
    assert spare.checkpoint_ids(run) == {"weights/1"}


def test_a_bare_rmdir_is_enotempty_and_no_refusal(spare):
    run = spare.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    done = spare.sh(
        f"rmdir {place} {run}/checkpoints/weights {run}/checkpoints; echo $?; rm -r {place}"
    )
    assert done.stderr.count("Directory not empty") == 3
    assert done.stdout == "1\n"
    assert done.returncode == 0
    assert spare.checkpoint_ids(run) == set()
    done = spare.sh(f"rmdir {run}/checkpoints/weights && rmdir {run}/checkpoints")
    assert done.returncode == 0, done.stderr


def test_unlinking_alone_only_hides(spare):
    run = spare.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    done = spare.sh(f"rm {place}/info.json; ls {place}; cat {place}/info.json")
    assert "info.json" not in done.stdout
    assert "No such file or directory" in done.stderr
    assert "info.json" in spare.sh(f"ls {place}").stdout, "another group sees all"
    assert spare.sh(f"cat {place}/tinker_path").stdout.endswith("/weights/1\n")
    assert deletes(spare.server) == 0


@pytest.mark.parametrize(
    "later", ["find $CK -type d -empty -delete", "rmdir $CK/weights/1", "rmdir -p $CK/weights/1"]
)
def test_what_one_command_emptied_another_does_not_delete(spare, later):
    run = spare.new_run("weights/1", "weights/2")
    words = f"CK={quoted(run + '/checkpoints')}\n"
    assert spare.sh(words + "rm $CK/weights/1/*").returncode == 0
    spare.sh(words + later)
    assert deletes(spare.server) == 0
    assert spare.checkpoint_ids(run) == {"weights/1", "weights/2"}
    assert spare.sh(words + "rm $CK/weights/1/*; rmdir $CK/weights/1").returncode == 0
    assert spare.checkpoint_ids(run) == {"weights/2"}


def test_a_file_that_is_open_while_it_is_removed_reads_on(spare):
    run = spare.new_run("weights/1")
    place = spare.path(f"{run}/checkpoints/weights/1")
    with open(place / "info.json", "rb") as file:
        first = file.read(10)
        assert spare.sh(f"rm -r {quoted(place)}").returncode == 0
        assert first + file.read() != b""
        file.seek(0)
        assert b'"base_model"' in file.read()
    assert not [name for name in place.parent.parent.rglob("*") if "fuse_hidden" in name.name]


@pytest.mark.parametrize(
    ("answer", "words", "told"),
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
def test_a_delete_that_the_server_refuses_is_seen_and_brings_everything_back(
    spare, answer, words, told
):
    run = spare.new_run("weights/1", "weights/2")
    place = f"{run}/checkpoints/weights/1"
    rule = spare.server.faults.add(
        "DELETE checkpoint",
        times=None,
        when=lambda entry: entry.path.endswith("weights/1"),
        headers={"x-should-retry": "false"},
        **answer,
    )
    try:
        done = spare.sh(f"rm -r {place} {run}/checkpoints/weights/2")
        assert done.returncode == 1
        assert f"cannot remove '{place}': {words}" in done.stderr
        # A refusal by the server is none of ours: the rest of the command goes on.
        assert spare.checkpoint_ids(run) == {"weights/1"}
        assert spare.sh(f"ls {place}").stdout.split() == [
            "archive.tar",
            "archive_url",
            "expires_at",
            "files",
            "info.json",
            "published",
            "tensors.json",
            "tinker_path",
        ]
        lines = [line for line in spare.changes().splitlines() if place in line]
        assert len(lines) == 1
        assert "failed: " in lines[0]
        assert told in lines[0]
        assert any(place in line and told in line for line in spare.errors().splitlines())
    finally:
        rule.remove()
    assert spare.sh(f"rm -r {place}").returncode == 0
    assert spare.checkpoint_ids(run) == set()


def test_a_checkpoint_that_somebody_else_deleted_meanwhile_is_gone_without_an_accident(spare):
    run = spare.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    spare.sh(f"ls {place}")
    spare.server.account.delete_checkpoint(run.partition("/")[2], "weights/1")
    done = spare.sh(f"rm -r {place}")
    assert "No such file or directory" in done.stderr
    assert deletes(spare.server) == 0
    assert spare.eventually(lambda: not spare.path(place).exists())


def test_a_checkpoint_that_was_saved_again_meanwhile_is_not_deleted(spare):
    run = spare.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    spare.sh(f"ls {place}")
    spare.server.account.add_checkpoint(run.partition("/")[2], "weights/1", time_s=time.time() + 9)
    done = spare.sh(f"rm -r {place}")
    assert "Device or resource busy" in done.stderr
    assert deletes(spare.server) == 0
    assert "saved again" in spare.changes()
    assert spare.checkpoint_ids(run) == {"weights/1"}


def test_an_interrupted_delete_is_told_and_may_have_happened(spare):
    run = spare.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    rule = spare.server.faults.add("DELETE checkpoint", hang=True)
    process = spare.start("rm", "-r", place)
    rule.wait_for(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 1.0
    assert process.returncode == -signal.SIGINT
    lines = [line for line in spare.changes().splitlines() if place in line]
    assert lines[0].endswith("under way (its caller: EINTR)")
    rule.release()
    assert spare.eventually(lambda: "done (its caller: EINTR)" in spare.changes())
    assert spare.checkpoint_ids(run) == set()
    assert "rm[" in lines[0]


def test_a_delete_that_takes_too_long_is_told(make_account):
    account = make_account(runs=0, settings={"timeout_s": 1.0})
    run = account.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    rule = account.server.faults.add("DELETE checkpoint", hang=True, times=None)
    try:
        done = account.sh(f"rm -r {place}")
        assert "Connection timed out" in done.stderr
        assert done.returncode == 1
        assert account.eventually(lambda: "failed: " in account.changes())
        assert account.sh(f"cat {place}/published").stdout == "0\n"
    finally:
        rule.remove()


def test_what_is_deleted_is_gone_also_where_somebody_reads_the_folder_meanwhile(account):
    run = account.new_run(*[f"weights/{number}" for number in range(5)])
    folder = account.path(f"{run}/checkpoints/weights")
    os.stat(folder / "0/info.json")  # a process that looks at files gets attributes with listings
    with os.scandir(folder) as entries:
        assert account.sh(f"rm -r {run}/checkpoints/weights/3").returncode == 0
        assert not (folder / "3").exists()
        names = [entry.name for entry in entries]
    assert {"0", "1", "2", "4"} <= set(names)
    assert not (folder / "3").exists()
