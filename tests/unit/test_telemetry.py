import errno
import os

import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.context import Caller
from tinkerfs.journal import MAX_LOG_LINES
from tinkerfs.telemetry import Telemetry


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def telemetry(time):
    return Telemetry(time.clock)


def test_errors_are_listed_newest_last_without_secrets(telemetry, time):
    telemetry.record_error("/a", "open", OSError(errno.EIO, "https://s/x?sig=secret tml-key"))
    time.advance(1)
    telemetry.record_error("/b\n", "stat", OSError(errno.EPERM, "no"))
    first, second = telemetry.errors.text().decode().splitlines()
    assert first.split("\t")[1:4] == ["/a", "open", "EIO"]
    assert "secret" not in first
    assert "tml-key" not in first
    assert second == "2027-01-15T08:00:01Z\t/b\\n\tstat\tEPERM\tno"


def test_repeated_error_increments_its_count(telemetry):
    telemetry.record_error("/first", "open", OSError(errno.EIO, "x"))
    for _ in range(1000):
        telemetry.record_error("/loop", "open", OSError(errno.EIO, "x"))
    lines = telemetry.errors.text().decode().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("(1000 times)")
    assert telemetry.snapshot()["counters"] == {"errors": 1001}


def test_errors_and_changes_have_at_most_100_lines(telemetry):
    for number in range(MAX_LOG_LINES + 5):
        telemetry.record_error(f"/{number}", "open", OSError(errno.EIO, "x"))
        telemetry.begin_mutation(f"/{number}", "delete", Caller(1, 0, 1))
    assert len(telemetry.errors.text().decode().splitlines()) == MAX_LOG_LINES
    assert len(telemetry.changes.text().decode().splitlines()) == MAX_LOG_LINES
    assert "\t/5\t" in telemetry.errors.text().decode().splitlines()[0]


def test_change_is_listed_from_its_request_on(telemetry):
    change = telemetry.begin_mutation("/c", "delete", Caller(0, 1000, 0))
    assert (
        telemetry.changes.text().decode()
        == "2027-01-15T08:00:00Z\t/c\tdelete\t?[0] uid 1000\tin flight\n"
    )
    change.abandoned_with = "EINTR"
    telemetry.end_mutation(change, "done")
    assert telemetry.changes.text().decode().endswith("\tdone (its caller: EINTR)\n")


def test_snapshot_has_requests_waits_and_hits(telemetry, time):
    telemetry.record_request("GET training_runs", "200")
    telemetry.record_request("GET training_runs", "503")
    telemetry.count("metadata_cache_hits", 3)
    telemetry.count("metadata_cache_misses")
    with telemetry.track_pending("archive /x"):
        time.advance(2)
        snapshot = telemetry.snapshot()
    assert snapshot["api_requests"] == {"GET training_runs": {"200": 1, "503": 1}}
    assert snapshot["api_requests_total"] == 2
    assert snapshot["pid"] == os.getpid()
    assert snapshot["metadata_cache_hit_ratio"] == 0.75
    assert snapshot["pending"] == [{"what": "archive /x", "elapsed_s": 2.0}]
    assert snapshot["uptime_s"] == 2.0
    assert telemetry.snapshot()["pending"] == []


@pytest.mark.expect_warnings("down")
def test_upstream_failure_is_logged_as_a_warning(telemetry, caplog):
    telemetry.record_error("/a", "open", OSError(errno.EPERM, "no"))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    telemetry.record_error("/a", "open", errors.os_error_from_api(errors.ServerError("down"), "/a"))
    assert [r.levelname for r in caplog.records][-1] == "WARNING"
