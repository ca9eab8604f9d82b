"""Lay out an adapter in PEFT's form over the bytes of a Tinker adapter (pure).

The result has a new header and the tensors' bytes where they lie. Nothing is computed: a tensor is
renamed, divided by its first dimension, repeated, or put between zeros. The rules of each model
family are in `adapter_families`.

The factors of experts have one of two layouts. With `peft`, each expert has tensors of its own, as
PEFT saves them. With `packed`, a projection has one tensor for all experts, `experts.w1` to
`experts.w3`, as Tinker stores it. vLLM 0.33 loads that with `--enable-moe-shared-loras`
(vllm/lora/utils.py, `process_packed_modules_mapping`). It requires all three projections
(vllm/lora/lora_weights.py, `pack_moe_stacked`). For A of w1 and w3 and for B of w2, it takes the
first expert's for all (vllm/lora/layers/fused_moe.py, `_match_expert_dim`).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from tinkerfs.weights.adapter_families import Family, FusedModule, family_of, peft_module
from tinkerfs.weights.base_models import BaseModel
from tinkerfs.weights.extents import Extent, ExtentMap, OwnBytes, Range, Rows, Zeros
from tinkerfs.weights.peft_form import EXPERTS, LORA_NAME, is_complete, is_peft_form
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

#: What converts a copy of an adapter that this module does not convert.
CONVERT_COMMAND: Final = "convert a copy with tinker_cookbook.weights.build_lora_adapter"
MERGE_COMMAND: Final = "merge a copy with tinker_cookbook.weights.build_hf_model"

_NEEDS_PEFT_LAYOUT: Final = "--moe-layout peft serves it"


class ConversionError(ValueError):
    """An adapter cannot be converted; the message names the rule that is missing.

    Attributes:
        hint: what to do instead.
    """

    def __init__(self, message: str, hint: str = CONVERT_COMMAND) -> None:
        super().__init__(message)
        self.hint = hint


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


def pass_on(
    header: bytes,
    size_bytes: int,
    config: Mapping[str, Any],
    family: Family | None,
    moe_layout: str = "peft",
) -> PeftAdapter | None:
    """Return an adapter that is in PEFT's form already, unchanged; None for any other one.

    Args:
        header: header of its safetensors file, without its length prefix.
        size_bytes: size of that file.
        config: its `adapter_config.json`.
        family: the family of its base model, None if it is unknown.
        moe_layout: layout of the experts: "peft" or "packed".

    Raises:
        ConversionError: the adapter is invalid, or has the other layout.
    """
    tensors = _contiguous_tensors(header, size_bytes)
    if not is_peft_form(tensors, config, family):
        return None
    if moe_layout == "packed" and any(".experts." in name for name in tensors):
        raise ConversionError(f"it has one tensor per expert already; {_NEEDS_PEFT_LAYOUT}")
    return PeftAdapter(ExtentMap([Range(0, size_bytes)]), None, None)


def convert(
    header: bytes,
    size_bytes: int,
    config: Mapping[str, Any],
    base: BaseModel,
    moe_layout: str = "peft",
) -> PeftAdapter:
    """Return an adapter in PEFT's form.

    Args:
        header: header of the Tinker adapter's safetensors file, without its length prefix.
        size_bytes: size of that file.
        config: the Tinker adapter's `adapter_config.json`.
        base: the base model.
        moe_layout: layout of the experts: "peft" or "packed".

    Raises:
        ConversionError: the adapter is invalid, or no rule says how to convert it.
    """
    family = family_of(base)
    unchanged = pass_on(header, size_bytes, config, family, moe_layout)
    if unchanged is not None:
        return unchanged
    if family.refusal is not None:
        raise ConversionError(family.refusal, MERGE_COMMAND)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ConversionError("adapter_config.json has no number 'r' above 0")
    if not isinstance(alpha, int | float) or type(alpha) is bool or not math.isfinite(alpha):
        raise ConversionError("adapter_config.json has no number 'lora_alpha'")
    start = LENGTH_BYTES + len(header)
    tensors = _contiguous_tensors(header, size_bytes)
    pairs = _pairs(tensors)
    conversion = _Conversion(base, family, start, is_packed=moe_layout == "packed")
    blocks = conversion.run(pairs)
    data = ExtentMap(extent for block in blocks for extent in block.extents)
    is_unchanged = data.extents == (Range(start, size_bytes - start),) and [
        (name, block.dtype, block.shape) for block in blocks for name in block.names
    ] == [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    file = ExtentMap([Range(0, size_bytes)])
    # Engines look up the projections of packed experts by the base model's names.
    if is_unchanged and not conversion.has_packed_experts and is_complete(config, pairs):
        return PeftAdapter(file, None, None)
    meaningful = [key for key in _MEANINGFUL if config.get(key)]
    if meaningful:
        raise ConversionError(f"no rule for {meaningful[0]!r} of adapter_config.json")
    new_config = _peft_config(config, base, conversion.modules, conversion.ranks)
    if is_unchanged:
        return PeftAdapter(file, new_config, None)
    prefixed = _new_header(blocks, start)
    extents = ExtentMap([OwnBytes(prefixed), *data.extents])
    return PeftAdapter(extents, new_config, prefixed[LENGTH_BYTES:])


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
        match = LORA_NAME.fullmatch(name)
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
    """One conversion: collects blocks, and the parts of modules until all are there.

    Attributes:
        modules: last names of the modules that the adapter has.
        ranks: ranks of modules that have another one than the adapter.
    """

    def __init__(self, base: BaseModel, family: Family, start: int, *, is_packed: bool) -> None:
        self.modules: set[str] = set()
        self.ranks: dict[str, int] = {}
        self._base, self._family, self._start = base, family, start
        self._is_packed = is_packed
        self._blocks: list[_Block] = []
        self._names: set[str] = set()
        self._header_bytes = 0
        self._fused = {part: fused for fused in family.fused for part in fused.parts}
        self._parts: dict[tuple[str, FusedModule], dict[str, _Pair]] = {}
        self._experts: dict[str, dict[str, _Pair]] = {}

    def run(self, pairs: Mapping[str, _Pair]) -> list[_Block]:
        """Return the blocks in the order of their data."""
        for path, pair in pairs.items():
            try:
                module = peft_module(path, self._base, self._family)
            except LookupError as error:
                raise _unknown(self._base, str(error)) from None
            except ValueError as error:
                raise ConversionError(str(error), MERGE_COMMAND) from None
            before, _, leaf = module.rpartition(".")
            experts = EXPERTS.fullmatch(module)
            if experts is not None:
                self._add_experts(experts["before"], experts["leaf"], pair)
            elif leaf in self._fused:
                self._parts.setdefault((before, self._fused[leaf]), {})[leaf] = pair
            else:
                _check_shapes(path, pair)
                for side, tensor in (("A", pair.a), ("B", pair.b)):
                    data = (self._range(tensor),)
                    self._add([module], leaf, side, _Block([], tensor.dtype, tensor.shape, data))
        for (before, fused), parts in self._parts.items():
            self._add_fused(before, fused, parts)
        for before, projections in self._experts.items():
            self._add_packed(before, projections)
        return sorted(self._blocks, key=lambda block: block.first_offset)

    def _add(self, paths: list[str], module: str, side: str, block: _Block) -> None:
        """Add a block, with the names of the factors of the modules at some paths."""
        names = [f"base_model.model.{path}.lora_{side}.weight" for path in paths]
        count = len(self._names)
        self._names.update(names)
        if len(self._names) < count + len(names):
            raise ConversionError(f"two tensors would be named {names[0]!r}")
        self._blocks.append(replace(block, names=names))
        self.modules.add(module)

    def _range(self, tensor: Tensor) -> Range:
        begin, end = tensor.data_offsets
        return Range(self._start + begin, end - begin)

    @property
    def has_packed_experts(self) -> bool:
        """Whether the adapter has experts in the packed layout."""
        return bool(self._experts)

    def _add_experts(self, before: str, leaf: str, pair: _Pair) -> None:
        """Add the factors of all experts, or collect them for the packed layout."""
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
        if self._is_packed:
            self._experts.setdefault(before, {})[leaf] = pair
            return
        # Checked before the names are made.
        self._header_bytes += 2 * count * (len(before) + 64)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ConversionError("its header would be longer than the format allows")
        leaf = dict(self._family.experts).get(leaf, leaf)
        paths = [f"{before}.{index}.{leaf}" for index in range(count)]
        for side, tensor in (("A", pair.a), ("B", pair.b)):
            # A factor with one expert is shared by all.
            data = (self._range(tensor),) * (count if tensor.shape[0] == 1 else 1)
            self._add(paths, leaf, side, _Block([], tensor.dtype, tensor.shape[1:], data))

    def _add_packed(self, before: str, projections: Mapping[str, _Pair]) -> None:
        """Add the factors of all experts in the packed layout; see the module's docstring."""
        names = dict(self._family.experts)
        if projections.keys() != names.keys():
            given, required = ", ".join(sorted(projections)), ", ".join(sorted(names))
            raise ConversionError(
                f"{before} has {given}, but the packed layout requires {required};"
                f" {_NEEDS_PEFT_LAYOUT}"
            )
        count = max(max(pair.a.shape[0], pair.b.shape[0]) for pair in projections.values())
        for leaf, pair in projections.items():
            shared = "B" if leaf == "w2" else "A"
            for side, tensor in (("A", pair.a), ("B", pair.b)):
                found = tensor.shape[0]
                if side == shared and found > 1:
                    raise ConversionError(
                        f"each expert has its own {side} of {before}.{leaf}, but the packed"
                        f" layout has one for all; {_NEEDS_PEFT_LAYOUT}"
                    )
                if side != shared and found != count:
                    raise ConversionError(
                        f"{before} has projections of {found} and {count} experts"
                    )
                block = _Block([], tensor.dtype, tensor.shape, (self._range(tensor),))
                self._add([f"{before}.{leaf}"], names[leaf], side, block)
        if "w3" not in names:
            # vLLM requires the name, and does not use the values for experts without a gate
            # (vllm/lora/layers/fused_moe.py, `set_lora`).
            a, b = projections["w1"].a, projections["w1"].b
            nothing = (Range(self._start + a.data_offsets[0], 0),)
            for side, like, shape in (
                ("A", a, [1, 0, a.shape[2]]),
                ("B", b, [count, 0, b.shape[2]]),
            ):
                block = _Block([], like.dtype, shape, nothing)
                self._add([f"{before}.w3"], names["w1"], side, block)

    def _add_fused(self, before: str, fused: FusedModule, parts: Mapping[str, _Pair]) -> None:
        """Add one module for its parts: A stacked, B block-diagonal."""
        target, order = fused.name, fused.parts
        missing = [part for part in order if part not in parts]
        if missing:
            raise ConversionError(f"{before}.{target} lacks its part {missing[0]}")
        layer = re.search(r"\.layers\.(\d+)\.", f".{before}.")
        pairs = [parts[part] for part in order]
        for part, pair in zip(order, pairs, strict=True):
            _check_shapes(f"{before}.{part}", pair)
        part_rows = sum(pair.b.shape[0] for pair in pairs)
        rows = self._base.rows_of(layer[1], target) if layer else None
        if rows is None:
            if not fused.is_whole:
                raise _unknown(self._base, f"the rows of {before}.{target}")
            rows = part_rows
        rank = sum(pair.a.shape[0] for pair in pairs)
        width = pairs[0].a.shape[1]
        dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b)}
        rest = rows - part_rows
        is_too_small = rest > 0 and fused.is_whole
        if (
            len(dtypes) > 1
            or rest < 0
            or is_too_small
            or any(pair.a.shape[1] != width for pair in pairs)
        ):
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
        path = [f"{before}.{target}"]
        self._add(path, target, "A", _Block([], dtype, [rank, width], stacked))
        self._add(path, target, "B", _Block([], dtype, [rows, rank], tuple(blocks)))
        self.ranks[target] = rank


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
