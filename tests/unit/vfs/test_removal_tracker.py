import errno

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.vfs.removal_tracker import MOVE_HINT, RemovalTracker


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def removals(time):
    return RemovalTracker(time.clock)


def test_hidden_names_are_visible_after_a_minute(removals, time):
    removals.hide("one", "info.json", 7)
    time.advance(50)
    removals.hide("one", "published", 7)
    assert removals.hidden("one", 7) == {"info.json", "published"}
    assert removals.hidden("other", 7) == frozenset()
    time.advance(59)
    assert removals.hidden("one", 7) == {"info.json", "published"}
    time.advance(1)
    assert removals.hidden("one", 7) == frozenset()
    assert not removals.is_hidden_in("one")


def test_hide_affects_one_process_group_only(removals, time):
    removals.hide("one", "info.json", 7)
    time.advance(30)
    removals.hide("one", "published", 8)
    assert (removals.hidden("one", 7), removals.hidden("one", 8)) == ({"info.json"}, {"published"})
    assert removals.hidden("one", 9) == frozenset()
    time.advance(30)
    assert (removals.hidden("one", 7), removals.hidden("one", 8)) == (frozenset(), {"published"})


def test_restore_makes_hidden_names_visible(removals):
    removals.hide("one", "info.json", 7)
    removals.hide("one", "info.json", 8)
    removals.restore("one", 7)
    removals.restore("one", 7)
    assert removals.hidden("one", 7) == frozenset()
    assert removals.hidden("one", 8) == {"info.json"}
    removals.restore("one")
    assert not removals.is_hidden_in("one")


def test_deny_restores_the_names_of_the_group(removals):
    for key in ("one", "two"):
        removals.hide(key, "info.json", 7)
        removals.hide(key, "published", 8)
    removals.deny(7, "/README.md")
    for key in ("one", "two"):
        assert removals.hidden(key, 7) == frozenset()
        assert removals.hidden(key, 8) == {"published"}


def test_check_after_deny_gives_the_same_hint(removals):
    removals.deny(7, "/runs/r/checkpoints/weights/1/info.json", MOVE_HINT)
    with pytest.raises(PermissionError, match="tinkerfs get PATH DEST, then rm -r PATH"):
        removals.check(7, "/runs/r/checkpoints/weights/1/published")


def test_check_after_deny_fails_until_a_minute_has_passed(removals, time):
    removals.check(7, "/runs/r/checkpoints/weights/1")
    assert removals.deny(7, "/README.md").errno == errno.EPERM
    for _ in range(5):
        time.advance(59)
        with pytest.raises(PermissionError, match="rm -r runs/"):
            removals.check(7, "/runs/r/checkpoints/weights/1")
    removals.check(8, "/runs/r/checkpoints/weights/1")
    time.advance(60)
    removals.check(7, "/runs/r/checkpoints/weights/1")
