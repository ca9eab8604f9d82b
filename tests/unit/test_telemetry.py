import errno
import os

import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.context import Caller
from tinkerfs.journal import KEPT_LINES
from tinkerfs.telemetry import Telemetry


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def telemetry(time):
    return Telemetry(time.clock)


def test_failures_are_told_newest_last_without_secrets(telemetry, time):
    telemetry.record_error("/a", "open", OSError(errno.EIO, "https://s/x?sig=secret tml-key"))
    time.advance(1)
    telemetry.record_error("/b\n", "stat", OSError(errno.EPERM, "no"))
    first, second = telemetry.errors_text().splitlines()
    assert first.split("\t")[1:4] == ["/a", "open", "EIO"]
    assert "secret" not in first
    assert "tml-key" not in first
    assert second == "2027-01-15T08:00:01Z\t/b\\n\tstat\tEPERM\tno"


def test_a_failure_that_repeats_is_counted_and_the_rest_is_kept(telemetry):
    telemetry.record_error("/first", "open", OSError(errno.EIO, "x"))
    for _ in range(1000):
        telemetry.record_error("/loop", "open", OSError(errno.EIO, "x"))
    lines = telemetry.errors_text().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("(1000 times)")
    assert telemetry.snapshot()["counters"] == {"errors": 1001}


def test_no_more_than_a_hundred_lines_are_kept(telemetry):
    for number in range(KEPT_LINES + 5):
        telemetry.record_error(f"/{number}", "open", OSError(errno.EIO, "x"))
        telemetry.begin_mutation(f"/{number}", "delete", Caller(1, 0, 1))
    assert len(telemetry.errors_text().splitlines()) == KEPT_LINES
    assert len(telemetry.changes_text().splitlines()) == KEPT_LINES
    assert "\t/5\t" in telemetry.errors_text().splitlines()[0]


def test_a_change_is_told_from_the_moment_it_is_asked_for(telemetry):
    change = telemetry.begin_mutation("/c", "delete", Caller(0, 1000, 0))
    assert (
        telemetry.changes_text() == "2027-01-15T08:00:00Z\t/c\tdelete\t?[0] uid 1000\tunder way\n"
    )
    change.abandoned_with = "EINTR"
    telemetry.end_mutation(change, "done")
    assert telemetry.changes_text().endswith("\tdone (its caller: EINTR)\n")


def test_the_snapshot_counts_calls_waits_and_hits(telemetry, time):
    telemetry.record_request("GET training_runs", "200")
    telemetry.record_request("GET training_runs", "503")
    telemetry.count("cache_hits", 3)
    telemetry.count("cache_misses")
    with telemetry.track_pending("archive /x"):
        time.advance(2)
        snapshot = telemetry.snapshot()
    assert snapshot["calls"] == {"GET training_runs": {"200": 1, "503": 1}}
    assert snapshot["calls_total"] == 2
    assert snapshot["pid"] == os.getpid()
    assert snapshot["cache_hit_rate"] == 0.75
    assert snapshot["waiting"] == [{"what": "archive /x", "for_s": 2.0}]
    assert snapshot["uptime_s"] == 2.0
    assert telemetry.snapshot()["waiting"] == []


@pytest.mark.expect_warnings("down")
def test_an_outage_is_a_warning_and_a_refusal_is_not(telemetry, caplog):
    telemetry.record_error("/a", "open", OSError(errno.EPERM, "no"))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    telemetry.record_error("/a", "open", errors.os_error_from_api(errors.ServerError("down"), "/a"))
    assert [r.levelname for r in caplog.records][-1] == "WARNING"
