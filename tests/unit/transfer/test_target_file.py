"""Exports to directories that other users can write to, and to limited file systems."""

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.transfer.destination import Destination
from tinkerfs.transfer.target_file import TargetFile

DATA = bytes(range(256)) * 20_000
MTIME_NS = 1_700_000_000_000_000_000
STRANGER = 12_345
ZEROS = bytes(len(DATA))


@dataclass
class File:
    """Fake weights with all bytes available."""

    data: bytes = DATA
    key: str = "version 1"
    mtime_ns: int = MTIME_NS
    read_bytes: int = 0
    cached: Path | None = None

    def backing_fd(self, ctx):
        return None if self.cached is None else os.open(self.cached, os.O_RDONLY)

    @property
    def size_bytes(self):
        return len(self.data)

    def read_into(self, buffer, offset, ctx):
        assert ctx is BACKGROUND_CONTEXT
        chunk = self.data[offset : offset + len(buffer)]
        buffer[: len(chunk)] = chunk
        self.read_bytes += len(chunk)
        return len(chunk)


def target(directory, name="file", destination=None, **fields):
    return TargetFile(destination or Destination(str(directory)), name, File(**fields), name)


def copy(directory, name="file", **fields):
    """Copy a file; return how many bytes were read for it."""
    made = target(directory, name, **fields)
    for _ in made.copy(0o644, BACKGROUND_CONTEXT):
        pass
    return made.file.read_bytes


def partial(directory, name="file", **fields):
    """Return the path of the partial file of a copy that was interrupted after 1 MiB."""
    next(target(directory, name, **fields).copy(0o644, BACKGROUND_CONTEXT))
    [found] = (directory / name).parent.glob(".*.partial")
    return found


def within(seconds, work):
    """Run a function that may block on a thread; return whether it ended in time."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_copy_resumes_its_partial_file(tmp_path):
    partial_path = partial(tmp_path)
    assert partial_path.stat().st_size == 1 << 20
    assert target(tmp_path).resumable_bytes() == 1 << 20
    assert copy(tmp_path) == len(DATA) - (1 << 20)
    assert (tmp_path / "file").read_bytes() == DATA
    assert target(tmp_path).is_complete()
    assert sorted(os.listdir(tmp_path)) == [".tinkerfs-get", "file"]


@pytest.fixture
def cached(tmp_path_factory):
    """Return a file of the cache with the bytes."""
    path = tmp_path_factory.mktemp("cache") / "1"
    path.write_bytes(DATA)
    return path


def test_file_in_the_cache_is_copied_by_the_kernel(tmp_path, cached):
    assert copy(tmp_path, cached=cached) == 0
    assert (tmp_path / "file").read_bytes() == DATA


def test_copy_by_the_kernel_resumes_a_partial_file(tmp_path, cached):
    partial(tmp_path)
    made = target(tmp_path, cached=cached)
    assert list(made.copy(0o644, BACKGROUND_CONTEXT)) == [len(DATA) - (1 << 20)]
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_is_read_where_the_kernel_cannot_copy(tmp_path, cached, monkeypatch, error):
    def refuse(*_arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert copy(tmp_path, cached=cached) == len(DATA)
    assert (tmp_path / "file").read_bytes() == DATA


def test_cached_file_that_is_cut_is_read_on(tmp_path, cached):
    os.truncate(cached, 1000)
    assert copy(tmp_path, cached=cached) == len(DATA) - 1000
    assert (tmp_path / "file").read_bytes() == DATA


def test_full_disk_during_a_copy_by_the_kernel_fails(tmp_path, cached, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with pytest.raises(OSError, match="No space") as raised:
        copy(tmp_path, cached=cached)
    assert raised.value.errno == errno.ENOSPC


def write_file(path, data=ZEROS, mode=0o600):
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def chown(path):
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def owned_by_another(path, _elsewhere):
    chown(write_file(path))


def writable_by_others(path, _elsewhere):
    write_file(path, mode=0o666)


def linked_twice(path, elsewhere):
    path.unlink()
    path.hardlink_to(elsewhere)


def a_symlink(path, elsewhere):
    path.unlink()
    path.symlink_to(elsewhere)


def a_fifo(path, _elsewhere):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "prepare", [owned_by_another, writable_by_others, linked_twice, a_symlink, a_fifo]
)
def test_untrusted_partial_is_not_used(tmp_path, needs_root, prepare):
    directory, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.write_bytes(ZEROS)
    prepare(partial(directory), elsewhere)
    assert within(10, lambda: copy(directory))
    assert (directory / "file").read_bytes() == DATA
    assert elsewhere.read_bytes() == ZEROS
    assert (directory / "file").stat().st_nlink == 1
    assert sorted(os.listdir(directory)) == [".tinkerfs-get", "file"]


def test_partial_that_is_a_directory_is_an_error(tmp_path):
    partial_path = partial(tmp_path)
    partial_path.unlink()
    partial_path.mkdir()
    with pytest.raises(OSError) as raised:  # noqa: PT011  (the kernel's words)
        copy(tmp_path)
    assert raised.value.errno == errno.EISDIR


@pytest.mark.parametrize("name", ["sub/file", "sub/deep/file"])
def test_symlink_for_a_directory_is_not_followed(tmp_path, name):
    directory, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for each in (directory, elsewhere, elsewhere / "deep"):
        each.mkdir()
    (directory / "sub").symlink_to(elsewhere)
    (elsewhere / name.removeprefix("sub/")).write_bytes(b"mine")
    with pytest.raises(NotADirectoryError):
        target(directory, name).exists()
    with pytest.raises(NotADirectoryError, match="'sub' is not a directory, or is a symbolic"):
        copy(directory, name)
    assert not target(directory, name).is_complete()
    assert (elsewhere / name.removeprefix("sub/")).read_bytes() == b"mine"
    assert len(list(elsewhere.rglob("*"))) == 2


def test_symlink_for_the_file_is_replaced(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    (tmp_path / "file").symlink_to(elsewhere)
    assert copy(tmp_path) == len(DATA)
    assert elsewhere.read_bytes() == b"mine"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("kind", ["fifo", "symlink", "directory", "stranger"])
def test_untrusted_record_is_not_used(tmp_path, needs_root, kind):
    directory, record = tmp_path / "out", tmp_path / "out" / ".tinkerfs-get"
    copy(directory)
    recorded = record.read_bytes()
    record.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(recorded)
    if kind == "fifo":
        os.mkfifo(record)
    elif kind == "symlink":
        record.symlink_to(elsewhere)
    elif kind == "directory":
        record.mkdir()
    else:
        chown(write_file(record, recorded))
    whole = []
    assert within(10, lambda: whole.append(target(directory).is_complete()))
    assert whole == [False]
    assert within(10, lambda: copy(directory, "other"))
    assert (directory / "other").read_bytes() == DATA
    assert elsewhere.read_bytes() == recorded
    assert kind != "stranger" or record.read_bytes() == recorded


def test_file_of_another_owner_is_not_complete(tmp_path, needs_root):
    copy(tmp_path)
    file = tmp_path / "file"
    write_file(file, mode=0o644)
    os.utime(file, ns=(MTIME_NS, MTIME_NS))
    assert target(tmp_path).is_complete(), "length, time and record agree"
    chown(file)
    assert not target(tmp_path).is_complete()


def test_replaced_partial_is_an_error(tmp_path):
    steps = target(tmp_path).copy(0o644, BACKGROUND_CONTEXT)
    next(steps)
    [partial_path] = tmp_path.glob(".*.partial")
    write_file(partial_path)
    with pytest.raises(OSError, match="replaced"):
        list(steps)


def test_partials_of_other_users_are_not_removed(tmp_path, needs_root):
    other = partial(tmp_path, key="version 0")
    chown(other)
    copy(tmp_path)
    assert other.exists()
    mine = partial(tmp_path, key="version 0")
    copy(tmp_path, key="version 2")
    assert not mine.exists() or mine == other
