"""The block cache as people see it: what is in it, whether it is sound, and away with it."""

import contextlib

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.cache.blocks import BlockCache
from tinkerfs.cache.upkeep import cached_files, clear, verify
from tinkerfs.telemetry import Telemetry

BLOCK = 64 << 10


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def cache(tmp_path, time):
    cache = BlockCache(
        tmp_path / "blocks", Telemetry(), time.clock, limit_bytes=1 << 30, floor_bytes=0
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
        assert (one.about, two.about) == ("tinker://one", "tinker://two")
        assert (one.is_open, two.is_open) == (True, False)
        assert (one.blocks, one.used_ns) == (3, time.now * 1e9)
        assert one.fetched_ns < two.fetched_ns < one.used_ns
        assert 9 * BLOCK <= one.size_bytes < 10 * BLOCK


def test_there_may_be_no_cache(tmp_path):
    assert cached_files(tmp_path / "none") == []
    assert verify(tmp_path / "none", everything) == (0, 0)
    assert clear(tmp_path / "none", everything) == 0


def test_blocks_that_were_altered_are_found_and_removed(cache):
    first, *_ = (path for path in cache.folder.rglob("*") if path.name.isdigit())
    first.write_bytes(bytes(first.stat().st_size))
    assert verify(cache.folder, everything) == (5, 1)
    assert verify(cache.folder, everything) == (5, 0)


def test_what_is_wanted_is_cleared_open_or_not(cache):
    with contextlib.closing(cache.open("one", "tinker://one")) as file:
        assert clear(cache.folder, lambda about: about.endswith("one")) >= 9 * BLOCK
        assert file.read(0, 0, 9, 3 * BLOCK) is None
        assert file.put(0, b"x" * BLOCK)
        assert {each.about for each in cached_files(cache.folder)} == {
            "tinker://one",
            "tinker://two",
        }
    clear(cache.folder, everything)
    assert list(cache.folder.iterdir()) == []
