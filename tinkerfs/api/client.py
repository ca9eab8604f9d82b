"""The Tinker API, one method per endpoint. Raises `errors.ApiError` kinds and nothing else.

Used by the catalogue and by what reads weights. It knows no file paths and keeps no answers. What
it learns is about the server alone: which URL form of a checkpoint id it takes, which endpoints are
out, and what it does not have.
"""

import copy
import dataclasses
import uuid
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Self, TypeVar
from urllib.parse import urlencode, urlsplit

from tinkerfs import errors
from tinkerfs.api import endpoints, pagination, parsing, raw_json, signed_urls
from tinkerfs.api.capabilities import UNSUPPORTED_THRESHOLD, CapabilityCache
from tinkerfs.api.checkpoint_ids import CheckpointRef, IdFormCache, id_path, id_segment
from tinkerfs.api.circuit_breaker import CircuitBreakers
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.endpoints import Endpoint, Scope
from tinkerfs.api.error_mapping import withheld
from tinkerfs.api.http_client import Response
from tinkerfs.api.models import (
    Capabilities,
    Checkpoint,
    Page,
    Sampler,
    Session,
    SessionSearchPage,
    SessionSummary,
    SignedUrl,
    TrainingRun,
    WeightsInfo,
)
from tinkerfs.api.transport import FIRST_BACKOFF_S, Recheck, Request, Transport
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.context import DEMAND, Priority
from tinkerfs.telemetry import Telemetry

T = TypeVar("T")

#: The most sessions that one search may return (Tinker SDK 0.36, sessions/search).
_MOST_FOUND = 200


class Client:
    """A client of one server's API. Thread-safe.

    Every method may take up to `timeout_s` for each HTTP request that it needs, retries included,
    and raises an `errors.ApiError` when that is over. Nothing is connected before the first call.

    Args:
        base_url: where the API is, http or https, perhaps with a path.
        credentials: where the key comes from.
        telemetry: counts every HTTP request.
        concurrency: the most requests at once, but those for archives, which may take minutes.
        timeout_s: bound on one request with all its retries, seconds.
        backoff_s: the first wait between retries, seconds; it doubles up to 20 times as much.
        clock: `now` for expiries and dates, `monotonic` for bounds.

    Raises:
        SetupError: the URL, or a proxy's in the environment, cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        telemetry: Telemetry,
        *,
        concurrency: int = 8,
        timeout_s: float = 30.0,
        backoff_s: float = FIRST_BACKOFF_S,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._clock = clock
        self._concurrency = concurrency
        self._interest = DEMAND
        self._transport = Transport(
            base_url,
            credentials,
            telemetry,
            concurrency=concurrency,
            timeout_s=timeout_s,
            backoff_s=backoff_s,
            clock=clock,
        )
        self._breakers = CircuitBreakers(clock)
        self._lacks = CapabilityCache(clock)
        self._forms = IdFormCache()
        self._unreadable = pagination.SkippedRecordReporter()

    @property
    def base_url(self) -> str:
        """Where the API is, without a slash at its end."""
        return self._base_url

    def with_priority(self, priority: Priority) -> Self:
        """Return this client for work that is, or is not, waited for: who waits goes first."""
        client = copy.copy(self)
        client._interest = priority
        return client

    def reset(self) -> None:
        """Ask the server again where it was out a moment ago, and for what it did not have."""
        self._breakers.reset()
        self._lacks.reset()

    def close(self) -> None:
        """Close every connection; later calls fail as Unreachable."""
        self._transport.close()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # Training runs

    def list_training_runs(self, limit: int = 100, offset: int = 0) -> Page[TrainingRun]:
        """Return one page of the user's own runs.

        Raises:
            ApiError: it cannot be had; EndpointMissing where the server lists no runs.
        """
        return self._list(endpoints.RUNS, parsing.parse_training_runs, limit, offset)

    def all_training_runs(
        self, on_page: Callable[[tuple[TrainingRun, ...]], None] = lambda _runs: None
    ) -> tuple[TrainingRun, ...]:
        """Return every run of the user: ceil(runs / page) calls, those after the first at once.

        Args:
            on_page: told the runs of each page as it comes, as `paging.read_all` does.

        Raises:
            ApiError: as `list_training_runs`; one page that fails fails all.
        """
        return self._all(self.list_training_runs, lambda run: run.run_id, on_page)

    def training_run(self, run_id: str) -> TrainingRun:
        """Return one run: the user's own, or a public one.

        Raises:
            ApiError: it cannot be had; NotFound where there is none.
        """
        path = f"training_runs/{id_segment(endpoints.RUN, run_id)}?access_scope=accessible"
        return self._fetch_one(Request(endpoints.RUN, path), parsing.parse_training_run)

    # Checkpoints

    def list_checkpoints(self, run_id: str, *, is_known: bool = False) -> tuple[Checkpoint, ...]:
        """Return every checkpoint of a run; the server does not page them.

        Args:
            run_id: the run.
            is_known: whether the run is known to exist.

        Raises:
            ApiError: they cannot be had; NotFound where there is no such run.
        """
        path = f"training_runs/{id_segment(endpoints.RUN_CHECKPOINTS, run_id)}/checkpoints"
        request = Request(endpoints.RUN_CHECKPOINTS, path, exists=is_known)
        page = self._fetch_one(request, parsing.parse_checkpoints)
        return self._unreadable.report(endpoints.RUN_CHECKPOINTS.label, page).items

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> Page[Checkpoint]:
        """Return one page of the checkpoints of all the user's runs, newest first.

        Raises:
            ApiError: it cannot be had; EndpointMissing where the server has no such listing.
        """
        return self._list(endpoints.USER_CHECKPOINTS, parsing.parse_checkpoints, limit, offset)

    def all_user_checkpoints(
        self,
        dedupe: Callable[[Checkpoint], Checkpoint] = lambda record: record,
        on_page: Callable[[tuple[Checkpoint, ...]], None] = lambda _records: None,
    ) -> tuple[Checkpoint, ...]:
        """Return every checkpoint of the user, newest first: ceil(checkpoints / page) calls.

        Args:
            dedupe: returns the equal of a record that is kept already, or the record itself.
            on_page: told the records of each page as it comes, as `paging.read_all` does.

        Raises:
            ApiError: as `list_user_checkpoints`; one page that fails fails all.
        """

        def fetch(limit: int, offset: int) -> Page[Checkpoint]:
            return self.list_user_checkpoints(limit, offset).mapped(dedupe)

        return self._all(fetch, lambda record: record.identity, on_page)

    def weights_info(self, tinker_path: str, *, is_known: bool = False) -> WeightsInfo:
        """Return what the weights behind a tinker path are.

        Args:
            tinker_path: `tinker://...`.
            is_known: whether the checkpoint is known to exist.

        Raises:
            ApiError: it cannot be had; NotFound, or BadRequest where the server tells nothing of
                this kind of checkpoint.
        """
        body = raw_json.dumps({"tinker_path": tinker_path})
        request = Request(endpoints.WEIGHTS_INFO, "weights_info", body, str(uuid.uuid4()), is_known)
        kind = tinker_path.rpartition("/")[0].rpartition("/")[2]  # SkyRL tells of `weights` alone
        what = (endpoints.WEIGHTS_INFO.label, kind)
        # Of a path that somebody made up, a refusal speaks of the path.
        with self._lacks.guard(what, errors.BadRequest) if is_known else nullcontext():
            return self._fetch_one(request, parsing.parse_weights_info)

    def archive(self, ref: CheckpointRef, hold_s: float = 0.0) -> SignedUrl:
        """Return a signed URL of the checkpoint's archive; the server may have to build it first.

        The redirect is read, never followed: the key belongs to the API's origin alone.

        Args:
            ref: the checkpoint.
            hold_s: how long the server may hold its response while it builds, seconds.

        Raises:
            ApiError: it cannot be had; NotReady while the server builds it, with `retry_after_s`
                where it says; EndpointMissing where the server gives no archives, or none of
                this kind of checkpoint.
        """
        request = Request(endpoints.ARCHIVE, "/archive", hold_s=hold_s)
        return self._checkpoint_request(
            request, ref, lambda answer: signed_urls.archive_url(answer, self._clock.now())
        )

    def external_weights_urls(self, ref: CheckpointRef) -> tuple[dict[str, str], float]:
        """Return a signed URL for each file of an external checkpoint, and when they expire.

        The URLs are secrets. The file names are the server's, unchecked. The expiry is in seconds
        since 1970.

        Raises:
            ApiError: they cannot be had; EndpointMissing where the server has no such thing.
        """
        request = Request(endpoints.EXTERNAL_URLS, "/external_weights_urls")
        return self._checkpoint_request(
            request, ref, lambda answer: signed_urls.external_urls(answer, self._clock.now())
        )

    # Changes of a checkpoint. One that may have arrived is sent again only after a `recheck`.

    def publish(self, ref: CheckpointRef, recheck: Recheck | None = None) -> None:
        """Let everybody read the checkpoint; that it is public already is success.

        Raises:
            ApiError: it cannot be done.
        """
        key = str(uuid.uuid4())
        self._change(Request(endpoints.PUBLISH, "/publish", None, key, recheck=recheck), ref)

    def unpublish(self, ref: CheckpointRef, recheck: Recheck | None = None) -> None:
        """Let only its owner read the checkpoint; that it is private already is success.

        Raises:
            ApiError: it cannot be done.
        """
        self._change(Request(endpoints.UNPUBLISH, "/publish", recheck=recheck), ref)

    def set_ttl(
        self, ref: CheckpointRef, ttl_seconds: int | None, recheck: Recheck | None = None
    ) -> None:
        """Let the server delete the checkpoint after a while, or never.

        Args:
            ref: the checkpoint.
            ttl_seconds: seconds from now, 3600 to 315360000; None for never.
            recheck: as of the others.

        Raises:
            ApiError: it cannot be done; BadRequest out of range.
        """
        body = raw_json.dumps({"ttl_seconds": ttl_seconds})
        self._change(Request(endpoints.TTL, "/ttl", body, recheck=recheck), ref)

    def delete(self, ref: CheckpointRef, recheck: Recheck | None = None) -> None:
        """Delete the checkpoint for ever.

        Raises:
            ApiError: it cannot be done; NotFound where it is gone already; NotReady or Conflict
                while it is being written.
        """
        self._change(Request(endpoints.DELETE, "", recheck=recheck), ref)

    # Sessions and samplers

    def list_sessions(self, limit: int = 100, offset: int = 0) -> Page[str]:
        """Return one page of the ids of the user's sessions.

        Raises:
            ApiError: it cannot be had; EndpointMissing where the server has no sessions.
        """
        return self._list(endpoints.SESSIONS, parsing.parse_session_ids, limit, offset)

    def all_sessions(self) -> tuple[str, ...]:
        """Return the ids of all the user's sessions, page after page: there is no count of them.

        Raises:
            ApiError: as `list_sessions`; one page that fails fails all.
        """
        return self._all(self.list_sessions, lambda session_id: session_id)

    def session(self, session_id: str) -> Session:
        """Return one session's record.

        Raises:
            ApiError: it cannot be had; NotFound, or EndpointMissing where that can be told.
        """
        path = f"sessions/{id_segment(endpoints.SESSION, session_id)}?access_scope=accessible"
        return self._fetch_one(
            Request(endpoints.SESSION, path), lambda body: parsing.parse_session(session_id, body)
        )

    def search_sessions(
        self,
        *,
        display_name: str | None = None,
        statuses: tuple[str, ...] = (),
        limit: int = 100,
        cursor: object = None,
    ) -> SessionSearchPage:
        """Return one page of the sessions that match.

        Args:
            display_name: what the name must hold.
            statuses: one of which it must have; empty for any.
            limit: how many at once, 1 to 200.
            cursor: `next_cursor` of the page before.

        Raises:
            ApiError: it cannot be had; EndpointMissing where the server has no search.
        """
        query: dict[str, object] = {"limit": limit}
        if display_name is not None:
            query["display_name"] = display_name
        if statuses:
            query["statuses"] = list(statuses)
        if cursor is not None:
            query["cursor"] = cursor
        body = raw_json.dumps(query)
        request = Request(endpoints.SESSION_SEARCH, "sessions/search", body, str(uuid.uuid4()))
        return self._fetch_one(request, parsing.parse_found_sessions)

    def all_found_sessions(self) -> tuple[SessionSummary, ...]:
        """Return every session of the user as the search tells of it: a call for 200 of them.

        Raises:
            ApiError: as `search_sessions`; one page that fails fails all.
        """
        return pagination.read_all_found(
            lambda cursor: self.search_sessions(limit=_MOST_FOUND, cursor=cursor)
        )

    def sampler(self, sampler_id: str) -> Sampler:
        """Return one sampler's record.

        Raises:
            ApiError: it cannot be had; NotFound, or EndpointMissing where that can be told.
        """
        path = f"samplers/{id_segment(endpoints.SAMPLER, sampler_id)}"
        return self._fetch_one(
            Request(endpoints.SAMPLER, path), lambda body: parsing.parse_sampler(sampler_id, body)
        )

    # The server

    def capabilities(self) -> Capabilities:
        """Return what the server offers.

        Raises:
            ApiError: it cannot be had.
        """
        request = Request(endpoints.CAPABILITIES, "get_server_capabilities")
        return self._fetch_one(request, parsing.parse_capabilities)

    def health(self) -> str:
        """Return what the server says of itself, "ok" in general; works without a key.

        Raises:
            ApiError: it does not answer, or not as the API does.
        """
        request = Request(endpoints.HEALTH, "healthz", needs_key=False)
        _, fields = self._fetch_one(request, raw_json.parse_object)
        return errors.redact(str(fields.get("status", "")))

    def whoami(self) -> bytes:
        """Return what the server tells of the key, as JSON; nothing of it is secret.

        Raises:
            ApiError: it cannot be had; Unauthorized where the key is no good; EndpointMissing where
                the server does not tell.
        """
        raw, _ = self._fetch_one(Request(endpoints.WHOAMI, "auth/apikey/me"), raw_json.parse_object)
        return raw

    # What all of them share

    def _fetch_one(self, request: Request, parse: Callable[[bytes], T]) -> T:
        endpoint = request.endpoint
        refusals = 1 if endpoint.scope is Scope.ACCOUNT else UNSUPPORTED_THRESHOLD
        asking = self._lacks.guard(endpoint.label, refusals=refusals)
        with asking, self._guarded(request) as deadline:
            answer = self._transport.send(request, deadline, self._interest)
            return self._parsed(endpoint, answer, lambda answer: parse(answer.body))

    def _guarded(self, request: Request) -> AbstractContextManager[float]:
        """Return the breaker of a request's endpoint; it yields when to give up."""
        endpoint, deadline = request.endpoint, self._transport.deadline(request.hold_s)
        return self._breakers.guard(endpoint.label, deadline, is_build=endpoint.is_long_running)

    def _list(
        self,
        endpoint: Endpoint,
        parse: Callable[[bytes], Page[T]],
        limit: int,
        offset: int,
    ) -> Page[T]:
        query = urlencode({"limit": limit, "offset": offset})
        path = endpoint.label.partition(" ")[2]
        page = self._fetch_one(Request(endpoint, f"{path}?{query}"), parse)
        return self._unreadable.report(endpoint.label, page)

    def _all(
        self,
        fetch: Callable[[int, int], Page[T]],
        key: Callable[[T], Hashable],
        on_page: Callable[[tuple[T, ...]], None] = lambda _items: None,
    ) -> tuple[T, ...]:
        return pagination.fetch_all_pages(fetch, key, on_page=on_page, workers=self._concurrency)

    def _parsed(self, endpoint: Endpoint, answer: Response, parse: Callable[[Response], T]) -> T:
        try:
            return parse(answer)
        except errors.ProtocolError as error:
            host = urlsplit(answer.url).hostname
            raise errors.ProtocolError(
                f"{error.message} (from {host})", endpoint=endpoint.label, status=answer.status
            ) from None

    def _change(self, request: Request, ref: CheckpointRef) -> None:
        self._checkpoint_request(
            request, ref, lambda answer: parsing.check_change_response(answer.body)
        )

    def _checkpoint_request(
        self, request: Request, ref: CheckpointRef, parse: Callable[[Response], T]
    ) -> T:
        """Ask something of a checkpoint, in the form of its id that the server takes.

        Args:
            request: what to ask; its path is what follows the checkpoint's id.
            ref: the checkpoint.
            parse: reads a success.

        Raises:
            ApiError: what was met; of two forms, what says more.
        """
        endpoint = request.endpoint
        run = f"training_runs/{id_segment(endpoint, ref.run_id)}/checkpoints"
        kind = ref.path_id.partition("/")[0]  # SkyRL has archives of sampler checkpoints alone
        # Nor does what is refused of another account's checkpoints speak of one's own.
        what = (endpoint.label, kind, ref.run_id if ref.is_foreign else None)
        with self._lacks.guard(what), self._guarded(request) as deadline:

            def ask(checkpoint_id: str) -> T:
                path = f"{run}/{id_path(checkpoint_id)}{request.path}"
                whole = dataclasses.replace(request, path=path, exists=ref.exists)
                answer = self._transport.send(whole, deadline, self._interest)
                return self._parsed(endpoint, answer, parse)

            try:
                return self._forms.try_forms(endpoint, ref, ask)
            except errors.NotFound as error:
                if not (ref.exists and endpoint.method == "GET" and self._is_listed(ref)):
                    raise
                raise withheld(error, is_foreign=ref.is_foreign) from None
            except errors.UnsupportedEndpoint as error:
                if not (ref.is_foreign and error.status in (404, 410)):
                    raise
                raise withheld(error, is_foreign=True) from None

    def _is_listed(self, ref: CheckpointRef) -> bool:
        """Tell whether a checkpoint that an endpoint does not find is there all the same."""
        try:
            listed = self.list_checkpoints(ref.run_id)
        except errors.ApiError:
            return False
        return any(ref.is_of(each.tinker_path, each.checkpoint_id) for each in listed)
