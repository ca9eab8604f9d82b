"""Protocols of the sources from which blocks are downloaded."""

from collections.abc import Callable, Iterator
from typing import Protocol, Self

from tinkerfs.context import RequestContext
from tinkerfs.weights.etags import Sample


class ByteStream(Protocol):
    """The bytes of a file, in order as they arrive: a `Transfer` or a `GzipTransfer`."""

    @property
    def is_full_body(self) -> bool:
        """Whether the whole file arrives, whatever range was requested."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Yield chunks of bytes."""
        ...

    def __enter__(self) -> Self:
        """Return the stream itself."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Close the connection."""
        ...


class BlockSource(Protocol):
    """A remote file: a `RangeSource` or a `GzipSource`."""

    def prepare(self, ctx: RequestContext) -> None:
        """Get what `open` needs; wait until the archive is built."""
        ...

    def is_ready(self) -> bool:
        """Return whether `open` has what it needs."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether every other version of the file has another ETag."""
        ...

    def use_samples(self, find: Callable[[], Sample | None]) -> None:
        """Set the function that returns a sample of cached bytes; see `RangeSource`."""
        ...

    def report_stale(self, reason: str) -> OSError:
        """Report that the file has changed, and return the error ESTALE."""
        ...

    def open(self, start: int, stop: int, before: bytes = b"") -> ByteStream:
        """Request the bytes [start, stop), which follow the known bytes `before`."""
        ...
