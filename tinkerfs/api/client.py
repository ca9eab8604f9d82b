"""Client of the Tinker API: one method per endpoint.

Used by the catalog and by the weight readers. The client has no file paths and no response cache.
It remembers only properties of the server: which form of a checkpoint id it accepts in a URL, which
endpoints are failing, and which endpoints it does not implement.

Every method raises subclasses of `errors.ApiError` and nothing else.
"""

import uuid
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlencode

from tinkerfs import errors
from tinkerfs.api import endpoints, pagination, parsing, raw_json, signed_urls
from tinkerfs.api.checkpoint_ids import CheckpointRef, capability, id_segment
from tinkerfs.api.circuit_breaker import (
    UNSUPPORTED,
    UNSUPPORTED_KIND,
    UNSUPPORTED_PAGE_SIZE,
)
from tinkerfs.api.endpoint_client import EndpointClient
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.api.http_client import Response
from tinkerfs.api.models import (
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
from tinkerfs.api.pagination import R, RecordList
from tinkerfs.api.transport import PageOfListing, Recheck, Request
from tinkerfs.validity import SharedReads

T = TypeVar("T")

#: Page size of the account's checkpoints (as in the CLI of Tinker SDK 0.38).
_ACCOUNT_PAGE_SIZE = 1000
#: Maximum page size of a session search (Tinker SDK 0.36, sessions/search).
_MAX_SEARCH_PAGE_SIZE = 200


class Client(EndpointClient):
    """The methods of the API. Thread-safe; see `EndpointClient` for its arguments."""

    # Training runs

    def list_training_runs(
        self, limit: int = 100, offset: int = 0, *, scope: str | None = None
    ) -> Page[TrainingRun]:
        """Return one page of the user's own training runs.

        Args:
            limit: page size.
            offset: number of runs before the page.
            scope: "accessible" for the runs that the user may read, as well as the own ones.
        """
        return self._list(endpoints.RUNS, parsing.parse_training_runs, limit, offset, scope)

    def all_training_runs(
        self, on_page: Callable[[RecordList[TrainingRun]], None] = lambda _arrived: None
    ) -> tuple[TrainingRun, ...]:
        """Return all training runs of the user.

        Sends one request per page. The pages after the first are requested in parallel, and one
        failed page fails the listing.

        Args:
            on_page: receives the runs that have arrived after each page, see `fetch_all_pages`.
        """
        return self._all(self.list_training_runs, lambda run: run.run_id, on_page)

    def all_accessible_runs(self) -> tuple[TrainingRun, ...]:
        """Return all training runs that the user may read; one request per page."""
        fetch = partial(self.list_training_runs, scope="accessible")
        return self._all(fetch, lambda run: run.run_id)

    def training_run(self, run_id: str) -> TrainingRun:
        """Return a training run that the user owns or that is public."""
        path = f"training_runs/{id_segment(endpoints.RUN, run_id)}?access_scope=accessible"
        return self._fetch_one(Request(endpoints.RUN, path), parsing.parse_training_run)

    # Checkpoints

    def list_checkpoints(self, run_id: str, *, exists: bool = False) -> tuple[Checkpoint, ...]:
        """Return all checkpoints of a run; this endpoint has no pages.

        If the run is known to exist (`exists`), a 404 means that the server lacks the endpoint.
        """
        return self._checkpoints_of(run_id, exists=exists).items

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> Page[Checkpoint]:
        """Return one page of the checkpoints of all the user's runs, newest first."""
        return self._list(endpoints.USER_CHECKPOINTS, parsing.parse_checkpoints, limit, offset)

    def all_user_checkpoints(
        self, new_records: Callable[[], R], on_page: Callable[[R], None] = lambda _arrived: None
    ) -> R:
        """Return all checkpoints of the user, newest first.

        Sends one request per page, in parallel after the first. One failed page fails the listing.
        Pages are larger than those of other listings, unless the server refuses their size.

        Args:
            new_records: returns an empty collection.
            on_page: receives the records that have arrived after each page, see `fetch_all_pages`.
        """
        arrived = new_records()

        def fetch_all(page_size: int) -> R:
            return self._listed(
                lambda: pagination.fetch_all_pages(
                    self.list_user_checkpoints,
                    new_records,
                    arrived,
                    on_page=on_page,
                    workers=self._concurrency,
                    page_size=page_size,
                )
            )

        large_pages = (endpoints.USER_CHECKPOINTS.label, _ACCOUNT_PAGE_SIZE)
        try:
            with self._breakers.guard(UNSUPPORTED_PAGE_SIZE, large_pages):
                return fetch_all(_ACCOUNT_PAGE_SIZE)
        except errors.BadRequest:
            return fetch_all(pagination.PAGE_SIZE)

    def weights_info(
        self, tinker_path: str, *, exists: bool = False, version: str = ""
    ) -> WeightsInfo:
        """Return the base model and LoRA parameters of a checkpoint's weights.

        Args:
            tinker_path: `tinker://...`.
            exists: whether the checkpoint is known to exist. Repeated BadRequests then mean that
                the server does not support this kind of checkpoint.
            version: which save of the checkpoint; empty if it is unknown.
        """
        body = raw_json.dumps({"tinker_path": tinker_path})
        request = Request(
            endpoints.WEIGHTS_INFO,
            "weights_info",
            body,
            str(uuid.uuid4()),
            exists,
            version=version,
        )
        kind = tinker_path.rpartition("/")[0].rpartition("/")[2]  # SkyRL supports only `weights`
        capability = (endpoints.WEIGHTS_INFO.label, kind)
        # If the path may be invalid, a BadRequest is about the path and not about the server.
        guard = self._breakers.guard(UNSUPPORTED_KIND, capability) if exists else nullcontext()
        with guard:
            return self._fetch_one(request, parsing.parse_weights_info)

    def archive(
        self, ref: CheckpointRef, hold_s: float = 0.0, reads: SharedReads | None = None
    ) -> SignedUrl:
        """Return a signed URL of the checkpoint's archive.

        The server may have to build the archive first, and may delay its response for `hold_s`
        seconds. The redirect is never followed, because the API key may be sent only to
        the origin of the API. Without `reads` the URL is not one that another host requested.

        Raises:
            ResourceNotReady: the server is still building the archive. `retry_after_s` is set if
                the server sent a delay.
            ApiError: the request failed. UnsupportedEndpoint means that the server provides no
                archives, or none of this kind of checkpoint.
        """
        request = Request(endpoints.ARCHIVE, "/archive", hold_s=hold_s)
        return self._checkpoint_request(
            request,
            ref,
            lambda response: signed_urls.archive_url(response, self._requested_at(response)),
            reads,
            lambda url: self._url_life_s(url.expires_at_s),
        )

    def _requested_at(self, response: Response) -> float:
        """Return when a response was requested, seconds since 1970."""
        return self._clock.now() - response.age_s

    def _url_life_s(self, expires_at_s: float) -> float:
        """Return how long a signed URL is shared: its last user has half of its validity left."""
        return (expires_at_s - self._clock.now()) / 2

    def check_supported(self, endpoint: Endpoint, ref: CheckpointRef | None = None) -> None:
        """Raise UnsupportedEndpoint if a request would, without one; `ref` is its checkpoint."""
        key = endpoint.label if ref is None else capability(endpoint, ref)
        self._breakers.check(UNSUPPORTED, key)

    def external_weights_urls(
        self, ref: CheckpointRef, reads: SharedReads | None = None
    ) -> tuple[dict[str, str], float]:
        """Return signed URLs for an external checkpoint's files, and their expiry.

        The URLs are secrets, and without `reads` not those that another host requested. The file
        names are not validated. The expiry is in seconds since 1970.
        """
        request = Request(endpoints.EXTERNAL_URLS, "/external_weights_urls")
        return self._checkpoint_request(
            request,
            ref,
            lambda response: signed_urls.external_urls(response, self._requested_at(response)),
            reads,
            lambda found: self._url_life_s(found[1]),
        )

    # Changes of a checkpoint. A change that the server may have received is retried only if
    # `recheck` permits it.

    def publish(self, ref: CheckpointRef, recheck: Recheck | None = None) -> None:
        """Publish the checkpoint; succeed if it is already public."""
        key = str(uuid.uuid4())
        self._change(Request(endpoints.PUBLISH, "/publish", None, key, recheck=recheck), ref)

    def unpublish(self, ref: CheckpointRef, recheck: Recheck | None = None) -> None:
        """Make the checkpoint private; succeed if it is already private."""
        self._change(Request(endpoints.UNPUBLISH, "/publish", recheck=recheck), ref)

    def set_ttl(
        self, ref: CheckpointRef, ttl_seconds: int | None, recheck: Recheck | None = None
    ) -> None:
        """Set the time after which the server deletes the checkpoint.

        `ttl_seconds` is counted from now, 3600 to 315360000; None disables the expiry.

        Raises:
            BadRequest: `ttl_seconds` is out of range.
            ApiError: the request failed.
        """
        body = raw_json.dumps({"ttl_seconds": ttl_seconds})
        self._change(Request(endpoints.TTL, "/ttl", body, recheck=recheck), ref)

    def delete(self, ref: CheckpointRef, recheck: Recheck | None = None) -> None:
        """Delete the checkpoint permanently.

        Raises:
            NotFound: the checkpoint does not exist any more.
            ResourceNotReady, Conflict: the checkpoint is still being written.
            ApiError: the request failed.
        """
        self._change(Request(endpoints.DELETE, "", recheck=recheck), ref)

    # Sessions and samplers

    def list_sessions(self, limit: int = 100, offset: int = 0) -> Page[str]:
        """Return one page of the ids of the user's sessions."""
        return self._list(endpoints.SESSIONS, parsing.parse_session_ids, limit, offset)

    def all_sessions(self) -> tuple[str, ...]:
        """Return the ids of all sessions of the user.

        Pages are requested one after the other, because the server sends no total count.
        """
        return self._all(self.list_sessions, lambda session_id: session_id)

    def session(self, session_id: str) -> Session:
        """Return the record of one session."""
        path = f"sessions/{id_segment(endpoints.SESSION, session_id)}?access_scope=accessible"
        return self._fetch_one(
            Request(endpoints.SESSION, path), lambda body: parsing.parse_session(session_id, body)
        )

    def trace_url(self, session_id: str) -> SignedUrl:
        """Return a signed URL of the trace of a session, which the server builds on request.

        Raises:
            ResourceNotReady, ApiError: as `archive`.
            BuildFailed: the server could not build the trace.
        """
        path = f"sessions/{id_segment(endpoints.TRACE, session_id)}/trace_export"
        request = Request(endpoints.TRACE, path)
        return self._fetch(
            request, lambda response: signed_urls.trace_url(response, self._clock.now())
        )

    def search_sessions(
        self,
        *,
        display_name: str | None = None,
        statuses: tuple[str, ...] = (),
        limit: int = 100,
        cursor: object = None,
    ) -> SessionSearchPage:
        """Return one page of the sessions that match all criteria.

        Args:
            display_name: substring of the session's name; None for any name.
            statuses: accepted statuses; empty for any status.
            limit: page size, 1 to 200.
            cursor: `next_cursor` of the previous page; None for the first page.
        """
        query: dict[str, object] = {"limit": limit}
        if display_name is not None:
            query["display_name"] = display_name
        if statuses:
            query["statuses"] = list(statuses)
        if cursor is not None:
            query["cursor"] = cursor
        body = raw_json.dumps(query)
        criteria = {name: value for name, value in query.items() if name != "cursor"}
        listing = f"sessions/search {raw_json.dumps(criteria).decode()}"
        request = Request(
            endpoints.SESSION_SEARCH,
            "sessions/search",
            body,
            str(uuid.uuid4()),
            page=PageOfListing(listing, is_first=cursor is None),
        )
        return self._fetch_one(request, parsing.parse_found_sessions)

    def all_found_sessions(self) -> tuple[SessionSummary, ...]:
        """Return summaries of all sessions of the user, one request per 200 sessions."""
        return self._listed(
            lambda: pagination.read_all_found(
                lambda cursor: self.search_sessions(limit=_MAX_SEARCH_PAGE_SIZE, cursor=cursor)
            )
        )

    def sampler(self, sampler_id: str) -> Sampler:
        """Return the record of one sampler."""
        path = f"samplers/{id_segment(endpoints.SAMPLER, sampler_id)}"
        return self._fetch_one(
            Request(endpoints.SAMPLER, path), lambda body: parsing.parse_sampler(sampler_id, body)
        )

    def post(self, endpoint: Endpoint, path: str, fields: Mapping[str, object]) -> dict[str, Any]:
        """Send a JSON object to the percent-encoded `path`; return the object in the response."""
        request = Request(endpoint, path, raw_json.dumps(fields), str(uuid.uuid4()))
        return self._fetch_one(request, lambda body: raw_json.loads_object(body) or {})

    # The server

    def whoami(self) -> bytes:
        """Return the server's record of the API key as JSON without secrets.

        Raises:
            Unauthorized: the server rejected the key.
            ApiError: the request failed.
        """
        raw, _ = self._fetch_one(Request(endpoints.WHOAMI, "auth/apikey/me"), raw_json.parse_object)
        return raw

    # Listings of several pages

    def _list(
        self,
        endpoint: Endpoint,
        parse: Callable[[bytes], Page[T]],
        limit: int,
        offset: int,
        scope: str | None = None,
    ) -> Page[T]:
        scope_query = {} if scope is None else {"access_scope": scope}
        query = urlencode({"limit": limit, "offset": offset, **scope_query})
        path = endpoint.label.partition(" ")[2]
        listing = f"{path} {limit} {scope}"
        request = Request(
            endpoint, f"{path}?{query}", page=PageOfListing(listing, is_first=offset == 0)
        )
        page = self._fetch_one(request, parse)
        return self._skipped.report(endpoint.label, page)

    def _all(
        self,
        fetch: Callable[[int, int], Page[T]],
        key: Callable[[T], Hashable],
        on_page: Callable[[RecordList[T]], None] = lambda _arrived: None,
    ) -> tuple[T, ...]:
        arrived = RecordList(key)
        records = self._listed(
            lambda: pagination.fetch_all_pages(
                fetch,
                lambda: RecordList(key),
                arrived,
                on_page=on_page,
                workers=self._concurrency,
            )
        )
        return tuple(records)

    def _listed(self, fetch_all: Callable[[], T]) -> T:
        """Fetch a listing, and all of it again if another host has not shared all of its pages."""
        try:
            return fetch_all()
        except pagination.SnapshotGone:
            return fetch_all()
