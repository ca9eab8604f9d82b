"""Tests of the traces of sessions, without a mount."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.clocks import FakeTime
from tests.support.mount import wait_until
from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.demo.content import Data, Noise
from tinkerfs.weights.traces import SessionTrace

MIB = 1 << 20
TRACE, STORE = "GET trace_export", "GET store/trace"


@pytest.fixture
def server(demo_server):
    return demo_server(runs=4, retry_after="0")


@pytest.fixture
def session(server):
    return server.account.session(server.account.session_ids()[0])


@pytest.fixture
def trace(server, session):
    return SessionTrace(server.base_url, session.id, f"/sessions/{session.id}", 7)


@pytest.fixture
def mount(server, weights_of):
    return weights_of(server)


def bytes_of(content):
    return content.read(0, content.size_bytes)


def read(mount, trace, ctx=BACKGROUND_CONTEXT):
    with mount.weights.traces.open(trace, ctx) as file:
        return file.read(1 << 40, 0, ctx)


def test_trace_is_read_once_it_is_built(server, mount, session, trace):
    session.trace_polls = 2
    assert read(mount, trace) == bytes_of(server.trace(session.id))
    assert server.journal.count(TRACE) == 3


def test_trace_is_read_by_ranges_and_cached(server, mount, weights_of, session, trace):
    session.trace = Noise(9 * MIB + 5, 1)
    expected = bytes_of(session.trace)
    with mount.weights.traces.open(trace, BACKGROUND_CONTEXT) as file:
        assert (file.size_bytes, file.mtime_ns) == (len(expected), 7)
        assert file.read(9, 8 * MIB, BACKGROUND_CONTEXT) == expected[8 * MIB :][:9]
        sent_bytes = sum(entry.sent_bytes for entry in server.journal.entries(STORE))
        assert sent_bytes <= BLOCK_BYTES + 1
        assert file.read(1 << 40, 0, BACKGROUND_CONTEXT) == expected
    server.journal.clear()
    assert read(weights_of(server), trace) == expected
    # A later mount requests the URL, and one byte to find out the version.
    assert server.journal.count(TRACE) == server.journal.count(STORE) == 1


def test_readers_share_one_build(server, weights_of, session, trace):
    mount = weights_of(server, url_age_s=60)  # a reader that starts late uses the same URL
    rule = server.faults.add(TRACE, times=1, hang=True)
    with ThreadPoolExecutor(20) as pool:
        found = [pool.submit(read, mount, trace) for _ in range(20)]
        rule.wait_for(1)
        pending = [what for what, _ in mount.telemetry.pending()]
        assert pending == [f"trace {trace.path}"]
        rule.release()
        expected = bytes_of(server.trace(session.id))
        assert {future.result(10) for future in found} == {expected}
    assert server.journal.count(TRACE) == 1


def test_interrupted_reader_leaves_the_build_running(server, mount, session, trace):
    session.trace_polls = None
    stop = threading.Event()
    interrupted = RequestContext(timeout_s=None, is_cancelled=stop.is_set)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(read, mount, trace, interrupted)
        wait_until(lambda: server.journal.count(TRACE) > 2)
        stop.set()
        with pytest.raises(OSError, match="Interrupted") as caught:
            waiting.result(10)
    assert caught.value.errno == errno.EINTR
    assert mount.telemetry.pending()
    session.trace_polls = 0
    assert read(mount, trace) == bytes_of(server.trace(session.id))


def test_trace_that_stays_pending_times_out(server, weights_of, session, trace):
    mount = weights_of(server, timeout_s=1.0)
    session.trace_polls = None
    with pytest.raises((errors.RequestTimeout, TimeoutError)):
        read(mount, trace)


def test_failed_build_is_reported_and_tried_again(server, mount, session, trace):
    session.trace_error = "the session has no events"
    for _ in range(2):
        with pytest.raises(errors.BuildFailed, match="the session has no events"):
            read(mount, trace)
    assert server.journal.count(TRACE) == 2
    session.trace_error = None
    assert read(mount, trace) == bytes_of(server.trace(session.id))


def test_failed_build_does_not_show_the_previous_trace(server, mount, session, trace):
    assert read(mount, trace)
    session.trace_error = "out of memory"
    with pytest.raises(errors.BuildFailed, match="out of memory"):
        read(mount, trace)


def test_trace_that_grew_is_another_version(server, mount, session, trace):
    first = read(mount, trace)
    session.trace_generation += 3
    longer = read(mount, trace)
    assert longer == bytes_of(server.trace(session.id)) != first


def test_size_is_known_while_the_trace_is_open(server, mount, session, trace):
    assert mount.weights.traces.size_bytes(trace) is None
    with mount.weights.traces.open(trace, BACKGROUND_CONTEXT) as file:
        session.trace_generation += 3
        assert mount.weights.traces.size_bytes(trace) == file.size_bytes
        with mount.weights.traces.open(trace, BACKGROUND_CONTEXT) as same:
            assert same.key == file.key
    assert mount.weights.traces.size_bytes(trace) is None
    with mount.weights.traces.open(trace, BACKGROUND_CONTEXT) as longer:
        assert longer.size_bytes == server.trace(session.id).size_bytes > file.size_bytes


def test_version_is_current_as_long_as_metadata_is_fresh(server, weights_of, session, trace):
    time = FakeTime()
    mount = weights_of(server, url_age_s=30.0, clock=time.clock)
    first = read(mount, trace)
    session.trace_generation += 3
    server.journal.clear()
    time.advance(26.0)
    assert mount.weights.traces.size_bytes(trace) == len(first)
    time.advance(3.0)
    # The kernel may use a size for a second, and the version must not change meanwhile.
    assert mount.weights.traces.size_bytes(trace) is None
    assert read(mount, trace) == first
    assert server.journal.count() == 0
    time.advance(1.0)
    assert len(read(mount, trace)) > len(first)
    assert server.journal.count(TRACE) == 1


def test_replaced_trace_makes_the_open_file_stale(server, mount, session, trace):
    session.trace = Noise(9 * MIB, 1)
    with mount.weights.traces.open(trace, BACKGROUND_CONTEXT) as file:
        session.trace, session.trace_generation = Noise(9 * MIB, 5), 9
        with pytest.raises(OSError, match="another version") as caught:
            file.read(9, 8 * MIB, BACKGROUND_CONTEXT)
        assert caught.value.errno == errno.ESTALE
    assert read(mount, trace) == bytes_of(session.trace)


def test_rejected_url_is_requested_again(server, mount, session, trace):
    session.trace = Noise(9 * MIB, 1)
    with mount.weights.traces.open(trace, BACKGROUND_CONTEXT) as file:
        server.signer.revoke_all()
        assert file.read(1 << 40, 0, BACKGROUND_CONTEXT) == bytes_of(session.trace)
    assert server.journal.count(TRACE) == 2


@pytest.mark.expect_warnings("update EHOSTUNREACH")
def test_trace_in_an_outage_is_the_last_version(server, weights_of, trace):
    expected = read(weights_of(server), trace)
    later = weights_of(server, timeout_s=1.0)
    server.stop_listening()
    assert read(later, trace) == expected
    assert f"{trace.path}\tupdate\tEHOSTUNREACH" in later.telemetry.errors.text().decode()
    other = SessionTrace(trace.server, "other", "/sessions/other", 0)
    with pytest.raises(errors.ConnectionFailed):
        read(later, other)


def test_removed_session_is_not_found(server, weights_of, session, trace):
    mount = weights_of(server, timeout_s=1.0)
    assert read(mount, trace)
    server.faults.add(
        TRACE, status=404, body={"detail": f"Session {session.id} not found"}, times=None
    )
    with pytest.raises(errors.NotFound):
        read(mount, trace)
    # Without a known version an outage is an error.
    server.stop_listening()
    with pytest.raises((errors.ConnectionFailed, TimeoutError)):
        read(mount, trace)


def test_missing_endpoint_is_requested_rarely(server, weights_of):
    mount = weights_of(server, burst=4)
    server.faults.add(TRACE, status=404, body={"detail": "Not Found"}, times=None)
    for number in range(9):
        trace = SessionTrace(server.base_url, f"s{number}", "/x", 0)
        with pytest.raises(errors.UnsupportedEndpoint):
            read(mount, trace)
    assert server.journal.count(TRACE) == 3


def test_builds_of_traces_count_for_the_rate_limit(server, weights_of):
    mount = weights_of(server, burst=1)
    first, second = (
        SessionTrace(server.base_url, session_id, f"/{session_id}", 0)
        for session_id in server.account.session_ids()
    )
    assert read(mount, first)
    with pytest.raises(errors.BurstExceeded, match="archive or trace builds a minute"):
        read(mount, second)
    assert read(mount, first)


def test_empty_trace_is_an_empty_file(mount, session, trace):
    session.trace = Data(b"")
    assert read(mount, trace) == b""
