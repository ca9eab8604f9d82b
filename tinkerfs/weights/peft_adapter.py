"""Lay out an adapter in PEFT's form over the bytes of a Tinker adapter (pure).

The result has a new header and the tensors' bytes where they lie. Nothing is computed: a tensor is
renamed, divided by its first dimension, repeated, or put between zeros. The rules of each model
family are in `adapter_families`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from tinkerfs.weights.adapter_families import Family, family_of, peft_module
from tinkerfs.weights.base_models import BaseModel
from tinkerfs.weights.extents import Extent, ExtentMap, OwnBytes, Range, Rows, Zeros
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, Tensor, parse_tensors

#: Maximum size of the new header: that of the format (safetensors, src/tensor.rs).
MAX_HEADER_BYTES: Final = 100_000_000

#: Maximum number of experts in one tensor.
MAX_EXPERTS: Final = 1024

#: Fields of `adapter_config.json` that change what the factors mean. Where one is set, a new
#: configuration would be wrong.
_MEANINGFUL: Final = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")

#: Data keep their place modulo this, the size of a page.
_ALIGNMENT: Final = 4096

_LORA_NAME: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EXPERTS: Final = re.compile(r"(?P<before>.+\.experts)\.(?P<leaf>[A-Za-z]\w*)")


class ConversionError(ValueError):
    """An adapter cannot be converted; the message names the rule that is missing."""


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter in PEFT's form.

    Attributes:
        extents: `adapter_model.safetensors`, over the bytes of the Tinker adapter.
        config: content of `adapter_config.json`; None if that of the Tinker adapter is right.
        header: the header of the safetensors file, without its length prefix; None if that of the
            Tinker adapter is right.
    """

    extents: ExtentMap
    config: bytes | None
    header: bytes | None


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two factors of a module: B (out, rank) times A (rank, in)."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class _Block:
    """Adjacent tensors of the result that differ only in their names and bytes.

    The tensors of all experts are one block: an adapter may have 100,000 of them.

    Attributes:
        names: the names, in the order of the data.
        dtype, shape: those of each tensor.
        extents: the data of all tensors.
    """

    names: list[str]
    dtype: str
    shape: list[int]
    extents: tuple[Extent, ...]

    @property
    def first_offset(self) -> int:
        """The offset of the first data in the source."""
        first = self.extents[0]
        return first.start if isinstance(first, Range | Rows) else 0

    @property
    def length(self) -> int:
        """The length of each tensor in bytes."""
        return sum(extent.length for extent in self.extents) // len(self.names)


def convert(
    header: bytes, size_bytes: int, config: Mapping[str, Any], base: BaseModel
) -> PeftAdapter:
    """Return an adapter in PEFT's form.

    Args:
        header: header of the Tinker adapter's safetensors file, without its length prefix.
        size_bytes: size of that file.
        config: the Tinker adapter's `adapter_config.json`.
        base: the base model.

    Raises:
        ConversionError: the adapter is invalid, or no rule says how to convert it.
    """
    family = family_of(base)
    if family.refusal is not None:
        raise ConversionError(family.refusal)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ConversionError("adapter_config.json has no number 'r' above 0")
    if not isinstance(alpha, int | float) or type(alpha) is bool or not math.isfinite(alpha):
        raise ConversionError("adapter_config.json has no number 'lora_alpha'")
    start = LENGTH_BYTES + len(header)
    tensors = _contiguous_tensors(header, size_bytes)
    pairs = _pairs(tensors)
    blocks, modules, ranks = _Conversion(base, family, start).run(pairs)
    is_unchanged = [name for block in blocks for name in block.names] == list(tensors)
    if is_unchanged and _is_complete(config, pairs):
        return PeftAdapter(ExtentMap([Range(0, size_bytes)]), None, None)
    meaningful = [key for key in _MEANINGFUL if config.get(key)]
    if meaningful:
        raise ConversionError(f"no rule for {meaningful[0]!r} of adapter_config.json")
    new_config = _peft_config(config, base, modules, ranks)
    if is_unchanged:
        return PeftAdapter(ExtentMap([Range(0, size_bytes)]), new_config, None)
    prefixed = _new_header(blocks, start)
    data = [extent for block in blocks for extent in block.extents]
    extents = ExtentMap([OwnBytes(prefixed), *data])
    return PeftAdapter(extents, new_config, prefixed[LENGTH_BYTES:])


def _is_complete(config: Mapping[str, Any], paths: Iterable[str]) -> bool:
    """Return whether a configuration is PEFT's and names the modules that the adapter has."""
    listed, name = config.get("target_modules"), config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA" or not isinstance(name, str) or not name:
        return False
    targets = {each for each in listed if isinstance(each, str)} if type(listed) is list else set()
    return all(_is_target(path, targets) for path in paths)


def _is_target(path: str, targets: Set[str]) -> bool:
    """Return whether a module is named: by its path, or by the end of it."""
    parts = path.split(".")
    return any(".".join(parts[index:]) in targets for index in range(len(parts)))


def _contiguous_tensors(header: bytes, size_bytes: int) -> dict[str, Tensor]:
    """Return the tensors by name in the order of their data."""
    try:
        tensors = parse_tensors("adapter_model.safetensors", header, size_bytes)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].data_offsets))
    end = 0
    for name, tensor in ordered.items():
        if tensor.data_offsets[0] != end:
            raise ConversionError(f"tensor {name!r} leaves a hole or overlaps another one")
        end = tensor.data_offsets[1]
    if LENGTH_BYTES + len(header) + end != size_bytes:
        raise ConversionError("the file has bytes after its last tensor")
    return ordered


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, _Pair]:
    """Return the factors by Tinker's path of their module, in the order of their data."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            raise ConversionError(f"{name!r} is not the name of a LoRA factor")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, found in sides.items():
        if len(found) != 2:
            raise ConversionError(f"one of the two factors of {module!r} is missing")
    if not sides:
        raise ConversionError("it has no LoRA factors")
    return {module: _Pair(found["A"], found["B"]) for module, found in sides.items()}


class _Conversion:
    """One conversion: collects blocks, and the parts of fused modules until all are there."""

    def __init__(self, base: BaseModel, family: Family, start: int) -> None:
        self._base, self._family, self._start = base, family, start
        self._blocks: list[_Block] = []
        self._names: set[str] = set()
        self._header_bytes = 0
        self._modules: set[str] = set()
        self._ranks: dict[str, int] = {}
        self._fused = {part: target for target, parts in family.fused for part in parts}
        self._parts: dict[tuple[str, str], dict[str, _Pair]] = {}

    def run(self, pairs: Mapping[str, _Pair]) -> tuple[list[_Block], set[str], dict[str, int]]:
        """Return the blocks in the order of their data, target modules, and other ranks."""
        for path, pair in pairs.items():
            try:
                module = peft_module(path, self._base, self._family)
            except LookupError as error:
                raise _unknown(self._base, str(error)) from None
            before, _, leaf = module.rpartition(".")
            experts = _EXPERTS.fullmatch(module)
            if experts is not None:
                self._add_experts(experts["before"], experts["leaf"], pair)
            elif leaf in self._fused:
                self._parts.setdefault((before, self._fused[leaf]), {})[leaf] = pair
            else:
                _check_shapes(path, pair)
                for side, tensor in (("A", pair.a), ("B", pair.b)):
                    data = (self._range(tensor),)
                    self._add([module], side, _Block([], tensor.dtype, tensor.shape, data))
        for (before, target), parts in self._parts.items():
            self._add_fused(before, target, parts)
        blocks = sorted(self._blocks, key=lambda block: block.first_offset)
        return blocks, self._modules, self._ranks

    def _add(self, modules: list[str], side: str, block: _Block) -> None:
        """Add a block, with the names of the factors of some modules."""
        names = [f"base_model.model.{module}.lora_{side}.weight" for module in modules]
        count = len(self._names)
        self._names.update(names)
        if len(self._names) < count + len(names):
            raise ConversionError(f"two tensors would be named {names[0]!r}")
        self._blocks.append(replace(block, names=names))
        self._modules.add(modules[0].rpartition(".")[2])

    def _range(self, tensor: Tensor) -> Range:
        begin, end = tensor.data_offsets
        return Range(self._start + begin, end - begin)

    def _add_experts(self, before: str, leaf: str, pair: _Pair) -> None:
        """Add the factors of each expert, which lie one after another in a tensor."""
        if not prod(pair.a.shape) and not prod(pair.b.shape):
            return  # a projection that the model does not have
        if len(pair.a.shape) != 3 or len(pair.b.shape) != 3:
            raise ConversionError(f"the factors of {before}.{leaf} have no dimension of experts")
        counts = {pair.a.shape[0], pair.b.shape[0]}
        count = max(counts)
        if counts not in ({1, count}, {count}) or not 1 < count <= MAX_EXPERTS:
            raise ConversionError(f"the factors of {before}.{leaf} are of {counts} experts")
        if not prod(pair.a.shape) or not prod(pair.b.shape) or pair.a.shape[1] != pair.b.shape[2]:
            raise ConversionError(f"the factors of {before}.{leaf} do not fit together")
        # Checked before the names are made.
        self._header_bytes += 2 * count * (len(before) + 64)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ConversionError("its header would be longer than the format allows")
        leaf = dict(self._family.experts).get(leaf, leaf)
        modules = [f"{before}.{index}.{leaf}" for index in range(count)]
        for side, tensor in (("A", pair.a), ("B", pair.b)):
            # A factor with one expert is shared by all.
            data = (self._range(tensor),) * (count if tensor.shape[0] == 1 else 1)
            self._add(modules, side, _Block([], tensor.dtype, tensor.shape[1:], data))

    def _add_fused(self, before: str, target: str, parts: Mapping[str, _Pair]) -> None:
        """Add one module for its parts: A stacked, B block-diagonal."""
        order = dict(self._family.fused)[target]
        missing = [part for part in order if part not in parts]
        if missing:
            raise ConversionError(f"{before}.{target} lacks its part {missing[0]}")
        layer = re.search(r"\.layers\.(\d+)\.", f".{before}.")
        rows = self._base.rows_of(layer[1], target) if layer else None
        if rows is None:
            raise _unknown(self._base, f"the rows of {before}.{target}")
        pairs = [parts[part] for part in order]
        for part, pair in zip(order, pairs, strict=True):
            _check_shapes(f"{before}.{part}", pair)
        rank = sum(pair.a.shape[0] for pair in pairs)
        width = pairs[0].a.shape[1]
        dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
        rest = rows - sum(pair.b.shape[0] for pair in pairs)
        if len(dtypes) > 1 or rest < 0 or any(pair.a.shape[1] != width for pair in pairs):
            raise ConversionError(f"the parts of {before}.{target} do not fit together")
        dtype = dtypes.pop()
        begin, end = pairs[0].a.data_offsets
        value_bytes = (end - begin) // max(prod(pairs[0].a.shape), 1)
        stacked = tuple(self._range(pair.a) for pair in pairs)
        blocks: list[Extent] = []
        column = 0
        for pair in pairs:
            count, part_rank = pair.b.shape
            blocks.append(
                Rows(
                    self._start + pair.b.data_offsets[0],
                    count,
                    part_rank * value_bytes,
                    column * value_bytes,
                    (rank - column - part_rank) * value_bytes,
                )
            )
            column += part_rank
        blocks.append(Zeros(rest * rank * value_bytes))
        module = [f"{before}.{target}"]
        self._add(module, "A", _Block([], dtype, [rank, width], stacked))
        self._add(module, "B", _Block([], dtype, [rows, rank], tuple(blocks)))
        self._ranks[target] = rank


def _unknown(base: BaseModel, fact: str) -> ConversionError:
    return ConversionError(f"not known of {base.name}: {fact} (hint: --base-models)")


def _check_shapes(path: str, pair: _Pair) -> None:
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or pair.a.shape[0] != pair.b.shape[1]:
        raise ConversionError(
            f"the factors of {path} have the shapes {pair.a.shape} and {pair.b.shape}"
        )


def _new_header(blocks: Iterable[_Block], start: int) -> bytes:
    """Return the header with its length prefix; the data begin at `start` modulo a page."""
    entries = ['"__metadata__":{"format":"pt"}']
    begin = 0
    for block in blocks:
        length = block.length
        shape = json.dumps(block.shape, separators=(",", ":"))
        fields = f'"dtype":{json.dumps(block.dtype)},"shape":{shape}'
        # All names in one call; no JSON string has a line break in it.
        for name in json.dumps(block.names, separators=("\n", ":"))[1:-1].split("\n"):
            end = begin + length
            entries.append(f'{name}:{{{fields},"data_offsets":[{begin},{end}]}}')
            begin = end
    text = f"{{{','.join(entries)}}}".encode()
    padding = (start - LENGTH_BYTES - len(text)) % _ALIGNMENT
    if len(text) + padding > MAX_HEADER_BYTES:
        raise ConversionError("its header would be longer than the format allows")
    return (len(text) + padding).to_bytes(LENGTH_BYTES, "little") + text + b" " * padding


def _peft_config(
    config: Mapping[str, Any], base: BaseModel, modules: set[str], ranks: Mapping[str, int]
) -> bytes:
    """Return `adapter_config.json`, with the scale of fused modules kept."""
    rank, alpha = config["r"], config["lora_alpha"]
    value = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "rank_pattern": dict(ranks),
        "alpha_pattern": {module: int(alpha * each / rank) for module, each in ranks.items()},
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    return json.dumps(value, indent=2).encode() + b"\n"
