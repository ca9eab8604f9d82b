"""Tests of the files in `/adapters`, which are made for serving engines."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.support.account import api_calls, deletes
from tests.support.drivers import outcome_of
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Data

MODEL = "adapter_model.safetensors"

#: Tinker's names of the projections of experts, and those of the base models.
EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

pytestmark = pytest.mark.served("GET archive")


def add_adapter(world, base_model):
    """Return the directory in `/adapters` of a new checkpoint, and its stored files."""
    run = world.server.account.add_run(base_model=base_model)
    checkpoint = world.server.account.add_checkpoint(run.id, "sampler_weights/1")
    checkpoint.size_bytes = 2 << 20
    world.refresh()
    world.server.journal.clear()
    files = world.server.files(run.id, checkpoint.id)
    stored = {name: content.read(0, content.size_bytes) for name, content in files.items()}
    return f"adapters/{run.id}@sampler_weights@1", stored


def converted(tensors):
    """Return the tensors that an engine expects, computed from those of Tinker."""
    result = {}
    for name, tensor in tensors.items():
        name = name.replace(".attn.", ".self_attn.")
        before, _, rest = name.partition(".experts.")
        if not rest:
            result[name] = tensor
            continue
        leaf, side = rest.split(".", 1)
        other = "lora_B.weight" if side == "lora_A.weight" else "lora_A.weight"
        count = max(len(tensor), len(tensors[f"{before}.experts.{leaf}.{other}"]))
        for index, each in enumerate(np.broadcast_to(tensor, (count, *tensor.shape[1:]))):
            result[f"{before}.experts.{index}.{EXPERTS[leaf]}.{side}"] = each
    return result


@pytest.mark.where(profile=lambda profile: not profile.member_names)
def test_dense_adapter_is_unchanged(world):
    directory, stored = add_adapter(world, "Qwen/Qwen3-8B")
    assert world.driver.read(f"{directory}/{MODEL}") == stored[MODEL]
    config = world.driver.read(f"{directory}/adapter_config.json")
    assert config == stored["adapter_config.json"]


@pytest.mark.parametrize("base_model", ["Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"])
@pytest.mark.where(profile=lambda profile: not profile.member_names)
def test_adapter_has_the_names_of_its_base_model(world, base_model):
    directory, stored = add_adapter(world, base_model)
    names = world.driver.listdir(directory)
    assert {*names} == {*stored, "tensors.json"}
    content = {name: world.driver.read(f"{directory}/{name}") for name in names}
    for name, data in content.items():
        assert world.driver.stat(f"{directory}/{name}").size == len(data)
    found = safetensors.numpy.load(content[MODEL])
    expected = converted(safetensors.numpy.load(stored[MODEL]))
    assert found.keys() == expected.keys()
    assert found.keys() != safetensors.numpy.load(stored[MODEL]).keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name].view(np.uint8), tensor.copy().view(np.uint8)), name
    config = json.loads(content["adapter_config.json"])
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads(content["tensors.json"])["tensors"].keys() == expected.keys()
    assert content["checkpoint_complete"] == stored["checkpoint_complete"]
    files = directory.replace("adapters/", "runs/").replace("@", "/checkpoints/", 1)
    assert world.driver.read(f"{files.replace('@', '/')}/files/{MODEL}") == stored[MODEL]


def assert_refused(world, directory):
    names = world.driver.listdir(directory)
    assert {MODEL, "adapter_config.json"} <= {*names}, "not an empty directory"
    for name in (MODEL, "adapter_config.json"):
        assert outcome_of(lambda: world.driver.read(f"{directory}/{name}")) == "EOPNOTSUPP"  # noqa: B023
    assert "tinker_cookbook.weights.build_" in world.errors()


def test_adapter_of_a_refused_family_is_eopnotsupp(world):
    directory, _stored = add_adapter(world, "deepseek-ai/DeepSeek-V3.1")
    assert_refused(world, directory)


@pytest.mark.where(profile=lambda profile: not profile.member_names)
def test_adapter_of_an_unknown_base_needs_the_form_of_peft(world):
    directory, stored = add_adapter(world, "someone/unknown")
    for name in (MODEL, "adapter_config.json"):
        assert world.driver.read(f"{directory}/{name}") == stored[name]
    run = world.server.account.add_run(base_model="someone/unknown")
    checkpoint = world.server.account.add_checkpoint(run.id, "sampler_weights/1")
    config = {**json.loads(stored["adapter_config.json"]), "target_modules": "all-linear"}
    files = {MODEL: stored[MODEL], "adapter_config.json": json.dumps(config).encode()}
    content = {name: Data(data) for name, data in files.items()}
    checkpoint.archive = tar_of(content, 1_700_000_000)
    world.refresh()
    assert_refused(world, f"adapters/{run.id}@sampler_weights@1")


@pytest.mark.where(profile=lambda profile: not profile.member_names)
def test_reads_of_an_adapter_download_its_blocks_once(world):
    directory, stored = add_adapter(world, "Qwen/Qwen3-30B-A3B")
    world.driver.read(f"{directory}/{MODEL}")
    world.server.journal.wait_until_idle()
    world.server.journal.clear()
    files = directory.replace("adapters/", "runs/").replace("@", "/checkpoints/", 1)
    world.driver.read(f"{directory}/{MODEL}")
    assert world.driver.read(f"{files.replace('@', '/')}/files/{MODEL}") == stored[MODEL]
    world.server.journal.wait_until_idle()
    assert [each for each in world.server.journal.entries() if each.origin == "store"] == []
    assert "GET archive" not in api_calls(world.server)


def test_removal_of_an_adapter_is_eperm(world):
    directory, _stored = add_adapter(world, "Qwen/Qwen3-8B")
    for step in (f"unlink {directory}", f"unlink {directory}/{MODEL}", f"rmdir {directory}"):
        assert world.driver.remove(step)[0] in ("EPERM", "ENOTDIR"), step
    assert world.driver.remove(f"unlink {directory}/{MODEL}") == ["EPERM"]
    assert deletes(world.server) == 0
