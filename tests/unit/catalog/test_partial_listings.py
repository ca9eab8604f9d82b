"""Partial listings: the first pages are served while later pages are in flight."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.support.drivers import opened
from tests.support.faulty_server import FaultyServer
from tinkerfs.context import RequestContext
from tinkerfs.demo.profiles import PROFILES

RUNS, CHECKPOINTS = 250, 1
PAGE = 100
CTX = RequestContext(timeout_s=30.0)
LISTED = {"/runs": "GET training_runs", "/checkpoints": "GET checkpoints"}


@pytest.fixture(scope="module")
def demo_server():
    profile = replace(PROFILES["official"], account_page_max=PAGE)
    with FaultyServer(runs=RUNS, checkpoints=CHECKPOINTS, profile=profile) as server:
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


def requests(server):
    return [entry.endpoint for entry in server.journal.entries("api")]


def later_pages(server, directory, **effects):
    return server.faults.add(LISTED[directory], times=None, after=1, **effects)


def refresh(filesystem):
    filesystem.open("/.tinkerfs/refresh", 1, CTX).write(b"1", CTX)


@pytest.mark.parametrize("directory", LISTED)
def test_scandir_with_hanging_pages_serves_the_first_page(directory, server, filesystem):
    hung = later_pages(server, directory, hang=True)
    scan = filesystem.scandir(directory, CTX)
    first = scan.read(0, PAGE)
    assert len(first) == PAGE
    with ThreadPoolExecutor() as threads:
        more = threads.submit(scan.read, PAGE, PAGE)
        for entry in first[::9]:
            assert filesystem.stat(f"{directory}/{entry.name}", CTX) == entry.attr
        assert not more.done()
        assert set(requests(server)) == {LISTED[directory]}
        hung.release()
        assert more.result(10)
    entries = scan.read_all()
    assert len({entry.name for entry in entries}) == len(entries) == RUNS
    assert entries == filesystem.listdir(directory, CTX)
    assert requests(server) == [LISTED[directory]] * 3


@pytest.mark.parametrize("directory", LISTED)
def test_scandir_of_fast_server_lists_all_pages_first(directory, server, filesystem, monkeypatch):
    monkeypatch.setattr("tinkerfs.cache.metadata.STREAM_WAIT_S", 30.0)
    scan = filesystem.scandir(directory, CTX)
    assert requests(server) == [LISTED[directory]] * 3
    assert len(scan.read_all()) == RUNS


@pytest.mark.parametrize("directory", LISTED)
def test_long_listing_is_streamed_at_once(directory, server, filesystem, monkeypatch):
    monkeypatch.setattr("tinkerfs.cache.metadata.STREAM_WAIT_S", 60.0)
    monkeypatch.setattr("tinkerfs.cache.result_stream.LONG_RESULTS", PAGE)
    hung = threading.Event()
    later_pages(server, directory, call=lambda: hung.wait(10))
    scan = filesystem.scandir(directory, CTX)
    assert len(scan.read(0, PAGE)) == PAGE
    assert not hung.is_set()
    hung.set()
    assert len(scan.read_all()) == RUNS


@pytest.mark.expect_warnings(r"list EIO .* 500")
@pytest.mark.parametrize("directory", LISTED)
def test_scandir_with_a_failing_page_raises_after_earlier_pages(directory, server, filesystem):
    hung = threading.Event()
    later_pages(
        server,
        directory,
        call=lambda: hung.wait(10),
        status=500,
        headers={"x-should-retry": "false"},
    )
    scan = filesystem.scandir(directory, CTX)
    assert len(scan.read(0, PAGE)) == PAGE
    hung.set()
    for read in (lambda: scan.read(PAGE, 1), scan.read_all):
        with pytest.raises(OSError, match="500"):
            read()
    reported = filesystem.open("/.tinkerfs/errors", 0, CTX).read(1 << 16, 0, CTX)
    assert directory.encode() in reported
    server.faults.clear()
    refresh(filesystem)
    assert len(filesystem.listdir(directory, CTX)) == RUNS


@pytest.mark.expect_warnings(r"list EOPNOTSUPP .* 405")
def test_scandir_with_an_unsupported_page_raises(server, filesystem):
    hung = threading.Event()
    later_pages(server, "/runs", call=lambda: hung.wait(10), status=405)
    scan = filesystem.scandir("/runs", CTX)
    hung.set()
    assert len(scan.read(0, PAGE)) == PAGE
    with pytest.raises(OSError, match="405"):
        scan.read(PAGE, 1)


def test_scandir_with_a_late_page_raises_timeout(server, filesystem):
    hung = later_pages(server, "/runs", hang=True)
    scan = filesystem.scandir("/runs", RequestContext(timeout_s=30.0, page_timeout_s=0.05))
    assert len(scan.read(0, PAGE)) == PAGE
    with pytest.raises(TimeoutError):
        scan.read(PAGE, 1)
    hung.release()
    assert len(filesystem.listdir("/runs", CTX)) == RUNS


def test_scandir_during_a_refresh_still_lists_everything(server, filesystem):
    hung = later_pages(server, "/runs", hang=True)
    scan = filesystem.scandir("/runs", CTX)
    refresh(filesystem)
    name = scan.read(0, 1)[0].name
    filesystem.stat(f"/runs/{name}", CTX)
    assert "GET training_runs/{run}" in requests(server), "a refreshed record is requested again"
    hung.release()
    assert len(scan.read_all()) == RUNS
