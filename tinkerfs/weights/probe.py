"""Questions to an object store that take one request each."""

from tinkerfs import errors
from tinkerfs.weights.connections import STORE_ENDPOINT, ObjectStoreClient
from tinkerfs.weights.range_source import RangeSource, UrlProvider
from tinkerfs.weights.retry import RetryBudget, TransferInterrupted
from tinkerfs.weights.version import UNKNOWN_BYTES, Version


def _read_version(client: ObjectStoreClient, address: UrlProvider) -> Version:
    """Return which version of a file the store has.

    Raises:
        ApiError: the request fails.
    """
    with RangeSource(client, address, None).open(0, 1) as transfer:
        if transfer.version.size_bytes == UNKNOWN_BYTES:
            for _ in transfer:  # its end shows its length
                pass
        return transfer.version


def read_archive_version(client: ObjectStoreClient, address: UrlProvider) -> Version:
    """Return which version of an archive the store has, waiting while it is empty.

    Raises:
        ApiError: the request fails, or the archive stays empty.
    """
    patience = RetryBudget(client.timeout_s)
    while not (version := _read_version(client, address)).size_bytes:
        patience.backoff_or_raise(empty_archive())
    return version


def empty_archive() -> TransferInterrupted:
    """Return the failure that an archive is an empty file, which no archive is."""
    words = "the store has an empty file in place of the archive, which may not be written yet"
    return TransferInterrupted(errors.ServerError(words, endpoint=STORE_ENDPOINT))


def has_version(client: ObjectStoreClient, address: UrlProvider, version: Version) -> bool:
    """Return whether the store has a version of a file, as far as its validators tell.

    Raises:
        ApiError: the request fails.
    """
    now = _read_version(client, address)
    return _comparable(now) == _comparable(version)


def _comparable(version: Version) -> tuple[int, str, str]:
    # Some stores and proxies mark the ETag of the same bytes as weak now and then.
    return version.size_bytes, version.etag.removeprefix("W/"), version.last_modified


def read_range(source: RangeSource, start: int, stop: int) -> bytes | None:
    """Return the bytes [start, stop) of a file, None where the store ignores ranges.

    Raises:
        ApiError: the request fails.
        OSError: ESTALE where the store has another version.
    """
    with source.open(start, stop) as transfer:
        return None if transfer.is_full_body else b"".join(transfer)
