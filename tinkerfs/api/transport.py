"""One HTTP request of the API, with the key, the retries and the bounds that all of them share.

`http_client` sends each try; `failures` knows what a status of 400 or more means.

Retried are 408, 409, 429, every 5xx and lost connections, as by the Tinker SDK,
but all tries together end within one bound: a file operation waits for them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import stamina
import stamina.instrumentation

from tinkerfs import errors
from tinkerfs.api.concurrency_limit import ConcurrencyLimiter
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.api.error_mapping import error_from_response
from tinkerfs.api.http_client import ExchangeError, HttpClient, Response
from tinkerfs.api.timestamps import parse_retry_after_s
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.context import DEMAND, Priority
from tinkerfs.errors import ApiError, StartupError
from tinkerfs.telemetry import Telemetry

#: Looks afresh before a change is sent again, and returns whether it is made by now; raises where
#: it must not be sent again. Takes the failure of the last try, and whether a try may be done.
Recheck = Callable[[ApiError, bool], bool]

#: How many times one request is tried at most (Tinker SDK).
MAX_ATTEMPTS = 10

#: Where there is no way to the server at all, one quick second try must do: a file operation that
#: fails fast on a dead network is worth more than one that hangs.
MAX_CONNECT_TRIES = 2
CONNECT_RETRY_S = 0.2

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 10.0

#: The largest answer that is read, bytes; 100,000 checkpoints are about 35 MB.
MAX_RESPONSE_BYTES = 256 << 20

_RETRIED = frozenset({408, 409, 429})

# Its own hooks log every retry on WARNING, with the exception behind it. A retry is no news here:
# the counters tell it, and what comes of it is told once, in the error. (Global by its design.)
stamina.instrumentation.set_on_retry_hooks(())


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask.

    Attributes:
        endpoint: which endpoint, for counters, messages and the meaning of failures.
        path: below `/api/v1/`, percent-encoded, with its query.
        body: JSON to send; None for no body.
        idempotency_key: a UUID for a POST, the same over all tries.
        is_known: whether the thing asked about is known to exist.
        needs_key: whether the key must be sent; where not, it is sent if there is one.
        hold_s: how long the server may hold its response, seconds, where that is more than the
            bound on all tries. It is not sent again after that bound.
        recheck: called before each further try of a change. A change without it is sent again
            only where the server cannot have received it.
    """

    endpoint: Endpoint
    path: str
    body: bytes | None = None
    idempotency_key: str | None = None
    exists: bool = False
    needs_key: bool = True
    hold_s: float = 0.0
    recheck: Recheck | None = None

    def is_made(self, failure: ApiError, *, may_be_done: bool) -> bool:
        """Return whether a change is made by now, before it is sent again.

        Raises:
            ApiError: it must not be sent again.
        """
        return self.recheck is not None and self.recheck(failure, may_be_done)


#: Stands for the response to a change that was found made.
_MADE = Response(204, {}, b"", "")


class Transport:
    """Sends requests of one API. Thread-safe; `close` ends it.

    Args:
        base_url: where the API is, http or https, perhaps with a path.
        credentials: where the key comes from.
        telemetry: counts every HTTP request.
        concurrency: how many requests there may be at once.
        timeout_s: bound on one `send`, all its tries together, seconds.
        backoff_s: the first wait between tries, seconds; it doubles up to 20 times as much.
        max_answer_bytes: the largest answer that is read.
        clock: whose `monotonic` the bound runs by.

    Raises:
        SetupError: the URL, or a proxy or bundle that the environment names, cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        telemetry: Telemetry,
        *,
        concurrency: int,
        timeout_s: float,
        backoff_s: float = FIRST_BACKOFF_S,
        max_answer_bytes: int = MAX_RESPONSE_BYTES,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._clock = clock
        self._budget = ConcurrencyLimiter(concurrency, clock)
        self._http = HttpClient(
            base_url.rstrip("/") + "/api/v1/",
            telemetry,
            max_idle=max(concurrency, 32),
            max_body_bytes=max_answer_bytes,
        )

    def close(self) -> None:
        """Close every connection, and end a credential command that is under way."""
        self._credentials.close()
        self._http.close()

    def __enter__(self) -> Self:
        """Return the transport itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def deadline(self, hold_s: float = 0.0) -> float:
        """Return the end of an operation that starts now, on the monotonic clock.

        Args:
            hold_s: as of the `Request`.
        """
        return self._clock.monotonic() + max(self._timeout_s, hold_s)

    def send(self, request: Request, deadline: float, priority: Priority = DEMAND) -> Response:
        """Send a request, again where that may help, and return its answer.

        Args:
            request: what to ask.
            deadline: when to give up, on the monotonic clock.
            priority: whether somebody waits for it; if not, who does goes first.

        Raises:
            ApiError: the answer is a failure, or there is none; every kind in `errors`.
        """
        is_second = False
        while True:
            key = self._key(request)
            try:
                answer = self._send_with_retries(request, key, deadline, priority)
            except errors.Unauthorized as error:
                if error.status != 401 or key is None or not request.needs_key:
                    raise
                if not self._credentials.on_unauthorized(key, error) or is_second:
                    raise
                is_second = True
                if request.is_made(error, may_be_done=False):
                    return _MADE
                continue
            if key is not None and request.needs_key:
                self._credentials.on_authorized(key)
            return answer

    def _key(self, request: Request) -> str | None:
        """Return the key to send, None where none is needed and none can be had.

        Raises:
            Unauthorized: there is none, or it was refused a moment ago.
        """
        try:
            return self._credentials.get()
        except (StartupError, errors.Unauthorized) as error:
            if not request.needs_key:
                return None
            if isinstance(error, errors.Unauthorized) and error.endpoint:
                raise
            words = error.message if isinstance(error, ApiError) else str(error)
            raise errors.Unauthorized(words, endpoint=request.endpoint.label) from None

    def _send_with_retries(
        self, request: Request, key: str | None, deadline: float, priority: Priority
    ) -> Response:
        try_until = min(deadline, self.deadline())

        def once() -> Response:
            return self._send_once(request, key, deadline, try_until, priority)

        tries = _RetryState(once, request, try_until, self._backoff_s, self._clock)
        # The waits are ours: they follow the server's wish and end with the deadline.
        for attempt in stamina.retry_context(on=tries.wait_s, attempts=MAX_ATTEMPTS, timeout=None):
            with attempt:
                return tries.run()
        raise AssertionError("stamina ended without an error")

    def _send_once(
        self,
        request: Request,
        key: str | None,
        deadline: float,
        try_until: float,
        priority: Priority,
    ) -> Response:
        """Send a request once, when it is its turn, and return any answer whatever its status.

        Raises:
            ExchangeError: there is no whole answer.
        """
        try:
            with self._budget.acquire(request.endpoint, try_until, priority) as turn:
                answer = self._exchange(request, key, deadline)
                turn.status = answer.status
                turn.retry_after_s = parse_retry_after_s(answer.headers, self._clock.now())
                return answer
        except ApiError as error:
            raise ExchangeError(error, is_unsent=True, is_final=True) from None

    def _exchange(self, request: Request, key: str | None, deadline: float) -> Response:
        """Send a request now; as `_once`."""
        endpoint = request.endpoint
        headers = {"Content-Type": "application/json"} if request.body is not None else {}
        if key is not None:
            headers["X-API-Key"] = key
        if request.idempotency_key is not None:
            headers["X-Idempotency-Key"] = request.idempotency_key
        left_s = deadline - self._clock.monotonic()
        if left_s <= 0:
            words = f"no response within {self._timeout_s:g} s"
            raise ExchangeError(
                errors.RequestTimeout(words, endpoint=endpoint.label), is_final=True
            )
        return self._http.send(
            endpoint.label,
            request.path,
            headers,
            request.body,
            left_s,
            may_repeat=not (endpoint.is_change or endpoint.is_long_running),
        )


class _RetryState:
    """The tries of one request with one key; one thread's. `once` sends it."""

    def __init__(
        self,
        once: Callable[[], Response],
        request: Request,
        deadline: float,
        backoff_s: float,
        clock: Clock,
    ) -> None:
        self._send_once = once
        self._request = request
        self._deadline = deadline
        self._backoff_s = backoff_s
        self._clock = clock
        self._count = 0
        self._count_unsent = 0
        self._failure: ApiError | None = None
        #: Whether an earlier try may have done what was asked, though nobody said so.
        self._may_have_succeeded = False
        #: How long to wait before the next try, seconds; None when the last failure is final.
        self._wait_s: float | None = None

    def wait_s(self, _: Exception) -> float | bool:
        """Tell stamina how long to wait before the next try; False ends them."""
        wait_s = self._wait_s
        if wait_s is None or self._clock.monotonic() + wait_s >= self._deadline:
            return False
        return wait_s

    def run(self) -> Response:
        """Try once.

        Raises:
            ApiError: the try failed; `wait_s` knows whether another one makes sense.
        """
        endpoint = self._request.endpoint
        self._count += 1
        self._wait_s = None
        failure = self._failure
        if failure is not None and self._request.is_made(
            failure, may_be_done=self._may_have_succeeded
        ):
            return _MADE
        try:
            answer = self._send_once()
        except ExchangeError as lost:
            self._wait_s = self._wait_after_loss(lost)
            self._may_have_succeeded = self._may_have_succeeded or not lost.is_unsent
            self._failure = lost.error
            raise lost.error from None
        if answer.status < 300 or answer.status in endpoint.success_statuses:
            return answer
        if endpoint.is_delete and self._may_have_succeeded and answer.status in (404, 410):
            return answer
        self._wait_s = self._wait_after_answer(answer)
        self._may_have_succeeded = self._may_have_succeeded or answer.status >= 500
        self._failure = error_from_response(
            endpoint,
            answer.status,
            answer.headers,
            answer.body,
            host=urlsplit(answer.url).hostname or "",
            now_s=self._clock.now(),
            is_known=self._request.exists,
        )
        raise self._failure

    def _wait_after_loss(self, lost: ExchangeError) -> float | None:
        if lost.is_final:
            return None
        if lost.is_unsent:
            self._count_unsent += 1
            return CONNECT_RETRY_S if self._count_unsent < MAX_CONNECT_TRIES else None
        if self._is_sent_once:
            return None
        # An idle connection that the server has closed is found out by using it: no need to wait.
        return 0.0 if self._count == 1 else self._backoff()

    def _wait_after_answer(self, answer: Response) -> float | None:
        status, endpoint = answer.status, self._request.endpoint
        if status == 401 or status in endpoint.non_retryable_statuses or self._is_sent_once:
            return None
        is_retried = status in _RETRIED or (status >= 500 and status != 501)
        wish = answer.headers.get("x-should-retry", "").strip().lower()
        if wish in ("true", "false"):
            is_retried = wish == "true"
        if not is_retried:
            return None
        asked_s = parse_retry_after_s(answer.headers, self._clock.now())
        return self._backoff() if asked_s is None else asked_s

    @property
    def _is_sent_once(self) -> bool:
        return self._request.endpoint.is_change and self._request.recheck is None

    def _backoff(self) -> float:
        longest_s = self._backoff_s * (LAST_BACKOFF_S / FIRST_BACKOFF_S)
        return min(self._backoff_s * 2.0 ** (self._count - 1), longest_s) * random.uniform(0.75, 1)
