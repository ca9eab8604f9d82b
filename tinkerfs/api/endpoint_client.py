"""Sends the requests of the client, and decides which are not sent.

An endpoint that fails or that the server lacks is requested rarely (`circuit_breaker`). A response
may be shared with other hosts (`shared_cache`). The form of a checkpoint's id is the one that the
server accepts (`checkpoint_ids`).
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import urlsplit

from tinkerfs import errors
from tinkerfs.api import endpoints, pagination, parsing
from tinkerfs.api.checkpoint_ids import CheckpointRef, IdFormCache, capability, id_path, id_segment
from tinkerfs.api.circuit_breaker import OUTAGE, UNSUPPORTED, UNSUPPORTED_LISTING, CircuitBreakers
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.endpoints import Endpoint, Scope
from tinkerfs.api.error_mapping import withheld
from tinkerfs.api.http_client import Response
from tinkerfs.api.models import Checkpoint, Page
from tinkerfs.api.transport import Request, Transport
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.context import DEMAND, Priority
from tinkerfs.retry import API_BACKOFF, Backoff
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import SharedReads

if TYPE_CHECKING:
    from tinkerfs.api.shared_cache import Send, SharedCache

T = TypeVar("T")


class EndpointClient:
    """Sends requests to the API of one server. Thread-safe.

    A method blocks for at most `timeout_s` per HTTP request, retries included. After that it raises
    an `errors.ApiError`. The first request opens the first connection.

    Args:
        base_url: http or https URL of the API, optionally with a path.
        concurrency: maximum number of requests in flight. Archive requests are not counted, because
            they may take minutes.
        timeout_s: timeout of one request including its retries, seconds.
        shared: the responses that hosts share; None without `--shared-cache`.

    Raises:
        StartupError: the URL or a proxy URL in the environment is invalid.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        telemetry: Telemetry,
        *,
        concurrency: int = 8,
        timeout_s: float = 30.0,
        backoff: Backoff = API_BACKOFF,
        clock: Clock = SYSTEM_CLOCK,
        shared: "SharedCache | None" = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._shared = shared
        self._clock = clock
        self._concurrency = concurrency
        self._priority = DEMAND
        self._transport = Transport(
            base_url,
            credentials,
            telemetry,
            concurrency=concurrency,
            timeout_s=timeout_s,
            backoff=backoff,
            clock=clock,
        )
        self._breakers = CircuitBreakers(clock)
        self._id_forms = IdFormCache()
        self._skipped = pagination.SkippedRecordReporter()

    @property
    def base_url(self) -> str:
        """URL of the API without a trailing slash."""
        return self._base_url

    def with_priority(self, priority: Priority) -> Self:
        """Return a client that shares everything but sends its requests with `priority`."""
        client = copy.copy(self)
        client._priority = priority
        return client

    def is_failing(self, endpoint: Endpoint) -> bool:
        """Return whether the circuit breaker of an endpoint is open."""
        return self._breakers.is_open(OUTAGE, endpoint.label)

    def reset(self) -> None:
        """Close all circuit breakers, and forget unsupported endpoints and shared responses."""
        self._breakers.reset()
        if self._shared is not None:
            self._shared.reset()

    def close(self) -> None:
        """Close every connection; later requests raise ConnectionFailed."""
        self._transport.close()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # Requests

    def _fetch_one(self, request: Request, parse: Callable[[bytes], T]) -> T:
        return self._fetch(request, lambda response: parse(response.body))

    def _fetch(self, request: Request, parse: Callable[[Response], T]) -> T:
        endpoint = request.endpoint
        unsupported = UNSUPPORTED_LISTING if endpoint.scope is Scope.ACCOUNT else UNSUPPORTED

        def send(refusal: errors.ApiError | None) -> tuple[Response, T]:
            with self._breakers.guard(unsupported, endpoint.label):
                if refusal is not None:
                    raise refusal
                with self._outage_guard(request) as deadline:
                    response = self._transport.send(request, deadline, self._priority)
                    return response, self._parse(endpoint, response, parse)

        return self._send_or_share(request, send, parse, self._priority.shared_reads)

    def _send_or_share(
        self,
        request: Request,
        send: "Send[T]",
        parse: Callable[[Response], T],
        reads: SharedReads | None,
        life_s: Callable[[T], float] = lambda _parsed: math.inf,
    ) -> T:
        """Return the parsed response of a request, from this host or another.

        Args:
            request: the request; its path identifies the response.
            send: sends it; see `shared_cache.Send`.
            parse: parses a response.
            reads: bounds the age of the response; None if it is not shared.
            life_s: returns how long a parsed response may be shared, seconds.
        """
        if self._shared is None or reads is None or not request.endpoint.is_shareable:
            return send(None)[1]
        return self._shared.fetch(request, reads, send, parse, life_s)

    def _outage_guard(self, request: Request) -> AbstractContextManager[float]:
        """Return the guard of the request's endpoint; it yields the request's deadline."""
        endpoint, deadline = request.endpoint, self._transport.deadline(request.hold_s)
        return self._breakers.guard(
            OUTAGE, endpoint.label, deadline, is_long_running=endpoint.is_long_running
        )

    def _parse(self, endpoint: Endpoint, response: Response, parse: Callable[[Response], T]) -> T:
        try:
            return parse(response)
        except errors.ProtocolError as error:
            host = urlsplit(response.url).hostname
            raise errors.ProtocolError(
                f"{error.message} (from {host})", endpoint=endpoint.label, status=response.status
            ) from None

    def announce_change(self, run_id: str) -> None:
        """Let other hosts request again what they share of a run; empty for anything."""
        if self._shared is not None:
            self._shared.announce(run_id)

    def _change(self, request: Request, ref: CheckpointRef) -> None:
        try:
            self._checkpoint_request(
                request, ref, lambda response: parsing.check_change_response(response.body)
            )
        finally:  # a failed request may have taken effect
            self.announce_change(ref.run_id)

    def _checkpoint_request(
        self,
        request: Request,
        ref: CheckpointRef,
        parse: Callable[[Response], T],
        reads: SharedReads | None = None,
        life_s: Callable[[T], float] = lambda _parsed: math.inf,
    ) -> T:
        """Send a request about a checkpoint, with the id form that the server accepts.

        The request's `path` is appended to the URL path of the checkpoint. See `_send_or_share`.
        """
        endpoint = request.endpoint
        run = f"training_runs/{id_segment(endpoint, ref.run_id)}/checkpoints"

        def send_form(deadline: float, checkpoint_id: str) -> tuple[Response, T]:
            path = f"{run}/{id_path(checkpoint_id)}{request.path}"
            complete = dataclasses.replace(request, path=path, exists=ref.exists)
            response = self._transport.send(complete, deadline, self._priority)
            return response, self._parse(endpoint, response, parse)

        def send(refusal: errors.ApiError | None) -> tuple[Response, T]:
            with self._breakers.guard(UNSUPPORTED, capability(endpoint, ref)):
                if refusal is not None:
                    raise refusal
                with self._outage_guard(request) as deadline:
                    return send_forms(deadline)

        def send_forms(deadline: float) -> tuple[Response, T]:
            try:
                return self._id_forms.try_forms(endpoint, ref, partial(send_form, deadline))
            except errors.NotFound as error:
                if not (ref.exists and endpoint.method == "GET" and self._is_listed(ref)):
                    raise
                raise withheld(error, is_own=ref.is_own) from None
            except errors.UnsupportedEndpoint as error:
                if ref.is_own or error.status not in (404, 410):
                    raise
                raise withheld(error, is_own=False) from None

        # The form of the id does not matter to other hosts. Without a version, the response may be
        # of a checkpoint that was replaced.
        path = f"{run}/{id_path(ref.path_id)}{request.path}" if ref.path_id else ""
        identified = dataclasses.replace(request, path=path, exists=ref.exists, version=ref.version)
        is_shared = bool(path and ref.version)
        return self._send_or_share(identified, send, parse, reads if is_shared else None, life_s)

    def _checkpoints_of(self, run_id: str, *, exists: bool = False) -> Page[Checkpoint]:
        """Return all checkpoints of a run; see `Client.list_checkpoints`."""
        path = f"training_runs/{id_segment(endpoints.RUN_CHECKPOINTS, run_id)}/checkpoints"
        request = Request(endpoints.RUN_CHECKPOINTS, path, exists=exists)
        page = self._fetch_one(request, parsing.parse_checkpoints)
        return self._skipped.report(endpoints.RUN_CHECKPOINTS.label, page)

    def _is_listed(self, ref: CheckpointRef) -> bool:
        """Return whether the run's listing includes the checkpoint."""
        try:
            listed = self._checkpoints_of(ref.run_id).items
        except errors.ApiError:
            return False
        return any(ref.is_of(record.tinker_path, record.checkpoint_id) for record in listed)
