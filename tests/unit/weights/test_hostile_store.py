"""Stores with invalid responses, and with versions that change: never a wrong byte."""

import itertools
import re
import time
from contextlib import ExitStack, suppress

import pytest

from tests.support.hostile import HostileServer, close, drip, endless, genuine, reset
from tests.unit.weights.conftest import subject_of, truth
from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.retry import STORE_BACKOFF, Backoff

MIB = 1 << 20
NAME = "adapter_model.safetensors"
SIZE_BYTES = 9 * MIB
TIMEOUT_S = 1.0

pytestmark = pytest.mark.expect_warnings(r"telemetry")


@pytest.fixture
def server():
    with HostileServer(runs=1, size_bytes=SIZE_BYTES) as server:
        yield server


def edited(change, *, has_ranges=True):
    """Send the genuine response, edited; without ranges, that for the whole file."""

    def step(handler):
        handler.entry.is_range_hidden = not has_ranges
        genuine(change)(handler)

    return step


def without(head, *names):
    lines = [
        line
        for line in head.decode().split("\r\n")
        if line.partition(":")[0].lower() not in [name.lower() for name in names]
    ]
    return "\r\n".join(lines).encode()


def with_headers(head, *lines):
    """Return a head with headers, which replace those of the same names."""
    names = [line.partition(":")[0] for line in lines]
    start = without(head, *names).removesuffix(b"\r\n\r\n")
    return start + "".join(f"\r\n{line}" for line in lines).encode() + b"\r\n\r\n"


def short(head):
    """Return a head with a Content-Range that ends after 1000 bytes."""
    return re.sub(
        rb"(Content-Range: bytes )(\d+)-\d+",
        lambda found: b"%s%s-%d" % (found[1], found[2], int(found[2]) + 999),
        head,
    )


def in_chunks(head, body, *lines):
    """Return a chunked response, without a length unless one of the lines states it."""
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(chunk), chunk)
        for chunk in (body[at : at + 100_000] for at in range(0, len(body), 100_000))
    )
    head = without(head, "Content-Length")
    return with_headers(head, "Transfer-Encoding: chunked", *lines) + chunks + b"0\r\n\r\n"


def read(file):
    return file.read(file.size_bytes, 0, BACKGROUND_CONTEXT)


def open_in(mount, server):
    return mount.weights.open(subject_of(server), NAME, BACKGROUND_CONTEXT)


def expected_of(server):
    return truth(server, subject_of(server), NAME)


INVALID = {
    "a body longer than its Content-Range": lambda head, body: (in_chunks(short(head), body),),
    "surplus after a true Content-Range": lambda head, body: (in_chunks(head, body + b"x"),),
    "a whole part of surplus": lambda head, body: (in_chunks(head, body + body),),
    "chunks that end early": lambda head, body: (in_chunks(head, body[:-1]),),
    "Transfer-Encoding: gzip, chunked": lambda head, body: (
        in_chunks(head, body, "Transfer-Encoding: gzip, chunked"),
    ),
    "Transfer-Encoding: identity": lambda head, body: (
        with_headers(head, "Transfer-Encoding: identity") + body,
    ),
    "Transfer-Encoding: chunked, chunked": lambda head, body: (
        in_chunks(head, body, "Transfer-Encoding: chunked, chunked"),
    ),
    "gzip, gzip, gzip": lambda head, body: (
        with_headers(head, "Content-Encoding: gzip, gzip, gzip") + body,
    ),
    "br": lambda head, body: (with_headers(head, "Content-Encoding: br") + body,),
    "two lengths": lambda head, body: (
        head.removesuffix(b"\r\n") + b"Content-Length: 7\r\n\r\n" + body,
    ),
    "a negative length": lambda head, body: (with_headers(head, "Content-Length: -1") + body,),
    "9 GiB of length": lambda head, body: (
        with_headers(head, "Content-Length: 9663676416") + body,
        close,
    ),
    "9 GiB of Content-Range": lambda head, body: (
        with_headers(head, "Content-Range: bytes 0-9663676415/9663676416") + body,
        close,
    ),
    "another range": lambda head, body: (
        with_headers(head, "Content-Range: bytes 1-4194304/9446400") + body,
    ),
    "a body that is cut": lambda head, body: (head + body[: len(body) // 2], reset),
    "no end of the chunks": lambda head, body: (
        in_chunks(head, body).removesuffix(b"0\r\n\r\n"),
        close,
    ),
    "416": lambda head, body: (b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n",),
    "101": lambda head, body: (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", close),
    "403 in the middle": lambda head, body: (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n",),
}


@pytest.mark.parametrize("case", INVALID)
def test_read_of_a_response_invalid_once_is_correct(server, weights_of, case):
    mount = weights_of(server, timeout_s=10)
    with open_in(mount, server) as file:
        server.on("store", edited(INVALID[case]), times=1)
        try:
            found = read(file)
        except errors.ClientError:  # the only case that is not retried
            assert case == "101"
            found = read(file)
        assert found == expected_of(server)


@pytest.mark.parametrize("case", INVALID)
def test_read_of_a_response_always_invalid_fails(server, weights_of, case, monkeypatch):
    backoff = Backoff(0.004, 0.01, immediate_retries=1)
    monkeypatch.setattr("tinkerfs.weights.transfer_monitor.STORE_BACKOFF", backoff)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    with open_in(mount, server) as file:
        rule = server.on("store", edited(INVALID[case]), times=None)
        with pytest.raises((errors.ApiError, OSError)):
            file.read(MIB, 5 * MIB, BACKGROUND_CONTEXT)
        rule.remove()
        assert read(file) == expected_of(server), "nothing invalid was cached"


@pytest.mark.parametrize("length", ["1", "99999999999"])
def test_read_of_a_chunked_body_ignores_content_length(server, weights_of, length):
    mount = weights_of(server, timeout_s=10)
    edit = edited(lambda head, body: (in_chunks(head, body, f"Content-Length: {length}"),))
    with open_in(mount, server) as file:
        server.on("store", edit, times=None)
        server.journal.clear()
        assert read(file) == expected_of(server)
        assert server.journal.count("GET store/archive") <= 3, "each response was valid"


STALLING = {
    "head": [drip(b"HTTP/1.1 206 Partial\r\n" * 99)],
    "interim responses": [drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 99)],
    "chunk size": [b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n", drip(b"0" * 999)],
    "endless 100": [endless(b"HTTP/1.1 100 Continue\r\n\r\n")],
}


@pytest.mark.parametrize("case", STALLING)
def test_read_of_a_stalling_store_ends_in_time(server, weights_of, case):
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    with open_in(mount, server) as file:
        rule = server.on("store", *STALLING[case], times=None)
        began = time.monotonic()
        with pytest.raises((errors.RequestTimeout, errors.ConnectionFailed, errors.ProtocolError)):
            file.read(9, 5 * MIB, BACKGROUND_CONTEXT)
        assert time.monotonic() - began < 10 * TIMEOUT_S
        rule.remove()
        began = time.monotonic()
        assert file.read(9, 5 * MIB, BACKGROUND_CONTEXT) == expected_of(server)[5 * MIB :][:9]
        assert time.monotonic() - began < 10 * TIMEOUT_S, "no reader joins the dead request"


def test_read_survives_a_short_dns_failure(server, weights_of):
    mount = weights_of(server, timeout_s=20)
    away = b"HTTP/1.1 302 Found\r\nLocation: http://nothing.invalid/\r\nContent-Length: 0\r\n\r\n"
    with open_in(mount, server) as file:
        server.on("store", away, times=4)
        assert read(file) == expected_of(server)


def test_read_survives_a_short_store_outage(server, weights_of):
    mount = weights_of(server, timeout_s=20)
    with open_in(mount, server) as file:
        server.stop_listening("store")
        server.drop_connections()
        reading = run_in_thread(lambda: read(file), "reader")
        refused = mount.telemetry
        while refused.snapshot()["api_requests"]["GET store"].get("failed", 0) < 4:
            time.sleep(0.01)
        server.resume_listening()
        assert reading.result(30) == expected_of(server)


def test_read_survives_a_short_api_outage(server, weights_of):
    mount = weights_of(server, timeout_s=20)
    with open_in(mount, server) as file:
        mount.weights.drop_urls()  # as if the URL had expired
        server.stop_listening("api", "store")
        server.drop_connections()
        calls = mount.telemetry.snapshot()["api_requests_total"]
        reading = run_in_thread(lambda: read(file), "reader")
        while mount.telemetry.snapshot()["api_requests_total"] < calls + 5:
            assert not reading.done(), reading.exception()
            time.sleep(0.01)
        server.resume_listening()
        assert reading.result(30) == expected_of(server)


def test_read_of_an_unreachable_store_fails_in_time(server, weights_of):
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    with open_in(mount, server) as file:
        server.stop_listening("store")
        server.drop_connections()
        began = time.monotonic()
        with pytest.raises(errors.ConnectionFailed, match="refused"):
            file.read(9, 5 * MIB, BACKGROUND_CONTEXT)
        assert TIMEOUT_S <= time.monotonic() - began < 10 * TIMEOUT_S + STORE_BACKOFF.max_s


# --- versions ------------------------------------------------------------------------------------


VALIDATORS = ("ETag", "Last-Modified")


def bare(head, body):
    """Remove the validators of a response."""
    return (without(head, *VALIDATORS) + body,)


def save_again(server):
    """Save the checkpoint again, with the same lengths and times."""
    subject = subject_of(server)
    checkpoint = server.account.checkpoint(subject.ref.run_id, subject.ref.path_id)
    before = expected_of(server)
    checkpoint.generation += 1
    assert expected_of(server) != before


def read_or_stale(file):
    """Return the bytes of a file, None for ESTALE."""
    try:
        return read(file)
    except OSError as error:
        if not errors.is_stale(error):
            raise
        return None


def read_in_the_end(mount, server, file=None):
    """Read an open file; after ESTALE, read it again after reopening it. Check the bytes.

    Returns:
        whether it was stale first.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_in(mount, server)) if file is None else file
        found = read_or_stale(file)
    if found is not None:
        assert found == expected_of(server)
        return False
    with open_in(mount, server) as opened:
        assert read(opened) == expected_of(server)
    return True


@pytest.mark.parametrize("is_chunked", [False, True])
def test_full_scan_resumed_in_another_version_restarts(server, weights_of, is_chunked):
    def cut(head, body):
        save_again(server)
        head = without(head, *VALIDATORS)
        sent = in_chunks(head, body) if is_chunked else head + body
        return (sent[: 5 * MIB], close)

    server.on("store", edited(cut, has_ranges=False), times=1)
    server.on("store", edited(bare, has_ranges=False), times=None)
    mount = weights_of(server, timeout_s=10)
    assert not read_in_the_end(mount, server), "no byte of the first version was returned"


@pytest.mark.parametrize("has_cache", [False, True])
def test_full_scan_over_blocks_of_another_version_is_stale(server, weights_of, has_cache):
    server.on("store", edited(bare, has_ranges=False), times=None)
    mount = weights_of(server, timeout_s=10, limit_bytes=(1 << 30) * has_cache)
    with open_in(mount, server) as file:
        for index in (0, 2):
            for path in mount.cache.directory.glob(f"*/{index}"):
                path.unlink()
        save_again(server)
        assert read_in_the_end(mount, server, file)


def test_blocks_of_another_version_on_disk_are_fetched_again(server, weights_of):
    server.on("store", edited(bare, has_ranges=False), times=None)
    with open_in(weights_of(server), server) as file:
        assert read(file) == expected_of(server)
        [directory] = weights_of(server).cache.directory.iterdir()
        old = {path: path.read_bytes() for path in directory.iterdir() if path.name in "0index"}
    save_again(server)
    mount = weights_of(server)
    mount.weights.invalidate(subject_of(server))
    with open_in(mount, server) as file:
        for path, data in old.items():  # as if the cache had rejected the newer blocks
            path.write_bytes(data)
        assert read(file) == expected_of(server)


def test_range_after_a_cached_block_of_another_version_is_stale(server, weights_of):
    server.on("store", edited(bare), times=None)
    mount = weights_of(server, timeout_s=10)
    with open_in(mount, server) as file:
        assert file.read(9, 1 * MIB, BACKGROUND_CONTEXT) == expected_of(server)[MIB:][:9]
        save_again(server)
        assert read_in_the_end(mount, server, file)


def test_range_resumed_in_another_version_is_stale(server, weights_of):
    def cut(head, body):
        save_again(server)
        return (without(head, *VALIDATORS) + body[: 2 * MIB], close)

    mount = weights_of(server, timeout_s=10)
    rule = server.on("store", edited(bare), times=None)
    with open_in(mount, server) as file:
        rule.remove()
        server.on("store", edited(cut), times=1)
        server.on("store", edited(bare), times=None)
        with pytest.raises(OSError, match="another version"):
            file.read(9, 5 * MIB, BACKGROUND_CONTEXT)
    assert not read_in_the_end(mount, server)


def test_part_of_a_block_of_another_version_is_stale(server, weights_of):
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    rule = server.on("store", edited(bare), times=None)
    with open_in(mount, server) as file:
        rule.remove()
        cut = edited(lambda head, body: (without(head, *VALIDATORS) + body[: 2 * MIB], close))
        server.on("store", cut, times=1)
        failing = server.on("store", b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", times=None)
        with pytest.raises(errors.ServerError):
            file.read(9, BLOCK_BYTES, BACKGROUND_CONTEXT)
        assert 0 < file._file.cached_bytes(BLOCK_BYTES, 2 * BLOCK_BYTES) < BLOCK_BYTES
        failing.remove()
        server.on("store", edited(bare), times=None)
        save_again(server)
        assert file.read(9, BLOCK_BYTES, BACKGROUND_CONTEXT), "the stored part is of one version"
        with pytest.raises(OSError, match="another version"):
            file.read(9, 7 * MIB, BACKGROUND_CONTEXT)
    assert not read_in_the_end(mount, server)


def test_etag_that_appears_is_another_version(server, weights_of):
    rule = server.on(
        "store", edited(lambda head, body: (without(head, "ETag") + body,)), times=None
    )
    mount = weights_of(server, timeout_s=10)
    with open_in(mount, server) as file:
        rule.remove()
        assert read_in_the_end(mount, server, file)


def test_etag_that_is_weak_at_times_is_the_same(server, weights_of):
    is_weak = itertools.cycle([False, True])

    def toggle(head, body):
        return ((head.replace(b'ETag: "', b'ETag: W/"') if next(is_weak) else head) + body,)

    server.on("store", edited(toggle), times=None)
    mount = weights_of(server, timeout_s=10)
    assert not read_in_the_end(mount, server)
    assert server.journal.count("GET store/archive") <= 6


def by_edge(count, save=lambda edge: None):
    """Send responses of several servers in turn, each with its own ETag."""
    edges = itertools.cycle(range(count))

    def step(handler):
        edge = next(edges)
        save(edge)
        if_range = handler.entry.headers.get("if-range")
        handler.entry.is_range_hidden = if_range is not None and if_range != f'"edge {edge}"'
        handler.entry.headers.pop("if-range", None)
        genuine(lambda head, body: (with_headers(head, f'ETag: "edge {edge}"') + body,))(handler)

    return step


@pytest.mark.parametrize("count", [2, 3])
def test_etags_that_differ_by_server_are_the_same_version(server, weights_of, count):
    server.on("store", by_edge(count), times=None)
    mount = weights_of(server, timeout_s=10)
    assert not read_in_the_end(mount, server)
    for path in mount.cache.directory.glob("*/[0-9]*"):
        path.unlink()
    assert not read_in_the_end(weights_of(server, timeout_s=10), server), "without cached bytes"
    received = mount.telemetry.snapshot()["counters"]["bytes_received"]
    assert received < 1.2 * SIZE_BYTES, "no range costs the whole file"


def test_etags_that_differ_by_server_and_version_are_stale(server, weights_of):
    subject = subject_of(server)
    checkpoint = server.account.checkpoint(subject.ref.run_id, subject.ref.path_id)
    versions = []
    for generation in (1, 0):
        checkpoint.generation = generation
        versions.append(expected_of(server))

    def save(edge):
        checkpoint.generation = edge

    server.on("store", by_edge(2, save), times=None)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    for _ in range(4):
        # Indexing fails too if it meets both versions.
        with suppress(errors.ProtocolError, OSError), open_in(mount, server) as file:
            assert read_or_stale(file) in (*versions, None)


# --- no length -----------------------------------------------------------------------------------


def without_length(head, body):
    return (in_chunks(head, body),)


def test_archive_in_chunks_without_a_length_is_read(server, weights_of):
    cut = edited(lambda head, body: (in_chunks(head, body)[: 5 * MIB], close), has_ranges=False)
    server.on("store", cut, times=1)
    server.on("store", edited(without_length, has_ranges=False), times=None)
    mount = weights_of(server, timeout_s=10)
    assert not read_in_the_end(mount, server)
    requests = server.journal.count("GET store/archive")
    assert requests == 2, "what indexing downloaded is cached"
    for path in mount.cache.directory.glob("*/[0-9]*"):
        path.unlink()
    assert not read_in_the_end(mount, server)
    assert server.journal.count("GET store/archive") <= requests + 3, "one per block"


def test_archive_tar_in_chunks_without_a_length_is_read(server, weights_of):
    server.on("store", edited(without_length, has_ranges=False), times=None)
    subject = subject_of(server)
    archive = server.archive(subject.ref.run_id, subject.ref.path_id)
    with weights_of(server, timeout_s=10).weights.open_archive(subject, BACKGROUND_CONTEXT) as file:
        assert file.size_bytes == archive.size_bytes
        assert read(file) == archive.read(0, archive.size_bytes)


def test_archive_that_ends_with_the_connection_is_rejected(server, weights_of):
    """Nothing shows whether such a body is complete."""
    cut = edited(
        lambda head, body: (without(head, "Content-Length") + body, close), has_ranges=False
    )
    server.on("store", cut, times=None)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    with pytest.raises(errors.ProtocolError, match="how long the file is"):
        mount.weights.files(subject_of(server), BACKGROUND_CONTEXT)


def test_external_files_in_chunks_without_a_length_are_read(server, weights_of):
    server.on("store", edited(without_length, has_ranges=False), times=None)
    subject = subject_of(server, "external_weights")
    mount = weights_of(server, timeout_s=10)
    members = mount.weights.files(subject, BACKGROUND_CONTEXT).members
    for name, member in members.items():
        with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
            assert file.size_bytes == member.size_bytes
            assert read(file) == truth(server, subject, name)


def test_redirect_to_another_origin_carries_no_key(server, weights_of):
    with HostileServer(runs=1) as other:
        location = f"{other.store_url}/elsewhere?X-Signature=c0ffee"
        server.on(
            "store", f"HTTP/1.1 307 X\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
        )
        mount = weights_of(server, timeout_s=10)
        assert not read_in_the_end(mount, server)
        assert other.received
        for request in (*other.received, *server.received):
            is_api = request.origin == "api"
            assert (server.api_key.encode() in request.head) == is_api
            assert bool(request.header("X-API-Key")) == is_api
