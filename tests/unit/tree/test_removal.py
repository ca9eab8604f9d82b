import errno

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.tree.removal import Removals


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def removals(time):
    return Removals(time.clock)


def test_what_was_unlinked_is_back_after_a_minute(removals, time):
    removals.hide("one", "info.json")
    time.advance(50)
    removals.hide("one", "published")
    assert removals.hidden("one") == {"info.json", "published"}
    assert removals.hidden("other") == frozenset()
    time.advance(59)
    assert removals.hidden("one") == {"info.json", "published"}
    time.advance(1)
    assert removals.hidden("one") == frozenset()


def test_a_delete_that_failed_brings_everything_back(removals):
    removals.hide("one", "info.json")
    removals.restore("one")
    removals.restore("one")
    assert removals.hidden("one") == frozenset()


def test_a_group_that_was_refused_is_refused_until_it_leaves_off_for_a_minute(removals, time):
    removals.check(7, "/runs/r/checkpoints/weights/1")
    assert removals.refuse(7, "/README.md").errno == errno.EPERM
    for _ in range(5):
        time.advance(59)
        with pytest.raises(PermissionError, match="rm -r runs/"):
            removals.check(7, "/runs/r/checkpoints/weights/1")
    removals.check(8, "/runs/r/checkpoints/weights/1")
    time.advance(60)
    removals.check(7, "/runs/r/checkpoints/weights/1")
