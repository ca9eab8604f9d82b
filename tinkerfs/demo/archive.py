"""Generated checkpoint files (a PEFT adapter), and tar archives of them.

The content is determined by the checkpoint's record: the files have a total size of `size_bytes`,
and are identical in every process.
"""

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tinkerfs.demo.content import Concat, Content, Data, GzipStored, Noise

_CONFIG_BYTES = 1024
MIN_SIZE_BYTES = 4096
"""Minimum total size of the files."""

_PREFIX = "base_model.model.model.layers"
_LAYERS = 4
_EXPERTS = 4


@dataclass(frozen=True, slots=True)
class _Module:
    """A module of each layer, by Tinker's name, with the experts that each factor has."""

    name: str
    a_experts: tuple[int, ...] = ()
    b_experts: tuple[int, ...] = ()


# Tinker's own names, which differ from those of the base model in places. Experts share one factor.
_MIXTURE = (
    _Module("mlp.experts.w1", (1,), (_EXPERTS,)),
    _Module("mlp.experts.w3", (1,), (_EXPERTS,)),
    _Module("mlp.experts.w2", (_EXPERTS,), (1,)),
)
_DENSE = (_Module("self_attn.q_proj"), _Module("self_attn.v_proj"), _Module("mlp.down_proj"))
_MODULES = {
    "Qwen/Qwen3-30B-A3B": (_Module("self_attn.q_proj"), _Module("self_attn.v_proj"), *_MIXTURE),
    "openai/gpt-oss-20b": (_Module("attn.q_proj"), _Module("attn.v_proj"), *_MIXTURE),
    "deepseek-ai/DeepSeek-V3.1": (_Module("self_attn.q_a_proj"), *_MIXTURE),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """Parameters that determine the files of a checkpoint.

    Attributes:
        lora_rank: Rank of the adapter, at least 1.
        size_bytes: Total size of the files; values below `MIN_SIZE_BYTES` are raised to it.
        identity: Seed of the weights, any text.
    """

    base_model: str
    lora_rank: int
    size_bytes: int
    identity: str


def adapter_files(adapter: Adapter) -> dict[str, Content]:
    """Return the files of an adapter by name, in the order of the archive."""
    size_bytes = max(adapter.size_bytes, MIN_SIZE_BYTES)
    return {
        "adapter_config.json": Data(_config(adapter)),
        "adapter_model.safetensors": _safetensors(adapter, size_bytes - _CONFIG_BYTES),
        "checkpoint_complete": Data(b""),
    }


def tar_of(files: Mapping[str, Content], mtime_s: int) -> Content:
    """Return a tar archive of files that were all modified at `mtime_s` (Unix time)."""
    parts: list[Content] = []
    for name, content in files.items():
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = content.size_bytes, mtime_s, 0o644
        parts += [Data(member.tobuf(tarfile.GNU_FORMAT)), content]
        parts.append(Data(b"\0" * (-content.size_bytes % tarfile.BLOCKSIZE)))
    length = sum(part.size_bytes for part in parts) + 2 * tarfile.BLOCKSIZE
    parts.append(Data(b"\0" * (2 * tarfile.BLOCKSIZE + -length % tarfile.RECORDSIZE)))
    return Concat(parts)


def gzipped(content: Content) -> Content:
    """Return the content in gzip format, uncompressed as SkyRL stores its archives."""
    return GzipStored(content)


def _config(adapter: Adapter) -> bytes:
    config = {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.lora_rank,
        "target_modules": sorted({each.name.rpartition(".")[2] for each in _modules(adapter)}),
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2).encode()
    return text.ljust(_CONFIG_BYTES - 1) + b"\n"


def _safetensors(adapter: Adapter, size_bytes: int) -> Content:
    """Return a file in safetensors format that is exactly `size_bytes` long.

    The format: https://huggingface.co/docs/safetensors
    """
    rank = adapter.lora_rank
    factors = _factors(adapter)
    if size_bytes < 160 * len(factors) + 8 * rank * _units(factors):
        factors = factors[:2]  # too small for a header with all of them
        rank = min(rank, 8)
    unit_bytes = 4 * rank * _units(factors)
    hidden = size_bytes // unit_bytes
    header = _header(factors, rank, hidden)
    while 8 + len(header) + unit_bytes * hidden > size_bytes:
        excess = 8 + len(header) + unit_bytes * hidden - size_bytes
        hidden -= -(-excess // unit_bytes)
        header = _header(factors, rank, hidden)
    data_bytes = unit_bytes * hidden
    # The remainder is white space after the header, which the format allows.
    header = header.ljust(size_bytes - 8 - data_bytes)
    digest = hashlib.blake2b(adapter.identity.encode(), digest_size=8).digest()
    prefix = len(header).to_bytes(8, "little") + header
    return Concat([Data(prefix), Noise(data_bytes, int.from_bytes(digest))])


@dataclass(frozen=True, slots=True)
class _Factor:
    """One of the two factors of a module; `experts` is its first dimension, if it has one."""

    name: str
    is_a: bool
    experts: tuple[int, ...]


def _modules(adapter: Adapter) -> tuple[_Module, ...]:
    return _MODULES.get(adapter.base_model, _DENSE)


def _factors(adapter: Adapter) -> list[_Factor]:
    return [
        _Factor(
            f"{_PREFIX}.{layer}.{module.name}.lora_{'A' if is_a else 'B'}.weight",
            is_a,
            module.a_experts if is_a else module.b_experts,
        )
        for layer in range(_LAYERS)
        for module in _modules(adapter)
        for is_a in (True, False)
    ]


def _units(factors: Sequence[_Factor]) -> int:
    """Return the number of matrices of rank x hidden values."""
    return sum(prod(factor.experts) for factor in factors)


def _header(factors: Sequence[_Factor], rank: int, hidden: int) -> bytes:
    tensors: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for factor in factors:
        matrix = (rank, hidden) if factor.is_a else (hidden, rank)
        shape = [*factor.experts, *matrix]
        end = begin + 4 * prod(shape)
        tensors[factor.name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return json.dumps(tensors, separators=(",", ":")).encode()
