"""Small requests to an object store: the version of a file, and a range of it."""

from tinkerfs import errors
from tinkerfs.weights.range_source import Connect, RangeSource
from tinkerfs.weights.transfer_monitor import STORE_ENDPOINT, TransferInterrupted
from tinkerfs.weights.url_cache import UrlProvider
from tinkerfs.weights.version import UNKNOWN_BYTES, Version


def read_version(connect: Connect, url_provider: UrlProvider) -> Version:
    """Return the current version of a file.

    Raises:
        ApiError: the request fails.
    """
    with RangeSource(connect, url_provider, None).open(0, 1) as transfer:
        if transfer.version.size_bytes == UNKNOWN_BYTES:
            for _ in transfer:  # to the end, which reveals the length
                pass
        return transfer.version


def read_archive_version(connect: Connect, url_provider: UrlProvider) -> Version:
    """Return the current version of an archive; wait while it is empty.

    Raises:
        ApiError: the request fails, or the archive stays empty.
    """
    retry_budget = connect().monitor.retry_budget()
    while not (version := read_version(connect, url_provider)).size_bytes:
        empty_archive().wait_or_raise(retry_budget)
    return version


def empty_archive() -> TransferInterrupted:
    """Return the error of an empty archive, which the server may still be writing."""
    message = "the store has an empty file in place of the archive, which may not be written yet"
    return TransferInterrupted(errors.ServerError(message, endpoint=STORE_ENDPOINT))


def has_version(connect: Connect, url_provider: UrlProvider, version: Version) -> bool:
    """Return whether the store has a version, according to its validators.

    Raises:
        ApiError: the request fails.
    """
    now = read_version(connect, url_provider)
    return _comparable(now) == _comparable(version)


def _comparable(version: Version) -> tuple[int, str, str]:
    # Some stores and proxies mark the ETag of the same bytes as weak from time to time.
    return version.size_bytes, version.etag.removeprefix("W/"), version.last_modified


def read_range(source: RangeSource, start: int, stop: int) -> bytes | None:
    """Return the bytes [start, stop) of a file, None if the store ignores ranges.

    Raises:
        ApiError: the request fails.
        OSError: ESTALE if the store has another version.
    """
    with source.open(start, stop) as transfer:
        return None if transfer.is_full_body else b"".join(transfer)
