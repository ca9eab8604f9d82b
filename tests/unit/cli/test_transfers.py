"""Transfers and the signals that end them."""

import signal

import pytest

from tinkerfs.cli.transfers import signals_interrupt


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
