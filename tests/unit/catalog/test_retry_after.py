"""Reads of a mount while a Retry-After is in effect."""

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import opened, outcome_of
from tests.support.server import demo_server, server  # noqa: F401
from tinkerfs.fuse import mount_table


@pytest.mark.expect_warnings("EBUSY|429")
def test_retry_after_serves_stale_values_and_sends_no_requests(
    server,  # noqa: F811
    tmp_path,
):
    time = FakeTime()
    one, other = server.account.run_ids[:2]
    with opened("process", server, tmp_path, time=time) as driver:
        runs = driver.listdir("runs")
        kinds = driver.listdir(f"runs/{one}/checkpoints")
        time.advance(60)
        server.journal.clear()
        server.faults.add("api", status=429, headers={"Retry-After": "100"})
        assert driver.listdir("runs") == runs
        # A slow machine shows the stale value before the response has arrived.
        assert mount_table.wait_until(lambda: b"429" in driver.read(".tinkerfs/errors"), 30)
        for _ in range(3):
            assert driver.listdir("runs") == runs
            assert driver.listdir(f"runs/{one}/checkpoints") == kinds
            assert outcome_of(lambda: driver.listdir(f"runs/{other}/checkpoints")) == "EBUSY"
            time.advance(10)
        assert server.journal.count() == 1
        assert "EBUSY" in driver.read(".tinkerfs/errors").decode()
        time.advance(71)
        assert driver.listdir(f"runs/{other}/checkpoints")
        assert driver.listdir("runs") == runs
        # On a slow machine stale values are served first and revalidated in the background.
        assert mount_table.wait_until(lambda: server.journal.count() == 3, 10)
