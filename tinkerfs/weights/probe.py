"""Questions to an object store that take one request each."""

from tinkerfs import errors
from tinkerfs.weights.connections import LABEL, StoreClient
from tinkerfs.weights.range_source import Address, Source
from tinkerfs.weights.retry import Lost, Patience
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

__all__ = ["empty_archive", "has_version", "read_archive_version", "read_range"]


def _read_version(client: StoreClient, address: Address) -> Version:
    """Return which version of a file the store has.

    Raises:
        ApiError: the request fails.
    """
    with Source(client, address, None).open(0, 1) as transfer:
        if transfer.version.size_bytes == UNKNOWN_BYTES:
            for _ in transfer:  # its end shows its length
                pass
        return transfer.version


def read_archive_version(client: StoreClient, address: Address) -> Version:
    """Return which version of an archive the store has, waiting while it is empty.

    Raises:
        ApiError: the request fails, or the archive stays empty.
    """
    patience = Patience(client.timeout_s)
    while not (version := _read_version(client, address)).size_bytes:
        patience.lost(empty_archive())
    return version


def empty_archive() -> Lost:
    """Return the failure that an archive is an empty file, which no archive is."""
    words = "the store has an empty file in place of the archive, which may not be written yet"
    return Lost(errors.ServerError(words, endpoint=LABEL))


def has_version(client: StoreClient, address: Address, version: Version) -> bool:
    """Return whether the store has a version of a file, as far as its validators tell.

    Raises:
        ApiError: the request fails.
    """
    now = _read_version(client, address)
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
