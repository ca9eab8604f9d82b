"""Tests of info.json: its content, and the number of requests."""

import json

import pytest

from tinkerfs.demo import serialization


def record_of(world, run, checkpoint_id):
    run_id = run.partition("/")[2]
    checkpoint = world.server.account.checkpoint(run_id, checkpoint_id)
    return serialization.checkpoint_json(run_id, checkpoint, world.server.profile)


@pytest.mark.served("GET training_runs/{run}")
def test_run_info_is_the_complete_indented_record(world):
    run = world.new_run(
        "weights/1", extra={"colour": "red", "nested": {"deep": [1, 2.50]}, "big": 2**70}
    )
    text = world.driver.read(f"{run}/info.json").decode()
    server_run = world.server.account.run(run.partition("/")[2])
    assert json.loads(text) == serialization.run_json(server_run, world.server.profile)
    assert text.startswith('{\n  "training_run_id": ')
    assert text.endswith("\n}\n")
    assert "1180591620717411303424" in text


def test_checkpoint_info_merges_weights_info_and_record(world):
    run = world.new_run()
    world.server.account.add_checkpoint(
        run.partition("/")[2], "weights/1", extra={"loss": 0.125, "tags": ["a", None]}
    )
    world.refresh()
    text = world.driver.read(f"{run}/checkpoints/weights/1/info.json").decode()
    info = json.loads(text)
    server_run = world.server.account.run(run.partition("/")[2])
    weights_info = serialization.weights_info_json(server_run)
    record = record_of(world, run, "weights/1")
    assert info == weights_info | record
    assert list(info)[: len(weights_info)] == list(weights_info)
    assert info["loss"] == 0.125
    assert info["optimizer_config"] == {"type": "adam"}
    assert text.startswith('{\n  "base_model": ')
    assert text.endswith("\n}\n")


@pytest.mark.parametrize("base_model", [None, "meta/other"])
def test_checkpoint_info_has_the_base_model_of_either_record(world, base_model):
    run = world.new_run()
    run_id = run.partition("/")[2]
    fields = {"base_model": base_model}
    world.server.account.add_checkpoint(run_id, "weights/1", extra=fields)
    world.refresh()
    info = json.loads(world.driver.read(f"{run}/checkpoints/weights/1/info.json"))
    assert info["base_model"] == (base_model or world.server.account.run(run_id).base_model)


def test_checkpoint_info_preserves_unknown_fields(world):
    run = world.new_run("weights/1")
    world.server.faults.add("POST weights_info", edit=lambda info: info | {"new_in_2031": [1]})
    info = json.loads(world.driver.read(f"{run}/checkpoints/weights/1/info.json"))
    assert info["new_in_2031"] == [1]


def test_weights_info_is_requested_once_per_checkpoint(world):
    names = [f"weights/{n}" for n in range(12)]
    run = world.new_run(*names)
    for _ in range(3):
        for name in names:
            checkpoint_dir = f"{run}/checkpoints/{name}"
            assert json.loads(world.driver.read(f"{checkpoint_dir}/info.json"))["base_model"]
            assert world.driver.stat(f"{checkpoint_dir}/info.json").size > 100
        world.server.journal.wait_until_idle()
        world.refresh()
    assert world.server.journal.count("POST weights_info") == len(names)


def test_weights_infos_of_siblings_are_prefetched(world):
    names = [f"weights/{n}" for n in range(10)]
    run = world.new_run(*names)
    world.server.faults.add("POST weights_info", times=None, latency_s=0.05)
    try:
        for name in names:
            world.driver.read(f"{run}/checkpoints/{name}/info.json")
    finally:
        world.server.faults.clear()
    assert world.server.journal.max_in_flight("POST weights_info") > 3
    assert world.server.journal.count("POST weights_info") == len(names)


@pytest.mark.where(profile=lambda profile: not profile.flat_paths)
@pytest.mark.expect_warnings("weights info EINVAL")
def test_refused_weights_info_affects_one_checkpoint_only(world):
    run = world.new_run("weights/1", "sampler_weights/1", "weights/2")
    world.server.faults.add(
        "POST weights_info",
        times=None,
        when=lambda entry: b"sampler_weights" in entry.body,
        status=400,
        body={"detail": "only weights paths are taken here"},
    )
    try:
        infos = {
            name: json.loads(world.driver.read(f"{run}/checkpoints/{name}/info.json"))
            for name in ("weights/1", "sampler_weights/1", "weights/2")
        }
        assert infos["sampler_weights/1"] == record_of(world, run, "sampler_weights/1")
        assert infos["weights/1"]["lora_rank"] == infos["weights/2"]["lora_rank"] == 32
        reported = [line for line in world.errors().splitlines() if f"{run}/" in line]
        assert len(reported) == 1
        assert f"/{run}/checkpoints/sampler_weights/1/info.json" in reported[0]
        assert "only weights paths are taken here" in reported[0]
        requests = world.server.journal.count("POST weights_info")
        for _ in range(3):  # the refusal is cached, and reported once
            world.driver.read(f"{run}/checkpoints/sampler_weights/1/info.json")
        assert world.server.journal.count("POST weights_info") == requests
        assert len([line for line in world.errors().splitlines() if f"{run}/" in line]) == 1
    finally:
        world.server.faults.clear()


@pytest.mark.expect_warnings("weights info EIO")
def test_failed_weights_info_is_requested_again(world):
    run = world.new_run("weights/1")
    path = f"{run}/checkpoints/weights/1/info.json"
    fault = world.server.faults.add(
        "POST weights_info", times=None, status=500, headers={"x-should-retry": "false"}
    )
    assert json.loads(world.driver.read(path)) == record_of(world, run, "weights/1")
    fault.remove()
    world.refresh()
    assert json.loads(world.driver.read(path))["base_model"]


def test_weights_info_of_a_checkpoint_saved_again_is_reloaded(world):
    run = world.new_run("weights/1")
    path = f"{run}/checkpoints/weights/1/info.json"
    before = json.loads(world.driver.read(path))
    world.server.account.add_checkpoint(
        run.partition("/")[2], "weights/1", time_s=1_900_000_000.0, extra={"again": True}
    )
    world.refresh()
    after = json.loads(world.driver.read(path))
    assert after["again"]
    assert before["time"] != after["time"]
    assert world.server.journal.count("POST weights_info") == 2


@pytest.mark.where(profile=lambda profile: profile.kinds <= profile.weights_info_kinds)
def test_second_mount_requests_no_weights_info(variant, tmp_path):
    from tests.support.drivers import opened
    from tests.support.faulty_server import FaultyServer

    kind, profile = variant
    with FaultyServer(runs=2, checkpoints=5, profile=profile) as server:
        for _ in range(2):
            with opened(kind, server, tmp_path) as driver:
                for run in server.account.runs():
                    for checkpoint in run.checkpoints:
                        checkpoint_dir = f"runs/{run.id}/checkpoints/{checkpoint.id}"
                        assert json.loads(driver.read(f"{checkpoint_dir}/info.json"))["is_lora"]
        # A checkpoint without a time may have been saved again.
        undated = sum(c.time_s is None for run in server.account.runs() for c in run.checkpoints)
        assert server.journal.count("POST weights_info") == 10 + undated
        assert server.journal.count("GET training_runs/{run}/checkpoints") == 4


@pytest.mark.where(profile=lambda profile: "expires_at" not in profile.omitted)
def test_expires_at_and_published_match_the_record(world):
    run_id = world.new_run().partition("/")[2]
    add = world.server.account.add_checkpoint
    add(run_id, "weights/1", is_public=True, expires_at_s=1_900_000_000.25)
    add(run_id, "weights/2")
    world.refresh()
    checkpoint_dir = f"runs/{run_id}/checkpoints/weights"
    assert world.driver.read(f"{checkpoint_dir}/1/expires_at") == b"2030-03-17T17:46:40.25Z\n"
    assert world.driver.read(f"{checkpoint_dir}/1/published") == b"1\n"
    assert world.driver.read(f"{checkpoint_dir}/2/expires_at") == b"never\n"
    assert world.driver.read(f"{checkpoint_dir}/2/published") == b"0\n"
