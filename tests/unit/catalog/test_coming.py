"""Listings of several pages, shown while the later ones are still on their way."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.drivers import opened
from tinkerfs.context import RequestContext
from tinkerfs.demo.server import DemoServer

RUNS, CHECKPOINTS = 250, 1
PAGE = 100
CALL = RequestContext(timeout_s=30.0)
LISTED = {"/runs": "GET training_runs", "/checkpoints": "GET checkpoints"}


@pytest.fixture(scope="module")
def demo_server():
    with DemoServer(runs=RUNS, checkpoints=CHECKPOINTS) as server:
        yield server


@pytest.fixture
def server(demo_server):
    yield demo_server
    demo_server.faults.clear()


@pytest.fixture
def filesystem(server, tmp_path):
    with opened("process", server, tmp_path) as driver:
        server.journal.clear()
        yield driver.filesystem


def calls(server):
    return [entry.endpoint for entry in server.journal.entries("api")]


def later_pages(server, folder, **effects):
    return server.faults.add(LISTED[folder], times=None, after=1, **effects)


@pytest.mark.parametrize("folder", LISTED)
def test_the_first_page_is_there_while_the_others_are_waited_for(folder, server, filesystem):
    held = later_pages(server, folder, hang=True)
    scan = filesystem.scandir(folder, CALL)
    first = scan.read(0, PAGE)
    assert len(first) == PAGE
    with ThreadPoolExecutor() as threads:
        more = threads.submit(scan.read, PAGE, PAGE)
        for entry in first[::9]:
            assert filesystem.stat(f"{folder}/{entry.name}", CALL) == entry.attr
        assert not more.done()
        assert set(calls(server)) == {LISTED[folder]}
        held.release()
        assert more.result(10)
    entries = scan.read_all()
    assert len({entry.name for entry in entries}) == len(entries) == RUNS
    assert entries == filesystem.listdir(folder, CALL)
    assert calls(server) == [LISTED[folder]] * 3


@pytest.mark.parametrize("folder", LISTED)
def test_of_a_quick_server_the_whole_is_there_at_once(folder, server, filesystem, monkeypatch):
    monkeypatch.setattr("tinkerfs.cache.metadata.PATIENCE_AT_START_S", 30.0)
    scan = filesystem.scandir(folder, CALL)
    assert calls(server) == [LISTED[folder]] * 3
    assert len(scan.read_all()) == RUNS


@pytest.mark.expect_warnings(r"list EIO .* 500")
@pytest.mark.parametrize("folder", LISTED)
def test_a_page_that_fails_is_told_after_those_that_came(folder, server, filesystem):
    held = threading.Event()
    later_pages(
        server,
        folder,
        call=lambda: held.wait(10),
        status=500,
        headers={"x-should-retry": "false"},
    )
    scan = filesystem.scandir(folder, CALL)
    assert len(scan.read(0, PAGE)) == PAGE
    held.set()
    for look in (lambda: scan.read(PAGE, 1), scan.read_all):
        with pytest.raises(OSError, match="500"):
            look()
    assert folder in filesystem._model.telemetry.errors_text()
    server.faults.clear()
    filesystem._model.catalogue.refresh()
    assert len(filesystem.listdir(folder, CALL)) == RUNS


@pytest.mark.expect_warnings(r"list EOPNOTSUPP .* 405")
def test_a_later_page_that_the_server_does_not_have_is_no_end(server, filesystem):
    held = threading.Event()
    later_pages(server, "/runs", call=lambda: held.wait(10), status=405)
    scan = filesystem.scandir("/runs", CALL)
    held.set()
    assert len(scan.read(0, PAGE)) == PAGE
    with pytest.raises(OSError, match="405"):
        scan.read(PAGE, 1)


def test_who_waits_for_the_next_page_is_told_when_it_is_late(server, filesystem):
    held = later_pages(server, "/runs", hang=True)
    scan = filesystem.scandir("/runs", RequestContext(timeout_s=30.0, page_timeout_s=0.05))
    assert len(scan.read(0, PAGE)) == PAGE
    with pytest.raises(TimeoutError):
        scan.read(PAGE, 1)
    held.release()
    assert len(filesystem.listdir("/runs", CALL)) == RUNS


def test_a_refresh_meanwhile_takes_nothing_from_who_reads(server, filesystem):
    held = later_pages(server, "/runs", hang=True)
    scan = filesystem.scandir("/runs", CALL)
    filesystem._model.catalogue.refresh()
    name = scan.read(0, 1)[0].name
    filesystem.stat(f"/runs/{name}", CALL)
    assert "GET training_runs/{run}" in calls(server), "what was refreshed is asked for anew"
    held.release()
    assert len(scan.read_all()) == RUNS
