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
        rows: rows of the fused modules by layer and module, such as ("3", "in_proj"); empty if
            unknown.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...] = ()
    has_lm_head: bool | None = None
    has_prefix: bool = False
    rows: Mapping[tuple[str, str], int] = field(default_factory=dict)


#: Patterns of names that the service offers, with what is known of them; the first match counts.
#: As of 2026-11, from tinker_cookbook 0.6.1 (`model_info.py`: names and families; `weights/`:
#: prefixes, and the tied embeddings of Qwen3.5-4B), and `tie_word_embeddings` in the config.json
#: of the others at Hugging Face.
_KNOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"meta-llama/Llama-3\.2-[13]B.*", {"model_type": "llama", "has_lm_head": False}),
    (r"meta-llama/Llama-3\.[13]-\d+B.*", {"model_type": "llama", "has_lm_head": True}),
    (r"Qwen/Qwen3-(0\.6|1\.7|4)B.*", {"model_type": "qwen3", "has_lm_head": False}),
    (r"Qwen/Qwen3-\d+B-A\d+B.*", {"model_type": "qwen3_moe", "has_lm_head": True}),
    (r"Qwen/Qwen3-(8|14|32)B.*", {"model_type": "qwen3", "has_lm_head": True}),
    (
        r"Qwen/Qwen3-VL-\d+B-A\d+B.*",
        {"model_type": "qwen3_vl_moe", "has_lm_head": True, "has_prefix": True},
    ),
    (r"Qwen/Qwen3\.5-4B.*", {"model_type": "qwen3_5", "has_lm_head": False, "has_prefix": True}),
    (
        r"Qwen/Qwen3\.[5-8]-\d+B-A\d+B.*",
        {"model_type": "qwen3_5_moe", "has_lm_head": True, "has_prefix": True},
    ),
    (
        r"Qwen/Qwen3\.[5-8]-27B.*",
        {"model_type": "qwen3_5", "has_lm_head": True, "has_prefix": True},
    ),
    (r"Qwen/Qwen3\.[5-8]-\d+B.*", {"model_type": "qwen3_5", "has_prefix": True}),
    (
        r"openai/gpt-oss-.*",
        {"model_type": "gpt_oss", "architectures": ("GptOssForCausalLM",), "has_lm_head": True},
    ),
    (r"deepseek-ai/DeepSeek-V3.*", {"model_type": "deepseek_v3", "has_lm_head": True}),
    (r"moonshotai/Kimi-K2-.*", {"model_type": "kimi_k2", "has_lm_head": True}),
    (r"moonshotai/Kimi-K2\.\d.*", {"model_type": "kimi_k25", "has_lm_head": True}),
    (
        r"nvidia/(NVIDIA-)?Nemotron-3-.*",
        {
            "model_type": "nemotron_h",
            "architectures": ("NemotronHForCausalLM",),
            "has_lm_head": True,
        },
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

        Raises:
            ValueError: the files of a local model are invalid.
        """
        for directory in self._directories(name):
            if (directory / "config.json").is_file():
                return _from_directory(name, directory)
        for pattern, facts in _KNOWN:
            if re.fullmatch(pattern, name):
                return BaseModel(name=name, **facts)
        return None

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
            revision = (repository / "refs/main").read_text().strip()
        except OSError:
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
    rows = {
        (match[1], match[2]): shape[0]
        for tensor, shape in shapes.items()
        if shape and (match := re.search(r"\.layers\.(\d+)\..*\.(\w+)\.weight$", tensor))
    }
    has_lm_head = any(f".{tensor}".endswith(".lm_head.weight") for tensor in shapes)
    return BaseModel(
        name=name,
        model_type=str(config.get("model_type", "")),
        architectures=tuple(map(str, config.get("architectures") or ())),
        has_lm_head=has_lm_head if shapes else None,
        has_prefix=any(tensor.startswith(_PREFIX) for tensor in shapes),
        rows=rows,
    )


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
