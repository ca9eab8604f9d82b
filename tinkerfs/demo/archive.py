"""Generated checkpoint files (a PEFT adapter), and tar archives of them.

The content is determined by the checkpoint's record: the files have a total size of `size_bytes`,
and are identical in every process.
"""

import hashlib
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass

from tinkerfs.demo.content import Concat, Content, Data, GzipStored, Noise

_CONFIG_BYTES = 1024
MIN_SIZE_BYTES = 4096
"""Minimum total size of the files."""

_PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
_LAYERS = 4


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
        "target_modules": sorted({name.rpartition(".")[2] for name in _PROJECTIONS}),
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2).encode()
    return text.ljust(_CONFIG_BYTES - 1) + b"\n"


def _safetensors(adapter: Adapter, size_bytes: int) -> Content:
    """Return a file in safetensors format that is exactly `size_bytes` long.

    The format: https://huggingface.co/docs/safetensors
    """
    matrices = 2 * len(_PROJECTIONS) * _LAYERS
    rank = adapter.lora_rank
    if (
        size_bytes < 64 * matrices + 4 * rank * matrices * 2
    ):  # too small for a header with all of them
        matrices = 2
        rank = min(rank, 8)
    hidden = size_bytes // (4 * rank * matrices)
    header = _header(matrices, rank, hidden)
    while 8 + len(header) + 4 * rank * matrices * hidden > size_bytes:
        excess = 8 + len(header) + 4 * rank * matrices * hidden - size_bytes
        hidden -= -(-excess // (4 * rank * matrices))
        header = _header(matrices, rank, hidden)
    data_bytes = 4 * rank * matrices * hidden
    # The remainder is white space after the header, which the format allows.
    header = header.ljust(size_bytes - 8 - data_bytes)
    digest = hashlib.blake2b(adapter.identity.encode(), digest_size=8).digest()
    prefix = len(header).to_bytes(8, "little") + header
    return Concat([Data(prefix), Noise(data_bytes, int.from_bytes(digest))])


def _header(matrices: int, rank: int, hidden: int) -> bytes:
    tensors: dict[str, object] = {"__metadata__": {"format": "pt"}}
    matrix_bytes = 4 * rank * hidden
    for index in range(matrices):
        layer, rest = divmod(index, 2 * len(_PROJECTIONS))
        projection = _PROJECTIONS[rest // 2]
        side, shape = ("B", [hidden, rank]) if rest % 2 else ("A", [rank, hidden])
        name = f"base_model.model.model.layers.{layer}.{projection}.lora_{side}.weight"
        begin = index * matrix_bytes
        tensors[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [begin, begin + matrix_bytes],
        }
    return json.dumps(tensors, separators=(",", ":")).encode()
