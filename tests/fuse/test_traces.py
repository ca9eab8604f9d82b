"""`trace.pftrace` on real mounts: tools that copy it, waits, and Ctrl-C."""

import os
import time

import pytest

from tests.support.account import every_binding, make_account, needs
from tests.support.mount import interrupt_after, wait_until

__all__ = ["make_account"]

TRACE = "GET trace_export"

#: Copy `$TRACE` to `$OUT`.
COPIES = {
    "cp": "cp $TRACE $OUT",
    "cat": "cat $TRACE > $OUT",
    "dd": "dd if=$TRACE of=$OUT bs=1000 status=none",
    "stat-cp": "stat -L $TRACE && cp $TRACE $OUT",
    "rsync": "rsync -L $TRACE $OUT",
    "tar": "tar chf - $TRACE | tar xOf - > $OUT",
    "busybox": "busybox cp $TRACE $OUT",
    "gio": "gio copy $TRACE $OUT",
    "python": "python3 -c 'import shutil, sys; shutil.copyfile(*sys.argv[1:])' $TRACE $OUT",
}


@pytest.fixture
def account(make_account):
    return make_account(
        runs=2,
        checkpoints=1,
        retry_after="0",
        settings={"archive_build_limit": 0, "archive_timeout_s": 20.0},
    )


@pytest.fixture
def session(account):
    return account.server.account.session(account.server.account.session_ids()[0])


@every_binding
def test_tools_copy_every_byte_of_a_trace_that_grows(account, session, tmp_path):
    needs(tool for tool in ("busybox", "gio", "rsync"))
    for name, script in COPIES.items():
        session.trace_generation += 7
        session.trace_polls = 1
        account.refresh()
        out = tmp_path / name
        done = account.sh(f"TRACE=sessions/{session.id}/trace.pftrace OUT='{out}'\n{script}")
        assert done.returncode == 0, (name, done)
        content = account.server.trace(session.id)
        assert out.read_bytes() == content.read(0, content.size_bytes), name


def test_ctrl_c_interrupts_the_wait_for_a_trace(account, session):
    session.trace_polls = None
    path = f"sessions/{session.id}/trace.pftrace"
    process = account.start("cat", path)
    wait_until(lambda: account.server.journal.count(TRACE) > 1)
    assert (
        f"trace /.content/%~sessions/{session.id}"
        in account.path(".tinkerfs/stats.json").read_text()
    )
    began = time.monotonic()
    assert account.sh(f"ls -lR sessions && cat sessions/{session.id}/info.json").returncode == 0
    assert time.monotonic() - began < 5.0
    assert interrupt_after(process, 0.0) < 5.0
    session.trace_polls = 0
    assert account.path(path).read_bytes()
    process.communicate(timeout=10)


def test_trace_that_is_never_built_times_out(make_account):
    account = make_account(
        runs=2, checkpoints=1, retry_after="0", settings={"archive_timeout_s": 1.0}
    )
    session = account.server.account.session(account.server.account.session_ids()[0])
    session.trace_polls = None
    done = account.sh(f"cat sessions/{session.id}/trace.pftrace")
    assert "Connection timed out" in done.stderr, done


def test_failure_of_a_trace_is_recorded_in_errors(account, session):
    session.trace_error = "no events were recorded"
    done = account.sh(f"cat sessions/{session.id}/trace.pftrace")
    assert "Input/output error" in done.stderr, done
    assert "no events were recorded" in account.errors().splitlines()[-1]


def test_search_that_follows_links_is_limited(make_account):
    account = make_account(runs=20, checkpoints=1)
    done = account.sh("grep -R nothing sessions --include=trace.pftrace")
    assert "Device or resource busy" in done.stderr, done
    assert account.server.journal.count(TRACE) <= 8


def test_trace_is_not_opened_for_its_icon(account, session):
    path = account.path(f"sessions/{session.id}/trace.pftrace")
    with pytest.raises(OSError, match="Operation not supported"):
        os.open(path, os.O_RDONLY | os.O_NOATIME)
    assert account.server.journal.count(TRACE) == 0
