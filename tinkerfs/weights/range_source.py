"""Bytes of one file of an object store, by signed URL: asked for in ranges, checked, resumed.

Closed ranges are asked for (shared caches split open ones badly), without the API's key. Each
response is held against the request and against what is known of the file, so a response that lies
is an error and never bytes. No URL, and no redirect's target, is in any message: they are secrets.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urljoin, urlsplit

from tinkerfs import errors
from tinkerfs.api.models import SignedUrl
from tinkerfs.api.timestamps import parse_retry_after_s
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.errors import ApiError
from tinkerfs.weights.connections import STORE_ENDPOINT, ObjectStoreClient
from tinkerfs.weights.etags import SAMPLE_BYTES, EtagAliases, Sample, sample_of
from tinkerfs.weights.responses import Part, part_of, size_of_unsatisfied, unusable
from tinkerfs.weights.retry import RetryBudget, TransferInterrupted
from tinkerfs.weights.transfer import Answer, Transfer
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

if TYPE_CHECKING:
    from tinkerfs.weights.pools import Response

MAX_REDIRECTS = 5

#: How often the servers of a store are asked for a sample until the one responds that is meant.
MAX_PROBES = 6

#: A store's ways to say that a URL has expired: S3 403 and 400, others 401; 404 and 410 as well
#: where an archive was built anew elsewhere.
_REFUSALS = frozenset({400, 401, 403, 404, 410})
_RETRIED = frozenset({408, 425, 429})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class UrlProvider(Protocol):
    """Where a file is."""

    @property
    def path(self) -> str:
        """The file that a user asked for, for messages."""
        ...

    def url(self, ctx: RequestContext) -> SignedUrl:
        """Return a URL that is good for some time yet."""
        ...

    def is_known(self) -> bool:
        """Tell whether `url` has one at hand."""
        ...

    def mark_changed(self) -> None:
        """Take note that the store has another file there than was known."""
        ...

    def invalidate(self, url: SignedUrl) -> None:
        """Take note that the store lets nobody in with this URL."""
        ...


class RangeSource:
    """One file of a store. Thread-safe.

    Args:
        client: the connections.
        address: where the file is.
        version: what it must be; None before that is known.
        sample: of its bytes; None for none.
        is_plain: nothing was derived from its content yet, such as where its members are.
    """

    def __init__(
        self,
        client: ObjectStoreClient,
        address: UrlProvider,
        version: Version | None,
        sample: Sample | None = None,
        *,
        is_plain: bool = False,
    ) -> None:
        self._client = client
        self._address = address
        self._version = version
        self._is_plain = is_plain
        self._etags = EtagAliases("" if version is None else version.etag, sample)
        self._find_sample: Callable[[], Sample | None] = lambda: None

    @property
    def is_exact(self) -> bool:
        """Whether any other version of the file is told by its ETag."""
        return self._version is not None and self._version.is_exact

    def use_samples(self, find: Callable[[], Sample | None]) -> None:
        """Let bytes that were cached of this version prove that another ETag names the same.

        Args:
            find: returns some of them, None for none.
        """
        self._find_sample = find

    def record_sample(self, start: int, data: bytes) -> None:
        """Remember bytes that were received, for the same use."""
        if self._etags.sample is None:
            self._etags.sample = sample_of(start, data)

    def open(self, start: int, stop: int, before: bytes = b"") -> Transfer:
        """Ask for the bytes [start, stop), and return them as they come.

        A store that heeds no ranges sends the whole file instead: see `Transfer.is_whole`.

        Args:
            start: where to begin.
            stop: more than `start`; beyond the file's end only where no version is known.
            before: what is known to be right before `start`, asked for again to see that it is
                still so; empty for nothing.

        Raises:
            ApiError: there is no usable answer, after all tries.
            OSError: ESTALE when the file is another one now, or gone.
        """
        patience = RetryBudget(self._client.timeout_s)
        answer = self.send(start - len(before), stop, patience)
        return Transfer(self, answer, start, stop, patience, before)

    def prepare(self, ctx: RequestContext) -> None:
        """Have a URL at hand, so that a fetch on another thread need not wait for the archive.

        Args:
            ctx: who wants it, and how long that one waits.

        Raises:
            ApiError: none is to be had.
            OSError: ESTALE when the file is gone; as `Archives.url`.
        """
        self._url(ctx)

    def is_ready(self) -> bool:
        """Tell whether there is a URL at hand."""
        return self._address.is_known()

    def send(self, start: int, stop: int, patience: RetryBudget) -> Answer:
        """Ask until there is an answer that holds `start`; for `Transfer`.

        Raises:
            ApiError, OSError: as `open`.
        """
        refused: ApiError | None = None
        while True:
            url = self._url(BACKGROUND_CONTEXT)
            try:
                answer = self._ask(url, start, stop)
            except _UrlRejected as refusal:
                self._address.invalidate(url)
                if refused is not None:
                    raise refused from None
                refused = refusal.error
            except _WithoutCondition:
                pass
            except TransferInterrupted as lost:
                patience.backoff_or_raise(lost)
            else:
                if self._version is None:
                    # What resumes this transfer is of the same version.
                    self._version = answer.version
                    self._etags = EtagAliases(answer.version.etag)
                self._etags.mark_in_use()
                return answer

    def stale(self, reason: str) -> OSError:
        """Return the error that the file is another one now; what is known of it is dropped."""
        self._address.mark_changed()
        return errors.stale(self._address.path, reason)

    def _url(self, ctx: RequestContext) -> SignedUrl:
        try:
            return self._address.url(ctx)
        except (errors.NotFound, errors.UnsupportedEndpoint) as error:
            if self._version is None:
                raise
            raise self.stale(f"it is gone: {error}") from error

    def _ask(self, signed: SignedUrl, start: int, stop: int) -> Answer:
        """Send one request.

        Raises:
            _Refused: the URL is no good.
            _WithoutCondition: it is to be sent again, without `If-Range`.
            Lost: there is no usable answer; another try may have one.
            ApiError: nor would another.
            OSError: ESTALE.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        is_mixed = self._etags.is_mixed
        if self._version is not None and self._version.validator and not is_mixed:
            headers["If-Range"] = self._version.validator
        response = self._get(signed.url, headers)
        try:
            answer = self._checked(response, start, stop)
        except BaseException:
            response.close()
            raise
        if answer.part.is_whole and self._etags.is_mixed and not is_mixed:
            response.close()
            raise _WithoutCondition  # it is whole because another server's ETag was named
        return answer

    def _get(self, url: str, headers: dict[str, str]) -> "Response":
        """Send a request, and follow its redirects within the time of one.

        Raises:
            Lost, ApiError: as `_ask`.
        """
        began = time.monotonic()
        for _ in range(MAX_REDIRECTS):
            response = self._client.get(url, headers)
            if response.status not in _REDIRECTS:
                return response
            response.close()
            if time.monotonic() - began > self._client.timeout_s:
                raise self._client.stall_error(_host(url))
            url = _redirected(url, response.headers.get("location", ""))
        raise errors.ProtocolError(f"{_host(url)} redirects on and on", endpoint=STORE_ENDPOINT)

    def _checked(self, response: "Response", start: int, stop: int) -> Answer:
        """Return what a response is, as far as its head tells.

        Raises:
            _Refused, Lost, ApiError, OSError: as `_ask`.
        """
        status, host = response.status, response.host
        if status == 200 and "html" in response.headers.get("content-type", "").lower():
            words = f"{host} sent a page of HTML, as a captive portal does"
            raise _UrlRejected(errors.ProtocolError(words, endpoint=STORE_ENDPOINT, status=status))
        if status in (200, 206):
            size_bytes = None if self._version is None else self._version.size_bytes
            if size_bytes == UNKNOWN_BYTES:
                size_bytes = None
            part = part_of(response, start, stop, size_bytes)
            version = self._same(response, part)
            if size_bytes is not None and max(part.stop, start) > size_bytes:
                raise unusable(response, "it is longer than the file")
            return Answer(response, part, version)
        if status == 416:
            return self._empty(response, start)
        words = f"{host} answered {status}"
        if status in _REFUSALS:
            kind: type[ApiError] = errors.ClientError
            if status in (401, 403):
                kind = errors.Unauthorized
            raise _UrlRejected(kind(words, endpoint=STORE_ENDPOINT, status=status))
        if status in _RETRIED or status >= 500:
            kind = errors.RateLimited if status == 429 else errors.ServerError
            wait_s = parse_retry_after_s(response.headers, time.time())
            raise TransferInterrupted(
                kind(words, endpoint=STORE_ENDPOINT, status=status), wait_s=wait_s
            )
        raise errors.ClientError(words, endpoint=STORE_ENDPOINT, status=status)

    def _same(self, response: "Response", part: Part) -> Version:
        """Return the version that a response is of.

        Raises:
            OSError: ESTALE: not the one that is meant.
            Lost: that cannot be told.
        """
        etag = response.headers.get("etag", "").strip()
        modified = response.headers.get("last-modified", "").strip()
        known = self._version
        if known is None:
            if part.total_bytes is not None:
                return Version(part.total_bytes, etag, modified)
            if not part.is_whole:
                raise unusable(response, "it does not say how long the file is")
            return Version(UNKNOWN_BYTES, etag, modified, has_length=False)
        # An ETag that appears where there was none is another version's too.
        given, expected = etag, known.etag
        if not given and not expected:
            given, expected = modified, known.last_modified
        if expected and not given:
            raise unusable(response, "it does not say which version of the file it is")
        is_other_size = known.has_length and part.total_bytes not in (None, known.size_bytes)
        is_same = given == expected
        if known.etag and not is_same:
            is_same = not is_other_size and self._is_alias(response, etag, modified)
        if not is_same or (is_other_size and not expected):
            raise self.stale("the store has another version of it now")
        if is_other_size:
            raise unusable(response, "it is of another length than the file")
        return known

    def _is_alias(self, response: "Response", etag: str, modified: str) -> bool:
        """Return whether another ETag names the bytes that are meant.

        Raises:
            Lost: that cannot be told yet, or not now.
        """
        known = self._version
        if self._etags.has(etag):
            return True
        if known is None or modified != known.last_modified or known.size_bytes == UNKNOWN_BYTES:
            return False
        sample = self._etags.sample or self._find_sample()
        if sample is not None:
            return self._has_sample(etag, sample)
        if self._etags.is_in_use:  # there is a sample as soon as the first bytes are received
            raise unusable(response, "its ETag is another one")
        # Nothing is known of the bytes, so nothing can be spliced; the date speaks for them.
        return bool(modified) and self._is_plain and self._etags.take_first(etag)

    def _has_sample(self, etag: str, sample: Sample) -> bool:
        """Return whether a server that names an ETag has the bytes that are known.

        Raises:
            Lost, ApiError: as `_ask`.
        """
        start, stop = sample.start, sample.start + SAMPLE_BYTES
        size_bytes = None if self._version is None else self._version.size_bytes
        url = self._url(BACKGROUND_CONTEXT).url
        for _ in range(MAX_PROBES):
            response = self._get(url, {"Range": f"bytes={start}-{stop - 1}"})
            try:
                if response.status != 206:
                    return False
                part = part_of(response, start, stop, size_bytes)
                if not sample.is_of(b"".join(Answer(response, part, Version(0)).pieces())):
                    return False
            finally:
                response.close()
            # A response without an ETag speaks for no server.
            found = response.headers.get("etag", "").strip()
            if found:
                self._etags.add(found)
            if self._etags.has(etag):
                return True
        return False

    def _empty(self, response: "Response", start: int) -> Answer:
        """Return what 416 means where it is the truth: an empty file, asked about."""
        size_bytes = size_of_unsatisfied(response)
        if self._version is None and size_bytes == 0 and start == 0:
            etag = response.headers.get("etag", "").strip()
            version = Version(0, etag, response.headers.get("last-modified", "").strip())
            return Answer(response, Part(0, 0, 0, is_whole=False), version)
        if self._version is not None and size_bytes not in (None, self._version.size_bytes):
            raise self.stale("the store has another version of it now")
        raise unusable(response, "it has no such part, it says")


class _WithoutCondition(Exception):
    """The request is to be sent again without `If-Range`."""


class _UrlRejected(Exception):
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
        f"{_host(url)} redirects to where nothing is read from", endpoint=STORE_ENDPOINT
    )


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the store"
