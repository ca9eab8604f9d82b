"""The block cache as people see it: what is in it, whether it is sound, and away with it."""

import contextlib
import os

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.maintenance import CorruptBlock, cached_files, clear, verify
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


def everything(_about):
    return True


def test_what_is_kept_is_told_the_latest_first(cache, time):
    with contextlib.closing(cache.open("one", "tinker://one")) as file:
        file.read(0, 0, 9, 3 * BLOCK)
        one, two = cached_files(cache.folder)
        assert (one.description, two.description) == ("tinker://one", "tinker://two")
        assert (one.is_open, two.is_open) == (True, False)
        assert (one.blocks, one.last_access_ns) == (3, time.now * 1e9)
        assert one.fetched_ns < two.fetched_ns < one.last_access_ns
        assert 9 * BLOCK <= one.size_bytes < 10 * BLOCK


def test_there_may_be_no_cache(tmp_path):
    assert cached_files(tmp_path / "none") == []
    assert verify(tmp_path / "none", everything) == (0, [])
    assert clear(tmp_path / "none", everything) == 0


def blocks_of(cache, about):
    [folder] = [each for each in cache.folder.iterdir() if read_about(each)[0] == about]
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def test_blocks_that_were_altered_are_told_and_removed(cache):
    first, second, _ = blocks_of(cache, "tinker://two")
    first.write_bytes(bytes(first.stat().st_size))
    second.unlink()
    second.symlink_to(first)
    bad = [CorruptBlock("tinker://two", 0), CorruptBlock("tinker://two", 1)]
    assert verify(cache.folder, lambda about: about.endswith("one")) == (3, [])
    assert verify(cache.folder, everything) == (4, bad)
    assert verify(cache.folder, everything) == (4, [])


def test_what_is_kept_is_told_of_the_length_where_that_is_known(cache):
    with contextlib.closing(cache.open("three", "tinker://three", 5 * BLOCK)) as file:
        file.put(4, b"x" * BLOCK)
        with contextlib.closing(file.begin_write(3, BLOCK)) as draft:
            draft.write(b"y" * 100)
            file.commit_partial(3, draft)
    lengths = {
        each.description: (each.data_bytes, each.length_bytes)
        for each in cached_files(cache.folder)
    }
    assert lengths == {
        "tinker://one": (9 * BLOCK, None),
        "tinker://two": (9 * BLOCK, None),
        "tinker://three": (BLOCK, 5 * BLOCK),
    }
    with contextlib.closing(cache.open("one", "tinker://one", 9 * BLOCK)):
        pass
    [one] = [each for each in cached_files(cache.folder) if each.description == "tinker://one"]
    assert one.length_bytes == 9 * BLOCK, "who knows it later says so"


@pytest.mark.parametrize("name", ["a\nb", "a\n5", "\udcff", " /"])
@pytest.mark.parametrize("length", [None, 7])
def test_any_name_is_told_as_it_was(cache, name, length):
    with contextlib.closing(cache.open("new", name, length)) as file:
        file.put(0, b"x")
    assert (name, length) in [read_about(each) for each in cache.folder.iterdir()]


@pytest.mark.parametrize("spoilt", [None, b"", b"\xff\xfe", b"\n7x", b"\n" + b"9" * 5000])
def test_what_no_longer_says_what_it_is_can_still_be_told_and_cleared(cache, spoilt):
    about = blocks_of(cache, "tinker://one")[0].with_name("about")
    if spoilt is None:
        about.unlink()
    else:
        about.write_bytes(spoilt)
    [lost] = [each for each in cached_files(cache.folder) if each.description == "?"]
    assert (lost.blocks, lost.length_bytes) == (3, None)
    assert clear(cache.folder, lambda about: about == "?") == lost.size_bytes
    with contextlib.closing(cache.open("two", "tinker://two")):
        assert [each.description for each in cached_files(cache.folder)] == ["tinker://two"]


def test_who_opens_a_file_again_does_not_write_what_it_is_again(cache):
    about = blocks_of(cache, "tinker://one")[0].with_name("about")
    before = os.stat(about)
    with contextlib.closing(cache.open("one", "tinker://one")):
        after = os.stat(about)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_wanted_is_cleared_open_or_not(cache):
    with contextlib.closing(cache.open("one", "tinker://one")) as file:
        assert clear(cache.folder, lambda about: about.endswith("one")) >= 9 * BLOCK
        assert file.read(0, 0, 9, 3 * BLOCK) is None
        assert file.put(0, b"x" * BLOCK)
        assert {each.description for each in cached_files(cache.folder)} == {
            "tinker://one",
            "tinker://two",
        }
    clear(cache.folder, everything)
    assert list(cache.folder.iterdir()) == []


def test_verify_and_clear_with_a_fifo_end(cache):
    path = blocks_of(cache, "tinker://one")[0]
    path.unlink()
    os.mkfifo(path)
    path.with_name("7").mkdir()
    sound, bad = run_in_thread(lambda: verify(cache.folder, everything), "verify").result(20)
    assert (sound, bad) == (5, [CorruptBlock("tinker://one", 0)])
    os.mkfifo(path)
    run_in_thread(lambda: clear(cache.folder, everything), "clear").result(20)
    assert cached_files(cache.folder) == []
