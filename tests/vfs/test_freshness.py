"""How old an answer may be, and who is asked how often."""

import threading
import time

import pytest

from tests.support.drivers import outcome_of

RUN_CHECKPOINTS = "GET training_runs/{run}/checkpoints"


@pytest.fixture(scope="module")
def turned(world):
    """A world whose clock the test turns, None where it is the machine's."""
    return None if world.is_kernel else world


def test_what_was_listed_is_fresh_for_its_ttl(turned):
    if turned is None:
        return
    run = turned.new_run("weights/1")
    listed = turned.driver.listdir(turned.pgid(run))
    turned.server.account.add_checkpoint(run.partition("/")[2], "weights/2")
    turned.driver.time.advance(29)
    assert turned.driver.listdir(turned.pgid(run)) == listed
    assert turned.server.journal.count(RUN_CHECKPOINTS) == 1
    turned.driver.time.advance(2)
    assert turned.driver.listdir(turned.pgid(run)) == ["1", "2"]
    assert turned.server.journal.count(RUN_CHECKPOINTS) == 2


@pytest.mark.served("GET training_runs/{run}")
def test_absence_is_remembered_for_a_shorter_time(turned):
    if turned is None:
        return
    turned.driver.listdir("runs")
    assert outcome_of(lambda: turned.driver.stat("runs/later")) == "ENOENT"
    turned.server.account.add_run("later")
    assert outcome_of(lambda: turned.driver.stat("runs/later")) == "ENOENT"
    turned.driver.time.advance(6)
    assert turned.driver.stat("runs/later").is_folder
    turned.server.account.remove_run("later")


@pytest.mark.expect_warnings("refresh E", "(list|stat) EIO")
def test_in_an_outage_the_last_good_answer_serves_for_a_day(turned):
    if turned is None:
        return
    run = turned.new_run("weights/1")
    listed = turned.driver.listdir(turned.pgid(run))
    fault = turned.server.faults.add(
        "api",
        times=None,
        status=503,
        body={"detail": "down for repairs"},
        headers={"x-should-retry": "false"},
    )
    try:
        turned.driver.time.advance(31)
        assert turned.driver.listdir(turned.pgid(run)) == listed
        assert "down for repairs" in turned.errors()
        assert '"stale_answers": ' in turned.driver.read(".tinkerfs/stats.json").decode()
        turned.driver.time.advance(23 * 3600)
        assert turned.driver.listdir(turned.pgid(run)) == listed
        turned.driver.time.advance(2 * 3600)
        assert outcome_of(lambda: turned.driver.listdir(f"{run}/checkpoints")) == "EIO"
    finally:
        fault.remove()
    turned.driver.time.advance(3)
    assert turned.driver.listdir(turned.pgid(run)) == listed


@pytest.mark.expect_warnings("refresh E")
def test_during_an_outage_a_walk_makes_few_calls(turned):
    if turned is None:
        return
    run = turned.new_run("weights/1")
    turned.driver.listdir(turned.pgid(run))
    fault = turned.server.faults.add(
        RUN_CHECKPOINTS, times=None, status=500, headers={"x-should-retry": "false"}
    )
    turned.driver.time.advance(31)
    for _ in range(50):
        turned.driver.listdir(turned.pgid(run))
    fault.remove()
    assert fault.applied == 1


def test_refresh_drops_everything_now(world):
    run = world.new_run("weights/1")
    assert world.driver.listdir(world.group(run)) == ["1"]
    world.server.account.add_checkpoint(run.partition("/")[2], "weights/2")
    assert world.driver.listdir(world.group(run)) == ["1"]
    world.driver.write(".tinkerfs/refresh", b"now\n")
    assert world.driver.listdir(world.group(run)) == ["1", "2"]
    assert world.driver.stat(f"{run}/checkpoints/weights/2").is_folder


def test_a_zero_ttl_asks_every_time(make_world):
    world = make_world(runs=1, checkpoints=1, settings={"ttl_s": 0.0})
    folder = f"runs/{world.server.account.run_ids[0]}/checkpoints"
    for _ in range(3):
        world.driver.listdir(folder)
    assert world.server.journal.count(RUN_CHECKPOINTS) >= 3


@pytest.mark.served("GET training_runs/{run}")
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.expect_warnings("list EIO")
def test_sixteen_who_want_one_listing_make_one_call_and_share_what_comes_of_it(world, status):
    run = world.new_run("weights/1")
    world.driver.stat(run)
    effects = {} if status == 200 else {"status": 500, "headers": {"x-should-retry": "false"}}
    hold = world.server.faults.add(RUN_CHECKPOINTS, hang=True, times=None, **effects)
    outcomes = []

    def ask():
        outcomes.append(outcome_of(lambda: world.driver.listdir(f"{run}/checkpoints")))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    try:
        for thread in threads:
            thread.start()
        hold.wait_for(1)
    finally:
        hold.release()
        for thread in threads:
            thread.join(20)
        hold.remove()
    assert outcomes == ["OK" if status == 200 else "EIO"] * 16
    # Who comes after a failure that is remembered for two seconds asks nobody either.
    assert world.server.journal.count(RUN_CHECKPOINTS) == 1


def test_who_changes_something_sees_it_everywhere_at_once(world):
    run = world.new_run("weights/1", "weights/2")
    place = f"{run}/checkpoints/weights/1"
    world.driver.listdir("runs")
    if world.serves("POST publish"):
        for word, flag in ((b"1", b"1\n"), (b"0", b"0\n")):
            world.driver.write(f"{place}/published", word)
            assert world.driver.read(f"{place}/published") == flag
    world.driver.remove(f"rmtree {place}")
    assert world.driver.listdir(world.group(run)) == ["2"]
    assert world.server.journal.count("GET training_runs") <= 2


@pytest.mark.served("GET training_runs")
def test_a_folder_s_time_changes_when_its_content_does(make_world):
    world = make_world(runs=1, checkpoints=1, settings={"ttl_s": 0.05})
    run = world.new_run("weights/1", "weights/2")
    run_id = run.removeprefix("runs/")
    folders = ["checkpoints", f"{run}/checkpoints", world.group(run)]

    def times():
        if world.is_kernel:
            time.sleep(0.06)
        else:
            world.driver.time.advance(1)
        for folder in folders:
            world.driver.listdir(folder)
        return [world.driver.stat(folder).mtime_ns for folder in folders]

    def seen_after(change):
        before = times()
        change()
        return world.eventually(
            lambda: all(new > old for new, old in zip(times(), before, strict=True))
        )

    assert seen_after(lambda: world.server.account.add_checkpoint(run_id, "weights/3"))
    assert seen_after(lambda: world.server.account.delete_checkpoint(run_id, "weights/1"))
    folders[:] = ["runs", "models"]
    assert seen_after(lambda: world.server.account.remove_run(run_id))
    steady = times()
    assert times() == steady
