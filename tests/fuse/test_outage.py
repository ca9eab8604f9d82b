"""Outage and recovery, under people who go on looking."""

import time

import pytest

from tests.support.account import account, make_account

__all__ = ["account", "make_account"]

#: How the API can be out: a fault for every endpoint, and what who knows nothing is then told.
OUTAGES = {
    "refused": ({"refuse": True}, "No route to host"),
    "hanging": ({"hang": True}, "Connection timed out"),
    "500": ({"status": 500}, "Input/output error"),
    "html": ({"html": True, "status": 200}, "Protocol error"),
    "half json": ({"half_json": True}, "Protocol error"),
}


# One binding: all of this is decided above the kernel.
@pytest.mark.parametrize("make_account", ["mfusepy3"], indirect=True)
@pytest.mark.parametrize("kind", OUTAGES)
def test_what_was_seen_stays_what_was_not_fails_fast_and_all_comes_back(make_account, kind):
    account = make_account(runs=3, checkpoints=3, settings={"ttl_s": 0.2, "timeout_s": 1.0})
    seen, unseen = account.server.account.run_ids[:2]
    look = f"ls -lR runs/{seen} && cat runs/{seen}/latest/info.json"
    known = account.sh(f"{look}; ls runs")
    assert known.returncode == 0
    options, words = OUTAGES[kind]
    fault = account.server.faults.add("api", times=None, **options)
    time.sleep(0.3)  # the TTL
    # Whoever comes first waits for the retries; after that an endpoint is known to be out.
    for _ in range(3):
        assert words in account.sh(f"ls runs/{unseen}/checkpoints").stderr
        account.sh(look)
    account.server.journal.clear()
    started = time.monotonic()
    rounds = 0
    while time.monotonic() - started < 3:
        rounds += 1
        done = account.sh(look)
        assert done.returncode == 0
        # A probe that hangs is given up after 2 s; everybody else is answered at once.
        done = account.sh(f"ls runs/{unseen}/checkpoints")
        assert done.returncode != 0
        assert words in done.stderr
        assert account.sh("ls runs/never-seen").returncode != 0
    assert rounds >= 2
    # One probe a second of each of the 4 endpoints that are asked for, and what breaks them.
    took_s = time.monotonic() - started
    assert account.server.journal.count("api") <= 4 * (took_s + 3)
    assert kind == "refused" or account.server.journal.count("api") > 0
    fault.remove()
    started = time.monotonic()
    assert account.eventually(
        lambda: account.sh(f"{look} && ls runs/{unseen}/checkpoints && ls runs").returncode == 0,
    )
    assert time.monotonic() - started < 5
