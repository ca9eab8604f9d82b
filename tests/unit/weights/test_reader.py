"""The weights reader: what is listed, how many requests it takes, what is cached."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tests.support.mount import wait_until
from tests.unit.weights.conftest import assert_disjoint, subject_of, truth
from tests.unit.weights.test_tar_index import special, tar_of
from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.demo.content import Data
from tinkerfs.demo.profiles import PROFILES
from tinkerfs.weights.version import Version

MIB = 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE, URL = "GET store/archive", "GET archive"


def read_all(file, step=MIB):
    data = bytearray()
    while chunk := file.read(step, len(data), BACKGROUND_CONTEXT):
        data += chunk
    return bytes(data)


def read(mount, subject, name=NAME):
    with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
        return read_all(file)


def checkpoint_of(server, subject):
    return server.account.find(subject.ref.run_id, subject.ref.path_id)[1]


def sent_bytes(server):
    server.journal.wait_until_idle()
    return sum(entry.sent_bytes for entry in server.journal.entries("store"))


@pytest.fixture
def gzip_server(demo_server):
    profile = dataclasses.replace(PROFILES["official"], archive_form="gzip")
    return demo_server(runs=1, size_bytes=20 * MIB, profile=profile)


@pytest.fixture
def small(demo_server):
    return demo_server(runs=1, size_bytes=20 * MIB)


def test_index_of_plain_tar_takes_two_requests_for_all_mounts(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=1 << 30)
    subject, mount = subject_of(server), weights_of(server)
    assert mount.weights.cached_files(subject) is None
    listing = mount.weights.files(subject, BACKGROUND_CONTEXT)
    true = server.files(subject.ref.run_id, subject.ref.path_id)
    sizes = {name: member.size_bytes for name, member in listing.members.items()}
    assert sizes == {name: content.size_bytes for name, content in true.items()}
    assert server.journal.endpoints() == {URL: 1, ARCHIVE: 2}
    assert sent_bytes(server) < MIB
    later = weights_of(server)
    assert later.weights.cached_files(subject) == later.weights.files(subject, BACKGROUND_CONTEXT)
    assert later.weights.archive_bytes(subject) == server.archive(*ids_of(subject)).size_bytes
    assert server.journal.endpoints() == {URL: 1, ARCHIVE: 2}


def ids_of(subject):
    return subject.ref.run_id, subject.ref.path_id


def test_header_of_large_file_costs_few_bytes(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=5 << 30)
    subject, mount = subject_of(server), weights_of(server)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        length = int.from_bytes(file.read(8, 0, BACKGROUND_CONTEXT), "little")
        assert json.loads(file.read(length, 8, BACKGROUND_CONTEXT))
    assert sent_bytes(server) <= 8 * MIB
    assert server.journal.count(ARCHIVE) == 3


@pytest.mark.parametrize("is_remounted", [False, True])
def test_tensor_of_large_file_costs_at_most_two_blocks_more(demo_server, weights_of, is_remounted):
    server = demo_server(runs=1, size_bytes=1_000_000_000)
    subject, mount = subject_of(server), weights_of(server)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        length = int.from_bytes(file.read(8, 0, BACKGROUND_CONTEXT), "little")
        header = json.loads(file.read(length, 8, BACKGROUND_CONTEXT))
        del header["__metadata__"]
        begin, end = sorted(each["data_offsets"] for each in header.values())[len(header) // 2]
        with weights_of(server).weights.open(subject, NAME, BACKGROUND_CONTEXT) as later:
            server.journal.clear()
            reader = later if is_remounted else file
            for offset in range(begin, end, 256 * 1024):
                reader.read(min(256 * 1024, end - offset), 8 + length + offset, BACKGROUND_CONTEXT)
    assert end - begin > 40_000_000
    # The tensor begins and ends within a block.
    assert end - begin <= sent_bytes(server) <= end - begin + 2 * BLOCK_BYTES


def test_later_mount_reads_from_the_cache(small, weights_of):
    subject = subject_of(small)
    mount = weights_of(small)
    assert read(mount, subject) == truth(small, subject, NAME)
    assert mount.weights.cached_bytes(subject, NAME) == len(truth(small, subject, NAME))
    assert sent_bytes(small) < 21 * MIB + 512 * 1024
    assert not any(entry.had_key for entry in small.journal.entries("store"))
    small.journal.clear()
    later = weights_of(small)
    assert later.weights.cached_bytes(subject, NAME) == len(truth(small, subject, NAME))
    for name in small.files(*ids_of(subject)):
        assert read(later, subject, name) == truth(small, subject, name)
    assert small.journal.count() == 0


def test_archive_can_be_read_as_a_file(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    assert mount.weights.archive_bytes(subject) is None
    with mount.weights.open_archive(subject, BACKGROUND_CONTEXT) as file:
        assert file.size_bytes == small.archive(*ids_of(subject)).size_bytes
        assert read_all(file) == small.archive(*ids_of(subject)).read(0, file.size_bytes)
    count = small.journal.count(ARCHIVE)
    assert weights_of(small).weights.archive_bytes(subject) == file.size_bytes
    assert read(mount, subject) == truth(small, subject, NAME)
    assert small.journal.count(ARCHIVE) == count + 2  # only the index, as the blocks are cached


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=st.lists(st.tuples(st.integers(0, 21 * MIB), st.integers(1, 6 * MIB)), max_size=6))
def test_any_read_returns_a_slice_of_the_file(reads, module_mount):
    file, expected = module_mount
    for offset, size in reads:
        assert file.read(size, offset, BACKGROUND_CONTEXT) == expected[offset : offset + size]


@pytest.fixture
def module_mount(small, weights_of):
    subject = subject_of(small)
    with weights_of(small).weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        yield file, truth(small, subject, NAME)


# Sources other than a plain tar with ranges


def test_gzip_archive_is_downloaded_once(gzip_server, weights_of):
    subject, mount = subject_of(gzip_server), weights_of(gzip_server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    archive = gzip_server.archive(*ids_of(subject)).size_bytes
    assert sent_bytes(gzip_server) <= archive
    gzip_server.journal.clear()
    for name in gzip_server.files(*ids_of(subject)):
        assert read(weights_of(gzip_server), subject, name) == truth(gzip_server, subject, name)
    assert gzip_server.journal.count() == 0
    with mount.weights.open_archive(subject, BACKGROUND_CONTEXT) as file:
        assert read_all(file) == gzip_server.archive(*ids_of(subject)).read(0, archive)


def test_gzip_archive_not_cached_is_downloaded_again(gzip_server, weights_of):
    subject, mount = subject_of(gzip_server), weights_of(gzip_server, limit_bytes=0)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    gzip_server.journal.clear()
    assert read(mount, subject) == truth(gzip_server, subject, NAME)
    assert 1 <= gzip_server.journal.count(ARCHIVE) <= 3


def test_gzip_archive_altered_once_is_downloaded_again(gzip_server, weights_of):
    subject, mount = subject_of(gzip_server), weights_of(gzip_server)
    gzip_server.faults.add("store", flip_byte=9_000_000, when=is_large)
    assert read(mount, subject) == truth(gzip_server, subject, NAME)


def is_large(entry):
    first, _, last = (entry.range or "bytes=0-0").removeprefix("bytes=").partition("-")
    return int(last) - int(first) > 10 * MIB


def test_gzip_archive_always_altered_is_an_error(gzip_server, weights_of):
    subject, mount = subject_of(gzip_server), weights_of(gzip_server)
    rule = gzip_server.faults.add("store", flip_byte=9_000_000, when=is_large, times=None)
    with pytest.raises(OSError, match="damaged") as caught:
        mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert errors.errno_name(caught.value) == "EIO"
    rule.remove()
    assert read(mount, subject) == truth(gzip_server, subject, NAME)
    # Later passes are compared with the digests of the first one.
    subprocess.run(["rm", "-rf", mount.cache.directory], check=True)
    gzip_server.faults.add("store", flip_byte=9_000_000, when=is_large, times=None)
    with pytest.raises(OSError, match=r"damaged|not what it was"):
        read(weights_of(gzip_server), subject)


def test_store_without_ranges_is_read_in_one_pass(small, weights_of):
    small.faults.add("store", ignore_range=True, times=None)
    subject, mount = subject_of(small), weights_of(small)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert small.journal.count(ARCHIVE) == 1
    assert read(mount, subject) == truth(small, subject, NAME)
    assert small.journal.count(ARCHIVE) == 1
    subprocess.run(["rm", "-rf", mount.cache.directory], check=True)
    small.journal.clear()
    assert read(weights_of(small), subject) == truth(small, subject, NAME)
    assert sent_bytes(small) < 3 * 21 * MIB


def test_store_without_ranges_is_read_without_a_cache(small, weights_of):
    small.faults.add("store", ignore_range=True, times=None)
    subject, mount = subject_of(small), weights_of(small, limit_bytes=0, memory_bytes=8 * MIB)
    expected = truth(small, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        for offset in (19 * MIB, 5, 11 * MIB):
            assert file.read(99, offset, BACKGROUND_CONTEXT) == expected[offset : offset + 99]


@pytest.mark.parametrize("profile", ["skyrl"])
def test_archives_of_other_servers_are_read(profile, demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=9 * MIB, profile=profile)
    subject = subject_of(server, "sampler_weights")
    bare = subject.ref.path_id.rpartition("/")[2]
    ref = dataclasses.replace(subject.ref, listed_id=bare)
    subject, mount = dataclasses.replace(subject, ref=ref), weights_of(server)
    assert read(mount, subject) == truth(server, subject, NAME)


def test_external_weights_are_listed_as_files(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=9 * MIB)
    subject, mount = subject_of(server, "external_weights"), weights_of(server)
    checkpoint = checkpoint_of(server, subject)
    large = random.Random(0).randbytes(9 * MIB)
    checkpoint.files = {
        "directory/deep/a.age": Data(b"secret"),
        "b.safetensors": Data(large),
        "empty": Data(b""),
        "../outside": Data(b"no"),
        "empty/below": Data(b"no"),
    }
    listing = mount.weights.files(subject, BACKGROUND_CONTEXT)
    sizes = {name: member.size_bytes for name, member in listing.members.items()}
    assert sizes == {"b.safetensors": 9 * MIB, "empty": 0, "directory/deep/a.age": 6}
    assert len(listing.skipped) == 2
    assert "left out" in mount.telemetry.errors.text().decode()
    for name in sizes:
        assert read(mount, subject, name) == checkpoint.files[name].read(0, sizes[name])
    assert server.journal.count("GET external_weights_urls") == 1
    server.journal.clear()
    later = weights_of(server)
    assert read(later, subject, "b.safetensors") == large
    assert server.journal.count() == 0


# Members of every kind


def mounted(server, weights_of, archive):
    subject = subject_of(server)
    checkpoint_of(server, subject).archive = Data(archive)
    return subject, weights_of(server)


def test_members_of_a_real_tar_have_the_original_bytes(tmp_path, demo_server, weights_of):
    directory, rng = tmp_path / "files", random.Random(0)
    (directory / "sub").mkdir(parents=True)
    with (directory / "sparse").open("wb") as file:
        file.truncate(10 * MIB)
        for _ in range(20):
            file.seek(rng.randrange(9 * MIB))
            file.write(rng.randbytes(70_000))
    (directory / ("n" * 200)).write_bytes(b"long")
    (directory / "sub" / "large").write_bytes(rng.randbytes(5 * MIB))
    (directory / "hard").hardlink_to(directory / "sub" / "large")
    (directory / "link").symlink_to("sub/large")
    command = ["tar", "--sparse", "--format=posix", "-C", directory, "-c", "."]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    subject, mount = mounted(demo_server(runs=1), weights_of, archive)
    members = mount.weights.files(subject, BACKGROUND_CONTEXT).members
    assert set(members) == {"sparse", "n" * 200, "sub/large", "hard", "link"}
    for name in members:
        expected = (directory / name).read_bytes()
        assert read(mount, subject, name) == expected
        with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
            for _ in range(20):
                at = rng.randrange(len(expected))
                assert file.read(300_000, at, BACKGROUND_CONTEXT) == expected[at : at + 300_000]


def test_thousands_of_members_take_few_requests(demo_server, weights_of):
    files = [(f"shard/{number:04}", bytes([number % 256]) * 3000) for number in range(4000)]
    server = demo_server(runs=1)
    subject, mount = mounted(server, weights_of, tar_of(*files, form=tarfile.GNU_FORMAT))
    members = mount.weights.files(subject, BACKGROUND_CONTEXT).members
    assert len(members) == 4000
    assert server.journal.count(ARCHIVE) < 15
    assert read(mount, subject, "shard/2999") == files[2999][1]


def test_unsafe_members_are_skipped_and_reported(demo_server, weights_of):
    archive = tar_of(("../up", b"1"), (special("d", tarfile.CHRTYPE), None), ("good", b"2"))
    subject, mount = mounted(demo_server(runs=1), weights_of, archive)
    listing = mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert (set(listing.members), len(listing.skipped)) == ({"good"}, 2)
    assert "'../up'" in mount.telemetry.errors.text().decode()
    with pytest.raises(FileNotFoundError):
        mount.weights.open(subject, "../up", BACKGROUND_CONTEXT)


@pytest.mark.parametrize("cut", [100, 3000, 19_700])
def test_truncated_tar_is_an_error(cut, demo_server, weights_of):
    archive = tar_of(("a", b"x" * 9000), ("b", b"y" * 9000))
    subject, mount = mounted(demo_server(runs=1), weights_of, archive[:cut])
    with pytest.raises(OSError, match=r".") as caught:
        mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert errors.errno_name(caught.value) == "EIO"


# Headers


def test_tensors_are_read_from_the_header_alone(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=1 << 30)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    assert mount.weights.cached_tensors(subject) is None
    document = json.loads(mount.weights.tensors(subject, BACKGROUND_CONTEXT))
    content = server.files(*ids_of(subject))[NAME]
    length = int.from_bytes(content.read(0, 8), "little")
    header = json.loads(content.read(8, 8 + length))
    del header["__metadata__"]
    assert {name: each["shape"] for name, each in document["tensors"].items()} == {
        name: each["shape"] for name, each in header.items()
    }
    assert server.journal.count(ARCHIVE) == 1
    assert sent_bytes(server) < MIB
    assert weights_of(server).weights.cached_tensors(subject) is not None


def test_long_header_takes_two_requests(demo_server, weights_of):
    tensors = {
        f"layers.{number}.lora_A.weight": {
            "dtype": "U8",
            "shape": [1],
            "data_offsets": [number, number + 1],
        }
        for number in range(60_000)
    }
    header = json.dumps(tensors).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(60_000)
    server = demo_server(runs=1)
    subject, mount = mounted(server, weights_of, tar_of((NAME, data)))
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    document = json.loads(mount.weights.tensors(subject, BACKGROUND_CONTEXT))
    assert document["tensors_count"] == 60_000
    assert server.journal.count(ARCHIVE) == 2


def test_invalid_safetensors_header_is_an_error(demo_server, weights_of):
    archive = tar_of((NAME, b"\xff" * 100))
    subject, mount = mounted(demo_server(runs=1), weights_of, archive)
    with pytest.raises(OSError, match="not a safetensors file"):
        mount.weights.tensors(subject, BACKGROUND_CONTEXT)


# Concurrency


def run_concurrently(count, work):
    results = [None] * count

    def run(number):
        try:
            results[number] = work(number)
        except (OSError, errors.ApiError) as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_concurrent_readers_download_each_block_once(small, weights_of):
    small.latency_s = 0.02
    subject = subject_of(small)
    # A mount that waited longer for the lock of the other one would download the units, too.
    mounts = [weights_of(small, timeout_s=60.0) for _ in range(2)]
    expected = truth(small, subject, NAME)
    for mount in mounts:
        mount.weights.files(subject, BACKGROUND_CONTEXT)
    small.journal.clear()
    found = run_concurrently(32, lambda number: read(mounts[number % 2], subject))
    assert all(data == expected for data in found)
    assert_disjoint(small.journal.entries(ARCHIVE), 20 * MIB)


def test_rejected_url_is_renewed_once_for_all_readers(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=60 * MIB)
    subject, mount = subject_of(server), weights_of(server, burst=1)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        server.signer.revoke_all()
        server.latency_s = 0.02
        found = run_concurrently(12, lambda n: file.read(9, n * BLOCK_BYTES, BACKGROUND_CONTEXT))
    expected = truth(server, subject, NAME)
    assert found == [expected[n * BLOCK_BYTES :][:9] for n in range(12)]
    assert server.journal.count(URL) == 2


def test_url_is_renewed_before_it_expires(demo_server, weights_of):
    time = FakeTime()
    server = demo_server(runs=1, size_bytes=20 * MIB, clock=time.clock.now)
    subject, mount = subject_of(server), weights_of(server, clock=time.clock)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        time.advance(890)
        file.read(9, 0, BACKGROUND_CONTEXT)
    assert [entry.status for entry in server.journal.entries("store")] == [206] * 3
    assert server.journal.count(URL) == 2


def test_http_client_is_made_while_the_archive_is_built(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    rule = small.faults.add(URL, hang=True)
    listing = run_in_thread(lambda: mount.weights.files(subject, BACKGROUND_CONTEXT), "listing")
    rule.wait_for(1)
    wait_until(lambda: mount.weights._origins._client is not None)
    rule.release()
    assert NAME in listing.result(10).members


def test_changed_archive_is_stale_until_reopened(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    old = truth(small, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.read(9, 0, BACKGROUND_CONTEXT) == old[:9]
        checkpoint_of(small, subject).generation += 1
        new = truth(small, subject, NAME)
        assert new != old
        for offset in (18 * MIB, 0):  # from then on also for cached bytes
            with pytest.raises(OSError, match="another version") as caught:
                file.read(9, offset, BACKGROUND_CONTEXT)
            assert errors.is_stale(caught.value)
            assert mount.store.get("weights index 2", subject.cache_key) is None
        assert read(mount, subject) == new
    assert read(weights_of(small), subject) == new


def test_checkpoint_deleted_while_open_is_stale(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        small.account.find(*ids_of(subject))[0].checkpoints.clear()
        with pytest.raises(OSError, match="gone") as caught:
            file.read(9, 9 * MIB, BACKGROUND_CONTEXT)
    assert errors.is_stale(caught.value)


@pytest.mark.expect_warnings("telemetry")
def test_waiting_reads_block_nothing_and_are_interruptible(small, weights_of):
    subject, other = subject_of(small), subject_of(small, "sampler_weights")
    mount = weights_of(small, timeout_s=30)
    assert read(mount, subject) == truth(small, subject, NAME)
    mount.weights.files(other, BACKGROUND_CONTEXT)
    rule = small.faults.add("store", hang=True, times=None)
    gone = threading.Event()
    with mount.weights.open(other, NAME, BACKGROUND_CONTEXT) as waiting:
        ctx = RequestContext(is_cancelled=gone.is_set)
        ended = []

        def wait(number):
            try:
                waiting.read(9, number * 300_000, ctx)
            except OSError as error:
                ended.append(errors.is_interruption(error))

        threads = [threading.Thread(target=wait, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        rule.wait_for(5)
        began = time.monotonic()
        assert read(mount, subject) == truth(small, subject, NAME)
        assert mount.weights.files(subject, BACKGROUND_CONTEXT)
        assert time.monotonic() - began < 2
        gone.set()
        began = time.monotonic()
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - began < 2
        assert ended == [True] * 64
    rule.release()
    assert read(mount, other) == truth(small, other, NAME)


def test_readahead_never_triggers_an_archive_build(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=20 * MIB)
    subject = subject_of(server)
    with weights_of(server).weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        file._file.fetch(0, BACKGROUND_CONTEXT).result(10)
    server.journal.clear()
    with weights_of(server).weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        for offset in range(0, 2 * MIB, 256 * 1024):
            file.read(256 * 1024, offset, BACKGROUND_CONTEXT)
        assert server.journal.count() == 0
        assert read_all(file) == truth(server, subject, NAME)
    assert server.journal.count(URL) == 1


def test_archive_build_is_shared_by_concurrent_callers(demo_server, weights_of):
    server = demo_server(runs=1, building_polls=2, retry_after="0")
    subject, mount = subject_of(server), weights_of(server)
    found = run_concurrently(8, lambda _: mount.weights.files(subject, BACKGROUND_CONTEXT))
    assert all(each == found[0] for each in found)
    assert server.journal.count(URL) == 3


def test_rate_limit_counts_builds_but_not_renewals(demo_server, weights_of):
    server = demo_server(runs=1)
    first, second = subject_of(server), subject_of(server, number=1)
    mount = weights_of(server, burst=1)
    mount.weights.files(first, BACKGROUND_CONTEXT)
    with pytest.raises(OSError, match="builds a minute"):
        mount.weights.files(second, BACKGROUND_CONTEXT)
    server.signer.revoke_all()
    assert read(mount, first) == truth(server, first, NAME)


# The cache


def test_memory_of_all_open_files_is_bounded(demo_server, weights_of):
    server = demo_server(runs=2, size_bytes=40 * MIB)
    mount = weights_of(server, limit_bytes=0, memory_bytes=24 * MIB)
    subjects = [subject_of(server, run=run) for run in (0, 1)]
    found = run_concurrently(4, lambda n: read(mount, subjects[n % 2]))
    assert all(data == truth(server, subjects[n % 2], NAME) for n, data in enumerate(found))
    assert mount.weights.memory.peak_bytes <= 24 * MIB


def test_cache_removed_or_altered_while_open_is_refilled(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    expected = truth(small, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert read_all(file) == expected
        for path in mount.cache.directory.rglob("*"):
            if path.name.isdigit():
                path.write_bytes(bytes(path.stat().st_size))
        assert read_all(file) == expected
        subprocess.run(["rm", "-rf", mount.cache.directory], check=True)
        assert read_all(file) == expected
        mount.cache.directory.parent.chmod(0o500)
        subprocess.run(["rm", "-rf", mount.cache.directory], check=False)
        assert read_all(file) == expected
        mount.cache.directory.parent.chmod(0o700)


def test_corrupt_index_is_rebuilt(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    listing = mount.weights.files(subject, BACKGROUND_CONTEXT)
    mount.store.put("weights index 2", subject.cache_key, b"\xc1nonsense")
    assert weights_of(small).weights.files(subject, BACKGROUND_CONTEXT) == listing


def test_no_secret_is_logged(small, weights_of, caplog):
    caplog.set_level("DEBUG")
    subject, mount = subject_of(small), weights_of(small)
    small.faults.add("store", status=500, times=2)
    read(mount, subject)
    assert "X-Signature" not in caplog.text + mount.telemetry.errors.text().decode()
    assert "X-Signature" not in json.dumps(mount.telemetry.snapshot())


def test_closed_reader_sends_no_request_to_a_store(small, weights_of):
    mount = weights_of(small)
    mount.weights.close()
    with pytest.raises(errors.ConnectionFailed, match="stopped"):
        mount.weights.files(subject_of(small), BACKGROUND_CONTEXT)
    assert small.journal.count("store") == 0


def test_missing_http_module_is_reported_with_a_hint(small, weights_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinkerfs.weights.http", None)
    with pytest.raises(errors.ConnectionFailed, match="mount again"):
        weights_of(small).weights.files(subject_of(small), BACKGROUND_CONTEXT)


def test_validator_prefers_a_strong_etag():
    assert Version(1, '"strong"', "date").validator == '"strong"'
    assert Version(1, 'W/"weak"', "date").validator == "date"
    assert Version(1).validator == ""


def content_of(fd):
    """Return the content of a file, and close it."""
    with open(fd, "rb") as file:
        return os.pread(file.fileno(), 1 << 30, 0)


def test_whole_cached_member_has_a_file_of_its_own(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    expected = truth(small, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.backing_fd(BACKGROUND_CONTEXT) is None
        assert read_all(file) == expected
        assert content_of(file.backing_fd(BACKGROUND_CONTEXT)) == expected
    mount = weights_of(small)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.backing_fd(BACKGROUND_CONTEXT, 1000) is None, "it is not verified yet"
        assert content_of(file.backing_fd(BACKGROUND_CONTEXT)) == expected
        assert content_of(file.backing_fd(BACKGROUND_CONTEXT, 1000)) == expected


def test_altered_cached_member_has_no_file_of_its_own(small, weights_of):
    subject, mount = subject_of(small), weights_of(small)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        expected = read_all(file)
        assert content_of(file.backing_fd(BACKGROUND_CONTEXT)) == expected
        [data] = mount.cache.directory.glob("*/1")
        with data.open("r+b") as altered:
            altered.seek(1 << 20)
            altered.write(b"?")
        assert file.backing_fd(BACKGROUND_CONTEXT) is None
        assert read_all(file) == expected
        assert content_of(file.backing_fd(BACKGROUND_CONTEXT)) == expected
