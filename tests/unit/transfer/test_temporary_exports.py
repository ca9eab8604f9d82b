"""Tests of exports for the time of a transfer."""

import time
from types import SimpleNamespace

import msgspec
import pytest

from tests.support.clocks import FakeTime
from tests.support.server import demo_server
from tests.unit.weights.conftest import subject_of, weights_of
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.exports import ExportOptions
from tinkerfs.transfer.exports import TemporaryExports

__all__ = ["demo_server", "weights_of"]


@pytest.fixture
def time_():
    return FakeTime(time.time())


@pytest.fixture
def server(demo_server, time_):
    return demo_server(
        runs=1,
        checkpoints=1,
        profile="official-0.36",
        exports=ExportOptions(),
        clock=lambda: time_.now,
    )


@pytest.fixture
def mount(server, weights_of, time_):
    return weights_of(server, clock=time_.clock)


@pytest.fixture
def ref(server):
    version = subject_of(server)
    return SimpleNamespace(version=version, checkpoint=SimpleNamespace(tinker_path=version.about))


def transfer(mount, ref):
    """Export a checkpoint, and end the transfer."""
    with TemporaryExports(mount.exports, lambda _checkpoint: None, lambda _text: None) as exports:
        exports.export(ref)
        exports.delete_all()


def test_own_export_is_deleted_after_the_transfer(server, mount, ref):
    transfer(mount, ref)
    assert mount.exports.find(ref.version) is None
    assert server.journal.count("DELETE checkpoint") == 1


def test_export_is_renewed_until_the_transfer_ends(server, mount, ref, time_):
    renewal = mount.exports.renewal
    with TemporaryExports(mount.exports, lambda _checkpoint: None, lambda _text: None) as exports:
        exports.export(ref)
        for number in range(1, 4):
            time_.advance(1800)
            renewal.renew_due()
            assert server.journal.count("PUT ttl") == number
    time_.advance(1800)
    renewal.renew_due()
    assert server.journal.count("PUT ttl") == 3


def test_export_of_another_process_stays_with_its_expiry(server, mount, ref):
    # As if a mount had exported it while the command waited for the lock.
    record = mount.exports.export(ref.version, 86_400, "/x/export", BACKGROUND_CONTEXT)
    record = msgspec.structs.replace(record, process="1:1")
    mount.exports._records.put(ref.version.cache_key, record)
    transfer(mount, ref)
    assert mount.exports.find(ref.version) == record
    assert server.journal.count("DELETE checkpoint") == 0
    assert server.journal.count("PUT ttl") == 0
