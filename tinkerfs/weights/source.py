"""Bytes of one file of an object store, by signed URL: asked for in ranges, checked, resumed.

Closed ranges are asked for (shared caches split open ones badly), without the API's key. Whatever
comes is held against what was asked and what is known of the file, so an answer that lies is an
error and never bytes; what breaks off is taken up where it broke. No URL, and no redirect's target,
is in any message: they are secrets.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self
from urllib.parse import urljoin, urlsplit

import msgspec

from tinkerfs import errors
from tinkerfs.api.models import SignedUrl
from tinkerfs.api.times import parse_retry_after_s
from tinkerfs.call import IN_PROCESS, Call
from tinkerfs.errors import ApiError
from tinkerfs.weights.connections import LABEL, StoreClient
from tinkerfs.weights.patience import Lost, Patience

if TYPE_CHECKING:
    from tinkerfs.weights.pools import Response

__all__ = ["Address", "Source", "Transfer", "Version"]

MAX_REDIRECTS = 5

#: A store's ways to say that a URL has expired: S3 403 and 400, others 401; 404 and 410 as well
#: where an archive was built anew elsewhere.
_REFUSALS = frozenset({400, 401, 403, 404, 410})
_RETRIED = frozenset({408, 425, 429})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})", re.IGNORECASE)


class Version(msgspec.Struct, frozen=True):
    """What tells one content of a file from another: its length, and the store's word."""

    size_bytes: int
    etag: str = ""
    last_modified: str = ""

    @property
    def validator(self) -> str:
        """What `If-Range` takes (RFC 9110, 13.1.5): a strong ETag, else a date; empty for none."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class Address(Protocol):
    """Where a file is."""

    @property
    def path(self) -> str:
        """The file that a user asked for, for messages."""
        ...

    def url(self, call: Call) -> SignedUrl:
        """Return a URL that is good for some time yet."""
        ...

    def is_known(self) -> bool:
        """Tell whether `url` has one at hand."""
        ...

    def changed(self) -> None:
        """Take note that the store has another file there than was known."""
        ...

    def refuse(self, url: SignedUrl) -> None:
        """Take note that the store lets nobody in with this URL."""
        ...


class Source:
    """One file of a store. Thread-safe.

    Args:
        client: the connections.
        address: where the file is.
        version: what it must be; None before that is known.
    """

    def __init__(self, client: StoreClient, address: Address, version: Version | None) -> None:
        self._client = client
        self._address = address
        self._version = version

    def open(self, start: int, stop: int) -> "Transfer":
        """Ask for the bytes [start, stop), and return them as they come.

        A store that heeds no ranges sends the whole file instead: see `Transfer.is_whole`.

        Args:
            start: where to begin.
            stop: more than `start`; beyond the file's end only where no version is known.

        Raises:
            ApiError: there is no usable answer, after all tries.
            OSError: ESTALE when the file is another one now, or gone.
        """
        patience = Patience(self._client.timeout_s)
        answer = self.begin(start, stop, patience)
        return Transfer(self, answer, start, stop, patience)

    def prepare(self, call: Call) -> None:
        """Have a URL at hand, so that a fetch on another thread need not wait for the archive.

        Args:
            call: who wants it, and how long that one waits.

        Raises:
            ApiError: none is to be had.
            OSError: ESTALE when the file is gone; as `Archives.url`.
        """
        self._url(call)

    def is_ready(self) -> bool:
        """Tell whether there is a URL at hand."""
        return self._address.is_known()

    def begin(self, start: int, stop: int, patience: Patience) -> "_Answer":
        """Ask until there is an answer that holds `start`; for `Transfer`.

        Raises:
            ApiError, OSError: as `open`.
        """
        refused: ApiError | None = None
        while True:
            url = self._url(IN_PROCESS)
            try:
                return self._ask(url, start, stop)
            except _Refused as refusal:
                if refused is not None:
                    raise refused from None
                refused = refusal.error
                self._address.refuse(url)
            except Lost as lost:
                patience.lost(lost)

    def _url(self, call: Call) -> SignedUrl:
        try:
            return self._address.url(call)
        except (errors.NotFound, errors.EndpointMissing) as error:
            if self._version is None:
                raise
            raise self._stale(f"it is gone: {error}") from error

    def _ask(self, signed: SignedUrl, start: int, stop: int) -> "_Answer":
        """Send one request, and follow its redirects.

        Raises:
            _Refused: the URL is no good.
            Lost: there is no usable answer; another try may have one.
            ApiError: nor would another.
            OSError: ESTALE.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if self._version is not None and self._version.validator:
            headers["If-Range"] = self._version.validator
        url = signed.url
        for _ in range(MAX_REDIRECTS):
            response = self._client.get(url, headers)
            if response.status not in _REDIRECTS:
                try:
                    return self._checked(response, start, stop)
                except BaseException:
                    response.close()
                    raise
            response.close()
            url = _redirected(url, response.headers.get("location", ""))
        raise errors.ProtocolError(f"{_host(url)} redirects on and on", endpoint=LABEL)

    def _checked(self, response: "Response", start: int, stop: int) -> "_Answer":
        status, host = response.status, response.host
        if status in (200, 206):
            return self._held_against(response, start, stop)
        if status == 416:
            return self._empty(response, start)
        words = f"{host} answered {status}"
        if status in _REFUSALS:
            kind: type[ApiError] = errors.Rejected
            if status in (401, 403):
                kind = errors.Unauthorized
            raise _Refused(kind(words, endpoint=LABEL, status=status))
        if status in _RETRIED or status >= 500:
            kind = errors.RateLimited if status == 429 else errors.ServerError
            wait_s = parse_retry_after_s(response.headers, time.time())
            raise Lost(kind(words, endpoint=LABEL, status=status), wait_s=wait_s)
        raise errors.Rejected(words, endpoint=LABEL, status=status)

    def _held_against(self, response: "Response", start: int, stop: int) -> "_Answer":
        """Return an answer that is about the file that is meant, and holds `start`."""
        headers = response.headers
        if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise self._lies(response, "it is coded, which was not asked for")
        length = headers.get("content-length", "")
        if response.status == 206:
            found = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
            if found is None:
                raise self._lies(response, "it does not say which part of the file it is")
            begin, end = int(found[1]), int(found[2]) + 1
            total = None if found[3] == "*" else int(found[3])
            if begin != start or not start < end <= stop or (length and length != str(end - begin)):
                raise self._lies(response, f"it is another part than {start} to {stop}")
        elif length.isdecimal():
            begin, end, total = 0, int(length), int(length)
        else:
            raise self._lies(response, "it does not say how long the file is")
        version = self._same(response, total)
        if end > version.size_bytes or start > version.size_bytes:
            raise self._lies(response, "it is longer than the file")
        return _Answer(response, begin, end, version)

    def _same(self, response: "Response", size_bytes: int | None) -> Version:
        """Return the version that an answer is of.

        Raises:
            OSError: ESTALE: not the one that is meant.
            Lost: that cannot be told.
        """
        etag = response.headers.get("etag", "")
        modified = response.headers.get("last-modified", "")
        known = self._version
        if known is None:
            if size_bytes is None:
                raise self._lies(response, "it does not say how long the file is")
            return Version(size_bytes, etag, modified)
        told, expected = (etag, known.etag) if known.etag else (modified, known.last_modified)
        is_other_size = size_bytes not in (None, known.size_bytes)
        if expected and not told:
            raise self._lies(response, "it does not say which version of the file it is")
        if told != expected or (is_other_size and not expected):
            raise self._stale("the store has another version of it now")
        if is_other_size:
            raise self._lies(response, "it is of another length than the file")
        return known

    def _empty(self, response: "Response", start: int) -> "_Answer":
        """Return what 416 means where it is the truth: an empty file, asked about."""
        found = _UNSATISFIED.fullmatch(response.headers.get("content-range", "").strip())
        size_bytes = None if found is None else int(found[1])
        if self._version is None and size_bytes == 0 and start == 0:
            etag = response.headers.get("etag", "")
            version = Version(0, etag, response.headers.get("last-modified", ""))
            return _Answer(response, 0, 0, version)
        if self._version is not None and size_bytes not in (None, self._version.size_bytes):
            raise self._stale("the store has another version of it now")
        raise self._lies(response, "it has no such part, it says")

    def _stale(self, words: str) -> OSError:
        self._address.changed()
        return errors.stale(self._address.path, words)

    def _lies(self, response: "Response", words: str) -> "Lost":
        message = f"the answer of {response.host} cannot be used: {words}"
        return Lost(errors.ProtocolError(message, endpoint=LABEL, status=response.status))


class Transfer:
    """Bytes of a file on their way, in order. One thread's; a context manager.

    Attributes:
        start: of the first byte that comes.
        stop: after the last one.
        version: of the file.
        is_whole: whether the store heeds no ranges, so that the whole file comes.
    """

    def __init__(
        self, source: Source, answer: "_Answer", start: int, stop: int, patience: Patience
    ) -> None:
        self.version = answer.version
        self.is_whole = answer.response.status == 200
        self.start = 0 if self.is_whole else start
        self.stop = (
            answer.version.size_bytes if self.is_whole else min(stop, self.version.size_bytes)
        )
        self._source = source
        self._answer = answer
        self._patience = patience

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes, [start, stop) in all.

        Raises:
            ApiError: they do not come, after all tries.
            OSError: ESTALE when the file is another one now, or gone.
        """
        at = self.start
        while at < self.stop:
            place = self._answer.start
            try:
                for piece in self._answer.response.pieces():
                    place += len(piece)
                    if place <= at:
                        continue  # the whole file came instead of the rest
                    fresh = piece[at - place :][: self.stop - at]
                    at += len(fresh)
                    self._patience.gained(len(fresh))
                    yield fresh
                    # An answer is read to its end: only then does its connection serve again.
                    if at == self.stop < self._answer.stop:
                        break
            except Lost as lost:
                if at < self.stop:
                    self._patience.lost(lost)
            else:
                if at < self.stop:  # a part of what was asked, or chunks that end early
                    short = errors.Unreachable("the store sent too little", endpoint=LABEL)
                    self._patience.lost(Lost(short))
            finally:
                self._answer.response.close()
            if at < self.stop:
                self._answer = self._source.begin(at, self.stop, self._patience)

    def close(self) -> None:
        """Let go of the connection."""
        self._answer.response.close()

    def __enter__(self) -> Self:
        """Return the transfer itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of the connection."""
        self.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    """A usable answer: the bytes [start, stop) of a version."""

    response: "Response"
    start: int
    stop: int
    version: Version


class _Refused(Exception):
    """The store does not take the URL (any more)."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


def _redirected(url: str, place: str) -> str:
    """Return where a redirect leads.

    Raises:
        ProtocolError: nowhere, or where bytes would be less safe.
    """
    try:
        target = urljoin(url, place)
        parts = urlsplit(target)
        is_worse = urlsplit(url).scheme == "https" and parts.scheme != "https"
        if place and parts.scheme in ("http", "https") and parts.hostname and not is_worse:
            return target
    except ValueError:
        pass
    raise errors.ProtocolError(
        f"{_host(url)} redirects to where nothing is read from", endpoint=LABEL
    )


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the store"
