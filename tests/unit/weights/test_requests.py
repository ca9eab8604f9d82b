"""Requests to a store: their ranges, number and concurrency; archives that are hard to index."""

import dataclasses
import gzip
import io
import itertools
import re
import resource
import tarfile

import pytest

from tests.unit.weights.conftest import range_of, subject_of, truth
from tests.unit.weights.test_tar_index import special
from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Data, Noise
from tinkerfs.demo.profiles import PROFILES
from tinkerfs.weights import tar_index
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY
from tinkerfs.weights.remote_file import CONNECTIONS

KIB, MIB = 1 << 10, 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE, URL = "GET store/archive", "GET archive"


def read(mount, subject, name=NAME):
    with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
        ranges = range(0, file.size_bytes, 256 * KIB)
        return b"".join(file.read(256 * KIB, offset, BACKGROUND_CONTEXT) for offset in ranges)


def requests_of(server):
    server.journal.wait_until_idle()
    return server.journal.entries(ARCHIVE)


def test_requests_have_closed_ranges_and_if_range(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=20 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    assert read(mount, subject) == truth(server, subject, NAME)
    first, *rest = requests_of(server)
    for entry in (first, *rest):
        begin, end = range_of(entry)
        assert 0 < end - begin <= BLOCK_BYTES
        assert entry.headers["accept-encoding"] == "identity"
    assert "if-range" not in first.headers
    validators = {entry.headers["if-range"] for entry in rest}
    assert len(validators) == 1
    assert re.fullmatch(r'"\w+"', validators.pop())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_rejected_url_is_renewed_once(demo_server, weights_of, status):
    server = demo_server(runs=1, size_bytes=9 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    refused = server.faults.add("store", status=status)
    assert read(mount, subject) == truth(server, subject, NAME)
    assert refused.applied == 1
    assert server.journal.count(URL) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.expect_warnings("telemetry")
def test_rejected_renewed_url_is_an_error(demo_server, weights_of, status):
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        server.journal.clear()
        server.faults.add("store", status=status, times=None)
        with pytest.raises((errors.ApiError, OSError)):
            file.read(9, 0, BACKGROUND_CONTEXT)
    assert server.journal.count(URL) == 1
    assert server.journal.count(ARCHIVE) == 2


def test_broken_response_is_resumed_at_its_end(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=9 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    rule = server.faults.add(
        "store", cut_after_bytes=1_000_001, when=lambda e: "=0-" not in e.range
    )
    assert read(mount, subject) == truth(server, subject, NAME)
    assert rule.applied
    _unit, cut, *others = sorted(requests_of(server), key=lambda entry: entry.start_s)
    begin, end = range_of(cut)
    assert (begin + 1_000_001, end) in [range_of(entry) for entry in others]
    assert sum(entry.sent_bytes for entry in requests_of(server)) < 9 * MIB + 100 * KIB


def test_slow_transfer_continues_beyond_the_timeout(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server, timeout_s=1.0)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", bytes_per_s=300 * KIB, times=None)
    assert read(mount, subject) == truth(server, subject, NAME)
    [entry] = requests_of(server)
    assert entry.end_s - entry.start_s > 3 * 1.0


def test_transfer_with_progress_survives_many_breaks(demo_server, weights_of):
    """Without a fresh budget after progress the delays between 10 retries would take 30 s."""
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server, timeout_s=3.0)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", cut_after_bytes=100 * KIB, times=None)
    assert read(mount, subject) == truth(server, subject, NAME)
    assert server.journal.count(ARCHIVE) > 10


def test_transfer_with_little_progress_fails(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server, timeout_s=1.0)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", cut_after_bytes=KIB, times=None)
    with pytest.raises(errors.ConnectionFailed):
        read(mount, subject)
    assert 2 < server.journal.count(ARCHIVE) < 10


def test_stalled_transfer_is_dropped_and_retried(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server, timeout_s=1.0)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", bytes_per_s=900)  # less than 1 KiB a second, but never silent
    assert read(mount, subject) == truth(server, subject, NAME)
    dropped, other = sorted(requests_of(server), key=lambda entry: entry.start_s)
    assert 0 < dropped.sent_bytes < 2 * KIB
    # The last chunk that was sent may not have been received.
    assert 0 < range_of(other)[0] - range_of(dropped)[0] <= dropped.sent_bytes


def test_sequential_read_sends_concurrent_requests(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=120 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.latency_s = 0.1
    assert len(read(mount, subject)) > 119 * MIB
    entries = requests_of(server)
    max_concurrent = max(
        sum(other.start_s <= entry.start_s < other.end_s for other in entries) for entry in entries
    )
    assert READAHEAD_CONCURRENCY // 2 <= max_concurrent <= CONNECTIONS
    ranges = sorted(map(range_of, entries))
    assert all(one[1] <= next_[0] for one, next_ in itertools.pairwise(ranges))


def test_prefetch_is_sent_before_waiting_for_the_demand_read(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=100 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", times=2, hold_until=2)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert len(file.read(3 * MIB, 0, BACKGROUND_CONTEXT)) == 3 * MIB
    assert {range_of(entry)[0] // BLOCK_BYTES for entry in requests_of(server)} >= {0, 1}


def test_archive_of_8_gb_and_2000_members_is_indexed(demo_server, weights_of):
    server = demo_server(runs=1)
    subject, mount = subject_of(server), weights_of(server)
    files = {f"shard/{n:04}": Noise(4 * MIB + n, n) for n in range(2000)}
    server.account.find(subject.ref.run_id, subject.ref.path_id)[1].archive = tar_of(files, 0)
    members = mount.weights.files(subject, BACKGROUND_CONTEXT).members
    sizes = {name: member.size_bytes for name, member in members.items()}
    assert sizes == {name: content.size_bytes for name, content in files.items()}
    assert sum(sizes.values()) > 8_000_000_000
    # A header leads only to the next one, so each costs a small request.
    assert server.journal.count(ARCHIVE) <= 2001
    assert sum(entry.sent_bytes for entry in requests_of(server)) < 2002 * 64 * KIB + MIB
    server.journal.clear()
    with mount.weights.open(subject, "shard/1999", BACKGROUND_CONTEXT) as file:
        assert file.read(99, 4 * MIB, BACKGROUND_CONTEXT) == files["shard/1999"].read(
            4 * MIB, 4 * MIB + 99
        )
    later = weights_of(server)
    assert len(later.weights.files(subject, BACKGROUND_CONTEXT).members) == 2000
    assert server.journal.count() == 1


def make_bomb(block, count):
    """Return a gzip file of a block that is repeated `count` times."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        for _ in range(count // 1000):
            file.write(block * 1000)
    return packed.getvalue()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_header_bomb_is_an_error_in_bounded_memory(demo_server, weights_of, monkeypatch, kind):
    monkeypatch.setattr(tar_index, "MAX_HEADER_BYTES", 16 << 20)  # 256 MiB take 9 s
    packed = dataclasses.replace(PROFILES["official"], archive_form="gzip")
    server = demo_server(runs=1, profile=packed)
    subject, mount = subject_of(server), weights_of(server)
    block = special("name", kind, "name").tobuf(tarfile.GNU_FORMAT)
    bomb = Data(make_bomb(block, 1_000_000))
    assert bomb.size_bytes < 5 * MIB
    server.account.find(subject.ref.run_id, subject.ref.path_id)[1].archive = bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=r"headers|members|damaged") as caught:
        mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert errors.errno_name(caught.value) == "EIO"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * KIB  # in KiB
