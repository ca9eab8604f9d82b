"""Signals during transfers, and retries in an account opened for a transfer."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.faulty_server import FaultyServer
from tests.support.mount import wait_until
from tests.unit.weights.conftest import subject_of
from tinkerfs.cli.locations import open_account
from tinkerfs.cli.transfers import exit_on_signal
from tinkerfs.config import Settings
from tinkerfs.context import BACKGROUND_CONTEXT


@pytest.fixture
def sigterm():
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def test_transfer_with_ignored_sigterm_continues(sigterm):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with exit_on_signal("run it again"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_transfer_with_sigterm_exits_with_143(sigterm, capsys):
    with pytest.raises(SystemExit) as end, exit_on_signal("run it again"):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
    assert capsys.readouterr().err == "tinkerfs: interrupted (hint: run it again)\n"


def test_open_account_retries_through_short_outage(tmp_path, monkeypatch):
    with FaultyServer(runs=1, checkpoints=9, size_bytes=100_000) as server:
        monkeypatch.setenv("TINKER_API_KEY", server.api_key)
        settings = Settings(base_url=server.base_url, cache_dir=str(tmp_path / "cache"))
        first, second = subject_of(server), subject_of(server, number=1)
        with open_account(settings) as app, ThreadPoolExecutor() as pool:
            assert app.weights.files(first, BACKGROUND_CONTEXT).members
            server.stop_listening("api")
            listing = pool.submit(app.weights.files, second, BACKGROUND_CONTEXT)

            def unreachable():
                requests = app.telemetry.snapshot()["api_requests"].values()
                return sum(count.get("unreachable", 0) for count in requests)

            wait_until(lambda: unreachable() >= 3 or listing.done())
            server.resume_listening()
            assert listing.result(20).members
