"""Sessions and samplers of the account: read-through, as `runs` is."""

from functools import partial

from tinkerfs import errors
from tinkerfs.api import models, raw_json
from tinkerfs.api.client import Client
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.context import Priority, RequestContext


class Sessions:
    """The sessions behind one key at one server. Thread-safe; waits only through a `Call`."""

    def __init__(self, client: Client, cache: MetadataCache, freshness: CachePolicies) -> None:
        self._client = client
        self._cache = cache
        self._freshness = freshness

    def list_ids(self, ctx: RequestContext) -> dict[str, models.SessionSummary]:
        """Return the user's sessions by id; a call for each page, none for each session.

        With names and times where the server has a search, else bare ids.
        """
        return self._cache.get(("sessions",), self._load_listed, self._freshness.listing, ctx)

    def changed_ns(self) -> int | None:
        """Return when the sessions were seen to change, nanoseconds since 1970; None if never."""
        changed_at = self._cache.last_changed(("sessions",))
        return None if changed_at is None else int(changed_at * 1e9)

    def cached(self) -> dict[str, models.SessionSummary]:
        """Return the sessions as last listed, without a call."""
        return self._cache.peek(("sessions",)) or {}

    def find(self, session_id: str, ctx: RequestContext) -> models.SessionSummary:
        """Return one session: of the listing where there is one, else asked for by itself.

        Raises:
            ApiError: NotFound, BadRequest or EndpointMissing where there is no such session.
        """
        if self.cached() and session_id in self.list_ids(ctx):
            return self.list_ids(ctx)[session_id]
        self.record(session_id, ctx)
        return _bare(session_id)

    def record(self, session_id: str, ctx: RequestContext) -> models.Session:
        """Return one session's record; one call when not fresh."""
        load = partial(self._load_session, session_id)
        return self._cache.get(("session", session_id), load, self._freshness.by_name, ctx)

    def sampler(self, sampler_id: str, ctx: RequestContext) -> models.Sampler:
        """Return one sampler's record; one call when not fresh."""
        load = partial(self._load_sampler, sampler_id)
        return self._cache.get(("sampler", sampler_id), load, self._freshness.by_name, ctx)

    def known_samplers(self) -> list[str]:
        """Return the samplers of the sessions that were looked into, without a call.

        The API lists samplers nowhere else.
        """
        records = (self._cache.peek(("session", session_id)) for session_id in self.cached())
        return [sampler_id for record in records if record for sampler_id in record.sampler_ids]

    def _load_listed(self, priority: Priority) -> dict[str, models.SessionSummary]:
        client = self._client.with_priority(priority)
        try:
            found = client.all_found_sessions()
        except (errors.UnsupportedEndpoint, errors.BadRequest):
            ids = client.all_sessions()
            found = tuple(map(_bare, ids))
        return {session.session_id: session for session in found}

    def _load_session(self, session_id: str, priority: Priority) -> models.Session:
        return self._client.with_priority(priority).session(session_id)

    def _load_sampler(self, sampler_id: str, priority: Priority) -> models.Sampler:
        return self._client.with_priority(priority).sampler(sampler_id)


def _bare(session_id: str) -> models.SessionSummary:
    """Return what is known of a session that no search told of."""
    raw = raw_json.with_fields(b"{}", session_id=session_id)
    return models.SessionSummary(session_id=session_id, raw=raw)
