"""Make `tensors.json` from the headers of safetensors files (pure).

The format is described at https://huggingface.co/docs/safetensors#format. A file begins with eight
bytes for the length of its header, which is JSON. `tensors.json` has one line per tensor, sorted by
name, so that `diff` shows which tensors of two checkpoints differ.
"""

import json
from math import prod
from typing import Any

import msgspec

#: Size of the length prefix of the header.
LENGTH_BYTES = 8

#: Maximum size of a header, 100 times that of an adapter with 1,000 tensors. The format itself
#: allows 100 MB.
MAX_HEADER_BYTES = 16 << 20

#: Maximum number of dimensions: that of numpy and torch. It bounds the product of a shape.
_MAX_DIMENSIONS = 64

#: Bits per value (safetensors, src/tensor.rs).
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Tensor(msgspec.Struct):
    """A tensor of a header; offsets are relative to the data."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def header_length(prefix: bytes, size_bytes: int) -> int:
    """Return the length of the header, given the length prefix and the file size.

    Raises:
        ValueError: the file is not a safetensors file, or its header is too large.
    """
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if len(prefix) < LENGTH_BYTES or LENGTH_BYTES + length > size_bytes:
        raise ValueError("not a safetensors file: its header would be longer than the file")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header of {length} bytes is too large")
    return length


def tensor_end_offsets(header: bytes, size_bytes: int) -> list[int]:
    """Return the end offsets of the tensors in a file, sorted.

    Raises:
        ValueError: the header is invalid.
    """
    start = LENGTH_BYTES + len(header)
    tensors = parse_tensors("it", header, size_bytes)
    return sorted(start + tensor.data_offsets[1] for tensor in tensors.values())


def parse_tensors(file: str, header: bytes, size_bytes: int) -> dict[str, Tensor]:
    """Return the tensors of a file by name, in the order of the header.

    Args:
        file: name of the file, for messages.
        header: the header without its length prefix.
        size_bytes: size of the file.

    Raises:
        ValueError: the header is invalid.
    """
    data_bytes = size_bytes - LENGTH_BYTES - len(header)
    entries = _entries(file, header)
    entries.pop("__metadata__", None)
    return {name: _tensor(file, name, value, data_bytes) for name, value in entries.items()}


def tensors_json(headers: "dict[str, tuple[bytes, int]]") -> bytes:
    """Return the tensors of some safetensors files as JSON, sorted by name.

    Args:
        headers: by file name, the header without its length prefix, and the file size.

    Raises:
        ValueError: a header is invalid.
    """
    tensors: dict[str, dict[str, object]] = {}
    metadata: dict[str, object] = {}
    for file, (header, size_bytes) in sorted(headers.items()):
        data_bytes = size_bytes - LENGTH_BYTES - len(header)
        for name, value in _entries(file, header).items():
            if name == "__metadata__":
                metadata[file] = value
                continue
            tensor = _tensor(file, name, value, data_bytes)
            begin, end = tensor.data_offsets
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "bytes": end - begin}
            tensors[name] = entry if len(headers) == 1 else {**entry, "file": file}
    lines = [f"    {_json(name)}: {_json(tensors[name])}" for name in sorted(tensors)]
    body = ",\n".join(lines)
    total_bytes = sum(int(str(each["bytes"])) for each in tensors.values())
    head = {"files": sorted(headers), "metadata": metadata, "tensors_count": len(tensors)}
    fields = [f"  {_json(name)}: {_json(value)}" for name, value in head.items()]
    fields.append(f'  "tensors_bytes": {total_bytes}')
    fields.append('  "tensors": {\n' + body + "\n  }" if lines else '  "tensors": {}')
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode("utf-8", "surrogatepass")


def _entries(file: str, header: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(header, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: its header is not a JSON object: {error}") from None


def _tensor(file: str, name: str, value: object, data_bytes: int) -> Tensor:
    try:
        tensor = msgspec.convert(value, Tensor)
    except msgspec.ValidationError as error:
        raise ValueError(f"{file}: tensor {name!r}: {error}") from None
    if len(tensor.shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{file}: tensor {name!r} has {len(tensor.shape)} dimensions")
    begin, end = tensor.data_offsets
    if not 0 <= begin <= end <= data_bytes or min(tensor.shape, default=0) < 0:
        raise ValueError(f"{file}: tensor {name!r} is outside of the file")
    bits = _BITS.get(tensor.dtype)
    if bits is not None and prod(tensor.shape) * bits != (end - begin) * 8:
        raise ValueError(f"{file}: the length of tensor {name!r} does not match its shape")
    return tensor


def _json(value: object) -> str:
    try:
        return msgspec.json.encode(value, order="sorted").decode()
    except UnicodeEncodeError:  # a name of non-UTF-8 bytes, with surrogates as in `os.listdir`
        return json.dumps(value, sort_keys=True)
