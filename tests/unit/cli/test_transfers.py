"""Transfers and the signals that end them."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.mount import wait_until
from tests.unit.weights.conftest import subject_of
from tinkerfs.cli import transfers
from tinkerfs.cli.transfers import signals_interrupt
from tinkerfs.config import Settings
from tinkerfs.context import IN_PROCESS
from tinkerfs.demo.server import DemoServer


@pytest.fixture
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_transfer_with_sigterm_ignored_goes_on(sigterm):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with signals_interrupt("go on"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_transfer_with_sigterm_ends_with_143(sigterm, capsys):
    with pytest.raises(SystemExit) as end, signals_interrupt("run it again"):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
    assert capsys.readouterr().err == "tinkerfs: interrupted: run it again\n"


def test_opened_account_waits_out_a_blip_after_the_first_archive(tmp_path, monkeypatch):
    with DemoServer(runs=1, checkpoints=9, size_bytes=100_000) as server:
        monkeypatch.setenv("TINKER_API_KEY", server.api_key)
        settings = Settings(base_url=server.base_url, cache_dir=str(tmp_path / "cache"))
        first, second = subject_of(server), subject_of(server, number=1)
        with transfers.opened(settings) as parts, ThreadPoolExecutor() as pool:
            assert parts.weights.files(first, IN_PROCESS).members
            server.stop_listening("api")
            listing = pool.submit(parts.weights.files, second, IN_PROCESS)

            def unreachable():
                calls = parts.telemetry.snapshot()["calls"].values()
                return sum(count.get("unreachable", 0) for count in calls)

            wait_until(lambda: unreachable() >= 3 or listing.done())
            server.resume_listening()
            assert listing.result(20).members
