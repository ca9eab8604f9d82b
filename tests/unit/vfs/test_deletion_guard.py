import errno

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.config import Settings
from tinkerfs.context import Caller
from tinkerfs.vfs import layout
from tinkerfs.vfs.copy_tracker import COPIED_FILES, COPIED_LINKS
from tinkerfs.vfs.deletion_guard import DeletionGuard
from tinkerfs.vfs.schema import Node

ROOT = Node(None, layout.ROOT, None, "/", None)
RM, OTHER, THIRD = (Caller(pid, 0, pid, pid) for pid in (7, 8, 9))


def checkpoint(name="1"):
    path = f"/runs/r/checkpoints/weights/{name}"
    return Node(None, layout._CHECKPOINT, None, path, ROOT)


def child(directory, name):
    spec = directory.spec.static_children[name]
    return Node(None, spec, None, f"{directory.path.rstrip('/')}/{name}", directory)


ONE, TWO = checkpoint("1"), checkpoint("2")


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def guard(time):
    return DeletionGuard(time.clock, Settings())


def unlink(guard, directory, name, caller=RM):
    guard.unlink(child(directory, name), lambda: caller)


def hidden(guard, directory, caller=RM):
    return guard.hidden(directory.path, caller.pgid)


def refuse(guard, caller=RM):
    with pytest.raises(PermissionError, match="only checkpoints can be removed") as failure:
        unlink(guard, ROOT, "README.md", caller)
    assert failure.value.errno == errno.EPERM


def test_hidden_names_are_visible_after_a_minute(guard, time):
    unlink(guard, ONE, "info.json")
    time.advance(50)
    unlink(guard, ONE, "published")
    assert hidden(guard, ONE) == {"info.json", "published"}
    assert hidden(guard, TWO) == frozenset()
    time.advance(59)
    assert hidden(guard, ONE) == {"info.json", "published"}
    assert guard.has_hidden_files
    time.advance(1)
    assert hidden(guard, ONE) == frozenset()
    assert not guard.has_hidden_files


def test_unlink_in_another_directory_does_not_extend_the_minute(guard, time):
    unlink(guard, ONE, "info.json")
    time.advance(30)
    unlink(guard, TWO, "info.json")
    time.advance(30)
    assert (hidden(guard, ONE), hidden(guard, TWO)) == (frozenset(), {"info.json"})


def test_unlink_hides_from_one_process_group_only(guard, time):
    unlink(guard, ONE, "info.json")
    time.advance(30)
    unlink(guard, ONE, "published", OTHER)
    assert (hidden(guard, ONE), hidden(guard, ONE, OTHER)) == ({"info.json"}, {"published"})
    assert hidden(guard, ONE, THIRD) == frozenset()
    time.advance(30)
    assert (hidden(guard, ONE), hidden(guard, ONE, OTHER)) == (frozenset(), {"published"})


def test_failed_deletion_shows_the_files_to_its_group(guard):
    for caller in (RM, OTHER):
        unlink(guard, ONE, "info.json", caller)
    with pytest.raises(TimeoutError), guard.deleting(ONE, RM):
        raise TimeoutError
    assert (hidden(guard, ONE), hidden(guard, ONE, OTHER)) == (frozenset(), {"info.json"})
    assert guard.has_hidden_files


def test_deletion_shows_the_names_to_every_group(guard):
    for caller in (RM, OTHER):
        unlink(guard, ONE, "info.json", caller)
    unlink(guard, TWO, "info.json")
    with guard.deleting(ONE, RM):
        pass
    assert hidden(guard, ONE) == hidden(guard, ONE, OTHER) == frozenset()
    assert hidden(guard, TWO) == {"info.json"}
    with guard.deleting(TWO, RM):
        pass
    assert not guard.has_hidden_files


def test_creation_shows_the_files_to_its_group(guard):
    unlink(guard, ONE, "info.json")
    directory = Node(None, ONE.spec, type("Entity", (), {"key": "key"}), ONE.path, ROOT)
    error = guard.refuse_new(directory, f"{ONE.path}/new", lambda: RM)
    assert error.errno == errno.EPERM
    assert not guard.has_hidden_files


def test_refused_removal_shows_the_files_to_its_group(guard):
    for directory in (ONE, TWO):
        unlink(guard, directory, "info.json")
        unlink(guard, directory, "published", OTHER)
    refuse(guard)
    for directory in (ONE, TWO):
        assert hidden(guard, directory) == frozenset()
        assert hidden(guard, directory, OTHER) == {"published"}


def test_refused_group_may_remove_nothing_until_a_minute_passed(guard, time):
    guard.check_removal(ONE.path, lambda: RM)
    refuse(guard)
    for _ in range(5):
        time.advance(59)
        with pytest.raises(PermissionError, match="rm -r runs/"):
            guard.check_removal(ONE.path, lambda: RM)
    guard.check_removal(ONE.path, lambda: OTHER)
    time.advance(60)
    assert guard.check_removal(ONE.path, lambda: RM) is RM


def test_group_that_copied_is_refused_with_the_same_hint(guard):
    for name in COPIED_FILES:
        guard.on_open(f"{ONE.path}/{name}", 0, lambda: RM)
    for name in COPIED_LINKS:
        guard.on_readlink(f"{ONE.path}/{name}", lambda: RM)
    for directory in (ONE, TWO):
        with pytest.raises(PermissionError, match="tinkerfs get PATH DEST, then rm -r PATH"):
            unlink(guard, directory, "info.json")


@pytest.mark.parametrize("directory", [ROOT, child(ROOT, "runs")])
def test_rmdir_of_permanent_directory_refuses_the_group(guard, directory):
    with pytest.raises(PermissionError, match="only checkpoints"):
        guard.check_rmdir(directory, RM)
    with pytest.raises(PermissionError, match="less than a minute ago"):
        unlink(guard, ONE, "info.json")


def test_read_only_mount_refuses_with_erofs(time):
    guard = DeletionGuard(time.clock, Settings(read_only=True))
    with pytest.raises(OSError, match="Read-only") as failure:
        unlink(guard, ONE, "info.json")
    assert failure.value.errno == errno.EROFS
    assert not guard.has_hidden_files
