"""Questions to an object store that take one request each."""

from tinkerfs.weights.connections import StoreClient
from tinkerfs.weights.source import Address, Source
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

__all__ = ["has_version", "read_range", "read_version"]


def read_version(client: StoreClient, address: Address) -> Version:
    """Return which version of a file the store has.

    Raises:
        ApiError: the request fails.
    """
    with Source(client, address, None).open(0, 1) as transfer:
        if transfer.version.size_bytes == UNKNOWN_BYTES:
            for _ in transfer:  # its end shows its length
                pass
        return transfer.version


def has_version(client: StoreClient, address: Address, version: Version) -> bool:
    """Return whether the store has a version of a file, as far as its validators tell.

    Raises:
        ApiError: the request fails.
    """
    now = read_version(client, address)
    return _comparable(now) == _comparable(version)


def _comparable(version: Version) -> tuple[int, str, str]:
    # Some stores and proxies mark the ETag of the same bytes as weak now and then.
    return version.size_bytes, version.etag.removeprefix("W/"), version.last_modified


def read_range(source: Source, start: int, stop: int) -> bytes | None:
    """Return the bytes [start, stop) of a file, None where the store ignores ranges.

    Raises:
        ApiError: the request fails.
        OSError: ESTALE where the store has another version.
    """
    with source.open(start, stop) as transfer:
        return None if transfer.is_whole else b"".join(transfer)
