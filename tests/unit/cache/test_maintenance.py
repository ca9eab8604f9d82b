"""Maintenance of the block cache: list, verify and clear it."""

import contextlib
import os

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.cache.maintenance import CorruptRange, cached_files, clear, verify
from tinkerfs.concurrency import run_in_thread
from tinkerfs.telemetry import Telemetry

BLOCK = 64 << 10


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def cache(tmp_path, time):
    cache = BlockCache(
        tmp_path / "blocks", Telemetry(), time.clock, max_bytes=1 << 30, min_free_bytes=0
    )
    for name in ("one", "two"):
        with contextlib.closing(cache.open(name, f"tinker://{name}")) as file:
            for index in range(3):
                file.put(index, name.encode() * BLOCK)
        time.advance(100)
    return cache


def everything(_description):
    return True


def test_cached_files_are_listed_latest_first(cache, time):
    with contextlib.closing(cache.open("one", "tinker://one")) as file:
        file.read(0, 0, 9, 3 * BLOCK)
        one, two = cached_files(cache.directory)
        assert (one.description, two.description) == ("tinker://one", "tinker://two")
        assert (one.is_open, two.is_open) == (True, False)
        assert (one.data_bytes, one.last_access_ns) == (9 * BLOCK, time.now * 1e9)
        assert one.fetched_ns <= two.fetched_ns
        assert 9 * BLOCK <= one.size_bytes < 10 * BLOCK


def test_missing_cache_is_empty(tmp_path):
    assert cached_files(tmp_path / "none") == []
    assert verify(tmp_path / "none", everything) == (0, [])
    assert clear(tmp_path / "none", everything) == 0


def files_of(cache, about):
    """Return the directory of a file, and the path of its data."""
    [directory] = [each for each in cache.directory.iterdir() if read_about(each)[0] == about]
    return directory, directory / "0"


def test_verify_reports_and_removes_corrupt_ranges(cache):
    _, data = files_of(cache, "tinker://two")
    with data.open("r+b") as file:
        file.write(bytes(3 * BLOCK))
        file.seek(2 * BLOCK_BYTES + 5)
        file.write(b"?")
    corrupt = [
        CorruptRange("tinker://two", start, start + 3 * BLOCK) for start in (0, 2 * BLOCK_BYTES)
    ]
    assert verify(cache.directory, lambda text: text.endswith("one")) == (9 * BLOCK, [])
    assert verify(cache.directory, everything) == (12 * BLOCK, corrupt)
    assert verify(cache.directory, everything) == (12 * BLOCK, [])


def test_cached_file_has_its_length_if_known(cache):
    with contextlib.closing(cache.open("three", "tinker://three", 5 * BLOCK)) as file:
        file.put(0, b"x" * BLOCK)
    lengths = {
        each.description: (each.data_bytes, each.length_bytes)
        for each in cached_files(cache.directory)
    }
    assert lengths == {
        "tinker://one": (9 * BLOCK, None),
        "tinker://two": (9 * BLOCK, None),
        "tinker://three": (BLOCK, 5 * BLOCK),
    }
    with contextlib.closing(cache.open("one", "tinker://one", 9 * BLOCK)):
        pass
    [one] = [each for each in cached_files(cache.directory) if each.description == "tinker://one"]
    assert one.length_bytes == 9 * BLOCK, "a later open records the length"


@pytest.mark.parametrize("name", ["a\nb", "a\n5", "\udcff", " /"])
@pytest.mark.parametrize("length", [None, 7])
def test_any_description_is_read_unchanged(cache, name, length):
    with contextlib.closing(cache.open("new", name, length)) as file:
        file.put(0, b"x")
    assert (name, length) in [read_about(each) for each in cache.directory.iterdir()]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"\n7x", b"\n" + b"9" * 5000])
def test_file_without_description_is_listed_and_cleared(cache, content):
    about = files_of(cache, "tinker://one")[0] / "about"
    if content is None:
        about.unlink()
    else:
        about.write_bytes(content)
    [lost] = [each for each in cached_files(cache.directory) if each.description == "?"]
    assert (lost.data_bytes, lost.length_bytes) == (9 * BLOCK, None)
    assert clear(cache.directory, lambda text: text == "?") == lost.size_bytes
    with contextlib.closing(cache.open("two", "tinker://two")):
        assert [each.description for each in cached_files(cache.directory)] == ["tinker://two"]


def test_reopening_a_file_does_not_rewrite_about(cache):
    about = files_of(cache, "tinker://one")[0] / "about"
    before = os.stat(about)
    with contextlib.closing(cache.open("one", "tinker://one")):
        after = os.stat(about)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_clear_removes_matching_files_even_if_open(cache):
    with contextlib.closing(cache.open("one", "tinker://one")) as file:
        assert clear(cache.directory, lambda text: text.endswith("one")) >= 9 * BLOCK
        assert file.read(0, 0, 9, 3 * BLOCK) is None
        assert file.put(0, b"x" * BLOCK)
        assert {each.description for each in cached_files(cache.directory)} == {
            "tinker://one",
            "tinker://two",
        }
    clear(cache.directory, everything)
    assert list(cache.directory.iterdir()) == []


def test_verify_and_clear_with_a_fifo_end(cache):
    directory, data = files_of(cache, "tinker://one")
    data.unlink()
    os.mkfifo(data)
    (directory / "7").mkdir()
    intact, corrupt = run_in_thread(lambda: verify(cache.directory, everything), "verify").result(
        20
    )
    assert (intact, len(corrupt)) == (9 * BLOCK, 3)
    run_in_thread(lambda: clear(cache.directory, everything), "clear").result(20)
    assert cached_files(cache.directory) == []
