"""The endpoints that change a checkpoint: publish, unpublish, TTL, delete."""

import math
from collections.abc import Callable
from typing import Any

from tinkerfs.demo.account import Account
from tinkerfs.demo.http import Reply, json_reply
from tinkerfs.demo.lookup import Lookup, Refusal
from tinkerfs.demo.profiles import Profile
from tinkerfs.demo.request_log import Entry
from tinkerfs.demo.sample_data import Checkpoint

TTL_RANGE_S = (3600, 315_360_000)
"""The shortest and the longest time to live that is accepted: an hour, ten years."""


class Changes:
    """Handlers of the API, called with the account's lock held."""

    def __init__(
        self, account: Account, profile: Profile, lookup: Lookup, clock: Callable[[], float]
    ) -> None:
        self._account, self._profile, self._lookup = account, profile, lookup
        self._clock = clock

    def publish(self, _entry: Entry, args: dict[str, str]) -> Reply:
        """Make a checkpoint public; 409 when it is."""
        checkpoint = self._own(args)
        if checkpoint.is_public:
            raise Refusal(409, "Checkpoint is already public")
        checkpoint.is_public = True
        return self._done()

    def unpublish(self, _entry: Entry, args: dict[str, str]) -> Reply:
        """Make a checkpoint private; 409 when it is."""
        checkpoint = self._own(args)
        if not checkpoint.is_public:
            raise Refusal(409, "Checkpoint is already private")
        checkpoint.is_public = False
        return self._done()

    def set_ttl(self, entry: Entry, args: dict[str, str]) -> Reply:
        """Set when a checkpoint expires, or that it never does."""
        checkpoint = self._own(args)
        body = self._lookup.body(entry)
        ttl_s: Any = body.get("ttl_seconds")
        if "ttl_seconds" not in body or isinstance(ttl_s, (bool, str, float, list, dict)):
            raise Refusal(422, [{"loc": ["body", "ttl_seconds"], "msg": "integer or null"}])
        least_s, most_s = TTL_RANGE_S
        if ttl_s is not None and not least_s <= ttl_s <= most_s:
            raise Refusal(400, f"ttl_seconds must be from {least_s} to {most_s}")
        checkpoint.expires_at_s = None if ttl_s is None else math.floor(self._clock()) + ttl_s
        return self._done()

    def delete(self, _entry: Entry, args: dict[str, str]) -> Reply:
        """Delete a checkpoint; 425 while it is being written."""
        try:
            checkpoint = self._own(args)
        except Refusal as refusal:
            if self._profile.is_delete_blind and "/" not in args["ckpt"] and refusal.detail:
                return json_reply({"deleted": True})
            raise
        if checkpoint.is_pending:
            raise Refusal(425, "Checkpoint is still being created")
        self._account.delete_checkpoint(args["run"], checkpoint.id)
        return json_reply({"deleted": True}) if self._profile.is_delete_blind else self._done()

    def _own(self, args: dict[str, str]) -> Checkpoint:
        """Return a checkpoint that the account may change."""
        _run, checkpoint = self._lookup.checkpoint(
            args["run"], args["ckpt"], self._profile.change_ids, self._profile.kinds
        )
        if not self._account.owns(args["run"]):
            raise Refusal(404, f"Checkpoint not found: {args['run']}/{args['ckpt']}")
        return checkpoint

    def _done(self) -> Reply:
        if self._profile.change_status == 204:
            return Reply(204)
        return json_reply({}, self._profile.change_status)
