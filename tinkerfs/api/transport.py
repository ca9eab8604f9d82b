"""Transport of API requests: authentication, concurrency, retries, timeout.

`http_client` sends each attempt, and `error_mapping` maps a status of 400 or more to an error.

Statuses 408, 409, 429, 5xx and lost connections are retried, as in the Tinker SDK. All attempts of
a request share one deadline, because a file operation waits for them.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from tinkerfs import errors
from tinkerfs.api import raw_json
from tinkerfs.api.concurrency_limit import ConcurrencyLimiter
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.api.error_mapping import error_from_response
from tinkerfs.api.http_client import ExchangeError, HttpClient, Response
from tinkerfs.api.token_exchange import TokenExchange
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.context import DEMAND, Priority
from tinkerfs.errors import ApiError, StartupError
from tinkerfs.retry import API_BACKOFF, Backoff, FailureKind, RetryBudget, parse_retry_after_s
from tinkerfs.telemetry import Telemetry

#: Called before a change is retried; returns whether the change has already taken effect. Raises an
#: ApiError if the change must not be retried. Takes the error of the last attempt, and whether an
#: attempt may have succeeded.
Recheck = Callable[[ApiError, bool], bool]

#: Maximum number of attempts per request (as in the Tinker SDK).
MAX_ATTEMPTS = 10

#: Maximum number of attempts that fail to connect. On a dead network a file operation should fail
#: fast instead of hanging.
MAX_CONNECT_ATTEMPTS = 2
CONNECT_RETRY_S = 0.2

#: Maximum size of a response body; 100,000 checkpoints are about 35 MB.
MAX_RESPONSE_BYTES = 256 << 20

_RETRYABLE_STATUSES = frozenset({408, 409, 429})


@dataclass(frozen=True, slots=True)
class PageOfListing:
    """A page of a listing of several pages.

    Attributes:
        listing: path and query of the listing, without the position of the page.
        is_first: whether the other pages continue this one.
    """

    listing: str
    is_first: bool


@dataclass(frozen=True, slots=True)
class Request:
    """One API request.

    Attributes:
        path: percent-encoded path and query, relative to `/api/v1/`.
        body: JSON; None for no body.
        idempotency_key: UUID of a POST, the same for all attempts.
        exists: whether the requested resource is known to exist.
        hold_s: how long the server may delay its response, seconds. It may exceed the transport's
            timeout, but the request is not retried after that timeout.
        recheck: called before each retry of a change. Without it a change is retried only if the
            server cannot have received it.
        version: the version of the checkpoint that the response is about; empty if it is unknown.
        page: which page of which listing the response has; None if it is the whole.
    """

    endpoint: Endpoint
    path: str
    body: bytes | None = None
    idempotency_key: str | None = None
    exists: bool = False
    hold_s: float = 0.0
    recheck: Recheck | None = None
    version: str = ""
    page: PageOfListing | None = None

    def has_taken_effect(self, failure: ApiError, *, may_have_succeeded: bool) -> bool:
        """Return whether `recheck` finds the change made, so that no retry is needed.

        Raises:
            ApiError: the change must not be retried.
        """
        return self.recheck is not None and self.recheck(failure, may_have_succeeded)


#: Replaces the response to a change that `recheck` found made.
_ALREADY_MADE = Response(204, {}, b"", "")


class Transport:
    """Sends requests to one API. Thread-safe.

    Args:
        base_url: http or https URL of the API, optionally with a path.
        concurrency: maximum number of requests in flight.
        timeout_s: timeout of one `send` including all its attempts, seconds.
        max_response_bytes: maximum size of a response body.

    Raises:
        StartupError: the URL is invalid, or the environment names an invalid proxy or certificate
            bundle.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        telemetry: Telemetry,
        *,
        concurrency: int,
        timeout_s: float,
        backoff: Backoff = API_BACKOFF,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._backoff = backoff
        self._clock = clock
        self._limiter = ConcurrencyLimiter(concurrency, clock)
        telemetry.add_gauge("api_permits", lambda: self._limiter.limit)
        telemetry.add_gauge("api_permits_used", lambda: self._limiter.running)
        telemetry.add_gauge("api_permits_awaited", lambda: self._limiter.waiting)
        telemetry.add_gauge("key", lambda: credentials.state)
        self._tokens = TokenExchange(self._post_with_key, clock)
        self._http = HttpClient(
            base_url.rstrip("/") + "/api/v1/",
            telemetry,
            max_idle=max(concurrency, 32),
            max_body_bytes=max_response_bytes,
        )

    def close(self) -> None:
        """Close every connection, and kill a running credential command."""
        self._credentials.close()
        self._http.close()

    def __enter__(self) -> Self:
        """Return the transport itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def deadline(self, hold_s: float = 0.0) -> float:
        """Return the deadline of an operation that starts now, on the monotonic clock.

        Args:
            hold_s: see `Request.hold_s`.
        """
        return self._clock.monotonic() + max(self._timeout_s, hold_s)

    def send(self, request: Request, deadline: float, priority: Priority = DEMAND) -> Response:
        """Send a request, retry it if appropriate, and return a successful response.

        After a 401 the request is sent once more with a token of the key, if the server exchanges
        keys for tokens, and once more if the key has changed. The deadline is on the monotonic
        clock. Demand requests are sent before prefetches.
        """
        is_second_token = is_second_key = False
        while True:
            key, credential = self._key(request), None
            try:
                credential = self._tokens.credential(key, self._left_s(deadline))
                response = self._send_with_retries(request, credential, deadline, priority)
            except errors.Unauthorized as error:
                if error.status != 401:
                    raise
                if (
                    credential is not None
                    and not is_second_token
                    and self._tokens.on_unauthorized(key, credential, self._left_s(deadline))
                ):
                    is_second_token = True
                elif not self._credentials.on_unauthorized(key, error) or is_second_key:
                    raise
                else:
                    is_second_key = True
                if request.has_taken_effect(error, may_have_succeeded=False):
                    return _ALREADY_MADE
                continue
            self._credentials.on_authorized(key)
            return response

    def _key(self, request: Request) -> str:
        """Return the API key to send.

        Raises:
            Unauthorized: the key is unavailable or was rejected recently.
        """
        try:
            return self._credentials.get()
        except (StartupError, errors.Unauthorized) as error:
            if isinstance(error, errors.Unauthorized) and error.endpoint:
                raise
            message = error.message if isinstance(error, ApiError) else str(error)
            raise errors.Unauthorized(message, endpoint=request.endpoint.label) from None

    def _post_with_key(
        self, endpoint: Endpoint, path: str, fields: Mapping[str, object], key: str
    ) -> dict[str, Any]:
        """Send a POST request with the key itself; return the object in the response."""
        request = Request(endpoint, path, raw_json.dumps(fields), str(uuid.uuid4()))
        response = self._send_with_retries(request, key, self.deadline(), DEMAND)
        return raw_json.parse_object(response.body)[1]

    def _left_s(self, deadline: float) -> float:
        return deadline - self._clock.monotonic()

    def _send_with_retries(
        self, request: Request, key: str, deadline: float, priority: Priority
    ) -> Response:
        retry_deadline = min(deadline, self.deadline())

        def send_once() -> Response:
            return self._send_once(request, key, deadline, retry_deadline, priority)

        retry_budget = RetryBudget(
            self._backoff,
            retry_deadline - self._clock.monotonic(),
            max_failures={FailureKind.NOT_SENT: MAX_CONNECT_ATTEMPTS},
            max_attempts=MAX_ATTEMPTS,
            clock=self._clock,
        )
        attempts = _Attempts(send_once, request, retry_budget, self._clock)
        while True:
            try:
                return attempts.run_next()
            except ApiError:
                if attempts.delay_s is None:
                    raise
            time.sleep(attempts.delay_s)

    def _send_once(
        self,
        request: Request,
        key: str,
        deadline: float,
        retry_deadline: float,
        priority: Priority,
    ) -> Response:
        """Acquire a permit, send a request once, and return its response of any status.

        Raises:
            ExchangeError: no complete response was received.
        """
        try:
            with self._limiter.acquire(request.endpoint, retry_deadline, priority) as permit:
                response = self._exchange(request, key, deadline)
                permit.status = response.status
                permit.retry_after_s = parse_retry_after_s(response.headers, self._clock.now())
                return response
        except ApiError as error:
            raise ExchangeError(error, request_not_sent=True, is_final=True) from None

    def _exchange(self, request: Request, key: str, deadline: float) -> Response:
        """Send a request once, without a permit.

        Raises:
            ExchangeError: no complete response was received.
        """
        endpoint = request.endpoint
        headers = {"X-API-Key": key}
        if request.body is not None:
            headers["Content-Type"] = "application/json"
        if request.idempotency_key is not None:
            headers["X-Idempotency-Key"] = request.idempotency_key
        left_s = self._left_s(deadline)
        if left_s <= 0:
            message = f"no response within {self._timeout_s:g} s"
            raise ExchangeError(
                errors.RequestTimeout(message, endpoint=endpoint.label), is_final=True
            )
        return self._http.send(
            endpoint.label,
            request.path,
            headers,
            request.body,
            left_s,
            may_repeat=not (endpoint.is_change or endpoint.is_long_running),
        )


class _Attempts:
    """Attempts of one request with one API key. Not thread-safe.

    Args:
        send_once: sends the request once; raises an ExchangeError without a response.

    Attributes:
        delay_s: delay before the next attempt, seconds; None if the last failure is final.
    """

    def __init__(
        self,
        send_once: Callable[[], Response],
        request: Request,
        retry_budget: RetryBudget,
        clock: Clock,
    ) -> None:
        self._send_once = send_once
        self._request = request
        self._retry_budget = retry_budget
        self._clock = clock
        self._failure: ApiError | None = None
        #: Whether an earlier attempt may have taken effect although no success was received.
        self._may_have_succeeded = False
        self.delay_s: float | None = None

    def run_next(self) -> Response:
        """Make one attempt and compute the delay before the next one.

        Raises:
            ApiError: the attempt failed.
        """
        endpoint = self._request.endpoint
        self.delay_s = None
        failure = self._failure
        if failure is not None and self._request.has_taken_effect(
            failure, may_have_succeeded=self._may_have_succeeded
        ):
            return _ALREADY_MADE
        try:
            response = self._send_once()
        except ExchangeError as error:
            self.delay_s = self._delay_after_error(error)
            self._may_have_succeeded = self._may_have_succeeded or not error.request_not_sent
            self._failure = error.error
            raise error.error from None
        if response.status < 300 or response.status in endpoint.success_statuses:
            return response
        if endpoint.is_delete and self._may_have_succeeded and response.status in (404, 410):
            return response
        self.delay_s = self._delay_after_response(response)
        self._may_have_succeeded = self._may_have_succeeded or response.status >= 500
        self._failure = error_from_response(
            endpoint,
            response.status,
            response.headers,
            response.body,
            host=urlsplit(response.url).hostname or "",
            now_s=self._clock.now(),
            exists=self._request.exists,
        )
        raise self._failure

    def _delay_after_error(self, error: ExchangeError) -> float | None:
        if error.is_final:
            return None
        if error.request_not_sent:
            return self._retry_budget.next_delay_s(FailureKind.NOT_SENT, CONNECT_RETRY_S)
        if self._is_sent_once:
            return None
        # The server may have closed an idle connection: retry at once on a new one.
        return self._retry_budget.next_delay_s(requested_s=None if self._failure else 0.0)

    def _delay_after_response(self, response: Response) -> float | None:
        status, endpoint = response.status, self._request.endpoint
        if status == 401 or status in endpoint.non_retryable_statuses or self._is_sent_once:
            return None
        is_retryable = status in _RETRYABLE_STATUSES or (status >= 500 and status != 501)
        override = response.headers.get("x-should-retry", "").strip().lower()
        if override in ("true", "false"):
            is_retryable = override == "true"
        if not is_retryable:
            return None
        requested_s = parse_retry_after_s(response.headers, self._clock.now())
        return self._retry_budget.next_delay_s(requested_s=requested_s)

    @property
    def _is_sent_once(self) -> bool:
        return self._request.endpoint.is_change and self._request.recheck is None
