"""What a store is asked for, how often, how many at a time; archives that are hard to read."""

import dataclasses
import gzip
import io
import itertools
import re
import resource
import tarfile

import pytest

from tests.unit.weights.conftest import subject_of, truth
from tests.unit.weights.test_tar_index import special
from tinkerfs import errors
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Data, Noise
from tinkerfs.demo.profiles import PROFILES
from tinkerfs.weights import tar_index
from tinkerfs.weights.block_math import BLOCK_BYTES
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY
from tinkerfs.weights.remote_file import CONNECTIONS

KIB, MIB = 1 << 10, 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE, URL = "GET store/archive", "GET archive"


def read(mount, subject, name=NAME):
    with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
        places = range(0, file.size_bytes, 256 * KIB)
        return b"".join(file.read(256 * KIB, offset, BACKGROUND_CONTEXT) for offset in places)


def asked(server):
    server.journal.wait_until_idle()
    return server.journal.entries(ARCHIVE)


def place_of(entry):
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", entry.range).groups()
    return int(first), int(last) + 1


def test_each_request_is_for_a_closed_range_of_this_version_as_it_stands(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=20 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    assert read(mount, subject) == truth(server, subject, NAME)
    first, *rest = asked(server)
    for entry in (first, *rest):
        begin, end = place_of(entry)
        assert 0 < end - begin <= BLOCK_BYTES
        assert entry.headers["accept-encoding"] == "identity"
    assert "if-range" not in first.headers
    validators = {entry.headers["if-range"] for entry in rest}
    assert len(validators) == 1
    assert re.fullmatch(r'"\w+"', validators.pop())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_url_that_is_refused_is_renewed_once(demo_server, weights_of, status):
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
def test_where_the_new_url_is_refused_too_there_is_no_third(demo_server, weights_of, status):
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


def test_what_breaks_off_is_taken_up_where_it_broke(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=9 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", cut_after_bytes=1_000_001)
    assert read(mount, subject) == truth(server, subject, NAME)
    cut, *others = sorted(asked(server), key=lambda entry: entry.start_s)
    begin, end = place_of(cut)
    assert (begin + 1_000_001, end) in [place_of(entry) for entry in others]
    assert sum(entry.sent_bytes for entry in asked(server)) < 9 * MIB + 100 * KIB


def test_a_transfer_that_is_slow_but_moves_goes_on_for_many_time_outs(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server, timeout_s=0.2)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", bytes_per_s=600 * KIB, times=None)
    assert read(mount, subject) == truth(server, subject, NAME)
    [entry] = asked(server)
    assert entry.end_s - entry.start_s > 5 * 0.2


def test_a_transfer_that_hardly_moves_is_dropped_and_tried_again(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=MIB)
    subject, mount = subject_of(server), weights_of(server, timeout_s=0.5)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", bytes_per_s=900)  # less than 1 KiB a second, and never still
    assert read(mount, subject) == truth(server, subject, NAME)
    dropped, other = sorted(asked(server), key=lambda entry: entry.start_s)
    assert 0 < dropped.sent_bytes < 2 * KIB
    # The last piece that was sent may not have been received.
    assert 0 < place_of(other)[0] - place_of(dropped)[0] <= dropped.sent_bytes


def test_several_requests_at_a_time_hide_the_latency(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=120 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.latency_s = 0.1
    assert len(read(mount, subject)) > 119 * MIB
    entries = asked(server)
    most = max(
        sum(other.start_s <= entry.start_s < other.end_s for other in entries) for entry in entries
    )
    assert READAHEAD_CONCURRENCY // 2 <= most <= CONNECTIONS
    places = sorted(map(place_of, entries))
    assert all(one[1] <= next_[0] for one, next_ in itertools.pairwise(places))


def test_what_comes_next_is_asked_for_before_the_wait_for_what_is_read(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=100 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    server.faults.add("store", times=2, hold_until=2)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert len(file.read(3 * MIB, 0, BACKGROUND_CONTEXT)) == 3 * MIB
    assert {place_of(entry)[0] // BLOCK_BYTES for entry in asked(server)} == {0, 1}


def test_an_archive_of_many_gb_with_thousands_of_members(demo_server, weights_of):
    server = demo_server(runs=1)
    subject, mount = subject_of(server), weights_of(server)
    files = {f"shard/{n:04}": Noise(4 * MIB + n, n) for n in range(2000)}
    server.account.find(subject.ref.run_id, subject.ref.path_id)[1].archive = tar_of(files, 0)
    members = mount.weights.files(subject, BACKGROUND_CONTEXT).members
    sizes = {name: member.size_bytes for name, member in members.items()}
    assert sizes == {name: content.size_bytes for name, content in files.items()}
    assert sum(sizes.values()) > 8_000_000_000
    # A header leads to the next one alone, so each costs a small request.
    assert server.journal.count(ARCHIVE) <= 2001
    assert sum(entry.sent_bytes for entry in asked(server)) < 2002 * 64 * KIB + MIB
    server.journal.clear()
    with mount.weights.open(subject, "shard/1999", BACKGROUND_CONTEXT) as file:
        assert file.read(99, 4 * MIB, BACKGROUND_CONTEXT) == files["shard/1999"].read(
            4 * MIB, 4 * MIB + 99
        )
    later = weights_of(server)
    assert len(later.weights.files(subject, BACKGROUND_CONTEXT).members) == 2000
    assert server.journal.count() == 1


def bomb_of(block, count):
    """A header so many times, packed."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        for _ in range(count // 1000):
            file.write(block * 1000)
    return packed.getvalue()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_bomb_of_headers_is_an_error_in_bounded_memory(
    demo_server, weights_of, monkeypatch, kind
):
    monkeypatch.setattr(tar_index, "MAX_HEADER_BYTES", 16 << 20)  # 256 MiB take 9 s
    packed = dataclasses.replace(PROFILES["official"], archive_form="gzip")
    server = demo_server(runs=1, profile=packed)
    subject, mount = subject_of(server), weights_of(server)
    block = special("name", kind, "name").tobuf(tarfile.GNU_FORMAT)
    bomb = Data(bomb_of(block, 1_000_000))
    assert bomb.size_bytes < 5 * MIB
    server.account.find(subject.ref.run_id, subject.ref.path_id)[1].archive = bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match=r"headers|members|damaged") as caught:
        mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert errors.errno_name(caught.value) == "EIO"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * KIB  # in KiB
