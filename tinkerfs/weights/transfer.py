"""Bytes of a file of an object store on their way: resumed when they break off, never spliced."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.weights.connections import STORE_ENDPOINT
from tinkerfs.weights.responses import Part, unusable
from tinkerfs.weights.retry import RetryBudget, TransferInterrupted
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

if TYPE_CHECKING:
    from tinkerfs.weights.pools import Response

#: What is asked for again where a transfer is resumed, to see that it is of the same version.
OVERLAP_BYTES = 4096

_WITHOUT_END = 1 << 62


class _Source(Protocol):
    def send(self, start: int, stop: int, patience: RetryBudget) -> "Answer": ...

    def stale(self, reason: str) -> OSError: ...

    def record_sample(self, start: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A usable response, which part of the file it holds, and of which version that is."""

    response: "Response"
    part: Part
    version: Version

    def pieces(self) -> Iterator[bytes]:
        """Yield the body.

        The last piece is yielded when the end of the body was received, and not before.

        Raises:
            Lost: it breaks off, or is longer or shorter than the head says.
        """
        offset, stop = self.part.start, self.part.stop
        pieces = self.response.pieces()
        for piece in pieces:
            offset += len(piece)
            is_last = stop != UNKNOWN_BYTES and offset >= stop
            if is_last and (offset > stop or next(pieces, None) is not None):
                raise unusable(self.response, "it is longer than it says")
            yield piece
        if offset < stop:
            raise TransferInterrupted(
                errors.ConnectionFailed("the store sent too little", endpoint=STORE_ENDPOINT)
            )


class Transfer:
    """Bytes of a file on their way, in order. One thread's; a context manager.

    Args:
        source: asked for the rest when a response breaks off.
        answer: the first response; begins `before` earlier than `start`.
        start: first byte that is wanted.
        stop: after the last byte that is wanted.
        patience: for the tries of this transfer.
        before: what is known to be right before `start`.

    Attributes:
        start: of the first byte that comes.
        stop: after the last one; far beyond the file's end while its length is unknown.
        version: of the file; with its length from the end of the transfer on at the latest.
        is_whole: whether the store heeds no ranges, so that the whole file comes.
    """

    def __init__(
        self,
        source: _Source,
        answer: Answer,
        start: int,
        stop: int,
        patience: RetryBudget,
        before: bytes = b"",
    ) -> None:
        self.version = answer.version
        self.is_full_body = answer.part.is_whole
        size_bytes = self.version.size_bytes
        end = _WITHOUT_END if size_bytes == UNKNOWN_BYTES else size_bytes
        self.start = 0 if self.is_full_body else start
        self.stop = end if self.is_full_body else min(stop, end)
        self._source = source
        self._answer = answer
        self._patience = patience
        # A strong ETag tells versions apart. Without one only the bytes themselves do.
        self._is_held_against = not self.version.is_exact
        self._tail = b"" if self.is_full_body else before
        self._digest = hashlib.sha256() if self.is_full_body and self._is_held_against else None

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes, [start, stop) in all.

        Raises:
            ApiError: they do not come, after all tries.
            OSError: ESTALE when the file is another one now, or gone.
        """
        at = self.start
        while at < self.stop:
            try:
                for piece in self._pieces(at):
                    fresh = piece[: self.stop - at]
                    if at == self.start:
                        self._source.record_sample(at, fresh)
                    at += len(fresh)
                    self._record(fresh)
                    self._patience.record_progress(len(fresh))
                    yield fresh
                    # A response is read to its end: only then does its connection serve again.
                    if at == self.stop < self._answer.part.stop:
                        break
                if self.stop == _WITHOUT_END:
                    self.stop = at
                    self.version = replace(self.version, size_bytes=at)
            except TransferInterrupted as lost:
                if at < self.stop:
                    self._patience.backoff_or_raise(lost)
            finally:
                self._answer.response.close()
            if at < self.stop:
                start = at - len(self._tail)
                self._answer = self._source.send(start, self.stop, self._patience)

    def _pieces(self, at: int) -> Iterator[bytes]:
        """Yield what the response brings from `at` on.

        Raises:
            Lost: as `Answer.pieces`.
            OSError: ESTALE: what it brings before that is not what came before.
        """
        offset = self._answer.part.start
        # Of a file that comes whole again all is compared, else the tail of what came before.
        digest = self._digest if offset == 0 else None
        again, tail = hashlib.sha256(), b""
        for received in self._answer.pieces():
            old = received[: max(at - offset, 0)]
            offset += len(received)
            if old and self._is_held_against:
                tail = (tail + old[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]
                if digest is not None:
                    again.update(old)
                if offset >= at and not (
                    tail.endswith(self._tail)
                    and (digest is None or digest.digest() == again.digest())
                ):
                    raise self._source.stale("the store has another version of it now")
            if len(received) > len(old):
                yield received[len(old) :]

    def _record(self, piece: bytes) -> None:
        if self._is_held_against:
            self._tail = (self._tail + piece[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]
        if self._digest is not None:
            self._digest.update(piece)

    def close(self) -> None:
        """Let go of the connection."""
        self._answer.response.close()

    def __enter__(self) -> Self:
        """Return the transfer itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of the connection."""
        self.close()
