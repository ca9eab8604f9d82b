"""Facts about base models that decide how an adapter is named.

They come from a directory of models or the local Hugging Face cache, else from a table of the
models that the Tinker service offers. Only config.json and the names and shapes of the tensors are
read, never the weights.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from tinkerfs.safe_open import open_regular, read_regular
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, Tensor, header_length, parse_tensors

#: Maximum size of a JSON file that describes a model.
MAX_JSON_BYTES: Final = 64 << 20

#: Key of the rows that a module has in every layer.
EVERY_LAYER: Final = ""

_PREFIX = "model.language_model."


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What the adapters of a base model depend on.

    Attributes:
        name: its name at Hugging Face, such as `Qwen/Qwen3-8B`.
        model_type: `model_type` of its config.json.
        architectures: `architectures` of its config.json.
        has_lm_head: whether its output layer has weights of its own; None if that is unknown.
        has_prefix: whether the language model's tensors begin with `model.language_model.`.
        rows: rows of the fused modules by layer and module, such as ("3", "in_proj") or
            (EVERY_LAYER, "in_proj"); empty if unknown.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...] = ()
    has_lm_head: bool | None = None
    has_prefix: bool = False
    rows: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def rows_of(self, layer: str, module: str) -> int | None:
        """Return the rows of a fused module in a layer, None if they are unknown."""
        return self.rows.get((layer, module), self.rows.get((EVERY_LAYER, module)))


_LLAMA: Final = {"model_type": "llama"}
_QWEN3: Final = {"model_type": "qwen3"}
_QWEN3_VL_MOE: Final = {"model_type": "qwen3_vl_moe", "has_prefix": True}
_QWEN3_5: Final = {"model_type": "qwen3_5", "has_prefix": True}
_QWEN3_5_MOE: Final = {"model_type": "qwen3_5_moe", "has_prefix": True}
_GPT_OSS: Final = {"model_type": "gpt_oss", "architectures": ("GptOssForCausalLM",)}
_KIMI_K2: Final = {"model_type": "kimi_k2", "architectures": ("DeepseekV3ForCausalLM",)}
_NEMOTRON: Final = {"model_type": "nemotron_h", "architectures": ("NemotronHForCausalLM",)}

#: Models that the service offers, with what is known of them, as of 2026-11. A model is listed if
#: tinker_cookbook 0.6.1 converts its adapters (`weights/README.md`; `model_info.py` has the names)
#: and all facts have a source. `model_type`, `architectures` and prefixes are those of transformers
#: 5.23 and of the cookbook (`weights/_merge*.py`). Four sources say if the output layer is tied:
#: (1) `tie_word_embeddings` in the config.json of the model at Hugging Face.
#: (2) The cookbook, where it names the layer of this model.
#: (3) The number of parameters, such as 8.95 billion for 9B.
#: (4) The default of the model's configuration class in transformers 5.23.
#: Rows of `in_proj` follow from config.json: 64 heads for Nano and Lightning, 128 for Super.
_KNOWN: Final[tuple[tuple[tuple[str, ...], bool, dict[str, Any]], ...]] = (
    (  # (1)
        (
            "meta-llama/Llama-3.1-8B",
            "meta-llama/Llama-3.1-8B-Instruct",
            "meta-llama/Llama-3.1-70B",
            "meta-llama/Llama-3.3-70B-Instruct",
        ),
        True,
        _LLAMA,
    ),
    (("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"), False, _LLAMA),  # (1)
    (("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-32B"), True, _QWEN3),  # (1)
    (("Qwen/Qwen3-4B-Instruct-2507",), False, _QWEN3),  # (1)
    (  # (1)
        (
            "Qwen/Qwen3-30B-A3B",
            "Qwen/Qwen3-30B-A3B-Base",
            "Qwen/Qwen3-30B-A3B-Instruct-2507",
            "Qwen/Qwen3-235B-A22B-Instruct-2507",
        ),
        True,
        {"model_type": "qwen3_moe"},
    ),
    (  # (4)
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"),
        True,
        _QWEN3_VL_MOE,
    ),
    (("Qwen/Qwen3.5-4B",), False, _QWEN3_5),  # (2)
    (("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-9B-Base"), True, _QWEN3_5),  # (3)
    (("Qwen/Qwen3.5-27B", "Qwen/Qwen3.6-27B", "Qwen/Qwen3.8-27B"), True, _QWEN3_5),  # (2), (3)
    (  # (1)
        (
            "Qwen/Qwen3.5-35B-A3B",
            "Qwen/Qwen3.5-35B-A3B-Base",
            "Qwen/Qwen3.5-397B-A17B",
            "Qwen/Qwen3.6-35B-A3B",
        ),
        True,
        _QWEN3_5_MOE,
    ),
    (("openai/gpt-oss-20b", "openai/gpt-oss-120b"), True, _GPT_OSS),  # (1)
    (  # (1); its adapters are refused
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-ai/DeepSeek-V3.1-Base"),
        True,
        {"model_type": "deepseek_v3"},
    ),
    (("moonshotai/Kimi-K2-Thinking",), True, _KIMI_K2),  # (1)
    (("moonshotai/Kimi-K2.5", "moonshotai/Kimi-K2.6"), True, {"model_type": "kimi_k25"}),  # (2)
    (  # (1), (2)
        (
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
        ),
        True,
        {**_NEMOTRON, "rows": {(EVERY_LAYER, "in_proj"): 10304}},
    ),
    (  # (1), (2)
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",),
        True,
        {**_NEMOTRON, "rows": {(EVERY_LAYER, "in_proj"): 18560}},
    ),
)


class BaseModels:
    """Looks up base models. Thread-safe: it keeps no state.

    Args:
        directory: a directory with models as `<organization>/<name>` or `<name>`, or None.
        hub_cache: the cache directory of huggingface_hub.
    """

    def __init__(self, directory: str | None, hub_cache: str | None = None) -> None:
        self._directory = directory
        self._hub_cache = hub_cache or default_hub_cache()

    def get(self, name: str) -> BaseModel | None:
        """Return what is known of a base model, None for an unknown one.

        A directory without tensor names, as a cache of tokenizers has, counts after the table.

        Args:
            name: its name; a part after a colon, which names a variant, is ignored.

        Raises:
            ValueError: the files of a local model are invalid.
        """
        name = name.partition(":")[0]
        partial: BaseModel | None = None
        for directory in self._directories(name):
            if (directory / "config.json").is_file():
                base = _from_directory(name, directory)
                if base.has_lm_head is not None:
                    return base
                partial = partial or base
        for names, has_lm_head, facts in _KNOWN:
            if name in names:
                return BaseModel(name=name, has_lm_head=has_lm_head, **facts)
        return partial

    def _directories(self, name: str) -> Iterable[Path]:
        """Yield the directories that may hold a model, in order of precedence."""
        parts = name.split("/")
        if not all(part and part not in (".", "..") and "\0" not in part for part in parts):
            return
        if self._directory is not None:
            yield Path(self._directory, *parts)
            yield Path(self._directory, parts[-1])
        repository = Path(self._hub_cache, "models--" + "--".join(parts))
        try:
            revision = read_regular(repository / "refs/main", 256).decode().strip()
        except (OSError, ValueError):
            return
        yield repository / "snapshots" / revision


def default_hub_cache() -> str:
    """Return the cache directory of huggingface_hub, by its environment variables."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")


def _from_directory(name: str, directory: Path) -> BaseModel:
    config = _read_json(directory / "config.json")
    shapes = _tensor_shapes(directory)
    rows = _mamba_rows(config) | {
        (match[1], match[2]): shape[0]
        for tensor, shape in shapes.items()
        if shape and (match := re.search(r"\.layers\.(\d+)\..*\.(\w+)\.weight$", tensor))
    }
    has_lm_head: bool | None = None
    if any(f".{tensor}".endswith(".lm_head.weight") for tensor in shapes):
        has_lm_head = True
    elif any(tensor.endswith(".embed_tokens.weight") for tensor in shapes):
        has_lm_head = False
    return BaseModel(
        name=name,
        model_type=str(config.get("model_type", "")),
        architectures=tuple(map(str, config.get("architectures") or ())),
        has_lm_head=has_lm_head,
        has_prefix=any(tensor.startswith(_PREFIX) for tensor in shapes),
        rows=rows,
    )


def _mamba_rows(config: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Return the rows of the fused input projection of Mamba layers, by config.json.

    Its rows are those of the gate, of the hidden state, of two groups of state vectors, and one per
    head (transformers, `NemotronHMamba2Mixer`).
    """
    names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    sizes = [size for name in names if isinstance(size := config.get(name), int)]
    if len(sizes) < len(names):
        return {}
    heads, head_size, groups, state = sizes
    return {(EVERY_LAYER, "in_proj"): 2 * heads * head_size + 2 * groups * state + heads}


def _tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """Return the shapes of a model's tensors by name, empty for tensors in absent files."""
    shapes: dict[str, list[int]] = {}
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shapes = {str(tensor): [] for tensor in _read_json(index).get("weight_map") or {}}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = _read_header(file)
        shapes.update((tensor, each.shape) for tensor, each in tensors.items())
    return shapes


def _read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; a link is followed, as the cache of a hub has."""
    fd = open_regular(file, os.O_RDONLY, follow_symlinks=True)
    with open(fd, "rb") as opened:
        size_bytes = os.fstat(fd).st_size
        length = header_length(opened.read(LENGTH_BYTES), size_bytes)
        return parse_tensors(file.name, opened.read(length), size_bytes)


def _read_json(file: Path) -> dict[str, Any]:
    data = read_regular(file, MAX_JSON_BYTES, follow_symlinks=True)
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a JSON object: {error}") from None
