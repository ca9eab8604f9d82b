"""Load adapters with vLLM's own modules, without a GPU and without a model.

vllm_engine.py runs this script inside the environment of vLLM. Requests on standard input and
replies on standard output are lines of JSON. A reply is a result or `{"error": "..."}`.

vLLM's code checks the names, reads the tensors, packs those of the experts and of fused layers, and
copies them into the buffers of its layers. The layers have no base layer, because that needs
compiled kernels: only the attributes that the code reads are set.
"""

import ast
import importlib
import json
import re
import sys
from collections.abc import Set
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from vllm.lora import lora_model
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper

#: Module and class of each family. The class has the mapping of the names.
CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_vl_moe": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "kimi_k2": ("deepseek_v2", "DeepseekV3ForCausalLM"),
    "nemotron_h": ("nemotron_h", "NemotronHForCausalLM"),
}

#: Modules outside of the layers that a class loads; the inner classes of vision models name them.
EMBEDDINGS = {
    "qwen3_5": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "qwen3_vl_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}

Weights = dict[str, Any]


def model_class(name: tuple[str, str]) -> Any:
    """Return a model class of vLLM."""
    return getattr(importlib.import_module(f"vllm.model_executor.models.{name[0]}"), name[1])


def expected_modules(family: str, base: str, count: int, *, is_packed: bool) -> set[str]:
    """Return the modules that vLLM expects, as `WorkerLoRAManager._load_adapter` computes them.

    The linear layers are those of the base model's file, by their last names. vLLM's own names of
    fused layers stand for these.
    """
    with safetensors.safe_open(f"{base}/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "visual" not in name]  # noqa: SIM118
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    modules = {
        name.split(".")[-2]
        for name, shape in shapes.items()
        if len(shape) == 2 and ".experts." not in name and not name.endswith("embed_tokens.weight")
    } - {"lm_head", "gate", "router"}
    modules |= {*model_class(EMBEDDINGS.get(family, CLASSES[family])).embedding_modules}
    if not count:
        return modules
    modules.add("experts")
    if is_packed:
        return modules | {f"experts.{leaf}" for leaf in ("w1", "w2", "w3")}
    leaves = ("gate_proj", "up_proj", "down_proj")
    return modules | {f"experts.{index}.{leaf}" for index in range(count) for leaf in leaves}


def load(
    family: str,
    base: str,
    path: str,
    count: int,
    *,
    is_packed: bool,
    also: Set[str] = frozenset(),
) -> Weights:
    """Return what vLLM reads from a directory, by its names of modules.

    Args:
        count: number of experts, 0 for none.
        is_packed: whether vLLM has `--enable-moe-shared-loras`.
        also: more modules to accept.
    """
    helper = PEFTHelper.from_local_dir(path, None)
    helper.validate_legal(lora_config())
    mapper = getattr(model_class(CLASSES[family]), "hf_to_vllm_mapper", None)
    expected = expected_modules(family, base, count, is_packed=is_packed) | also
    model = LoRAModel.from_local_checkpoint(
        path,
        expected,
        helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    loras: Weights = model.loras
    return loras


def lora_config(*, is_packed: bool = False) -> Any:
    """Return what vLLM's code reads of its own configuration."""
    return SimpleNamespace(
        max_loras=1,
        max_lora_rank=64,
        lora_dtype=torch.float32,
        fully_sharded_loras=False,
        enable_moe_shared_loras=is_packed,
    )


def moe_layer(
    lora: PackedLoRALayerWeights, count: int, *, is_gated: bool, is_packed: bool
) -> FusedMoEWithLoRA:
    """Return vLLM's layer of experts with the packed factors in its buffers."""
    w1_a, w1_b = lora.lora_a[0], lora.lora_b[0]
    layer = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(
        hidden_dim=w1_a.shape[2],
        num_local_experts=count,
        num_experts=count,
        intermediate_size_per_partition=w1_b.shape[1],
        intermediate_size_per_partition_unpadded=None,
        moe_parallel_config=SimpleNamespace(use_ep=False, ep_rank=0),
    )
    layer.tp_size, layer.tp_rank, layer.device = 1, 0, torch.device("cpu")
    layer._w13_slices = 2 if is_gated else 1
    layer.create_lora_weights(1, lora_config(is_packed=is_packed))
    layer.set_lora(0, lora.lora_a, lora.lora_b)
    return layer


def products(layer: FusedMoEWithLoRA) -> torch.Tensor:
    """Return B times A of every projection and expert, as one vector."""
    pairs = [
        *zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, strict=True),
        (layer.w2_lora_a_stacked[0], layer.w2_lora_b_stacked[0]),
    ]
    return torch.cat([(b[0] @ a[0]).flatten() for a, b in pairs])


def experts(request: dict[str, Any]) -> dict[str, Any]:
    """Load an adapter in both layouts; compare the products in the layers of experts.

    `path` is the directory in the layout `packed`, and `peft` that in the other one. Returns the
    number of layers, and the largest difference of the products.
    """
    family, base, count = request["model"], request["base"], request["count"]
    # Whether a class takes an output layer does not matter here.
    also = {"lm_head"}
    packed = load(family, base, request["path"], count, is_packed=True, also=also)
    peft = load(family, base, request["peft"], count, is_packed=False, also=also)
    is_gated = not model_class(CLASSES[family]).is_non_gated_moe
    layers = sorted({name.rpartition(".w1")[0] for name in packed if name.endswith(".w1")})
    assert layers, sorted(packed)
    difference = 0.0
    for name in layers:
        stacked = PackedLoRALayerWeights.pack_moe_stacked(
            [packed[f"{name}.{leaf}"] for leaf in ("w1", "w2", "w3")], name
        ).optimize()
        gate = "gate_proj" if is_gated else "up_proj"
        ones: list[LoRALayerWeights | None] = []
        for index in range(count):
            ones += [peft[f"{name}.{index}.{leaf}"] for leaf in (gate, "down_proj")]
            ones.append(peft[f"{name}.{index}.up_proj"] if is_gated else None)
        per_expert = PackedLoRALayerWeights.pack_moe(ones, name, not is_gated).optimize()
        results = [
            products(moe_layer(lora, count, is_gated=is_gated, is_packed=is_packed))
            for lora, is_packed in ((stacked, True), (per_expert, False))
        ]
        assert results[0].abs().max() > 0, "the adapter changes nothing"
        difference = max(difference, float((results[0] - results[1]).abs().max()))
    return {"layers": len(layers), "difference": difference}


def linear_attention(request: dict[str, Any]) -> dict[str, Any]:
    """Load an adapter; compare the product in `in_proj_qkvz` with that of the stored parts.

    `stored` is the directory of the adapter in Tinker's names.
    """
    loras = load(
        request["model"], request["base"], request["path"], request["count"], is_packed=False
    )
    stored = safetensors.torch.load_file(f"{request['stored']}/adapter_model.safetensors")
    config = json.loads(Path(request["stored"], "adapter_config.json").read_text())
    paths = [name.removesuffix("_qkv") for name in loras if name.endswith(".in_proj_qkv")]
    assert paths, sorted(loras)
    difference = 0.0
    for path in paths:
        packed = PackedLoRALayerWeights.pack([loras[f"{path}_qkv"], loras[f"{path}_z"]])
        tinker_path = f"base_model.model.model.{path[path.index('layers.') :]}"
        parts = [
            [stored[f"{tinker_path}_{part}.lora_{side}.weight"].float() for side in "BA"]
            for part in "qkvz"
        ]
        sizes = [b.shape[0] for b, _a in parts]
        layer = MergedColumnParallelLinearWithLoRA.__new__(MergedColumnParallelLinearWithLoRA)
        torch.nn.Module.__init__(layer)
        layer.n_slices, layer.output_sizes, layer.output_slices = 4, sizes, sizes
        layer.tp_size, layer.input_size, layer.device = 1, parts[0][1].shape[1], "cpu"
        layer.create_lora_weights(1, lora_config())
        layer.set_lora(0, packed.lora_a, packed.lora_b)
        buffers = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        found = torch.cat([b[0, 0] @ a[0, 0] for a, b in buffers])
        expected = torch.cat([b @ a for b, a in parts]) * config["lora_alpha"] / config["r"]
        assert expected.abs().max() > 0, "the adapter changes nothing"
        difference = max(difference, float((found - expected).abs().max()))
    return {"layers": len(paths), "difference": difference}


def names(request: dict[str, Any]) -> dict[str, Any]:
    """Load an adapter; return the number of modules, and the modules that vLLM refuses."""
    arguments = (request["model"], request["base"], request["path"], request["count"])
    try:
        return {"refused": [], "modules": len(load(*arguments, is_packed=request["is_packed"]))}
    except ValueError as error:
        match = re.search(r"but received (\[.*?\])", str(error))
        if match is None:
            raise
        refused = {name.rpartition(".")[2] for name in ast.literal_eval(match[1])}
        return {"refused": sorted(refused), "modules": 0}


STEPS = {"experts": experts, "linear_attention": linear_attention, "names": names}


def main() -> None:
    """Process requests until standard input ends."""
    lora_model.PIN_MEMORY = False  # which needs a driver
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print to standard output
    about = {"version": metadata.version("vllm"), "families": sorted(CLASSES)}
    print(json.dumps(about), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = STEPS[request["step"]](request)
        except Exception as error:  # noqa: BLE001 - reported, and the next request is processed
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
