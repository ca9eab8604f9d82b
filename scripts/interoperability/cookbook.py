"""Create tiny base models and adapters in Tinker's names; convert them with the cookbook.

families.py runs this script inside the environment of the loaders. Requests on standard
input and replies on standard output are lines of JSON. A reply is a result or `{"error": "..."}`.

The modules of an adapter are those that Tinker trains: their sizes add up to the parameter counts
of tinker_cookbook 0.6.1 (`hyperparam_utils.py`). A factor of an expert projection that faces the
hidden dimension is shared by all experts.
"""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import safetensors
import safetensors.torch
import torch
import transformers
from tinker_cookbook import model_info
from tinker_cookbook.exceptions import WeightsAdapterError
from tinker_cookbook.weights import build_hf_model, build_lora_adapter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

Tensors = dict[str, torch.Tensor]

RANK, ALPHA = 4, 8
TOKENS = torch.arange(24)[None]

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MOE = TEXT | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
QWEN_VISION = VISION | {"out_hidden_size": 32}
LATENT_ATTENTION = {name: value for name, value in TEXT.items() if name != "head_dim"} | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "layers_block_type": ["mamba", "attention", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        base: name of the base model.
        model_type: key of the configuration class of transformers.
        config: arguments of that class.
        dtype: dtype of the adapter.
        unembed: Tinker's name of the output layer.
        saved_as: changes of the saved config.json.
        saved_below: prefix of the names of the saved tensors.
        not_loaded: pattern of the modules that PEFT with transformers ignores or refuses; None if
            transformers names the layers differently from the cookbook.
        is_tied: whether the output layer is tied to the embedding.
    """

    base: str
    model_type: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    unembed: str = "model.unembed_tokens"
    saved_as: dict[str, Any] | None = None
    saved_below: str = ""
    not_loaded: str | None = "$^"
    is_tied: bool = False


FAMILIES = {
    "llama": Family(base="meta-llama/Llama-3.1-8B", model_type="llama", config=TEXT),
    "qwen3": Family(base="Qwen/Qwen3-8B", model_type="qwen3", config=TEXT, dtype=torch.bfloat16),
    "qwen3-tied": Family(
        base="Qwen/Qwen3-4B-Instruct-2507",
        model_type="qwen3",
        config=TEXT | {"tie_word_embeddings": True},
        dtype=torch.float16,
        is_tied=True,
    ),
    "qwen3_moe": Family(base="Qwen/Qwen3-30B-A3B", model_type="qwen3_moe", config=MOE),
    "qwen3_vl_moe": Family(
        base="Qwen/Qwen3-VL-30B-A3B-Instruct",
        model_type="qwen3_vl_moe",
        config={
            "text_config": MOE,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
        not_loaded="experts",
    ),
    "qwen3_5": Family(
        base="Qwen/Qwen3.6-27B",
        model_type="qwen3_5",
        config={"text_config": TEXT | LINEAR_ATTENTION, "vision_config": QWEN_VISION},
    ),
    "qwen3_5-tied": Family(
        base="Qwen/Qwen3.5-4B",
        model_type="qwen3_5",
        config={
            "text_config": TEXT | LINEAR_ATTENTION | {"tie_word_embeddings": True},
            "vision_config": QWEN_VISION,
            "tie_word_embeddings": True,
        },
        is_tied=True,
    ),
    "qwen3_5_moe": Family(
        base="Qwen/Qwen3.6-35B-A3B",
        model_type="qwen3_5_moe",
        config={
            "text_config": MOE | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 16},
            "vision_config": QWEN_VISION,
        },
        dtype=torch.bfloat16,
        not_loaded=r"\.experts",
    ),
    "gpt_oss": Family(
        base="openai/gpt-oss-20b",
        model_type="gpt_oss",
        config=TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
        not_loaded="experts",
    ),
    "kimi_k2": Family(
        base="moonshotai/Kimi-K2-Thinking",
        model_type="deepseek_v3",
        config=LATENT_ATTENTION,
        saved_as={"model_type": "kimi_k2"},
        not_loaded="mlp",
    ),
    "kimi_k25": Family(
        base="moonshotai/Kimi-K2.6",
        model_type="deepseek_v3",
        config=LATENT_ATTENTION,
        saved_as={
            "model_type": "kimi_k25",
            "architectures": ["KimiK25ForConditionalGeneration"],
        },
        saved_below="language_model.",
        not_loaded=None,
    ),
    "nemotron_h": Family(
        base="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        model_type="nemotron_h",
        config=MAMBA,
        unembed="model.lm_head",
        not_loaded=r"\.experts|out_proj",
    ),
    "deepseek_v3": Family(
        base="deepseek-ai/DeepSeek-V3.1", model_type="deepseek_v3", config=LATENT_ATTENTION
    ),
}

#: Names of the number of experts in the configurations of transformers.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

#: Modules that Tinker trains, by their last name.
TRAINED = re.compile(
    r"(?P<path>.+\.(self_attn|mlp|linear_attn|mixer|shared_experts?)"
    r"\.([qkvo]_proj|(gate|up|down)_proj|q_a_proj|kv_a_proj_with_mqa|in_proj_z|out_proj))\.weight"
)


def create_base(family: Family, directory: Path) -> dict[str, list[int]]:
    """Save a base model; return the shapes of its tensors by name."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.model_type, **family.config)
    model = auto_class(family).from_config(config)
    model.save_pretrained(directory)
    if family.saved_as:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | family.saved_as))
    if family.saved_below:
        path = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        renamed = {family.saved_below + name: tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(renamed, path)
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def trained_modules(
    family: Family, shapes: dict[str, list[int]]
) -> Iterator[tuple[str, int, int, int]]:
    """Yield Tinker's name of each module, rows and columns, and experts or 0."""
    config = family.config.get("text_config", family.config)
    hidden = config["hidden_size"]
    layers_with_experts = set()
    for name, shape in shapes.items():
        if "visual" in name or "vision" in name:
            continue
        path = re.sub(r"^(model\.language_model|language_model\.model|backbone)\.", "model.", name)
        if match := re.match(r"(.+\.experts)\.", path):
            layers_with_experts.add(match[1])
        elif match := re.fullmatch(r"(.+)\.in_proj_qkv\.weight", path):
            keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
            for part, rows in zip("qkv", (keys, keys, shape[0] - 2 * keys), strict=True):
                yield f"{match[1]}.in_proj_{part}", rows, shape[1], 0
        elif match := re.fullmatch(r"(.+)\.in_proj\.weight", path):
            rows = config["mamba_num_heads"] * config["mamba_head_dim"]
            yield f"{match[1]}.gate_proj", rows, shape[1], 0
            yield f"{match[1]}.x_proj", rows, shape[1], 0
        elif match := TRAINED.fullmatch(path):
            module = match["path"]
            if family.model_type == "gpt_oss":
                module = module.replace(".self_attn.", ".attn.")
            yield module, shape[0], shape[1], 0
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    count = next((config[key] for key in EXPERT_COUNTS if key in config), 0)
    for path in sorted(layers_with_experts):
        yield f"{path}.w1", inner, hidden, count
        yield f"{path}.w2", hidden, inner, count
        # A family with two projections per expert has an empty third one.
        yield f"{path}.w3", 0 if family.model_type == "nemotron_h" else inner, hidden, count
    yield family.unembed, config["vocab_size"], hidden, 0


def create_adapter(family: Family, shapes: dict[str, list[int]]) -> Tensors:
    """Return an adapter in Tinker's names."""
    torch.manual_seed(1)
    tensors: Tensors = {}
    for module, rows, columns, experts in trained_modules(family, shapes):
        a: tuple[int, ...] = (RANK, columns)
        b: tuple[int, ...] = (rows, RANK)
        if experts:
            is_outer = module.endswith(".w2")
            a, b = (experts if is_outer else 1, *a), (1 if is_outer else experts, *b)
        if not rows:
            a = (a[0], 0, columns)
        for side, shape in (("A", a), ("B", b)):
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = (torch.randn(shape) / 4).to(family.dtype)
    return tensors


def save_adapter(tensors: Tensors, directory: Path) -> None:
    """Save an adapter as Tinker does."""
    directory.mkdir(parents=True)
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))


class Truth:
    """What the cookbook makes of an adapter.

    Args:
        name: name of the family.
        directory: directory of base models, `bases`, and of one directory per family.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self._family = FAMILIES[name]
        self._base = directory / "bases" / self._family.base
        self._own = directory / name
        shapes = create_base(self._family, self._base)
        tensors = create_adapter(self._family, shapes)
        if self._family.is_tied:
            # tinkerfs refuses it, because no engine loads the factors of the output layer.
            save_adapter(tensors, self._own / "tied")
            unembed = self._family.unembed
            tensors = {name: each for name, each in tensors.items() if unembed not in name}
        save_adapter(tensors, self._own / "adapter")
        # So that the name of the base model is a path for the cookbook.
        os.chdir(directory / "bases")
        self.refusal = None
        try:
            build_lora_adapter(
                base_model=self._family.base,
                adapter_path=str(self._own / "adapter"),
                output_path=str(self._own / "peft"),
            )
        except WeightsAdapterError as error:
            self.refusal = str(error)
        if self.refusal is None and self._family.not_loaded is not None:
            self._merge(tensors, re.compile(self._family.not_loaded))

    def _merge(self, tensors: Tensors, pattern: re.Pattern[str]) -> None:
        """Save the adapter without the modules that PEFT does not load; merge it."""
        loadable = {name: each for name, each in tensors.items() if not pattern.search(name)}
        save_adapter(loadable, self._own / "loadable")
        build_hf_model(
            base_model=self._family.base,
            adapter_path=str(self._own / "loadable"),
            output_path=str(self._own / "merged"),
        )
        self._count = len(loadable)
        self._expected = logits(self._load(self._own / "merged"))
        change = (self._expected - logits(self._load(self._base))).abs().max()
        assert change > 0.1, "the adapter changes nothing"

    def _load(self, directory: Path) -> Any:
        """Load a model; `AutoModel` does not know the model types of all files."""
        config = transformers.AutoConfig.for_model(self._family.model_type, **self._family.config)
        model = auto_class(self._family).from_config(config)
        return type(model).from_pretrained(directory, config=config, dtype=torch.float32).eval()

    def compare(self, path: str) -> dict[str, Any]:
        """Compare a directory with that of the cookbook: tensors by their bits, and the config.

        Only the parts of the linear attention's `in_proj_qkv` differ, which the cookbook leaves as
        they are: they are joined with their bits, and with the same product of the factors.
        """
        expected_config = json.loads((self._own / "peft/adapter_config.json").read_text())
        config = json.loads(Path(path, "adapter_config.json").read_text())
        expected = safetensors.torch.load_file(self._own / "peft/adapter_model.safetensors")
        joined = join_parts(expected)
        if joined:
            targets = {*expected_config["target_modules"]} - {f"in_proj_{part}" for part in "qkv"}
            expected_config["target_modules"] = sorted(targets | {"in_proj_qkv"})
            expected_config["rank_pattern"] = {"in_proj_qkv": 3 * RANK}
            expected_config["alpha_pattern"] = {"in_proj_qkv": 3 * ALPHA}
        differing = [
            field
            for field in expected_config.keys() | config.keys()
            if field not in expected_config
            or field not in config
            or config[field] != expected_config[field]
            or type(config[field]) is not type(expected_config[field])
        ]
        assert not differing, f"fields of adapter_config.json differ: {differing}"
        return compare(safetensors.torch.load_file(f"{path}/adapter_model.safetensors"), expected)

    def load(self, path: str) -> dict[str, Any]:
        """Load an adapter with PEFT; compare the logits with those of the merged model."""
        model = peft.PeftModel.from_pretrained(
            self._load(self._base), path, autocast_adapter_dtype=False
        ).eval()
        difference = float((logits(model) - self._expected).abs().max())
        assert difference < 1e-3, f"the logits differ by {difference}"
        return {"tensors": self._count, "difference": difference}


def offered_models() -> list[str]:
    """Return the models of the service that the cookbook lists."""
    tables = [get() for name, get in vars(model_info).items() if re.fullmatch("get_.+_info", name)]
    return [f"{each.organization}/{name}" for table in tables for name, each in table.items()]


def auto_class(family: Family) -> Any:
    """Return the class that creates the models of a family."""
    is_text = "text_config" not in family.config
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a forward pass."""
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def compare(found: Tensors, expected: Tensors) -> dict[str, Any]:
    """Compare tensors bit for bit; return their number."""
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, (name, found[name].dtype, tensor.dtype)
        assert found[name].shape == tensor.shape, (name, found[name].shape, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor)), f"different values in {name}"
    return {"tensors": len(expected)}


def join_parts(tensors: Tensors) -> int:
    """Replace the factors of `in_proj_q`, `in_proj_k` and `in_proj_v`; return how many modules."""
    paths = [match[1] for name in tensors if (match := re.match(r"(.+\.in_proj_)q\.lora_A", name))]
    for path in paths:
        a, b = (
            [tensors.pop(f"{path}{part}.lora_{side}.weight") for part in "qkv"] for side in "AB"
        )
        tensors[f"{path}qkv.lora_A.weight"] = torch.cat(a)
        tensors[f"{path}qkv.lora_B.weight"] = torch.block_diag(*b)
        product = torch.cat(
            [each_b.float() @ each_a.float() for each_a, each_b in zip(a, b, strict=True)]
        )
        difference = torch.block_diag(*b).float() @ torch.cat(a).float() - product
        assert difference.abs().max() < 1e-5, f"the product of {path}qkv differs"
    return len(paths)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor; in these -0.0 is not 0.0 and NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def main() -> None:
    """Process requests until standard input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print to standard output
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("tinker_cookbook").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    modules = (torch, transformers, peft, safetensors)
    versions = {each.__name__: each.__version__ for each in modules}
    versions["tinker_cookbook"] = metadata.version("tinker_cookbook")
    bases = {name: family.base for name, family in FAMILIES.items()}
    about = {"versions": versions, "bases": bases, "models": offered_models()}
    print(json.dumps(about), file=replies, flush=True)
    truths: dict[str, Truth] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name, step, path = request["model"], request["step"], request["path"]
        try:
            if step == "make":
                truth = truths[name] = Truth(name, Path(path))
                reply = {"refusal": truth.refusal}
            else:
                reply = getattr(truths[name], step)(path)
        except Exception as error:  # noqa: BLE001 - reported, and the next request is processed
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
