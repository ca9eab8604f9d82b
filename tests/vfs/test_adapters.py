"""Adapters in the form that serving engines load, over every driver."""

import json
from types import SimpleNamespace

import pytest
import safetensors.numpy

from tests.support.drivers import outcome_of

pytestmark = pytest.mark.where(profile=lambda profile: profile.name == "official")

NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(make_world):
    """An account in which one process may start any number of archive builds."""
    return make_world(runs=0, settings={"archive_build_limit": 0})


EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def add(world, base_model, size_bytes=3_000_000, kind="sampler_weights"):
    """Add a checkpoint of a run of a base model."""
    account = world.server.account
    run = account.add_run(base_model=base_model, lora_rank=8)
    account.add_checkpoint(run.id, f"{kind}/s", size_bytes=size_bytes)
    content = world.server.files(run.id, f"{kind}/s")[NAME]
    data = content.read(0, content.size_bytes)
    path = f"adapters/{run.id}@{kind}@s"
    return SimpleNamespace(
        path=path, data=data, tensors=safetensors.numpy.load(data), run_id=run.id
    )


def expected_tensors(tensors):
    """Return the tensors with the names that PEFT expects of GPT-OSS and Qwen3 MoE."""
    expected = {}
    for name, value in tensors.items():
        name = name.replace(".attn.", ".self_attn.")
        if ".experts." not in name:
            expected[name] = value
            continue
        before, _, leaf = name.partition(".experts.")
        projection, _, rest = leaf.partition(".")
        for index in range(4):
            renamed = f"{before}.experts.{index}.{EXPERTS[projection]}.{rest}"
            expected[renamed] = value[index if len(value) > 1 else 0]
    return expected


@pytest.mark.parametrize("base_model", ["openai/gpt-oss-20b", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_adapter_has_the_names_of_the_base_model(world, base_model, kind):
    added = add(world, base_model, kind=kind)
    found = safetensors.numpy.load(world.driver.read(f"{added.path}/{NAME}"))
    expected = expected_tensors(added.tensors)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert (found[name].shape, found[name].tobytes()) == (value.shape, value.tobytes())
    config = json.loads(world.driver.read(f"{added.path}/adapter_config.json"))
    assert config["base_model_name_or_path"] == base_model
    assert {"q_proj", "gate_proj"} <= set(config["target_modules"])


def test_adapter_in_the_form_of_peft_is_passed_on(world):
    for base_model in ("Qwen/Qwen3-8B", "somebody/unknown"):
        added = add(world, base_model)
        assert world.driver.read(f"{added.path}/{NAME}") == added.data


def test_sizes_are_those_of_the_converted_files(world):
    added = add(world, "openai/gpt-oss-20b")
    assert NAME in world.driver.listdir(added.path)
    for name in (NAME, "adapter_config.json", "checkpoint_complete"):
        path = f"{added.path}/{name}"
        assert world.driver.stat(path).size == len(world.driver.read(path)), name
    tensors = json.loads(world.driver.read(f"{added.path}/tensors.json"))["tensors"]
    assert sorted(tensors) == sorted(expected_tensors(added.tensors))


def test_files_stay_as_the_server_has_them(world):
    added = add(world, "openai/gpt-oss-20b")
    path = f"runs/{added.run_id}/checkpoints/sampler_weights/s/files/{NAME}"
    assert world.driver.read(path) == added.data


def test_adapter_without_a_rule_is_refused_at_open(world):
    added = add(world, "deepseek-ai/DeepSeek-V3.1")
    assert NAME in world.driver.listdir(added.path)
    for name in (NAME, "adapter_config.json", "tensors.json"):
        assert outcome_of(lambda name=name: world.driver.read(f"{added.path}/{name}")) == (
            "EOPNOTSUPP"
        ), name
    errors = world.driver.read(".tinkerfs/errors").decode()
    assert "DeepSeek V3" in errors
    assert "build_lora_adapter" in errors


def test_second_use_fetches_nothing(world):
    added = add(world, "openai/gpt-oss-20b", size_bytes=9_000_000)
    log = world.server.journal
    log.clear()
    world.driver.read(f"{added.path}/{NAME}")
    whole_bytes = sum(record.sent_bytes for record in log if record.origin == "store")
    log.clear()
    world.driver.read(f"{added.path}/{NAME}")
    world.driver.read(f"runs/{added.run_id}/checkpoints/sampler_weights/s/files/{NAME}")
    assert log.count("store") == 0
    assert whole_bytes < 1.2 * len(added.data)
