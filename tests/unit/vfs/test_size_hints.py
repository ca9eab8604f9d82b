"""Tests of size hints: stat() records a reported upper bound until it expires."""

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import opened
from tests.support.faulty_server import FaultyServer
from tinkerfs.context import RequestContext
from tinkerfs.vfs.kernel_cache import ATTR_SETTLED_S, SizeHintTracker

CTX = RequestContext(timeout_s=30.0)


@pytest.mark.parametrize(
    ("sizes", "is_bound"),
    [([None], True), ([None, 9000], True), ([9000, None], False), ([9000], False)],
)
def test_stat_records_a_bound_iff_it_reports_one(tmp_path, monkeypatch, sizes, is_bound):
    # The exact size may become available, or change, at any time through another request.
    with (
        FaultyServer(runs=1, checkpoints=2) as server,
        opened("process", server, tmp_path, time=FakeTime()) as driver,
    ):
        filesystem = driver.filesystem
        run = server.account.runs()[0]
        checkpoint = f"/runs/{run.id}/checkpoints/{run.checkpoints[0].id}"
        path = filesystem.realpath(f"{checkpoint}/archive.tar", CTX)
        filesystem._size_hints._reported_at.clear()
        remaining = iter([*sizes, *sizes[-1:] * 9])
        weights = filesystem._backend.weights
        monkeypatch.setattr(type(weights), "archive_bytes", lambda *_args: next(remaining))
        assert (filesystem.stat(path, CTX).size_bytes != 9000) == is_bound
        assert (filesystem._size_hints.reported_at(path) is not None) == is_bound


def test_on_exact_removes_the_hint_only_after_it_settled():
    now = [100.0]
    hints = SizeHintTracker(lambda: now[0])
    hints.record("/x")
    now[0] += ATTR_SETTLED_S - 0.01
    hints.on_exact("/x")
    assert hints.reported_at("/x") == 100.0, "a reply with the bound may still arrive"
    now[0] += 0.02
    assert hints.reported_at("/x") == 100.0, "the kernel has received no other size"
    hints.on_exact("/x")
    assert hints.reported_at("/x") is None
    hints.on_exact("/x")


def test_hint_expires_after_ten_seconds():
    now = [100.0]
    hints = SizeHintTracker(lambda: now[0])
    hints.record("/x")
    now[0] += 10.0
    assert hints.reported_at("/x") == 100.0
    now[0] += 0.1
    assert hints.reported_at("/x") is None
