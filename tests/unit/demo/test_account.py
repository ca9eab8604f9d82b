import dataclasses
import time

import pytest

from tinkerfs.demo.account import Account
from tinkerfs.demo.sample_data import REFERENCE_TIME_S, SampleData, Session


def account(**fields):
    return Account(SampleData(**({"runs": 6, "checkpoints": 5} | fields)), lambda: 1_900_000_000.0)


def everything(found):
    return [
        dataclasses.asdict(run) for run in [*found.runs(), *map(found.run, found.foreign_run_ids)]
    ]


def test_account_is_determined_by_its_seed():
    assert everything(account()) == everything(account())
    assert everything(account()) != everything(account(seed=1))


def test_account_with_more_runs_has_the_same_first_runs():
    assert account(runs=6).run_ids == account(runs=60).run_ids[:6]


def test_times_are_ordered_and_in_the_past():
    found = account(runs=50)
    times = [run.last_request_time_s for run in found.runs()]
    assert times == sorted(times, reverse=True)
    assert times[0] < REFERENCE_TIME_S
    for run in found.runs():
        saved = [c.time_s for c in run.checkpoints]
        assert saved == sorted(saved)
        assert saved[-1] < run.last_request_time_s
    newest_first = [c.time_s for _, c in found.checkpoints()]
    assert newest_first == sorted(newest_first, reverse=True)


def test_reference_time_of_now_dates_records_to_now():
    found = account(reference_time_s=time.time())
    assert time.time() - 3600 < found.runs()[0].last_request_time_s < time.time()
    expiries = [c.expires_at_s for _, c in found.checkpoints() if c.expires_at_s]
    assert expiries
    assert all(expiry > time.time() for expiry in expiries)


def test_ids_are_unique():
    found = account(runs=500, checkpoints=12)
    assert len(set(found.run_ids)) == 500
    paths = [f"{run.id}/{c.id}" for run, c in found.checkpoints()]
    assert len(set(paths)) == len(paths) == 6000


def test_checkpoints_of_a_page_are_a_slice_of_all():
    found = account()
    whole = found.checkpoints()
    assert len(whole) == found.checkpoint_count == 30
    for offset in range(0, 33, 4):
        for limit in (0, 1, 4, 7, 100):
            assert found.checkpoints(offset, limit) == whole[offset : offset + limit]


def test_large_account_generates_only_requested_records():
    found = account(runs=100_000, checkpoints=10)
    assert len(found.checkpoints(999_950, 100)) == 50
    assert len(found.session_ids(49_990, 20)) == 10
    found.touch(found.run_ids[500])
    found.add_checkpoint(found.run_ids[700], "weights/new")
    found.delete_checkpoint(found.run_ids[900], "weights/0001")
    assert found.checkpoint_count == 1_000_000
    assert len(found.checkpoints(500_000, 100)) == 100
    assert len(found._cached_runs) < 30


def test_added_records_are_listed_first():
    found = account()
    run = found.add_run(base_model="own/model")
    checkpoint = found.add_checkpoint(found.run_ids[3], "weights/new", is_public=True)
    assert found.run_ids[0] == run.id
    assert found.runs(0, 1) == [run]
    assert found.checkpoints(0, 1) == [(found.run(found.run_ids[3]), checkpoint)]
    assert found.checkpoint_count == 31
    with pytest.raises(KeyError):
        found.add_checkpoint("none", "weights/new")
    with pytest.raises(KeyError):
        found.find(run.id, "weights/none")


def test_add_checkpoint_with_an_existing_id_replaces_it():
    found = account()
    run_id = found.run_ids[0]
    again = found.add_checkpoint(run_id, "weights/0001")
    assert found.checkpoint(run_id, "weights/0001") is again
    assert again.generation == 1
    assert found.checkpoint_count == 30


def test_delete_checkpoint_and_remove_run_remove_records():
    found = account()
    run_id = found.run_ids[2]
    assert found.delete_checkpoint(run_id, "weights/0001")
    assert not found.delete_checkpoint(run_id, "weights/0001")
    assert not found.delete_checkpoint("none", "weights/0001")
    assert found.checkpoint_count == len(found.checkpoints()) == 29
    found.remove_run(run_id)
    assert found.run(run_id) is None
    assert found.checkpoint_count == len(found.checkpoints()) == 25


def test_checkpoints_after_changes_are_ordered_in_every_page():
    found = account(runs=12, checkpoints=4)
    ids, newest_s = found.run_ids, found.runs()[0].last_request_time_s
    found.touch(ids[10])
    found.add_checkpoint(ids[3], "weights/new")
    found.add_checkpoint(ids[3], "weights/0001")
    found.delete_checkpoint(ids[3], "sampler_weights/0001")
    found.delete_checkpoint(ids[4], "sampler_weights/0001")
    found.run(ids[5]).checkpoints.clear()
    found.remove_run(ids[6])
    found.add_checkpoint(ids[7], "weights/former", time_s=newest_s - 2.5 * 3600)
    found.delete_checkpoint(ids[8], found.add_checkpoint(ids[8], "weights/brief").id)
    found.add_run("added")
    for number in range(14):
        found.add_checkpoint("added", f"weights/{number}", time_s=newest_s - 3000 * number)
    found.remove_run(found.add_run().id)
    pairs = [(run, c) for run in found.runs() for c in run.checkpoints]
    whole = found.checkpoints()
    assert found.checkpoint_count == len(whole) == len(pairs)
    times = [c.time_s for _run, c in whole]
    assert times == sorted(times, reverse=True)
    assert {(run.id, c.id) for run, c in whole} == {(run.id, c.id) for run, c in pairs}
    for offset in range(len(whole) + 2):
        assert found.checkpoints(offset, 5) == whole[offset : offset + 5]


def test_changed_records_are_never_evicted():
    found = account(runs=5000, checkpoints=1)
    resized, deleted = found.run_ids[2], found.run_ids[3]
    found.run(resized).checkpoints[0].size_bytes = 7
    found.delete_checkpoint(deleted, "weights/0001")
    assert len(found.runs()) == 5000
    assert len(found._cached_runs) < 5000
    assert found.run(resized).checkpoints[0].size_bytes == 7
    assert not found.run(deleted).checkpoints
    assert found.checkpoint_count == 4999


def test_touch_moves_a_run_to_the_front():
    found = account()
    last = found.run_ids[-1]
    found.touch(last)
    assert found.run_ids[0] == last
    assert found.run(last).last_request_time_s == 1_900_000_000.0


def test_add_session_adds_a_session_and_its_samplers():
    found = account()
    session = Session("s", 1.0, ["r"], {"s:sample:0": ("m", None)})
    found.add_session(session)
    assert found.session_ids()[0] == "s"
    assert found.session("s") is session
    assert found.sampler("s:sample:0") == ("m", None)
    assert found.sampler("s:sample:1") is None


def test_session_of_the_last_odd_run_has_one_run():
    found = account(runs=5)
    *_, last = found.session_ids()
    assert found.session(last).run_ids == found.run_ids[4:]


def test_empty_account_lists_nothing():
    found = account(runs=0)
    assert (found.runs(), found.checkpoints(), found.session_ids()) == ([], [], [])
    assert account(checkpoints=0).checkpoints() == []
