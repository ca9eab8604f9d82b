"""Copying a directory onto a checkpoint changes nothing, and writing a single control does.

A checkpoint directory has controls, files that act when written: `published`, `expires_at` and
`export`.
"""

import sys

import pytest

from tests.support.account import account, make_account, needs, quoted

__all__ = ["account", "make_account"]

#: $X is published and expires, $Y does neither; $OUT is a directory outside the mount.
COPIES = {
    "cp -r of names": "cp -r $X/* $Y/",
    "cp -r of what is in it": "cp -r $X/. $Y/",
    "cp -a": "cp -aT $X $Y",
    "cp -r into the parent": "cp -r $X $W2/",
    "cp of names, following": "cp $X/* $Y/",
    "cp -rL": "cp -rL $X/. $Y/",
    "cp -f": "cp -rf $X/* $Y/",
    "busybox cp": "busybox cp -r $X $W2/",
    "cp back from a copy": "cp -a $X $OUT/ && cp -a $OUT/0001/. $Y/",
    "rsync": "rsync -a $X/ $Y/",
    "rsync --inplace": "rsync -a --inplace --ignore-times $X/ $Y/",
    "tar": "tar -C $X -c . | tar -C $Y -x --no-overwrite-dir --overwrite",
    "copytree": (
        "$PYTHON -c 'import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)' $X $Y"
    ),
    "scp": "scp -rq $X/. $Y/",
    "cp -r after a refused removal": "rm -f README.md; cp -r $X/* $Y/",
    "mv": "cp -a $X $OUT/ && mv -f $OUT/0001/* $Y/",
}

BY_HAND = {
    "echo": "echo 1 > $Y/published",
    "cp onto the file": "cp $X/published $Y/published",
    "cp into the directory": "cp $X/published $Y/",
    "cp of both controls": "cp $X/expires_at $X/published $Y/",
    "cp -a": "cp -a $X/published $Y/published",
    "cat": "cat $X/published > $Y/published",
    "tee": "echo 1 | tee $Y/published",
    "dd": "echo 1 | dd of=$Y/published status=none",
    "tee onto two": "echo 1 | tee $X/published $Y/published",
    "Python": '$PYTHON -c \'import sys; open(sys.argv[1], "w").write("1")\' $Y/published',
    "a script that walks": (
        "$PYTHON -c 'import os, sys\n"
        "for path, _, names in os.walk(sys.argv[1]):\n"
        '    if "published" in names and open(path + "/published").read() == "0\\n":\n'
        '        open(path + "/published", "w").write("1")\' $W2'
    ),
    "find and sh": "find $W2 -name published -exec sh -c 'echo 1 > \"$1\"' - {} \\;",
    "after a copy by another command": "setsid -w cp -r $X/* $Y/; echo 1 > $Y/published",
}


@pytest.fixture
def pair(account):
    """Return two runs with a checkpoint each; the first one is published and expires."""
    runs = [account.new_run("weights/0001") for _ in range(2)]
    ids = [run.partition("/")[2] for run in runs]
    account.sh(f"echo 1 > {runs[0]}/checkpoints/weights/0001/published")
    account.sh(f"echo 30d > {runs[0]}/checkpoints/weights/0001/expires_at")
    account.server.journal.clear()
    yield runs
    for run_id in ids:
        account.server.account.remove_run(run_id)


def run_script(account, pair, tmp_path, text):
    needs(tool for tool in ("busybox", "rsync", "scp") if tool in text)
    source, target = (f"{run}/checkpoints/weights" for run in pair)
    assignments = f"W2=./{quoted(target)} OUT={quoted(tmp_path)} PYTHON={quoted(sys.executable)}\n"
    return account.sh(f"X=./{quoted(source)}/0001\n{assignments}Y=$W2/0001\n{text}")


def state(account, run):
    record = account.server.account.checkpoint(run.partition("/")[2], "weights/0001")
    return record.is_public, record.expires_at_s is not None


@pytest.mark.parametrize("name", COPIES)
def test_copy_of_directory_changes_no_checkpoint(account, pair, tmp_path, name):
    done = run_script(account, pair, tmp_path, COPIES[name])
    assert done.returncode != 0, done
    assert [state(account, run) for run in pair] == [(True, True), (False, False)]
    changes = {entry.method for entry in account.server.journal.entries("api")} - {"GET"}
    assert changes <= {"POST"}
    assert not [e for e in account.server.journal.entries("api") if "publish" in e.endpoint]
    assert not account.server.journal.count("POST create_session")
    listed = account.sh(f"ls {pair[1]}/checkpoints/weights/0001").stdout.split()
    assert len(listed) == 9


def test_rejected_control_write_reports_reason_and_hint(account, pair, tmp_path):
    done = run_script(account, pair, tmp_path, COPIES["cp -r of names"])
    assert "error writing" in done.stderr
    logged = [line for line in account.errors().splitlines() if pair[1] in line]
    assert any(
        "as a copy of a whole directory does; nothing was changed (hint" in t for t in logged
    )


@pytest.mark.parametrize("name", BY_HAND)
def test_control_written_by_itself_takes_effect(account, pair, tmp_path, name):
    done = run_script(account, pair, tmp_path, BY_HAND[name])
    if "another command" not in name:
        assert done.stderr == ""
    assert done.returncode == 0
    assert state(account, pair[1]) == (True, "both" in name)
