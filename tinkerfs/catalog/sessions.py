"""Sessions and samplers of the account: read-through, as `runs` is."""

from functools import partial

from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.api.client import Client
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.catalog.policies import Freshness
from tinkerfs.context import Call, Interest

__all__ = ["Sessions"]


class Sessions:
    """The sessions behind one key at one server. Thread-safe; waits only through a `Call`."""

    def __init__(self, client: Client, cache: MetadataCache, freshness: Freshness) -> None:
        self._client = client
        self._cache = cache
        self._freshness = freshness

    def listed(self, call: Call) -> dict[str, models.FoundSession]:
        """Return the user's sessions by id; a call for each page, none for each session.

        With names and times where the server has a search, else bare ids.
        """
        return self._cache.get(("sessions",), self._load_listed, self._freshness.listing, call)

    def changed_ns(self) -> int | None:
        """Return when the sessions were seen to change, nanoseconds since 1970; None if never."""
        changed_at = self._cache.changed_at(("sessions",))
        return None if changed_at is None else int(changed_at * 1e9)

    def known(self) -> dict[str, models.FoundSession]:
        """Return the sessions as last listed, without a call."""
        return self._cache.peek(("sessions",)) or {}

    def find(self, session_id: str, call: Call) -> models.FoundSession:
        """Return one session: of the listing where there is one, else asked for by itself.

        Raises:
            ApiError: NotFound, BadRequest or EndpointMissing where there is no such session.
        """
        if self.known() and session_id in self.listed(call):
            return self.listed(call)[session_id]
        self.record(session_id, call)
        return _bare(session_id)

    def record(self, session_id: str, call: Call) -> models.Session:
        """Return one session's record; one call when not fresh."""
        load = partial(self._load_session, session_id)
        return self._cache.get(("session", session_id), load, self._freshness.by_name, call)

    def sampler(self, sampler_id: str, call: Call) -> models.Sampler:
        """Return one sampler's record; one call when not fresh."""
        load = partial(self._load_sampler, sampler_id)
        return self._cache.get(("sampler", sampler_id), load, self._freshness.by_name, call)

    def known_samplers(self) -> list[str]:
        """Return the samplers of the sessions that were looked into, without a call.

        The API lists samplers nowhere else.
        """
        records = (self._cache.peek(("session", session_id)) for session_id in self.known())
        return [sampler_id for record in records if record for sampler_id in record.sampler_ids]

    def _load_listed(self, interest: Interest) -> dict[str, models.FoundSession]:
        client = self._client.on_behalf(interest)
        try:
            found = client.all_found_sessions()
        except (errors.EndpointMissing, errors.BadRequest):
            ids = client.all_sessions()
            found = tuple(map(_bare, ids))
        return {session.session_id: session for session in found}

    def _load_session(self, session_id: str, interest: Interest) -> models.Session:
        return self._client.on_behalf(interest).session(session_id)

    def _load_sampler(self, sampler_id: str, interest: Interest) -> models.Sampler:
        return self._client.on_behalf(interest).sampler(sampler_id)


def _bare(session_id: str) -> models.FoundSession:
    """Return what is known of a session that no search told of."""
    raw = models.with_fields(b"{}", session_id=session_id)
    return models.FoundSession(session_id=session_id, raw=raw)
