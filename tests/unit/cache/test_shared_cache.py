"""Hosts that share a cache directory: right bytes, one download, and no wait for a dead server.

Each cache here stands for a host: it knows of the others only what is in the directory.
"""

import contextlib
import os
import random
import stat
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.support.clocks import FakeTime
from tinkerfs.cache import maintenance
from tinkerfs.cache.bounded_access import BoundedAccess
from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES, UNITS_PER_BLOCK
from tinkerfs.cache.eviction import scan_cache
from tinkerfs.cache.extent_files import HEADER_BYTES, Extent, extent_of, list_extents
from tinkerfs.cache.maintenance import CorruptRange
from tinkerfs.cache.shared_cache import SharedBlockCache
from tinkerfs.concurrency import run_in_thread
from tinkerfs.telemetry import Telemetry

SIZE_BYTES = 2 * BLOCK_BYTES + UNIT_BYTES + 7


def new_host(directory, max_bytes=1 << 30, **options):
    options = {"owner": os.getuid(), "has_locks": True, "memory_bytes": 1 << 25, **options}
    return SharedBlockCache(
        directory / "shared", Telemetry(), max_bytes=max_bytes, min_free_bytes=0, **options
    )


def opened(host, key="key"):
    return contextlib.closing(host.open(key, f"tinker://{key}", SIZE_BYTES))


CONTENT = random.Random(0).randbytes(SIZE_BYTES)


def content(start=0, stop=SIZE_BYTES):
    return CONTENT[start:stop]


def block(index):
    return content(index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES)


def found(file, units):
    """Return whether units are cached, as a download looks them up."""
    return not file.missing(units, SIZE_BYTES)


def read(file, index):
    """Return a block as a reader gets it that has looked it up."""
    size, first = len(block(index)), index * UNITS_PER_BLOCK
    file.missing(range(first, first - (-size // UNIT_BYTES)), SIZE_BYTES)
    return file.read(index, 0, size, size)


def path_of(host, name):
    [path] = [path for path in host.directory.rglob(name) if path.is_file()]
    return path


def messages(host):
    return host._telemetry.errors.text().decode()


@pytest.mark.parametrize("name", ["0", "1-1", "2-1", "15-17", "-1-2", "01-2", "1-2 ", "1-٣"])
def test_extent_of_other_names_is_none(name):
    assert extent_of(name) is None


def test_hosts_find_what_another_one_stored(tmp_path):
    one, other = new_host(tmp_path), new_host(tmp_path)
    with opened(one) as first, opened(other) as second:
        assert not second.has(2)
        for index in range(3):
            assert first.put(index, block(index))
        assert not second.has(2), "only a look-up finds what is new"
        assert found(second, range(32, 34))
        assert second.read(2, 3, 9, len(block(2))) == block(2)[3:9]
    with opened(new_host(tmp_path)) as third:
        assert [third.has(index) for index in range(3)] == [True] * 3
        assert third.cached_bytes(5, SIZE_BYTES) == SIZE_BYTES - 5
        assert [third.read(i, 0, len(block(i)), len(block(i))) for i in range(3)] == [
            block(index) for index in range(3)
        ]
    assert not messages(one) + messages(other)
    assert list_extents(path_of(one, "about").parent) == {
        Extent(0, 16), Extent(16, 32), Extent(32, 34)
    }  # fmt: skip


def test_parts_of_a_block_are_joined_and_replaced(tmp_path):
    one, other = new_host(tmp_path), new_host(tmp_path)
    with opened(one) as first:
        for start, stop in ((0, 3), (2, 5)):
            with contextlib.closing(first.begin_write(start * UNIT_BYTES, BLOCK_BYTES)) as writer:
                writer.write(content(start * UNIT_BYTES, stop * UNIT_BYTES + 9))
                first.commit_part(writer)
        with opened(other) as second:
            assert second.missing(range(16)) == range(5, 16)
            length = 5 * UNIT_BYTES
            assert second.read(0, 0, length, BLOCK_BYTES) == content(0, length)
            assert second.read(0, 0, length + 1, BLOCK_BYTES) is None
            assert first.put(0, block(0))
            assert read(second, 0) == block(0)
    assert list_extents(path_of(one, "about").parent) == {Extent(0, 16)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: bytes(len(data)),
    ],
)
def test_damaged_extent_is_absent_and_removed(tmp_path, damage):
    one, other = new_host(tmp_path), new_host(tmp_path)
    with opened(one) as first, opened(other) as second:
        first.put(0, block(0))
        path = path_of(one, "0-16")
        path.write_bytes(damage(path.read_bytes()))
        assert not found(second, range(16))
        assert not path.exists()
        assert messages(other).count("\n") == 1
        assert "a block on disk was altered" in messages(other)
        assert first.put(0, block(0))
        assert read(second, 0) == block(0)


def test_extent_under_another_name_is_absent(tmp_path):
    host = new_host(tmp_path)
    with opened(host) as file:
        file.put(0, block(0))
        path_of(host, "0-16").rename(path_of(host, "about").with_name("16-32"))
        with opened(new_host(tmp_path)) as other:
            assert not found(other, range(16, 32))


def test_extent_of_another_user_is_not_trusted(tmp_path, needs_root):
    one, other = new_host(tmp_path), new_host(tmp_path)
    with opened(one) as first, opened(other) as second:
        first.put(0, block(0))
        os.chown(path_of(one, "0-16"), 12345, 12345)
        assert not found(second, range(16))
        assert "belongs to another user" in messages(other)


def test_symlink_and_fifo_are_not_followed(tmp_path):
    host = new_host(tmp_path)
    with opened(host) as file:
        file.put(0, block(0))
        path = path_of(host, "0-16")
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        os.mkfifo(path.with_name("16-32"))
        with opened(new_host(tmp_path)) as other:
            assert not found(other, range(16))
            assert not found(other, range(16, 32))


def test_evicted_extent_is_absent_for_all_hosts(tmp_path):
    one, other = new_host(tmp_path), new_host(tmp_path, memory_bytes=0)
    with opened(one) as first, opened(other) as second:
        first.put(0, block(0))
        assert read(second, 0) == block(0)
        path_of(one, "0-16").unlink()
        assert second.read(0, 0, 9, BLOCK_BYTES) is None
        assert second.missing(range(16)) == range(16)
        assert second.put(0, block(0))
        assert read(second, 0) == block(0)
    assert not messages(other)


def test_removed_directory_is_created_again(tmp_path):
    one, other = new_host(tmp_path), new_host(tmp_path)
    with opened(one) as first, opened(other) as second:
        first.ensure_directory()
        second.ensure_directory()
        assert maintenance.clear(one.directory, lambda _: True) >= 0
        for path in one.directory.iterdir():
            for each in path.iterdir():
                each.unlink()
            path.rmdir()
        assert second.put(1, block(1))
        assert read(first, 1) == block(1)
    assert not messages(one) + messages(other)


def test_abandoned_file_is_removed_by_the_servers_clock(tmp_path):
    host = new_host(tmp_path)
    with opened(host) as file:
        file.put(0, block(0))
    directory = path_of(host, "about").parent
    for name, age_s in ((".new-old", 7200), (".new-young", 60)):
        (directory / name).write_bytes(b"part")
        now_ns = os.stat(directory / "used").st_mtime_ns
        os.utime(directory / name, ns=(0, now_ns - age_s * 10**9))
    with opened(new_host(tmp_path)) as other:
        assert other.has(0)
    assert {path.name for path in directory.iterdir()} >= {".new-young", "0-16"}
    assert not (directory / ".new-old").exists()


def test_failed_write_leaves_no_file(tmp_path):
    host = new_host(tmp_path)
    with opened(host) as file:
        file.put(0, block(0))
        directory = path_of(host, "about").parent
        (directory / "16-32").mkdir()  # a rename onto it fails
        (directory / "16-32/x").touch()
        assert not file.put(1, block(1))
        assert not [path for path in directory.iterdir() if path.name.startswith(".new-")]
        assert messages(host).count("\n") == 1


def test_files_are_private(tmp_path):
    host = new_host(tmp_path)
    with opened(host) as file:
        file.put(0, block(0))
    for path in host.directory.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_hosts_stay_within_the_bound_together(tmp_path):
    max_bytes = 12 * BLOCK_BYTES
    hosts = [new_host(tmp_path, max_bytes=max_bytes) for _ in range(3)]
    for number in range(9):
        host = hosts[number % 3]
        with contextlib.closing(host.open(str(number), str(number), 3 * BLOCK_BYTES)) as file:
            for index in range(3):
                assert file.put(index, block(0)), messages(host)
        assert sum(each.size_bytes for each in scan_cache(host.directory)) <= max_bytes
    names = {each.description for each in maintenance.cached_files(hosts[0].directory)}
    assert "8" in names
    assert "0" not in names, "the least recently used one is evicted first"


def test_open_file_of_another_host_is_not_evicted(tmp_path):
    hosts = [new_host(tmp_path, max_bytes=4 * BLOCK_BYTES) for _ in range(2)]
    with opened(hosts[0], "first") as first:
        first.put(0, block(0))
        for number in range(4):
            with opened(hosts[1], str(number)) as file:
                file.put(0, block(0))
                file.put(1, block(1))
        assert read(new_host(tmp_path).open("first", "first", SIZE_BYTES), 0) == block(0)


def test_claim_excludes_other_hosts_until_its_end(tmp_path):
    one, other = new_host(tmp_path), new_host(tmp_path)
    with opened(one) as first, opened(other) as second:
        first.ensure_directory()
        second.ensure_directory()
        with first.lock_units(range(16), 1.0) as is_free:
            assert is_free
            with second.lock_units(range(3, 4), 0.0) as is_other_free:
                assert not is_other_free
            with second.lock_units(range(16, 32), 0.0) as is_other_free:
                assert is_other_free
        with second.lock_units(range(16), 0.0) as is_free:
            assert is_free


def test_maintenance_shows_verifies_and_clears(tmp_path):
    host = new_host(tmp_path)
    with opened(host, "one") as file, opened(host, "two") as other:
        for index in range(3):
            file.put(index, block(index))
        other.put(0, block(0))
        files = {each.description: each for each in maintenance.cached_files(host.directory)}
    assert (files["tinker://one"].data_bytes, files["tinker://one"].is_open) == (SIZE_BYTES, True)
    assert files["tinker://two"].data_bytes == BLOCK_BYTES
    [path] = host.directory.rglob("16-32")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    intact_bytes, corrupt = maintenance.verify(host.directory, lambda _: True)
    assert intact_bytes == SIZE_BYTES
    assert corrupt == [CorruptRange("tinker://one", BLOCK_BYTES, 2 * BLOCK_BYTES)]
    assert maintenance.clear(host.directory, lambda name: name == "tinker://one") > BLOCK_BYTES
    assert [each.description for each in maintenance.cached_files(host.directory)] == [
        "tinker://two"
    ]


def test_loaded_extents_stay_within_their_memory(tmp_path):
    host = new_host(tmp_path, memory_bytes=BLOCK_BYTES + UNIT_BYTES)
    with opened(host) as file:
        for index in range(3):
            file.put(index, block(index))
        assert [read(file, index) for index in range(3)] == [block(index) for index in range(3)]
        assert sum(map(len, host.loaded._extents.values())) <= BLOCK_BYTES + UNIT_BYTES


def test_sequential_reader_finds_the_next_blocks_loaded(tmp_path):
    with opened(new_host(tmp_path)) as file:
        for index in range(3):
            file.put(index, block(index))
    host = new_host(tmp_path)
    with opened(host) as file:
        for index in range(2):
            file.read(index, 0, 9, BLOCK_BYTES)
        counted = host._telemetry.counters
        deadline = threading.Event()
        while counted()["shared_cache_blocks_read"] < 3:
            assert not deadline.wait(0.01)
        assert file.read(2, 0, 9, len(block(2))) == block(2)[:9]
        assert counted()["shared_cache_blocks_read"] == 3


# A file system that hangs.


@pytest.fixture
def release():
    """Return an event that ends every hanging access."""
    event = threading.Event()
    yield event
    event.set()


def test_hanging_access_ends_after_its_bound(tmp_path, release):
    telemetry = Telemetry()
    access = BoundedAccess(tmp_path, telemetry, bound_s=0.05, set_aside_s=0.0)
    late = []
    with pytest.raises(TimeoutError, match=r"no response within 0.05 s"):
        access.run(lambda: release.wait(60) and 5, on_late=late.append)
    assert telemetry.counters()["shared_cache_outages"] == 1
    assert telemetry.errors.text().decode().count("\n") == 1
    release.set()
    deadline = threading.Event()
    while not late or access.is_set_aside:
        assert not deadline.wait(0.01)
    assert late == [5]
    access._bound_s = 60.0
    assert access.run(lambda: 6) == 6


def test_slow_file_system_is_not_set_aside(tmp_path, release):
    now = FakeTime()
    access = BoundedAccess(
        tmp_path, Telemetry(), bound_s=0.01, set_aside_s=0.0, monotonic=now.clock.monotonic
    )
    slow = run_in_thread(lambda: access.run(lambda: release.wait(60)), "slow")
    for _ in range(5):
        now.advance(0.009)
        access.run(lambda: None)
    with pytest.raises(TimeoutError):
        slow.result(0.05)
    assert not access.is_set_aside
    now.advance(0.011)
    with pytest.raises(OSError, match="no response"):
        slow.result(60)


def test_access_that_takes_far_too_long_is_given_up(tmp_path, release):
    now = FakeTime()
    access = BoundedAccess(
        tmp_path, Telemetry(), bound_s=0.01, set_aside_s=0.0, monotonic=now.clock.monotonic
    )
    slow = run_in_thread(lambda: access.run(lambda: release.wait(60)), "slow")
    while not slow.done():
        now.advance(0.005)
        with contextlib.suppress(TimeoutError):
            access.run(lambda: None)
    assert access._telemetry.counters()["shared_cache_outages"] >= 1


def test_file_system_that_hangs_is_set_aside(tmp_path, release):
    host = new_host(tmp_path, bound_s=60.0)
    with opened(host) as file:
        file.put(0, block(0))
        file.put(1, block(1))
        host.loaded.discard((file._name, Extent(16, 32)))
        host.access._bound_s = 0.05
        with pytest.raises(TimeoutError):
            host.access.run(lambda: release.wait(60))
        assert file.read(0, 1, 9, BLOCK_BYTES) == block(0)[1:9], "it is in memory"
        assert file.read(1, 1, 9, BLOCK_BYTES) is None
        assert file.missing(range(32)) == range(16, 32)
        assert file.begin_write(2 * BLOCK_BYTES, 9) is None
        with file.lock_units(range(16), 60.0) as is_free:
            assert is_free
        assert host.usage_bytes() >= 0
        assert host.free_bytes() == 0
    assert messages(host).count("\n") == 1


def test_waiting_accesses_end_with_the_first_timeout(tmp_path, release):
    access = BoundedAccess(tmp_path, Telemetry(), bound_s=0.05)
    patient = run_in_thread(lambda: access.run(lambda: release.wait(60), extra_s=600), "patient")
    with pytest.raises(TimeoutError):
        access.run(lambda: release.wait(60))
    with pytest.raises(TimeoutError):
        patient.result(60)


def test_error_of_an_access_is_raised(tmp_path):
    access = BoundedAccess(tmp_path, Telemetry(), bound_s=60.0)

    def fail():
        raise TimeoutError(110, "of the work itself")

    with pytest.raises(TimeoutError, match="of the work itself"):
        access.run(fail)
    assert not access.is_set_aside
    access.finish(fail)


# Anything may happen to the directory.


class Hosts(RuleBasedStateMachine):
    """Hosts that read and write, while their directory is damaged and evicted."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.hosts = [
            new_host(Path(self.directory.name), memory_bytes=size)
            for size in (0, BLOCK_BYTES, 1 << 25)
        ]
        self.files = [host.open("key", "key", SIZE_BYTES) for host in self.hosts]

    def teardown(self):
        for file in self.files:
            file.close()
        self.directory.cleanup()

    @rule(host=st.integers(0, 2), first=st.integers(0, 33), count=st.integers(1, 16))
    def store(self, host, first, count):
        stop = min(first + count, (first // 16 + 1) * 16, 34)
        data = content(first * UNIT_BYTES, min(stop * UNIT_BYTES, SIZE_BYTES))
        with contextlib.closing(self.files[host].begin_write(first * UNIT_BYTES, 9)) as writer:
            writer.write(data)
            assert self.files[host].commit(writer)
        assert self.files[host].missing(range(first, stop), SIZE_BYTES) == range(first, first)

    @rule(host=st.integers(0, 2), index=st.integers(0, 2), looks_up=st.booleans())
    def read(self, host, index, looks_up):
        file, data = self.files[host], block(index)
        if looks_up:
            file.missing(file._units(index), SIZE_BYTES)
        assert file.read(index, 0, len(data), len(data)) in (data, None)
        assert file.read(index, 1, 3, len(data)) in (data[1:3], None)

    @rule(number=st.integers(0, 99), at=st.integers(0, BLOCK_BYTES))
    def damage(self, number, at):
        paths = sorted(self.hosts[0].directory.rglob("*-*"))
        if paths:
            path = paths[number % len(paths)]
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.seek(at % size)
                old = file.read(1)
                file.seek(at % size)
                file.write(bytes([old[0] ^ 255]))

    @rule(number=st.integers(0, 99))
    def evict(self, number):
        paths = sorted(self.hosts[0].directory.rglob("*-*"))
        if paths:
            paths[number % len(paths)].unlink()

    @rule(host=st.integers(0, 2))
    def drop_all(self, host):
        self.files[host].drop_all()

    @rule(host=st.integers(0, 2), index=st.integers(0, 2))
    def drop(self, host, index):
        self.files[host].drop(index)
        assert not self.files[host].has(index)

    @rule()
    def clear(self):
        maintenance.clear(self.hosts[0].directory, lambda _: True)


Hosts.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
test_hosts_never_read_a_wrong_byte = Hosts.TestCase


def test_header_is_a_small_part_of_a_block():
    assert HEADER_BYTES < 64
