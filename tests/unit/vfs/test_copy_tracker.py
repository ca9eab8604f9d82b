import pytest

from tests.support.clocks import FakeTime
from tinkerfs.context import Caller
from tinkerfs.vfs import copy_tracker, layout
from tinkerfs.vfs.copy_tracker import COPIED_FILES, COPIED_LINKS, CopyTracker
from tinkerfs.vfs.schema import ControlFile, GeneratedFile, Symlink

ONE, TWO = "/runs/r/checkpoints/weights/1", "/runs/r/checkpoints/weights/2"
MOVER = Caller(70, 0, 70, 70)
SIBLING = Caller(71, 0, 70, 71)
STRANGER = Caller(80, 0, 80, 80)


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def copies(time):
    return CopyTracker(time.clock)


def open_files(copies, directory, caller, names=COPIED_FILES):
    for name in names:
        copies.on_read(directory, name, caller)


def read_links(copies, directory, caller, names=COPIED_LINKS):
    for name in names:
        copies.on_read(directory, name, caller)


def copy(copies, directory, caller=MOVER):
    open_files(copies, directory, caller)
    read_links(copies, directory, caller)
    copies.on_list(directory, caller)


def test_tracked_names_are_those_of_the_table():
    specs = {spec.name: spec for spec in layout._CHECKPOINT_SPECS}
    assert all(isinstance(specs[name], GeneratedFile | ControlFile) for name in COPIED_FILES)
    assert {name for name, spec in specs.items() if isinstance(spec, Symlink)} == set(COPIED_LINKS)


def test_process_that_read_every_name_has_copied(copies):
    copy(copies, ONE)
    assert copies.has_copied(ONE, MOVER)
    assert copies.has_copied(ONE, SIBLING), "rm after cp in one script"
    assert not copies.has_copied(TWO, MOVER)
    assert not copies.has_copied(ONE, STRANGER)


@pytest.mark.parametrize("missing", [*COPIED_FILES, *COPIED_LINKS])
def test_process_that_skipped_a_name_has_not_copied(copies, missing):
    open_files(copies, ONE, MOVER, [name for name in COPIED_FILES if name != missing])
    read_links(copies, ONE, MOVER, [name for name in COPIED_LINKS if name != missing])
    copies.on_list(ONE, MOVER)
    assert not copies.has_copied(ONE, MOVER)


def test_two_processes_that_read_half_each_have_not_copied(copies):
    read_links(copies, ONE, SIBLING)  # ls -l
    open_files(copies, ONE, MOVER)  # grep -r
    copies.on_list(ONE, MOVER)
    assert not copies.has_copied(ONE, Caller(72, 0, 70, 72))


def test_process_that_opened_all_without_listing_has_copied(copies):
    open_files(copies, ONE, MOVER)
    assert copies.has_copied(ONE, MOVER)
    assert not copies.has_copied(ONE, SIBLING), "grep -r, followed by rm"
    copies.on_list(ONE, MOVER)
    assert not copies.has_copied(ONE, MOVER), "a script that reads all files before rmtree"
    open_files(copies, ONE, MOVER, ["published"])
    assert copies.has_copied(ONE, MOVER)


def test_copy_expires_after_the_last_read_of_its_group(copies, time):
    copy(copies, ONE)
    for _ in range(5):  # the first directory of a long copy is remembered
        time.advance(copy_tracker.COPY_WINDOW_S - 1)
        copies.on_read(TWO, "info.json", SIBLING)
    assert copies.has_copied(ONE, MOVER)
    time.advance(copy_tracker.COPY_WINDOW_S)
    assert not copies.has_copied(ONE, MOVER)


def test_expired_reads_are_not_part_of_a_copy(copies, time):
    open_files(copies, ONE, MOVER)
    time.advance(copy_tracker.COPY_WINDOW_S)
    read_links(copies, ONE, MOVER)
    assert not copies.has_copied(ONE, MOVER)


def test_forget_removes_copies_of_a_directory(copies):
    copy(copies, ONE)
    copies.forget(ONE)
    assert not copies.has_copied(ONE, SIBLING)


def test_reads_are_bounded_and_the_oldest_is_evicted(copies, monkeypatch):
    monkeypatch.setattr(copy_tracker, "_MAX_READS", 100)
    open_files(copies, ONE, MOVER)
    for number in range(100):
        read_links(copies, f"{TWO}{number}", MOVER)
        assert len(copies._reads) <= 100
    assert len(copies._reads) > 80
    read_links(copies, ONE, MOVER)
    assert not copies.has_copied(ONE, MOVER)


def test_more_copies_than_the_bound_count_as_everything(copies, monkeypatch):
    monkeypatch.setattr(copy_tracker, "_MAX_COPIES", 10)
    for number in range(11):
        copy(copies, f"{TWO}{number}")
    assert copies.has_copied(f"{TWO}0", SIBLING)
    assert not copies._copies[70].directories


def test_refused_write_marks_the_directory_until_it_expires(copies, time):
    copies.on_write_refused("key", "info.json", 70)
    assert copies.is_written_over("key", 70)
    assert not copies.is_written_over("other", 70)
    assert not copies.is_written_over("key", 80)
    time.advance(copy_tracker.WRITE_WINDOW_S)
    assert not copies.is_written_over("key", 70)


@pytest.mark.parametrize(
    ("name", "is_copy"),
    [
        (".info.json.FEZhO8", True),  # rsync
        (".archive.tar.21527", True),
        ("files", True),
        (".published.swp", False),  # vim, nano
        ("4913", False),
        ("published~", False),
        ("sedXq31aB", False),
    ],
)
def test_refused_new_name_counts_if_a_read_only_file_is_meant(copies, name, is_copy):
    copies.on_write_refused("key", name, 70)
    assert copies.is_written_over("key", 70) is is_copy
