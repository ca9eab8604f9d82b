"""Copies into directories that others write to, and onto file systems that lack something."""

import errno
import os
import threading
from dataclasses import dataclass

import pytest

from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.weights.destination import Destination
from tinkerfs.weights.exported_file import ExportedFile

DATA = bytes(range(256)) * 20_000
MTIME_NS = 1_700_000_000_000_000_000
STRANGER = 12_345
ZEROS = bytes(len(DATA))


@dataclass
class File:
    """Stands for weights that are there."""

    data: bytes = DATA
    key: str = "version 1"
    mtime_ns: int = MTIME_NS
    read_bytes: int = 0

    @property
    def size_bytes(self):
        return len(self.data)

    def read_into(self, buffer, offset, call):
        assert call is BACKGROUND_CONTEXT
        piece = self.data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self.read_bytes += len(piece)
        return len(piece)


def target(folder, name="file", destination=None, **fields):
    return ExportedFile(destination or Destination(str(folder)), name, File(**fields), name)


def copy(folder, name="file", **fields):
    """Copy; return how many bytes were read for it."""
    made = target(folder, name, **fields)
    for _ in made.copy(0o644, BACKGROUND_CONTEXT):
        pass
    return made.file.read_bytes


def partial(folder, name="file", **fields):
    """The name of the partial file, from a copy that was broken off after 1 MiB."""
    next(target(folder, name, **fields).copy(0o644, BACKGROUND_CONTEXT))
    [found] = (folder / name).parent.glob(".*.partial")
    return found


def within(seconds, work):
    """Do something on a thread that may wait for ever, and return whether it ended."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_copy_goes_on_in_its_partial_file(tmp_path):
    begun = partial(tmp_path)
    assert begun.stat().st_size == 1 << 20
    assert target(tmp_path).resumable_bytes() == 1 << 20
    assert copy(tmp_path) == len(DATA) - (1 << 20)
    assert (tmp_path / "file").read_bytes() == DATA
    assert target(tmp_path).is_whole()
    assert sorted(os.listdir(tmp_path)) == [".tinkerfs-get", "file"]


def plant(path, data=ZEROS, mode=0o600):
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def chown(path):
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def owned_by_another(path, _elsewhere):
    chown(plant(path))


def writable_by_others(path, _elsewhere):
    plant(path, mode=0o666)


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
    "plant_at", [owned_by_another, writable_by_others, linked_twice, a_symlink, a_fifo]
)
def test_partial_of_another_origin_is_not_used(tmp_path, needs_root, plant_at):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_bytes(ZEROS)
    plant_at(partial(folder), elsewhere)
    assert within(10, lambda: copy(folder))
    assert (folder / "file").read_bytes() == DATA
    assert elsewhere.read_bytes() == ZEROS
    assert (folder / "file").stat().st_nlink == 1
    assert sorted(os.listdir(folder)) == [".tinkerfs-get", "file"]


def test_partial_that_is_a_directory_is_an_error(tmp_path):
    begun = partial(tmp_path)
    begun.unlink()
    begun.mkdir()
    with pytest.raises(OSError) as raised:  # noqa: PT011  (the kernel's words)
        copy(tmp_path)
    assert raised.value.errno == errno.EISDIR


@pytest.mark.parametrize("name", ["sub/file", "sub/deep/file"])
def test_symlink_for_a_directory_is_not_followed(tmp_path, name):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for each in (folder, elsewhere, elsewhere / "deep"):
        each.mkdir()
    (folder / "sub").symlink_to(elsewhere)
    (elsewhere / name.removeprefix("sub/")).write_bytes(b"mine")
    with pytest.raises(NotADirectoryError):
        target(folder, name).exists()
    with pytest.raises(NotADirectoryError, match="'sub' is not a directory, or is a symbolic"):
        copy(folder, name)
    assert not target(folder, name).is_whole()
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
def test_record_of_another_origin_is_not_used(tmp_path, needs_root, kind):
    folder, record = tmp_path / "out", tmp_path / "out" / ".tinkerfs-get"
    copy(folder)
    told = record.read_bytes()
    record.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(told)
    if kind == "fifo":
        os.mkfifo(record)
    elif kind == "symlink":
        record.symlink_to(elsewhere)
    elif kind == "directory":
        record.mkdir()
    else:
        chown(plant(record, told))
    whole = []
    assert within(10, lambda: whole.append(target(folder).is_whole()))
    assert whole == [False]
    assert within(10, lambda: copy(folder, "other"))
    assert (folder / "other").read_bytes() == DATA
    assert elsewhere.read_bytes() == told
    assert kind != "stranger" or record.read_bytes() == told


def test_file_of_another_origin_is_not_whole(tmp_path, needs_root):
    copy(tmp_path)
    file = tmp_path / "file"
    plant(file, mode=0o644)
    os.utime(file, ns=(MTIME_NS, MTIME_NS))
    assert target(tmp_path).is_whole(), "what it rests on: length, time and record"
    chown(file)
    assert not target(tmp_path).is_whole()


def test_exchanged_partial_is_an_error(tmp_path):
    steps = target(tmp_path).copy(0o644, BACKGROUND_CONTEXT)
    next(steps)
    [begun] = tmp_path.glob(".*.partial")
    plant(begun)
    with pytest.raises(OSError, match="exchanged"):
        list(steps)


def test_partials_of_others_stay(tmp_path, needs_root):
    other = partial(tmp_path, key="version 0")
    chown(other)
    copy(tmp_path)
    assert other.exists()
    mine = partial(tmp_path, key="version 0")
    copy(tmp_path, key="version 2")
    assert not mine.exists() or mine == other
