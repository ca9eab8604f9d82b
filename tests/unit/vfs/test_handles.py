"""Open files: what the kernel may keep of a path whose bytes become others."""

from tinkerfs.vfs.handles import Versions

KEEP, FORGET, NONE = (True, True), (False, True), (False, False)


def test_pages_stay_from_open_to_open_of_one_version():
    versions = Versions()
    assert versions.opened("a", "1") == FORGET
    assert versions.opened("a", "1") == KEEP
    versions.closed("a", "1")
    versions.closed("a", "1")
    assert versions.opened("a", "1") == KEEP
    assert versions.opened("b", "1") == FORGET


def test_another_version_begins_with_none():
    versions = Versions()
    versions.opened("a", "1")
    versions.closed("a", "1")
    assert versions.opened("a", "2") == FORGET
    assert versions.opened("a", "2") == KEEP


def test_while_two_are_open_the_newer_has_no_pages_and_the_older_leaves_none_behind():
    versions = Versions()
    versions.opened("a", "1")
    assert versions.opened("a", "2") == NONE
    assert versions.opened("a", "2") == NONE
    versions.closed("a", "1")
    assert versions.opened("a", "2") == FORGET, "the older one may have filled pages"
    assert versions.opened("a", "2") == KEEP
