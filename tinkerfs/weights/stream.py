"""How much is read from a connection at a time: more than httpcore does by itself.

httpx has no setting for it, but tells the connection of each answer (its extension
`network_stream`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["READ_BYTES", "read_more_at_once"]

#: httpcore reads 64 KiB, and each piece goes through h11, httpx and the interpreter's one lock.
READ_BYTES = 256 << 10


def read_more_at_once(stream: Any) -> None:
    """Have a connection read up to `READ_BYTES` at a time from here on.

    Args:
        stream: httpcore's, as an answer tells it; one that was seen before stays as it is, and None
            is none.
    """
    if stream is not None and not isinstance(stream.read, partial):
        stream.read = partial(_read, stream.read)


def _read(read: Callable[..., bytes], max_bytes: int, timeout: float | None = None) -> bytes:
    return read(max(max_bytes, READ_BYTES), timeout=timeout)
