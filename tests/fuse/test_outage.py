"""Outage of the API and recovery, while processes keep listing and reading."""

import time

import pytest

from tests.support.account import account, make_account

__all__ = ["account", "make_account"]

#: Kinds of outage: a fault of every endpoint, and the error message for data that is not cached.
OUTAGES = {
    "refused": ({"refuse": True}, "No route to host"),
    "hanging": ({"hang": True}, "Connection timed out"),
    "500": ({"status": 500, "headers": {"x-should-retry": "false"}}, "Input/output error"),
    "html": ({"html": True, "status": 200}, "Protocol error"),
    "half json": ({"half_json": True}, "Protocol error"),
}


@pytest.mark.parametrize("kind", OUTAGES)
def test_outage_serves_cached_data_and_recovers(make_account, kind):
    account = make_account(runs=3, checkpoints=3, settings={"ttl_s": 0.2, "timeout_s": 3.0})
    seen, unseen = account.server.account.run_ids[:2]
    script = f"ls -lR runs/{seen} && cat runs/{seen}/latest/info.json"
    cached = account.sh(f"{script}; ls runs")
    assert cached.returncode == 0
    options, expected = OUTAGES[kind]
    fault = account.server.faults.add("api", times=None, **options)
    time.sleep(0.3)  # the TTL
    # The first request of an endpoint waits for its retries; then its circuit breaker is open.
    for _ in range(3):
        assert expected in account.sh(f"ls runs/{unseen}/checkpoints").stderr
        account.sh(script)
    account.server.journal.clear()
    started = time.monotonic()
    rounds = 0
    while rounds < 2 or time.monotonic() - started < 3:
        rounds += 1
        done = account.sh(script)
        assert done.returncode == 0
        # A probe times out after 2 s; all other requests return at once.
        done = account.sh(f"ls runs/{unseen}/checkpoints")
        assert done.returncode != 0
        assert expected in done.stderr
        assert account.sh("ls runs/never-seen").returncode != 0
    # One probe per second of each of the 4 endpoints, plus the requests that open the breakers.
    took_s = time.monotonic() - started
    assert account.server.journal.count("api") <= 4 * (took_s + 3)
    assert kind == "refused" or account.server.journal.count("api") > 0
    fault.remove()
    assert account.eventually(
        lambda: account.sh(f"{script} && ls runs/{unseen}/checkpoints && ls runs").returncode == 0,
        15,
    )
