"""What a mount shows while the server wants to be left alone."""

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import opened, outcome_of
from tests.support.server import demo_server, server  # noqa: F401
from tinkerfs.fuse import mount_table


@pytest.mark.expect_warnings("EBUSY|429")
def test_while_a_retry_after_runs_what_is_known_is_shown_and_the_rest_is_busy_without_a_call(
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
        # On a busy machine what is known is shown first, and the call made behind it.
        assert mount_table.wait_until(lambda: server.journal.count() == 3, 10)
