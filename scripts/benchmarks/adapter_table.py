"""What the conversion makes of an adapter of each model family, and what reading it costs.

Each adapter has the modules that Tinker trains, at rank 8. The dimensions are of the order of those
of the base models; the values are noise. Every adapter is read through a new mount with an empty
cache: first one tensor, as `safe_open` does, and then the whole file.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.benchmarks.harness import mounted
from scripts.benchmarks.throughput import read_all
from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Concat, Data, Noise

RANK = 8
MODEL = "adapter_model.safetensors"

#: Names of the parts of a layer, with rows and columns; experts have a third number.
Modules = dict[str, tuple[int, ...]]

#: The header of a safetensors file, without its metadata.
Header = dict[str, dict[str, list[int]]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The modules of the layers of a base model.

    Attributes:
        base: name of the base model.
        layers: pairs of a number of layers and their modules.
        unembed: Tinker's name of the output layer, and the size of the vocabulary and hidden size.
    """

    base: str
    layers: tuple[tuple[int, Modules], ...]
    unembed: tuple[str, int, int]


def attention(hidden: int, query: int, value: int, path: str = "self_attn") -> Modules:
    return {
        f"{path}.q_proj": (query, hidden),
        f"{path}.k_proj": (value, hidden),
        f"{path}.v_proj": (value, hidden),
        f"{path}.o_proj": (hidden, query),
    }


def dense(hidden: int, inner: int, path: str = "mlp") -> Modules:
    return {
        f"{path}.gate_proj": (inner, hidden),
        f"{path}.up_proj": (inner, hidden),
        f"{path}.down_proj": (hidden, inner),
    }


def experts(hidden: int, inner: int, count: int) -> Modules:
    return {
        "mlp.experts.w1": (inner, hidden, count),
        "mlp.experts.w2": (hidden, inner, count),
        "mlp.experts.w3": (inner, hidden, count),
    }


def linear_attention(hidden: int, key: int, value: int) -> Modules:
    return {
        "linear_attn.in_proj_q": (key, hidden),
        "linear_attn.in_proj_k": (key, hidden),
        "linear_attn.in_proj_v": (value, hidden),
        "linear_attn.in_proj_z": (value, hidden),
        "linear_attn.out_proj": (hidden, value),
    }


LATENT = {
    "self_attn.q_a_proj": (1536, 7168),
    "self_attn.kv_a_proj_with_mqa": (576, 7168),
    "self_attn.o_proj": (7168, 8192),
}
UNEMBED = "model.unembed_tokens"

SHAPES = (
    Shape(
        base="meta-llama/Llama-3.1-8B",
        layers=((32, attention(4096, 4096, 1024) | dense(4096, 14336)),),
        unembed=(UNEMBED, 128256, 4096),
    ),
    Shape(
        base="Qwen/Qwen3-30B-A3B",
        layers=((48, attention(2048, 4096, 512) | experts(2048, 768, 128)),),
        unembed=(UNEMBED, 151936, 2048),
    ),
    Shape(
        base="Qwen/Qwen3-VL-30B-A3B-Instruct",
        layers=((48, attention(2048, 4096, 512) | experts(2048, 768, 128)),),
        unembed=(UNEMBED, 151936, 2048),
    ),
    Shape(
        base="Qwen/Qwen3.6-27B",
        layers=(
            (48, linear_attention(5120, 2048, 6144) | dense(5120, 17408)),
            (16, attention(5120, 12288, 1024) | dense(5120, 17408)),
        ),
        unembed=(UNEMBED, 248320, 5120),
    ),
    Shape(
        base="Qwen/Qwen3.6-35B-A3B",
        layers=(
            (30, linear_attention(2048, 2048, 4096) | experts(2048, 512, 256)),
            (10, attention(2048, 8192, 512) | experts(2048, 512, 256)),
        ),
        unembed=(UNEMBED, 248320, 2048),
    ),
    Shape(
        base="openai/gpt-oss-20b",
        layers=((24, attention(2880, 4096, 512, "attn") | experts(2880, 2880, 32)),),
        unembed=(UNEMBED, 201088, 2880),
    ),
    Shape(
        base="moonshotai/Kimi-K2-Thinking",
        layers=((1, LATENT | dense(7168, 18432)), (60, LATENT | experts(7168, 2048, 384))),
        unembed=(UNEMBED, 163840, 7168),
    ),
    Shape(
        base="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        layers=(
            (
                23,
                {
                    "mixer.gate_proj": (4096, 2688),
                    "mixer.x_proj": (4096, 2688),
                    "mixer.out_proj": (2688, 4096),
                },
            ),
            (
                23,
                {
                    "mixer.experts.w1": (1856, 2688, 128),
                    "mixer.experts.w2": (2688, 1856, 128),
                    "mixer.shared_experts.up_proj": (3712, 2688),
                    "mixer.shared_experts.down_proj": (2688, 3712),
                },
            ),
            (6, attention(2688, 4096, 256, "mixer")),
        ),
        unembed=("model.lm_head", 131072, 2688),
    ),
)


def tensors(shape: Shape, rank: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the tensors of an adapter in Tinker's names."""
    number = 0
    modules: list[tuple[str, tuple[int, ...]]] = []
    for count, layer in shape.layers:
        for _ in range(count):
            modules += ((f"model.layers.{number}.{name}", size) for name, size in layer.items())
            number += 1
    name, rows, columns = shape.unembed
    modules.append((name, (rows, columns)))
    for name, size in modules:
        a, b = [rank, size[1]], [size[0], rank]
        if len(size) == 3:
            is_down = name.endswith(".w2")
            a, b = [size[2] if is_down else 1, *a], [1 if is_down else size[2], *b]
        yield f"base_model.model.{name}.lora_A.weight", a
        yield f"base_model.model.{name}.lora_B.weight", b


def stored_files(shape: Shape) -> dict[str, Concat | Data]:
    """Return the files of a checkpoint as the server stores them."""
    # That of the largest one is smaller, so that it stays below a gigabyte.
    rank = 2 if "Kimi" in shape.base else RANK
    entries: dict[str, object] = {}
    end = 0
    for name, size in tensors(shape, rank):
        begin, end = end, end + 2 * prod(size)
        entries[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    prefix = len(header).to_bytes(8, "little") + header
    config = {"r": rank, "lora_alpha": 32, "base_model_name_or_path": shape.base}
    return {
        "adapter_config.json": Data(json.dumps(config).encode()),
        MODEL: Concat([Data(prefix), Noise(end, 0)]),
    }


@dataclass(frozen=True)
class Cost:
    """Requests to the store and bytes that it sent."""

    requests: int
    sent_bytes: int

    def __str__(self) -> str:
        return f"{self.requests}, {self.sent_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class Reading:
    """A file and what reading it costs.

    Attributes:
        header: its tensors by name.
        header_bytes, size_bytes: lengths of the header and the file.
        first, whole: cost of the first tensor, and of the whole file.
    """

    header: Header
    header_bytes: int
    size_bytes: int
    first: Cost
    whole: Cost


def cost(server: FaultyServer) -> Cost:
    """Return what was requested since the last call."""
    server.journal.wait_until_idle()
    entries = [each for each in server.journal.entries() if each.origin == "store"]
    server.journal.clear()
    return Cost(len(entries), sum(each.sent_bytes for each in entries))


def read_header(fd: int) -> tuple[Header, int]:
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    header: Header = json.loads(os.pread(fd, length, 8))
    header.pop("__metadata__", None)
    return header, length


def read_tensor(path: Path) -> tuple[Header, int]:
    """Read the header and the first tensor of a file; return the header and its length."""
    fd = os.open(path, os.O_RDONLY)
    try:
        header, length = read_header(fd)
        begin, end = min(each["data_offsets"] for each in header.values())
        assert len(os.pread(fd, end - begin, 8 + length + begin)) == end - begin
        return header, length
    finally:
        os.close(fd)


def fates(stored: Header, made: Header) -> str:
    """Say what became of the tensors."""
    counts = dict.fromkeys(("kept", "renamed", "split", "repeated", "joined"), 0)
    is_packed = any(".experts.w1." in name for name in made)
    for name, each in stored.items():
        if name in made:
            counts["kept"] += 1
        elif len(each["shape"]) == 3 and not is_packed:
            counts["split" if each["shape"][0] > 1 else "repeated"] += 1
        elif re.search(r"\.(in_proj_[qkv]|mixer\.(gate|x)_proj)\.", name):
            counts["joined"] += 1
        else:
            counts["renamed"] += 1
    return ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)


def measure(server: FaultyServer, binding: str, path: str, *options: str) -> Reading:
    """Read a file below a new mount with an empty cache."""
    with (
        TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        mounted(server, binding, Path(cache), *options) as mount,
    ):
        server.journal.clear()
        header, length = read_tensor(mount / path)
        first = cost(server)
        read_all(mount / path)
        whole = cost(server)
        total = Cost(first.requests + whole.requests, first.sent_bytes + whole.sent_bytes)
        size_bytes = (mount / path).stat().st_size
    return Reading(header, length, size_bytes, first, total)


def print_table(binding: str) -> None:
    """Print a Markdown table with a row for each family, form and layout."""
    print("| base model | form | tensors | header | file | first tensor | all |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        with FaultyServer(runs=0) as server:
            run = server.account.add_run(base_model=shape.base)
            checkpoint = server.account.add_checkpoint(run.id, "sampler_weights/1")
            checkpoint.archive = tar_of(stored_files(shape), 1_700_000_000)
            stored_path = f"runs/{run.id}/checkpoints/sampler_weights/1/files/{MODEL}"
            adapter_path = f"adapters/{run.id}@sampler_weights@1/{MODEL}"
            forms: dict[str, tuple[str, ...]] = {
                "stored": (stored_path,),
                "`peft`": (adapter_path,),
            }
            if any("experts" in name for _, layer in shape.layers for name in layer):
                forms["`packed`"] = (adapter_path, "--moe-layout", "packed")
            stored: Header = {}
            for form, arguments in forms.items():
                found = measure(server, binding, *arguments)
                stored = stored or found.header
                made = fates(stored, found.header) if form != "stored" else ""
                cells = [
                    shape.base if form == "stored" else "",
                    form,
                    f"{len(found.header)}" + (f" ({made})" if made else ""),
                    f"{found.header_bytes / 1e3:,.0f} kB",
                    f"{found.size_bytes / 1e6:,.0f} MB",
                    found.first,
                    found.whole,
                ]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
