"""Tests of PageCacheTracker: pages of several tracker of one path."""

from tinkerfs.vfs.kernel_cache import PageCacheTracker

KEEP, DISCARD, NO_CACHE = (True, True), (False, True), (False, False)


def test_on_open_of_the_same_version_keeps_the_pages():
    tracker = PageCacheTracker()
    assert tracker.on_open("a", "1") == DISCARD
    assert tracker.on_open("a", "1") == KEEP
    tracker.on_close("a", "1")
    tracker.on_close("a", "1")
    assert tracker.on_open("a", "1") == KEEP
    assert tracker.on_open("b", "1") == DISCARD


def test_on_open_of_another_version_discards_the_pages():
    tracker = PageCacheTracker()
    tracker.on_open("a", "1")
    tracker.on_close("a", "1")
    assert tracker.on_open("a", "2") == DISCARD
    assert tracker.on_open("a", "2") == KEEP


def test_on_open_while_another_version_is_open_does_not_cache():
    tracker = PageCacheTracker()
    tracker.on_open("a", "1")
    assert tracker.on_open("a", "2") == NO_CACHE
    assert tracker.on_open("a", "2") == NO_CACHE
    tracker.on_close("a", "1")
    assert tracker.on_open("a", "2") == DISCARD, "the older version may have filled pages"
    assert tracker.on_open("a", "2") == KEEP
