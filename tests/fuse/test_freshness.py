"""Freshness on real mounts: the machine's clock, and the kernel's caches of a second at most."""

import os
import time

from tests.support.account import account, api_calls, make_account

__all__ = ["account", "make_account"]

RUN_CHECKPOINTS = "GET training_runs/{run}/checkpoints"


def test_what_changes_at_the_server_shows_after_the_ttl_and_a_second(make_account):
    account = make_account(runs=1, checkpoints=1, settings={"ttl_s": 0.5})
    run = account.server.account.runs()[0]
    flag = account.path(f"runs/{run.id}/checkpoints/weights/0001/published")
    before = flag.read_text()
    run.checkpoints[0].is_public = not run.checkpoints[0].is_public
    account.server.account.add_checkpoint(run.id, "weights/new")
    started = time.monotonic()
    assert account.eventually(lambda: flag.read_text() != before)
    assert account.eventually((flag.parent.parent / "new").is_dir)
    assert account.eventually(
        lambda: os.readlink(account.path(f"runs/{run.id}/latest")).endswith("weights/new")
    )
    assert time.monotonic() - started < 3.0


def test_within_the_ttl_nobody_is_asked_twice(account):
    run = account.server.account.run_ids[0]
    account.refresh()
    account.server.journal.clear()
    for _ in range(3):
        assert account.sh(f"ls runs; ls -R runs/{run}; cat runs/{run}/info.json").returncode == 0
    assert api_calls(account.server) == {"GET training_runs": 1, RUN_CHECKPOINTS: 1}


def test_refresh_is_at_once(account):
    run = account.new_run("weights/1")
    assert account.sh(f"ls {run}/checkpoints/weights").stdout == "1\n"
    account.server.account.add_checkpoint(run.partition("/")[2], "weights/2")
    done = account.sh(
        f"ls {run}/checkpoints/weights; echo > .tinkerfs/refresh; ls {run}/checkpoints/weights;"
        f" readlink {run}/latest"
    )
    assert done.stdout.split()[:3] == ["1", "1", "2"]
    assert account.eventually(
        lambda: account.sh(f"readlink {run}/latest").stdout == "checkpoints/weights/2\n"
    )


def test_a_name_that_comes_to_be_is_there_at_once(account):
    account.sh("ls runs")
    assert account.sh("ls -d runs/not-yet").returncode != 0
    account.server.account.add_run("not-yet")
    account.refresh()
    assert account.sh("ls -d runs/not-yet").returncode == 0


def test_after_a_change_every_look_agrees_at_once(account):
    run = account.new_run("weights/1", "weights/2")
    done = account.sh(
        f"""ls -lR {run} > /dev/null
        echo 1 > {run}/checkpoints/weights/2/published
        cat {run}/latest/published {run}/checkpoints/weights/2/published
        grep -c '"public": true' {run}/latest/info.json {run}/info.json
        rm -r {run}/checkpoints/weights/2
        ls {run}/checkpoints/weights
        grep -c weights/2 {run}/info.json
        """
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["1", "1"]
    assert [line[-1] for line in lines[2:4]] == ["1", "1"]
    assert lines[4:] == ["1", "0"], done


def test_in_an_outage_the_last_good_answer_is_there_at_once(make_account):
    account = make_account(runs=2, checkpoints=2, settings={"ttl_s": 0.1, "timeout_s": 2.0})
    known = account.sh("ls -lR runs; cat runs/*/info.json")
    assert known.returncode == 0
    fault = account.server.faults.add(
        "api", times=None, status=503, headers={"x-should-retry": "false"}
    )
    time.sleep(0.15)  # the TTL
    started = time.monotonic()
    done = account.sh("ls -lR runs; cat runs/*/info.json")
    assert time.monotonic() - started < 3.0
    assert (done.returncode, done.stdout) == (0, known.stdout)
    assert "503" in account.errors()
    assert '"stale_answers"' in account.path(".tinkerfs/stats.json").read_text()
    fault.remove()


def test_a_hanging_server_holds_up_a_known_listing_for_two_seconds_at_most(make_account):
    account = make_account(runs=2, checkpoints=2, settings={"ttl_s": 0.1})
    known = account.sh("ls -lR runs")
    fault = account.server.faults.add("api", times=None, hang=True)
    time.sleep(0.15)  # the TTL
    started = time.monotonic()
    done = account.sh("ls runs")
    assert time.monotonic() - started < 3.0
    assert done.returncode == 0
    assert set(done.stdout.split()) == set(account.server.account.run_ids)
    # What is waited for once is not waited for again.
    started = time.monotonic()
    assert account.sh("ls runs; ls runs; ls runs").returncode == 0
    assert time.monotonic() - started < 1.0
    fault.remove()
    assert known.returncode == 0


def test_sixty_four_waiting_reads_hold_up_nothing(account):
    runs = [account.new_run("weights/1") for _ in range(64)]
    other, known = account.server.account.run_ids[-2:]
    new = account.server.account.add_checkpoint(other, "weights/new")
    cold = f"runs/{other}/checkpoints/{new.id}"
    account.refresh()
    account.sh(f"ls -R runs/{other} runs/{known}; cat runs/{known}/latest/info.json")
    account.server.journal.wait_until_idle()
    fault = account.server.faults.add(RUN_CHECKPOINTS, times=None, hang=True)
    processes = [account.start("ls", f"{run}/checkpoints") for run in runs]
    try:
        fault.wait_for(7)  # an endpoint leaves one of --concurrency calls to the others
        asked = account.server.journal.count("POST weights_info")
        started = time.monotonic()
        done = account.sh(
            f"ls runs > /dev/null && ls -lR runs/{known} > /dev/null"
            f" && cat runs/{known}/latest/info.json > /dev/null && cat .tinkerfs/stats.json"
            f" && cat {cold}/info.json > /dev/null",
            timeout_s=20,
        )
        took_s = time.monotonic() - started
        assert done.returncode == 0, done
        assert took_s < 4
        assert account.server.journal.count("POST weights_info") > asked
    finally:
        fault.remove()
        for process in processes:
            process.communicate(timeout=30)
    assert all(process.returncode == 0 for process in processes)
