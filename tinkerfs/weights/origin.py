"""What blocks are fetched from: a file of a store, or one that is unpacked on the way."""

from collections.abc import Callable, Iterator
from typing import Protocol, Self

from tinkerfs.context import RequestContext
from tinkerfs.weights.etags import Sample


class ByteStream(Protocol):
    """Bytes on their way, in order: `Transfer`, or it unpacked."""

    @property
    def is_full_body(self) -> bool:
        """Whether all of the file comes, whatever was asked for."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Yield them."""
        ...

    def __enter__(self) -> Self:
        """Return the same."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Let go of the connection."""
        ...


class BlockSource(Protocol):
    """Where a file comes from: a `Source`, or it unpacked."""

    def prepare(self, ctx: RequestContext) -> None:
        """Have at hand what `open` needs, as long as it takes."""
        ...

    def is_ready(self) -> bool:
        """Tell whether `open` has what it needs."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether the store's validator tells any other version of the file."""
        ...

    def use_samples(self, find: Callable[[], Sample | None]) -> None:
        """Let cached bytes prove what a validator does not: as `Source.use_samples`."""
        ...

    def stale(self, reason: str) -> OSError:
        """Return the error that the file is another one now."""
        ...

    def open(self, start: int, stop: int, before: bytes = b"") -> ByteStream:
        """Ask for [start, stop), which follows `before`."""
        ...
