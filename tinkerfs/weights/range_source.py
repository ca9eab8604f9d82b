"""Read ranges of one file of an object store, by signed URL.

Requests name closed ranges, because shared caches handle open ones badly, and never carry the API
key. Each response is validated against the request and the known version of the file, so that an
invalid response is an error and never wrong bytes. Messages contain no URL and no redirect target,
because both are secrets.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from tinkerfs import errors
from tinkerfs.api.models import SignedUrl
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.errors import ApiError
from tinkerfs.retry import RetryBudget, parse_retry_after_s
from tinkerfs.weights.etags import SAMPLE_BYTES, EtagAliases, Sample, sample_of
from tinkerfs.weights.proxied_range import request_from_proxy
from tinkerfs.weights.responses import (
    ContentRange,
    invalid_response,
    parse_content_range,
    unsatisfied_size,
)
from tinkerfs.weights.transfer import RangeResponse, Transfer
from tinkerfs.weights.transfer_monitor import STORE_ENDPOINT, TransferInterrupted
from tinkerfs.weights.url_cache import UrlProvider
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

if TYPE_CHECKING:
    from tinkerfs.weights.http import ObjectStoreClient, StreamedResponse

#: Returns the HTTP client, which is imported at the first request.
Connect = Callable[[], "ObjectStoreClient"]

MAX_REDIRECTS = 5

#: Maximum number of sample requests, until the store's server with the expected ETag responds.
MAX_PROBES = 6

#: Statuses of an expired URL: S3 sends 403 or 400, other stores 401. After the archive was built
#: again elsewhere, stores send 404 or 410.
_URL_REJECTED = frozenset({400, 401, 403, 404, 410})
_RETRIABLE = frozenset({408, 425, 429})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class RangeSource:
    """One file of an object store. Thread-safe.

    Args:
        url_provider: returns the signed URL of the file.
        version: the expected version; None if it is not known yet.
        sample: of the file's bytes; None if there is none.
        is_plain: nothing has been derived from the content yet, such as member offsets.
        on_stale: called if the store has another version than the expected one.
    """

    def __init__(
        self,
        connect: Connect,
        url_provider: UrlProvider,
        version: Version | None,
        sample: Sample | None = None,
        *,
        is_plain: bool = False,
        on_stale: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._url_provider = url_provider
        self._version = version
        self._is_plain = is_plain
        self._on_stale = on_stale
        self._etags = EtagAliases("" if version is None else version.etag, sample)
        self._find_sample: Callable[[], Sample | None] = lambda: None

    @property
    def is_exact(self) -> bool:
        """Whether every other version of the file has another ETag."""
        return self._version is not None and self._version.is_exact

    def use_samples(self, find: Callable[[], Sample | None]) -> None:
        """Set the function that returns a sample of the cached bytes of this version.

        The sample proves whether another ETag names the same bytes.
        """
        self._find_sample = find

    def record_sample(self, start: int, data: bytes) -> None:
        """Store a sample of received bytes, unless there is one already."""
        if self._etags.sample is None:
            self._etags.sample = sample_of(start, data)

    def open(self, start: int, stop: int, before: bytes = b"") -> Transfer:
        """Request the bytes [start, stop), and return the transfer.

        `stop` may exceed the file's end only while the version is unknown. `before` holds the known
        bytes that precede `start`. They are requested again and compared, to detect a change.
        If the store does not support range requests, the whole file arrives: see
        `Transfer.is_full_body`.

        Raises:
            ApiError: all attempts fail.
            OSError: ESTALE if the file has changed or is gone.
        """
        retry_budget = self._connect().monitor.retry_budget()
        response = self.send(start - len(before), stop, retry_budget)
        return Transfer(self, response, start, stop, retry_budget, before)

    def prepare(self, ctx: RequestContext) -> None:
        """Get a signed URL, so that a download on another thread need not wait for it.

        Raises:
            ApiError: the request fails.
            OSError: ESTALE if the file is gone; see also `SignedUrlCache.url`.
        """
        self._url(ctx)

    def is_ready(self) -> bool:
        """Return whether a signed URL is cached."""
        return self._url_provider.has_url()

    def send(
        self, start: int, stop: int, retry_budget: RetryBudget, *, is_resumed: bool = False
    ) -> RangeResponse:
        """Send requests until a response contains `start`; called by `Transfer`.

        A transfer that broke off is resumed from the store itself, because a caching proxy may have
        broken it off and may do so again.

        Raises:
            ApiError, OSError: as `open`.
        """
        rejected: ApiError | None = None
        while True:
            url = self._url(BACKGROUND_CONTEXT)
            try:
                response = None if is_resumed else self._send_to_proxy(url, start, stop)
                if response is None:
                    response = self._send_once(url, start, stop)
            except _UrlRejected as rejection:
                self._url_provider.invalidate(url)
                if rejected is not None:
                    raise rejected from None
                rejected = rejection.error
            except _RetryWithoutIfRange:
                pass
            except TransferInterrupted as interruption:
                interruption.wait_or_raise(retry_budget)
            else:
                self._adopt_version(response)
                self._etags.mark_in_use()
                return response

    def report_stale(self, reason: str) -> OSError:
        """Report that the file has changed, and return the error ESTALE."""
        self._on_stale()
        return errors.stale(self._url_provider.path, reason)

    def _url(self, ctx: RequestContext) -> SignedUrl:
        try:
            return self._url_provider.url(ctx)
        except (errors.NotFound, errors.UnsupportedEndpoint) as error:
            if self._version is None:
                raise
            raise self.report_stale(f"the file is gone: {error}") from error

    def _adopt_version(self, response: RangeResponse) -> None:
        if self._version is None:  # a later response must be of the same version
            self._version = response.version
            self._etags = EtagAliases(response.version.etag)

    def _send_to_proxy(self, signed: SignedUrl, start: int, stop: int) -> RangeResponse | None:
        """Send one request to the caching proxy; return None if the store must be asked.

        The version is always from the store, so a small request for it comes first.

        Raises:
            _UrlRejected, TransferInterrupted, ApiError, OSError: as `_send_once`.
        """
        client = self._connect()
        if client.blob_proxy is None or self._etags.is_mixed or stop - start <= 1:
            return None
        if self._version is None:
            response = self._send_once(signed, start, start + 1)
            if response.content_range.is_full_body or not response.version.size_bytes:
                return response
            try:
                for _ in response.chunks():  # to the end, so that the connection can be reused
                    pass
            finally:
                response.http.close()
            self._adopt_version(response)
            assert self._version is not None
        return request_from_proxy(client, signed.url, start, stop, self._version)

    def _send_once(self, signed: SignedUrl, start: int, stop: int) -> RangeResponse:
        """Send one request.

        Raises:
            _UrlRejected: the URL has expired.
            _RetryWithoutIfRange: the request must be sent again, without `If-Range`.
            TransferInterrupted: there is no valid response; a retry may get one.
            ApiError: a retry would fail too.
            OSError: ESTALE.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        is_mixed = self._etags.is_mixed
        if self._version is not None and self._version.validator and not is_mixed:
            headers["If-Range"] = self._version.validator
        response = self._get(signed.url, headers)
        try:
            validated = self._validate(response, start, stop)
        except BaseException:
            response.close()
            raise
        if validated.content_range.is_full_body and self._etags.is_mixed and not is_mixed:
            response.close()
            raise _RetryWithoutIfRange  # If-Range named the ETag of another server of the store
        return validated

    def _get(self, url: str, headers: dict[str, str]) -> "StreamedResponse":
        """Send a request, and follow redirects within the timeout of one request.

        Raises:
            TransferInterrupted, ApiError: as `_send_once`.
        """
        client, began = self._connect(), time.monotonic()
        for _ in range(MAX_REDIRECTS):
            response = client.get(url, headers)
            if response.status not in _REDIRECTS:
                return response
            response.close()
            if time.monotonic() - began > client.monitor.stall_timeout_s:
                raise client.monitor.stall_error(_host(url))
            url = _redirect_target(url, response.headers.get("location", ""))
        raise errors.ProtocolError(f"too many redirects from {_host(url)}", endpoint=STORE_ENDPOINT)

    def _validate(self, response: "StreamedResponse", start: int, stop: int) -> RangeResponse:
        """Validate the head of a response; return it with its range and version.

        Raises:
            _UrlRejected, TransferInterrupted, ApiError, OSError: as `_send_once`.
        """
        status, host = response.status, response.host
        if status == 200 and "html" in response.headers.get("content-type", "").lower():
            message = f"{host} sent a page of HTML, as a captive portal does"
            raise _UrlRejected(
                errors.ProtocolError(message, endpoint=STORE_ENDPOINT, status=status)
            )
        if status in (200, 206):
            size_bytes = None if self._version is None else self._version.size_bytes
            if size_bytes == UNKNOWN_BYTES:
                size_bytes = None
            content_range = parse_content_range(response, start, stop, size_bytes)
            version = self._matching_version(response, content_range)
            if size_bytes is not None and max(content_range.stop, start) > size_bytes:
                raise invalid_response(response, "its range exceeds the file")
            return RangeResponse(response, content_range, version)
        if status == 416:
            return self._empty(response, start)
        message = f"{host} responded with status {status}"
        if status in _URL_REJECTED:
            kind: type[ApiError] = errors.ClientError
            if status in (401, 403):
                kind = errors.Unauthorized
            raise _UrlRejected(kind(message, endpoint=STORE_ENDPOINT, status=status))
        if status in _RETRIABLE or status >= 500:
            kind = errors.RateLimited if status == 429 else errors.ServerError
            requested_s = parse_retry_after_s(response.headers, time.time())
            raise TransferInterrupted(
                kind(message, endpoint=STORE_ENDPOINT, status=status), requested_s=requested_s
            )
        raise errors.ClientError(message, endpoint=STORE_ENDPOINT, status=status)

    def _matching_version(
        self, response: "StreamedResponse", content_range: ContentRange
    ) -> Version:
        """Return the version of a response, which must be the expected one.

        Raises:
            OSError: ESTALE: the response is of another version.
            TransferInterrupted: the version of the response cannot be determined.
        """
        etag = response.headers.get("etag", "").strip()
        modified = response.headers.get("last-modified", "").strip()
        known = self._version
        if known is None:
            if content_range.total_bytes is not None:
                return Version(content_range.total_bytes, etag, modified)
            if not content_range.is_full_body:
                raise invalid_response(response, "it does not state how long the file is")
            return Version(UNKNOWN_BYTES, etag, modified, has_length=False)
        # An ETag that appears where there was none also means another version.
        given, expected = etag, known.etag
        if not given and not expected:
            given, expected = modified, known.last_modified
        if expected and not given:
            raise invalid_response(response, "it does not state the version of the file")
        total_bytes = content_range.total_bytes
        is_other_size = known.has_length and total_bytes not in (None, known.size_bytes)
        is_same = given == expected
        if known.etag and not is_same:
            is_same = not is_other_size and self._is_alias(response, etag, modified)
        if not is_same or (is_other_size and not expected):
            raise self.report_stale("the store has another version now")
        if is_other_size:
            raise invalid_response(response, "it states another length than that of the file")
        return known

    def _is_alias(self, response: "StreamedResponse", etag: str, modified: str) -> bool:
        """Return whether another ETag names the same bytes.

        Raises:
            TransferInterrupted: this cannot be determined now.
        """
        known = self._version
        if self._etags.has(etag):
            return True
        if known is None or modified != known.last_modified or known.size_bytes == UNKNOWN_BYTES:
            return False
        sample = self._etags.sample or self._find_sample()
        if sample is not None:
            return self._has_sample(etag, sample)
        if self._etags.is_in_use:  # the first received bytes will provide a sample
            raise invalid_response(response, "it has another ETag")
        # No bytes were received or used yet, so versions cannot mix; the date is proof enough.
        return bool(modified) and self._is_plain and self._etags.adopt_if_unused(etag)

    def _has_sample(self, etag: str, sample: Sample) -> bool:
        """Return whether a server of the store with this ETag sends the sampled bytes.

        Raises:
            TransferInterrupted, ApiError: as `_send_once`.
        """
        start, stop = sample.start, sample.start + SAMPLE_BYTES
        size_bytes = None if self._version is None else self._version.size_bytes
        url = self._url(BACKGROUND_CONTEXT).url
        for _ in range(MAX_PROBES):
            response = self._get(url, {"Range": f"bytes={start}-{stop - 1}"})
            try:
                if response.status != 206:
                    return False
                content_range = parse_content_range(response, start, stop, size_bytes)
                body = RangeResponse(response, content_range, Version(0)).chunks()
                if not sample.is_of(b"".join(body)):
                    return False
            finally:
                response.close()
            # A response without an ETag proves nothing about any server.
            found = response.headers.get("etag", "").strip()
            if found:
                self._etags.add(found)
            if self._etags.has(etag):
                return True
        return False

    def _empty(self, response: "StreamedResponse", start: int) -> RangeResponse:
        """Return an empty file's response if status 416 means that, else raise an error."""
        size_bytes = unsatisfied_size(response)
        if self._version is None and size_bytes == 0 and start == 0:
            etag = response.headers.get("etag", "").strip()
            version = Version(0, etag, response.headers.get("last-modified", "").strip())
            return RangeResponse(response, ContentRange(0, 0, 0, is_full_body=False), version)
        if self._version is not None and size_bytes not in (None, self._version.size_bytes):
            raise self.report_stale("the store has another version now")
        raise invalid_response(response, "it rejects the requested range")


class _RetryWithoutIfRange(Exception):
    """The request must be sent again without `If-Range`."""


class _UrlRejected(Exception):
    """The store rejects the signed URL, which may have expired."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


def _redirect_target(url: str, location: str) -> str:
    """Return the absolute URL that a redirect leads to.

    Raises:
        ProtocolError: the URL is invalid, or a downgrade from HTTPS.
    """
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        is_downgrade = urlsplit(url).scheme == "https" and parts.scheme != "https"
        if location and parts.scheme in ("http", "https") and parts.hostname and not is_downgrade:
            return target
    except ValueError:
        pass
    raise errors.ProtocolError(
        f"{_host(url)} redirects to an invalid or insecure URL", endpoint=STORE_ENDPOINT
    )


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the store"
