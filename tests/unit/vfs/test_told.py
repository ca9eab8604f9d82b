"""A length that is a mere bound is remembered as told, whatever becomes known meanwhile."""

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import opened
from tinkerfs.context import RequestContext
from tinkerfs.demo.server import DemoServer
from tinkerfs.vfs.kernel_cache import SETTLED_S, SizeHintTracker

CALL = RequestContext(timeout_s=30.0)


@pytest.mark.parametrize(
    ("answers", "is_bound"),
    [([None], True), ([None, 9000], True), ([9000, None], True), ([9000], False)],
)
def test_a_bound_is_remembered_also_if_the_length_becomes_known_while_it_is_told(
    tmp_path, monkeypatch, answers, is_bound
):
    # The archive of a checkpoint is looked into for its tensors.json, by another process say.
    with (
        DemoServer(runs=1, checkpoints=2) as server,
        opened("process", server, tmp_path, time=FakeTime()) as driver,
    ):
        filesystem = driver.filesystem
        run = server.account.runs()[0]
        checkpoint = f"/runs/{run.id}/checkpoints/{run.checkpoints[0].id}"
        path = filesystem.realpath(f"{checkpoint}/archive.tar", CALL)
        filesystem._bounds._told_at.clear()
        rest = iter([*answers, *answers[-1:] * 9])
        weights = filesystem._model.weights
        monkeypatch.setattr(type(weights), "archive_bytes", lambda *_args: next(rest))
        filesystem.stat(path, CALL)
        assert (filesystem._bounds.reported_at(path) is not None) == is_bound


def test_bounds_after_an_exact_size_hold_until_it_settled():
    now = [100.0]
    bounds = SizeHintTracker(lambda: now[0])
    bounds.record("/x")
    now[0] += SETTLED_S - 0.01
    bounds.on_exact("/x")
    assert bounds.reported_at("/x") == 100.0, "a reply with the bound may be on its way"
    now[0] += 0.02
    assert bounds.reported_at("/x") == 100.0, "the kernel has no other size"
    bounds.on_exact("/x")
    assert bounds.reported_at("/x") is None
    bounds.on_exact("/x")
