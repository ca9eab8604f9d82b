"""Tests of the renewal of exports while their files are read."""

import time

import msgspec
import pytest

from tests.support.clocks import FakeTime
from tests.unit.weights.conftest import subject_of, truth
from tinkerfs.api import exports as api_exports
from tinkerfs.app import open_app
from tinkerfs.config import Settings
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.exports import ExportOptions
from tinkerfs.retry import Backoff
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.weights import export_renewal

MIB = 1 << 20
NAME = "adapter_model.safetensors"
HOUR_S, MINUTE_S = 3600, 60
NO_RETRY = {"x-should-retry": "false"}


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    monkeypatch.setattr(api_exports, "POLL", Backoff(0.01, 0.05))
    monkeypatch.setattr(export_renewal, "CHECK_S", 3600.0)


@pytest.fixture
def time_():
    """The time of the server and of the mount."""
    return FakeTime(time.time())


@pytest.fixture
def server(demo_server, time_):
    return demo_server(
        runs=1,
        size_bytes=20 * MIB,
        profile="official-0.36",
        exports=ExportOptions(),
        clock=lambda: time_.now,
    )


@pytest.fixture
def subject(server):
    return subject_of(server)


@pytest.fixture
def mount(server, weights_of, time_):
    return weights_of(server, clock=time_.clock)


@pytest.fixture
def record(mount, subject):
    """Return the record of an export for an hour."""
    return export(mount, subject)


def export(mount, subject, ttl_s=HOUR_S):
    return mount.exports.export(subject, ttl_s, "/x/export", BACKGROUND_CONTEXT)


def requests(server):
    """Return how many requests read the expiry, and how many set it."""
    count = server.journal.count
    return count("GET training_runs/{run}/checkpoints"), count("PUT ttl")


def saved(server, record):
    """Return the external weights of an export on the server, None if they are gone."""
    server.account.delete_expired()
    path = TinkerPath.parse(record.path)
    return server.account.checkpoint(path.run_id, f"{path.kind}/{path.name}")


def left_s(server, record, time_):
    return saved(server, record).expires_at_s - time_.now


def test_open_file_keeps_its_export_alive(server, mount, subject, record, time_):
    expected = truth(server, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.read(MIB, 0, BACKGROUND_CONTEXT) == expected[:MIB]
        server.journal.clear()
        for _minute in range(5 * 60):
            time_.advance(MINUTE_S)
            mount.exports.renewal.renew_due()
        assert requests(server) == (10, 10), "one of each in half of the duration"
        assert file.read(MIB, 19 * MIB, BACKGROUND_CONTEXT) == expected[19 * MIB :][:MIB]
    assert mount.telemetry.counter_value("exports_renewed") == 10
    assert mount.exports.find(subject).path == record.path


def test_open_archive_of_an_export_keeps_it_alive(server, mount, subject, record, time_):
    with mount.weights.open_archive(subject, BACKGROUND_CONTEXT) as file:
        server.journal.clear()
        for _minute in range(90):
            time_.advance(MINUTE_S)
            mount.exports.renewal.renew_due()
        assert requests(server) == (3, 3), "one renewal, and not one for each file"
        assert len(file.read(file.size_bytes, 0, BACKGROUND_CONTEXT)) == file.size_bytes


def test_closed_file_lets_its_export_expire(server, mount, subject, record, time_):
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        file.read(MIB, 0, BACKGROUND_CONTEXT)
        time_.advance(HOUR_S / 2)
        mount.exports.renewal.renew_due()
    server.journal.clear()
    for _minute in range(60):
        time_.advance(MINUTE_S)
        mount.exports.renewal.renew_due()
    assert requests(server) == (0, 0)
    assert saved(server, record) is None


def test_stat_and_listing_do_not_renew(server, mount, subject, record, time_):
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    time_.advance(HOUR_S * 0.75)
    server.journal.clear()
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    mount.weights.cached_bytes(subject, NAME)
    mount.exports.describe(subject)
    mount.exports.renewal.renew_due()
    assert server.journal.count() == 0


def test_read_renews_an_export_that_is_due(server, mount, subject, record, time_):
    time_.advance(HOUR_S * 0.4)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        file.read(MIB, 0, BACKGROUND_CONTEXT)
        server.journal.clear()
        time_.advance(HOUR_S * 0.2)
        for offset in range(8, 20, 4):
            file.read(MIB, offset * MIB, BACKGROUND_CONTEXT)
        while mount.exports.renewal._flights.in_flight():
            time.sleep(0.01)
    assert requests(server) == (1, 1)
    assert left_s(server, record, time_) == pytest.approx(HOUR_S, abs=2)


def test_two_mounts_renew_an_export_once(server, mount, weights_of, subject, record, time_):
    other = weights_of(server, clock=time_.clock)
    with (
        mount.weights.open(subject, NAME, BACKGROUND_CONTEXT),
        other.weights.open(subject, NAME, BACKGROUND_CONTEXT),
    ):
        time_.advance(HOUR_S / 2)
        server.journal.clear()
        mount.exports.renewal.renew_due()
        other.exports.renewal.renew_due()
    assert requests(server) == (1, 1)


def test_export_that_another_process_changes_is_left_to_it(
    server, mount, weights_of, subject, record, time_
):
    other = weights_of(server, clock=time_.clock)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
        time_.advance(HOUR_S / 2)
        server.journal.clear()
        with other.exports._records.lock(subject.cache_key):
            mount.exports.renewal.renew_due()
            assert requests(server) == (0, 0)
        mount.exports.renewal.renew_due()
    assert requests(server) == (1, 1)


@pytest.mark.parametrize("hours", [None, 24, 0.7])
def test_expiry_set_by_the_user_stays(server, mount, subject, record, time_, hours):
    wanted = None if hours is None else time_.now + hours * HOUR_S
    server.account.set_expiry(record.ref.run_id, saved(server, record), wanted)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
        server.journal.clear()
        time_.advance(HOUR_S / 2)
        mount.exports.renewal.renew_due()
        assert requests(server) == (1, 0)
        time_.advance(HOUR_S / 8)
        mount.exports.renewal.renew_due()
    assert requests(server) == (1, 0), "asked once"
    assert saved(server, record).expires_at_s == wanted
    text = mount.exports.describe(subject)
    assert ("without expiry" if wanted is None else "until 20") in text
    export(mount, subject)
    assert left_s(server, record, time_) == pytest.approx(HOUR_S, abs=2), "written by the user"


def test_export_that_the_user_prolonged_is_found_later(server, mount, subject, record, time_):
    wanted = time_.now + 24 * HOUR_S
    server.account.set_expiry(record.ref.run_id, saved(server, record), wanted)
    time_.advance(2 * HOUR_S)
    assert mount.exports.find(subject) is None
    server.journal.clear()
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        file.read(MIB, 0, BACKGROUND_CONTEXT)
    assert requests(server) == (1, 0)
    assert saved(server, record).expires_at_s == wanted
    time_.advance(30 * HOUR_S)
    server.journal.clear()
    assert mount.exports.recover(subject) is None
    assert mount.exports.recover(subject) is None
    assert requests(server) == (1, 0), "an expired export is forgotten"


def test_wrong_clock_does_not_stop_renewals(server, weights_of, subject, time_):
    wrong = FakeTime(time_.now + 600)
    mount = weights_of(server, clock=wrong.clock)
    record = export(mount, subject)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
        server.journal.clear()
        for _minute in range(3 * 60):
            time_.advance(MINUTE_S)
            wrong.advance(MINUTE_S)
            mount.exports.renewal.renew_due()
    assert requests(server) == (6, 6)
    assert left_s(server, record, time_) > HOUR_S / 3


@pytest.mark.expect_warnings("renew the export EIO")
def test_failure_is_reported_once_and_tried_again(server, mount, subject, record, time_):
    fault = server.faults.add(
        "PUT ttl", times=None, status=500, body={"detail": "not now"}, headers=NO_RETRY
    )
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        server.journal.clear()
        for _minute in range(50):
            time_.advance(MINUTE_S)
            mount.exports.renewal.renew_due()
        assert server.journal.count("PUT ttl") == 2, "at 30 and 45 minutes"
        lines = mount.telemetry.errors.text().decode().splitlines()
        assert len(lines) == 1
        assert "renew the export\tEIO" in lines[0]
        assert "not now" in lines[0]
        assert file.read(MIB, 0, BACKGROUND_CONTEXT) == truth(server, subject, NAME)[:MIB]
        fault.remove()
        time_.advance(5 * MINUTE_S)
        mount.exports.renewal.renew_due()
    assert left_s(server, record, time_) == pytest.approx(HOUR_S, abs=2)


def test_export_that_the_server_has_deleted_is_forgotten(server, mount, subject, record, time_):
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
        path = TinkerPath.parse(record.path)
        assert server.account.delete_checkpoint(path.run_id, f"{path.kind}/{path.name}")
        time_.advance(HOUR_S / 2)
        server.journal.clear()
        mount.exports.renewal.renew_due()
        mount.exports.renewal.renew_due()
    assert requests(server) == (1, 0)
    assert mount.exports.describe(subject) == "none"
    assert mount.telemetry.errors.text() == b""


def test_mount_that_changes_nothing_does_not_renew(server, mount, subject, record, time_):
    mount.exports.renewal.is_enabled = False
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        time_.advance(HOUR_S * 0.9)
        server.journal.clear()
        file.read(MIB, 0, BACKGROUND_CONTEXT)
        mount.exports.renewal.renew_due()
    assert requests(server) == (0, 0)


@pytest.mark.parametrize("read_only", [True, False])
def test_read_only_mount_has_no_renewals(server, tmp_path, read_only):
    settings = Settings(
        base_url=server.base_url, cache_dir=str(tmp_path / "cache"), read_only=read_only
    )
    with open_app(settings) as app:
        assert app.exports.renewal.is_enabled is not read_only


def test_external_checkpoint_of_the_user_is_not_renewed(server, mount, time_):
    run_id = server.account.run_ids[0]
    checkpoint = server.account.add_checkpoint(run_id, "external_weights/mine")
    server.account.set_expiry(run_id, checkpoint, time_.now + HOUR_S)
    mine = subject_of(server, "external_weights", number=-1)
    with mount.weights.open(mine, NAME, BACKGROUND_CONTEXT) as file:
        time_.advance(HOUR_S * 0.75)
        server.journal.clear()
        file.read(MIB, 0, BACKGROUND_CONTEXT)
        mount.exports.renewal.renew_due()
    assert requests(server) == (0, 0)


def test_thread_renews_and_ends_with_the_last_use(
    server, mount, subject, record, time_, monkeypatch
):
    monkeypatch.setattr(export_renewal, "CHECK_S", 0.01)
    renewal = mount.exports.renewal
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
        assert renewal._is_checking
        time_.advance(HOUR_S / 2)
        while not mount.telemetry.counter_value("exports_renewed"):
            time.sleep(0.01)
    while renewal._is_checking:
        time.sleep(0.01)
    assert not renewal._uses


def test_record_of_an_earlier_version_is_not_renewed(server, mount, subject, record, time_):
    old = msgspec.structs.replace(record, ttl_s=0)
    mount.exports._records.put(subject.cache_key, old)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
        time_.advance(HOUR_S * 0.75)
        server.journal.clear()
        mount.exports.renewal.renew_due()
    assert requests(server) == (0, 0)
