"""Tests of `trace.pftrace`, the timeline of a session."""

import pytest

from tests.support.account import HOSTILE_NAMES, api_calls
from tests.support.drivers import outcome_of
from tinkerfs import name_encoding
from tinkerfs.demo.sample_data import Session

pytestmark = pytest.mark.served("GET trace_export")

TRACE = "GET trace_export"


@pytest.fixture
def world(make_world):
    return make_world(runs=4, checkpoints=1, retry_after="0", settings={"archive_build_limit": 0})


def paths_of(world):
    """Return the path of each session's trace, by its id."""
    return {each: f"sessions/{each}/trace.pftrace" for each in world.driver.listdir("sessions")}


def target_of(world, path):
    """Return the path that a trace's link leads to."""
    directory = path.rpartition("/")[0]
    assert world.driver.readlink(path).startswith("../../.content/")
    assert directory.count("/") == 1
    return world.driver.readlink(path).removeprefix("../../")


def true_bytes(world, session_id):
    content = world.server.trace(session_id)
    return content.read(0, content.size_bytes)


def last_error(world):
    return world.errors().splitlines()[-1]


def test_trace_is_read_after_it_was_built(world):
    for session_id, path in paths_of(world).items():
        world.server.account.session(session_id).trace_polls = 2
        assert world.driver.read(path) == true_bytes(world, session_id)
    assert world.server.journal.count(TRACE) == 2 * 3


def test_look_at_a_trace_requests_none(world):
    world.driver.listdir("sessions")
    world.server.journal.clear()
    for session_id, path in paths_of(world).items():
        assert world.driver.listdir(f"sessions/{session_id}") == [
            "info.json",
            "trace.pftrace",
            "runs",
            "samplers",
        ]
        assert world.driver.stat(path).is_link
        status = world.driver.stat(target_of(world, path))
        assert status.size > len(true_bytes(world, session_id))
        assert status.permissions == 0o444
        assert status.mtime_ns == world.driver.stat(f"sessions/{session_id}").mtime_ns
    requests = api_calls(world.server)
    assert requests.keys() <= {"GET sessions/{session}"}
    assert world.server.journal.count("store") == 0


def test_size_is_exact_once_the_trace_was_opened(world):
    session_id, path = next(iter(paths_of(world).items()))
    data = world.driver.read(path)
    assert world.driver.stat(target_of(world, path)).size == len(data)
    world.server.account.session(session_id).trace_generation += 1
    world.refresh()  # otherwise the URL is used until it is as old as `--ttl`
    longer = world.driver.read(path)
    assert longer == true_bytes(world, session_id)
    assert len(longer) > len(data)
    assert world.driver.stat(target_of(world, path)).size == len(longer)


def test_targets_of_traces_are_not_listed(world):
    session_id, path = next(iter(paths_of(world).items()))
    directory, _, name = target_of(world, path).rpartition("/")
    assert world.driver.listdir(".content") == []
    assert world.driver.listdir(directory.rpartition("/")[0]) == []
    assert world.driver.listdir(directory) == [name]
    absent = target_of(world, path).replace(session_id, "none")
    assert outcome_of(lambda: world.driver.read(absent)) == "ENOENT"


@pytest.mark.expect_warnings("open EIO")
def test_failed_trace_is_eio_with_the_words_of_the_server(world):
    session_id, path = next(iter(paths_of(world).items()))
    session = world.server.account.session(session_id)
    session.trace_error = "no events, see https://store/log?X-Signature=secret"
    assert outcome_of(lambda: world.driver.read(path)) == "EIO"
    assert "the trace could not be built: no events" in last_error(world)
    assert "secret" not in world.errors()
    session.trace_error = None
    assert world.driver.read(path) == true_bytes(world, session_id)


@pytest.mark.expect_warnings("open EOPNOTSUPP")
def test_missing_trace_endpoint_is_eopnotsupp(make_world):
    world = make_world(runs=20, checkpoints=1)
    world.server.faults.add(TRACE, status=404, body={"detail": "Not Found"}, times=None)
    for path in paths_of(world).values():
        assert outcome_of(lambda path=path: world.driver.read(path)) == "EOPNOTSUPP"
    assert "no such endpoint (GET sessions/{session}/trace_export" in last_error(world)
    assert world.server.journal.count(TRACE) == 3


@pytest.mark.expect_warnings("open EBUSY")
def test_traces_count_for_the_archive_burst(make_world):
    world = make_world(runs=8, checkpoints=1, settings={"archive_build_limit": 2})
    outcomes = [outcome_of(lambda p=p: world.driver.read(p)) for p in paths_of(world).values()]
    assert outcomes == ["OK", "OK", "EBUSY", "EBUSY"]
    assert "archive or trace builds" in last_error(world)


def test_session_that_was_removed_is_enoent(world):
    session_id, path = next(iter(paths_of(world).items()))
    world.server.faults.add(TRACE, status=404, body={"detail": f"Session {session_id} not found"})
    assert outcome_of(lambda: world.driver.read(path)) == "ENOENT"
    assert world.driver.read(path) == true_bytes(world, session_id)


def test_traces_of_sessions_with_hostile_names_are_read(make_world):
    world = make_world(runs=0, settings={"archive_build_limit": 0})
    # Names with a slash and those that are not Unicode do not pass through this server's URLs.
    excluded = (".", "..", "../../etc/passwd", "a/b", "\ud800")
    names = [name for name in HOSTILE_NAMES if name not in excluded]
    for name in [*names, "%~sessions", "sessions", "weights"]:
        session = Session(id=name, created_at_s=1.7e9, run_ids=[], samplers={})
        world.server.account.add_session(session)
    for name in world.driver.listdir("sessions"):
        path = f"sessions/{name}/trace.pftrace"
        assert target_of(world, path) == f".content/%~sessions/{name}/trace.pftrace"
        # A mount waits up to a second at each open after a stat.
        if not world.is_kernel or name.startswith("%25"):
            assert world.driver.read(path), path
        assert world.driver.stat(target_of(world, path)).size > 0
    assert name_encoding.encode("%~sessions") in world.driver.listdir("sessions")


def test_trace_cannot_be_removed_or_written(world):
    path = next(iter(paths_of(world).values()))
    assert outcome_of(lambda: world.driver.write(target_of(world, path), b"x")) == "EPERM"
    assert world.driver.remove(f"unlink {path}") == ["EPERM"]
