"""Append-only table of checkpoints in little memory.

An account may have a million checkpoints. As objects they take a kilobyte each; a row here takes
about a hundred bytes. A checkpoint is decoded whenever it is read.
"""

from array import array
from collections.abc import Iterator
from math import inf

import msgspec

from tinkerfs.api import models
from tinkerfs.catalog.listings import ListedCheckpoint

#: Number of rows of a block, a power of 2.
_BLOCK_ROWS = 1024
_BLOCK_SHIFT = 10
#: Header of a MessagePack array of `_BLOCK_ROWS` items (its specification, "array 16").
_BLOCK_HEADER = b"\xdc" + _BLOCK_ROWS.to_bytes(2, "big")

#: Maximum number of shapes that rows share; the rows of further ones contain their own. A server
#: may send different JSON each time.
_MAX_SHAPES = 4096

_MIN_SLOTS = 64
_HASH_MASK = 2**32 - 1


class _Shape(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The values that most checkpoints have in common with others."""

    kind: str
    record_kind: str | None
    checkpoint_type: str | None
    is_public: bool
    has_ambiguous_id: bool
    json_template: str


class _Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A checkpoint as it is encoded.

    Attributes:
        shape: a number of the table's shapes, or the shape itself.
        name: the name of the checkpoint and of its record.
        tinker_path: True for the path that results from the key.
    """

    shape: int | _Shape
    run_id: str
    name: str
    time_ns: int | None
    size_bytes: int | None
    expires_at_ns: int | None
    tinker_path: str | bool | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Row).decode
_decode_block = msgspec.msgpack.Decoder(list[_Row]).decode


class CheckpointTable:
    """Checkpoints by position and by key. One thread may add while others read.

    Two tables with equal checkpoints in the same order are equal.
    """

    def __init__(self) -> None:
        self._shapes: list[_Shape] = []
        self._shape_numbers: dict[_Shape, int] = {}
        #: The encoded rows of each full block, and where each row begins and the last one ends.
        self._blocks: list[tuple[bytes, array[int]]] = []
        self._tail: list[bytes] = []
        #: Checkpoints that cannot be encoded, because a text or their JSON has invalid bytes.
        self._unencoded: dict[int, ListedCheckpoint] = {}
        #: An open-addressing hash table of row numbers plus 1, and the hash of each row's key.
        self._slots = array("I", [0]) * _MIN_SLOTS
        self._hashes = array("I")
        self._length = 0  # grows once a row can be found
        self._last_ns: float = inf
        self._is_newest_first = True

    def add(self, checkpoint: ListedCheckpoint) -> bool:
        """Append a checkpoint; return False if the table has one with its key."""
        key_hash = hash(checkpoint.key) & _HASH_MASK
        slot, first = self._find(checkpoint.key, key_hash)
        if first is not None:
            return False
        time_ns = checkpoint.record.time_ns or 0
        self._is_newest_first = self._is_newest_first and time_ns <= self._last_ns
        self._last_ns = time_ns
        number = self._length
        self._tail.append(self._encoded(checkpoint, number))
        self._hashes.append(key_hash)
        if len(self._tail) == _BLOCK_ROWS:
            self._finish_block()
        self._slots[slot] = number + 1
        if 2 * len(self._hashes) > len(self._slots):
            self._grow()
        self._length += 1
        return True

    def get(self, key: tuple[str, str, str]) -> ListedCheckpoint | None:
        """Return the checkpoint with a `ListedCheckpoint.key`, or None."""
        _slot, found = self._find(key, hash(key) & _HASH_MASK)
        return found

    def newest_first(self) -> "CheckpointTable":
        """Return a table of the same checkpoints, the newest first; the same one if it is so."""
        if self._is_newest_first:
            return self
        times_ns = [checkpoint.record.time_ns or 0 for checkpoint in self]
        table = CheckpointTable()
        for number in sorted(range(len(self)), key=times_ns.__getitem__, reverse=True):
            table.add(self[number])
        return table

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> ListedCheckpoint:
        """Return the checkpoint that was added as the given one, from 0."""
        return self._checkpoint(number, self._row(number))

    def __iter__(self) -> Iterator[ListedCheckpoint]:
        number = 0
        for data, _starts in self._blocks:
            for row in _decode_block(_BLOCK_HEADER + data):
                yield self._checkpoint(number, row)
                number += 1
        while number < len(self):
            yield self[number]
            number += 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CheckpointTable):
            return NotImplemented
        return (
            self._blocks == other._blocks
            and self._tail == other._tail
            and self._shapes == other._shapes
            and self._unencoded == other._unencoded
        )

    __hash__ = None  # type: ignore[assignment]

    def _find(
        self, key: tuple[str, str, str], key_hash: int
    ) -> tuple[int, ListedCheckpoint | None]:
        """Return the slot of a key, or where it would be, and the checkpoint with it if any."""
        slots, hashes = self._slots, self._hashes
        mask = len(slots) - 1
        slot = key_hash & mask
        while number := slots[slot]:
            if hashes[number - 1] == key_hash:
                found = self[number - 1]
                if found.key == key:
                    return slot, found
            slot = (slot + 1) & mask
        return slot, None

    def _grow(self) -> None:
        slots = array("I", [0]) * (2 * len(self._slots))
        mask = len(slots) - 1
        for number, key_hash in enumerate(self._hashes, 1):
            slot = key_hash & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = number
        self._slots = slots  # at once, because other threads read it

    def _finish_block(self) -> None:
        starts = array("I", [0])
        for row in self._tail:
            starts.append(starts[-1] + len(row))
        # In this order, because `_row` reads the tail first.
        self._blocks.append((b"".join(self._tail), starts))
        self._tail = []

    def _row(self, number: int) -> _Row:
        tail, block = self._tail, number >> _BLOCK_SHIFT
        if block >= len(self._blocks):
            return _decode(tail[number & (_BLOCK_ROWS - 1)])
        data, starts = self._blocks[block]
        index = number & (_BLOCK_ROWS - 1)
        return _decode(data[starts[index] : starts[index + 1]])

    def _encoded(self, checkpoint: ListedCheckpoint, number: int) -> bytes:
        record = checkpoint.record
        run_id, kind, name = checkpoint.key
        path: str | bool | None = record.tinker_path
        if path == f"tinker://{run_id}/{kind}/{name}":
            path = True
        template = record.json_template
        if isinstance(template, str):
            shape = _Shape(
                kind,
                record.kind,
                record.checkpoint_type,
                record.is_public,
                checkpoint.has_ambiguous_id,
                template,
            )
            row = _Row(
                self._shape_number(shape),
                run_id,
                name,
                record.time_ns,
                record.size_bytes,
                record.expires_at_ns,
                path,
            )
            try:
                return _encode(row)
            except UnicodeEncodeError:
                pass
        self._unencoded[number] = checkpoint
        return _encode(_Row(0, "", "", None, None, None, None))

    def _shape_number(self, shape: _Shape) -> int | _Shape:
        number = self._shape_numbers.get(shape)
        if number is None:
            number = len(self._shapes)
            if number == _MAX_SHAPES:
                return shape
            self._shapes.append(shape)
            self._shape_numbers[shape] = number
        return number

    def _checkpoint(self, number: int, row: _Row) -> ListedCheckpoint:
        if self._unencoded and number in self._unencoded:
            return self._unencoded[number]
        shape, run_id, name, path = row.shape, row.run_id, row.name, row.tinker_path
        if isinstance(shape, int):
            shape = self._shapes[shape]
        kind = shape.kind
        record = models.Checkpoint(
            kind=shape.record_kind,
            name=name,
            checkpoint_type=shape.checkpoint_type,
            time_ns=row.time_ns,
            tinker_path=f"tinker://{run_id}/{kind}/{name}" if isinstance(path, bool) else path,
            size_bytes=row.size_bytes,
            is_public=shape.is_public,
            expires_at_ns=row.expires_at_ns,
            json_template=shape.json_template,
        )
        return ListedCheckpoint(run_id, kind, name, record, shape.has_ambiguous_id)
