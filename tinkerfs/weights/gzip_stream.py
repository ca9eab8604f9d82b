"""Gzip, unpacked on the way: what is packed has no random access, so all of it comes."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.weights.etags import Sample
from tinkerfs.weights.range_source import RangeSource
from tinkerfs.weights.transfer import Transfer

#: How a gzip file begins (RFC 1952, 2.3.1).
GZIP_MAGIC = b"\x1f\x8b"

#: At most so much is unpacked at a time, bytes: a few packed ones can be a thousand times as many.
_STEP_BYTES = 1 << 20


def inflated(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what gzip members, one after another, unpack to.

    Raises:
        ValueError: they are damaged, end early, or do not have their checksum; what came before
            is not to be trusted either.
    """
    decoder = zlib.decompressobj(wbits=31)
    for piece in pieces:
        packed = piece
        while packed:
            if decoder.eof:
                if not packed.strip(b"\0"):  # padding, which gzip(1) takes as well
                    break
                decoder = zlib.decompressobj(wbits=31)
            try:
                plain = decoder.decompress(packed, _STEP_BYTES)
            except zlib.error as error:
                raise ValueError(f"the archive is damaged: {error}") from None
            packed = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if plain:
                yield plain
    if not decoder.eof:
        raise ValueError("the archive is damaged: it ends early")


class GzipSource:
    """A packed file as if it were plain: always all of it, from its start. Thread-safe.

    Args:
        source: the packed file.
        packed_bytes: its length.
        plain_bytes: what it unpacks to.
        path: for messages.
    """

    def __init__(self, source: RangeSource, packed_bytes: int, plain_bytes: int, path: str) -> None:
        self._source = source
        self._packed_bytes = packed_bytes
        self._plain_bytes = plain_bytes
        self._path = path

    def prepare(self, ctx: RequestContext) -> None:
        """Have a URL at hand; as `Source.prepare`."""
        self._source.prepare(ctx)

    def is_ready(self) -> bool:
        """Tell whether there is a URL at hand."""
        return self._source.is_ready()

    @property
    def is_exact(self) -> bool:
        """As `Source.is_exact`."""
        return self._source.is_exact

    def use_samples(self, find: Callable[[], Sample | None]) -> None:
        """Do nothing: what is cached is not what the store has."""

    def stale(self, reason: str) -> OSError:
        """As `Source.stale`."""
        return self._source.stale(reason)

    def open(self, _start: int, _stop: int, _before: bytes = b"") -> "GzipTransfer":
        """Ask for all of it.

        Raises:
            ApiError, OSError: as `Source.open`.
        """
        transfer = self._source.open(0, self._packed_bytes)
        return GzipTransfer(transfer, self._plain_bytes, self._path)


class GzipTransfer:
    """A packed file on its way. One thread's; a context manager.

    Attributes:
        start: 0.
        stop: what it unpacks to.
        is_whole: True.
    """

    is_full_body = True
    start = 0

    def __init__(self, transfer: Transfer, plain_bytes: int, path: str) -> None:
        self.stop = plain_bytes
        self._transfer = transfer
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        """Yield it unpacked.

        Raises:
            ApiError, OSError: as `Transfer`; EIO for what is damaged.
        """
        try:
            yield from inflated(self._transfer)
        except ValueError as error:
            raise errors.corrupt(self._path, str(error)) from None

    def close(self) -> None:
        """Let go of the connection."""
        self._transfer.close()

    def __enter__(self) -> Self:
        """Return the transfer itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of the connection."""
        self.close()
