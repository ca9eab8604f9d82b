"""Adapters on a real mount, accessed as serving engines do."""

import hashlib
import json
import os
import sys

import numpy as np
import pytest
import safetensors.numpy

from tests.support.account import BINDINGS, api_calls, make_account, mounted, new_run
from tests.support.faulty_server import FaultyServer
from tests.support.mount import run as run_process
from tests.support.mount import tinkerfs
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Data

__all__ = ["make_account"]

#: An engine's steps for each requested adapter: check that its real path is within the directory,
#: then load it. Prints the number of bytes read, or the name of the errno.
ENGINE = """
import errno, os, sys
root = os.path.realpath(sys.argv[1])
for name in sys.argv[2:]:
    path = os.path.realpath(os.path.join(root, name))
    assert os.path.commonpath((root, path)) == root, path
    try:
        os.listdir(path)
        print(sum(len(open(f"{path}/{n}", "rb").read()) for n in os.listdir(path)))
    except OSError as error:
        print(errno.errorcode[error.errno])
"""

BURST = 2


@pytest.fixture
def adapters(make_account):
    """Return an account with six adapters and a burst of two, and their names in `/adapters`."""
    account = make_account(runs=0, settings={"archive_build_limit": BURST})
    run = account.new_run(*(f"sampler_weights/{n}" for n in range(6)))
    return account, [f"{run[5:]}@sampler_weights@{n}" for n in range(6)]


def run_engine(account, names):
    """Return the output of an engine that loads these adapters in one process."""
    done = account.sh(
        f"exec {sys.executable} -S -E -c '{ENGINE}' adapters {' '.join(names)}",
        shell=("bash", "-c"),
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.split()


def test_prefetched_adapters_do_not_count_towards_burst(adapters, tmp_path):
    account, names = adapters
    fetched, others = names[:3], names[3:]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TINKER_API_KEY": account.server.api_key,
    }
    paths = [account.path(f"adapters/{name}") for name in fetched]
    done = tinkerfs("prefetch", *paths, env=env)
    assert done.returncode == 0, done.stderr
    printed = run_engine(account, [*others[:1], *fetched, *others[1:], *fetched])
    sizes = [int(word) for word in printed if word.isdigit()]
    assert len(sizes) == 2 * len(fetched) + BURST
    assert printed[len(fetched) + BURST] == "EBUSY", "the third adapter that was not prefetched"
    [line] = [line for line in account.errors().splitlines() if "\tEBUSY\t" in line]
    assert "a process that opens many adapters" in line
    assert "tinkerfs prefetch" in line


def test_listing_adapters_requests_no_archive(adapters):
    account, names = adapters
    account.server.journal.clear()
    done = account.sh(
        "ls -a adapters && find adapters -printf '%f\\n' && ls -a adapters/.content/*"
    )
    assert ".content" not in done.stdout.split()
    assert all(done.stdout.split().count(name) == 2 for name in names)
    done = account.sh(
        "du -s adapters && ls -ld adapters/*/ && stat -L adapters/* && file adapters/*"
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    account.server.journal.wait_until_idle()
    assert "GET archive" not in api_calls(account.server)


def test_url_of_adapter_is_that_of_its_checkpoint(adapters):
    account, names = adapters
    run_id = account.server.account.run_ids[0]
    for name in (names[0], f"{names[0]}/adapter_config.json"):
        done = tinkerfs("url", account.path(f"adapters/{name}"))
        assert done.stdout == f"tinker://{run_id}/sampler_weights/0\n", done


LOAD = """
import hashlib, mmap, sys
from safetensors import safe_open
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    print(hashlib.sha256(mapped).hexdigest())
with safe_open(sys.argv[1], framework="np") as weights:
    for name in weights.keys():
        print(name, hashlib.sha256(weights.get_tensor(name).tobytes()).hexdigest())
"""


def test_converted_adapter_is_loaded_mapped_and_copied(make_account, tmp_path):
    account = make_account(runs=0, settings={"xattr": True})
    run = account.new_run("sampler_weights/1", base_model="Qwen/Qwen3-30B-A3B")
    directory = account.path(f"adapters/{run[5:]}@sampler_weights@1")
    model = directory / "adapter_model.safetensors"
    files = account.server.files(run[5:], "sampler_weights/1")
    content = files["adapter_model.safetensors"]
    stored = safetensors.numpy.load(content.read(0, content.size_bytes))
    # In a separate process, because it holds the GIL while it opens, and the server runs here.
    done = run_process(sys.executable, "-c", LOAD, model)
    assert (done.returncode, done.stderr) == (0, ""), done
    mapped, *lines = done.stdout.splitlines()
    assert mapped == hashlib.sha256(model.read_bytes()).hexdigest()
    found = dict(line.split() for line in lines)
    experts = "base_model.model.model.layers.0.mlp.experts"
    for index in range(4):
        for leaf, tinker_leaf in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            for side in "AB":
                tensor = stored[f"{experts}.{tinker_leaf}.lora_{side}.weight"]
                one = tensor[index if len(tensor) > 1 else 0]
                name = f"{experts}.{index}.{leaf}.lora_{side}.weight"
                assert found[name] == hashlib.sha256(one.tobytes()).hexdigest(), name
    cached_bytes = os.getxattr(model, "user.tinkerfs.cached_bytes")
    assert int(cached_bytes) == model.stat().st_size
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TINKER_API_KEY": account.server.api_key,
    }
    done = tinkerfs("get", directory, tmp_path / "copy", env=env)
    assert done.returncode == 0, done.stderr
    names = os.listdir(directory)
    assert {"adapter_model.safetensors", "tensors.json"} < {*names}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (directory / name).read_bytes()


def test_packed_layout_is_that_of_mount_prefetch_and_get(make_account, tmp_path):
    account = make_account(runs=0, settings={"moe_layout": "packed"})
    run = account.new_run("sampler_weights/1", base_model="Qwen/Qwen3-30B-A3B")
    directory = account.path(f"adapters/{run[5:]}@sampler_weights@1")
    assert os.path.realpath(directory).endswith("+packed"), "another path than that of peft"
    files = account.server.files(run[5:], "sampler_weights/1")
    content = files["adapter_model.safetensors"]
    stored = content.read(0, content.size_bytes)
    model = directory / "adapter_model.safetensors"
    assert model.read_bytes() == stored, "the names of this base are those of Tinker"
    tensors = json.loads((directory / "tensors.json").read_bytes())["tensors"]
    assert tensors.keys() == safetensors.numpy.load(stored).keys()
    config = json.loads((directory / "adapter_config.json").read_bytes())
    assert {"gate_proj", "up_proj", "down_proj"} < {*config["target_modules"]}
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TINKER_API_KEY": account.server.api_key,
    }
    done = tinkerfs("prefetch", directory, env=env)
    assert done.returncode == 0, done.stderr
    for name, arguments in {"packed": [], "peft": ["--moe-layout", "peft"]}.items():
        done = tinkerfs("get", *arguments, directory, tmp_path / name, env=env)
        assert done.returncode == 0, done.stderr
        copy = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        assert (copy == stored) == (name == "packed")


def test_get_uses_the_base_models_of_the_mount(make_account, tmp_path):
    base = tmp_path / "models/someone/own"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "gpt_oss", "architectures": ["GptOss"]}')
    names = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(names))
    account = make_account(runs=0, settings={"base_models": str(tmp_path / "models")})
    run = account.new_run("sampler_weights/1", base_model="someone/own")
    module = "base_model.model.model.layers.0.attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": np.ones((4, 2)),
        f"{module}.lora_B.weight": np.ones((2, 4)),
    }
    files = {
        "adapter_model.safetensors": Data(safetensors.numpy.save(tensors)),
        "adapter_config.json": Data(b'{"r": 4, "lora_alpha": 8}'),
    }
    [checkpoint] = account.server.account.runs()[0].checkpoints
    checkpoint.archive = tar_of(files, 1_700_000_000)
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TINKER_API_KEY": account.server.api_key,
    }
    directory = account.path(f"adapters/{run[5:]}@sampler_weights@1")
    done = tinkerfs("get", directory, tmp_path / "copy", env=env)
    assert done.returncode == 0, done.stderr
    copy = safetensors.numpy.load((tmp_path / "copy/adapter_model.safetensors").read_bytes())
    assert {name.split(".")[5] for name in copy} == {"self_attn"}


def test_remounts_with_other_layouts_share_only_blocks(tmp_path):
    binding = BINDINGS[-1]
    with FaultyServer(runs=0) as server:
        run_id = new_run(server, "sampler_weights/1", base_model="Qwen/Qwen3-30B-A3B")
        content = server.files(run_id, "sampler_weights/1")["adapter_model.safetensors"]
        stored = safetensors.numpy.load(content.read(0, content.size_bytes))
        found, paths = {}, {}
        for layout in ("peft", "packed", "peft"):
            server.journal.clear()
            with mounted(server, tmp_path, binding, moe_layout=layout) as root:
                directory = root / f"adapters/{run_id}@sampler_weights@1"
                tensors = safetensors.numpy.load(
                    (directory / "adapter_model.safetensors").read_bytes()
                )
                assert found.setdefault(layout, tensors.keys()) == tensors.keys()
                paths[layout] = os.path.realpath(directory)
            server.journal.wait_until_idle()
            is_first = len(found) == 1 and layout == "peft" and len(paths) == 1
            downloads = [each for each in server.journal.entries() if each.origin == "store"]
            assert bool(downloads) == is_first, "the second layout reads the same blocks"
    assert paths["packed"] == f"{paths['peft']}+packed"
    assert found["packed"] == stored.keys() != found["peft"]
