"""Read-through cache of the account's sessions and samplers."""

from functools import partial
from itertools import islice

from tinkerfs import errors
from tinkerfs.api import models, raw_json
from tinkerfs.api.client import Client
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.catalog.cached_listing import CachedListing
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.context import BACKGROUND_CONTEXT, Priority, RequestContext


class Sessions:
    """The sessions and samplers of one account on one server.

    Thread-safe. Methods wait only through their `RequestContext`.

    Attributes:
        listing: the user's sessions by id. The summaries have names and times if the server
            supports searches, otherwise only ids.
    """

    def __init__(
        self, client: Client, cache: MetadataCache, policies: CachePolicies, concurrency: int
    ) -> None:
        self._client = client
        self._concurrency = concurrency
        self._supports_search = True  # until the server refuses one
        self._cache = cache
        self._policies = policies
        self.listing = CachedListing(cache, ("sessions",), self._load_sessions, policies.listing)

    def find(self, session_id: str, ctx: RequestContext) -> models.SessionSummary:
        """Return one session, from the cached listing or by its own request.

        Raises:
            ApiError: NotFound, BadRequest or UnsupportedEndpoint if the session does not exist.
        """
        listed = self.listing.get(ctx) if self.listing.peek(ctx) else {}
        if session_id in listed:
            return listed[session_id]
        self.record(session_id, ctx)
        return _summary_from_id(session_id)

    def summary(self, session_id: str, ctx: RequestContext) -> models.SessionSummary:
        """Return the search result of a session; only its id if that is unavailable.

        One request per 200 sessions if the listing is not fresh, and none if the server is known
        to support no search.
        """
        if self._supports_search:
            try:
                found = self.listing.get(ctx).get(session_id)
            except errors.ApiError:
                ctx.mark_uncacheable()
                found = None
            if found is not None:
                return found
        return _summary_from_id(session_id)

    def record(self, session_id: str, ctx: RequestContext) -> models.Session:
        """Return a session's record; one request if it is not fresh."""
        load = partial(self._load_session, session_id)
        return self._cache.get(("session", session_id), load, self._policies.by_name, ctx)

    def project_ids(self, ctx: RequestContext) -> list[str]:
        """Return the projects of the user's sessions; empty if the server names none."""
        found = (session.project_id for session in self.listing.get(ctx).values())
        return list(dict.fromkeys(project_id for project_id in found if project_id))

    def runs_of_project(self, project_id: str, ctx: RequestContext) -> list[str]:
        """Return the ids of a project's training runs; one request per session of the project."""
        listed = self.listing.get(ctx).values()
        session_ids = [s.session_id for s in listed if s.project_id == project_id]
        prefetches = iter(session_ids)
        run_ids: dict[str, None] = {}
        for position, session_id in enumerate(session_ids):
            for following in islice(prefetches, 1 if position else self._concurrency):
                self._prefetch_record(following)
            try:
                run_ids.update(dict.fromkeys(self.record(session_id, ctx).training_run_ids))
            except errors.NOT_FOUND_ERRORS:  # the session was removed after it was listed
                continue
        return list(run_ids)

    def _prefetch_record(self, session_id: str) -> None:
        load = partial(self._load_session, session_id)
        self._cache.prefetch(("session", session_id), load, self._policies.by_name)

    def sampler(self, sampler_id: str, ctx: RequestContext) -> models.Sampler:
        """Return a sampler's record; one request if it is not fresh."""
        load = partial(self._load_sampler, sampler_id)
        return self._cache.get(("sampler", sampler_id), load, self._policies.by_name, ctx)

    def cached_sampler_ids(self, ctx: RequestContext) -> list[str]:
        """Return the samplers of all cached session records, without a request.

        The API lists samplers only in session records.
        """
        session_ids = self.listing.peek(ctx) or ()
        records = [self._cache.peek(("session", id_), BACKGROUND_CONTEXT) for id_ in session_ids]
        if None in records:
            ctx.mark_uncacheable()
        return [sampler_id for record in records if record for sampler_id in record.sampler_ids]

    def _load_sessions(self, priority: Priority) -> dict[str, models.SessionSummary]:
        client = self._client.with_priority(priority)
        try:
            found = client.all_found_sessions()
            self._supports_search = True
        except (errors.UnsupportedEndpoint, errors.BadRequest):
            self._supports_search = False
            found = tuple(map(_summary_from_id, client.all_sessions()))
        return {session.session_id: session for session in found}

    def _load_session(self, session_id: str, priority: Priority) -> models.Session:
        return self._client.with_priority(priority).session(session_id)

    def _load_sampler(self, sampler_id: str, priority: Priority) -> models.Sampler:
        return self._client.with_priority(priority).sampler(sampler_id)


def _summary_from_id(session_id: str) -> models.SessionSummary:
    """Return the summary of a session of which only the id is known."""
    raw = raw_json.with_fields(b"{}", session_id=session_id)
    return models.SessionSummary(session_id=session_id, raw=raw)
