"""Open files: what the kernel may keep of a path whose bytes become others."""

from tinkerfs.vfs.handles import PageCacheTracker

KEEP, FORGET, NONE = (True, True), (False, True), (False, False)


def test_pages_stay_from_open_to_open_of_one_version():
    versions = PageCacheTracker()
    assert versions.on_open("a", "1") == FORGET
    assert versions.on_open("a", "1") == KEEP
    versions.on_close("a", "1")
    versions.on_close("a", "1")
    assert versions.on_open("a", "1") == KEEP
    assert versions.on_open("b", "1") == FORGET


def test_another_version_begins_with_none():
    versions = PageCacheTracker()
    versions.on_open("a", "1")
    versions.on_close("a", "1")
    assert versions.on_open("a", "2") == FORGET
    assert versions.on_open("a", "2") == KEEP


def test_while_two_are_open_the_newer_has_no_pages_and_the_older_leaves_none_behind():
    versions = PageCacheTracker()
    versions.on_open("a", "1")
    assert versions.on_open("a", "2") == NONE
    assert versions.on_open("a", "2") == NONE
    versions.on_close("a", "1")
    assert versions.on_open("a", "2") == FORGET, "the older one may have filled pages"
    assert versions.on_open("a", "2") == KEEP
