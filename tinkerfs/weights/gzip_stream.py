"""Decompress a gzip file of a store, always from its start (no random access)."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.weights.etags import Sample
from tinkerfs.weights.range_source import RangeSource
from tinkerfs.weights.transfer import Transfer

#: The first bytes of a gzip file (RFC 1952, 2.3.1).
GZIP_MAGIC = b"\x1f\x8b"

#: Maximum output of one decompression step: few compressed bytes may expand a thousandfold.
_STEP_BYTES = 1 << 20


def inflated(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress consecutive gzip members.

    Raises:
        ValueError: the data is corrupt or truncated; what was yielded before is invalid too.
    """
    decoder = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        compressed = chunk
        while compressed:
            if decoder.eof:
                if not compressed.strip(b"\0"):  # padding, which gzip(1) accepts as well
                    break
                decoder = zlib.decompressobj(wbits=31)
            try:
                data = decoder.decompress(compressed, _STEP_BYTES)
            except zlib.error as error:
                raise ValueError(f"the archive is damaged: {error}") from None
            compressed = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if data:
                yield data
    if not decoder.eof:
        raise ValueError("the archive is damaged: it ends early")


class GzipSource:
    """A gzip file that is read decompressed and always completely. Thread-safe.

    Args:
        source: the compressed file.
        path: for messages.
    """

    def __init__(
        self, source: RangeSource, compressed_bytes: int, uncompressed_bytes: int, path: str
    ) -> None:
        self._source = source
        self._compressed_bytes = compressed_bytes
        self._uncompressed_bytes = uncompressed_bytes
        self._path = path

    def prepare(self, ctx: RequestContext) -> None:
        """Get a signed URL; see `RangeSource.prepare`."""
        self._source.prepare(ctx)

    def is_ready(self) -> bool:
        """Return whether a signed URL is cached."""
        return self._source.is_ready()

    @property
    def is_exact(self) -> bool:
        """Whether every other version of the file has another ETag."""
        return self._source.is_exact

    def use_samples(self, find: Callable[[], Sample | None]) -> None:
        """Do nothing, because the cached bytes are decompressed and the store's are not."""

    def report_stale(self, reason: str) -> OSError:
        """Report that the file has changed, and return the error ESTALE."""
        return self._source.report_stale(reason)

    def open(self, _start: int, _stop: int, _before: bytes = b"") -> "GzipTransfer":
        """Request the whole file, whatever the range.

        Raises:
            ApiError, OSError: as `RangeSource.open`.
        """
        transfer = self._source.open(0, self._compressed_bytes)
        return GzipTransfer(transfer, self._uncompressed_bytes, self._path)


class GzipTransfer:
    """A gzip file that is being downloaded. Not thread-safe; a context manager.

    Attributes:
        stop: length of the decompressed file.
    """

    is_full_body = True
    start = 0

    def __init__(self, transfer: Transfer, uncompressed_bytes: int, path: str) -> None:
        self.stop = uncompressed_bytes
        self._transfer = transfer
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        """Yield the decompressed bytes.

        Raises:
            ApiError, OSError: as `Transfer`; EIO if the file is corrupt.
        """
        try:
            yield from inflated(self._transfer)
        except ValueError as error:
            raise errors.corrupt(self._path, str(error)) from None

    def close(self) -> None:
        """Close the connection."""
        self._transfer.close()

    def __enter__(self) -> Self:
        """Return the transfer itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the transfer."""
        self.close()
