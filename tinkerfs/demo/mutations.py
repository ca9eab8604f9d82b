"""Handlers of the endpoints that change a checkpoint: publish, TTL, delete."""

import math
from collections.abc import Callable
from typing import Any

from tinkerfs.demo.account import Account
from tinkerfs.demo.http import Reply, json_reply
from tinkerfs.demo.lookup import HttpError, Lookup
from tinkerfs.demo.profiles import Profile
from tinkerfs.demo.request import Request
from tinkerfs.demo.sample_data import Checkpoint

TTL_RANGE_S = (3600, 315_360_000)
"""Minimum and maximum TTL that the API accepts: an hour and ten years."""


class MutationEndpoints:
    """API handlers, called with the account's lock held."""

    def __init__(
        self, account: Account, profile: Profile, lookup: Lookup, clock: Callable[[], float]
    ) -> None:
        self._account, self._profile, self._lookup = account, profile, lookup
        self._clock = clock

    def publish(self, _request: Request, args: dict[str, str]) -> Reply:
        """Make a checkpoint public; 409 if it is already public."""
        checkpoint = self._own(args)
        if self._profile.publishes_to_hub:
            return self._done()
        if checkpoint.is_public:
            raise HttpError(409, "Checkpoint is already public")
        checkpoint.is_public = True
        return self._done()

    def unpublish(self, _request: Request, args: dict[str, str]) -> Reply:
        """Make a checkpoint private; 409 if it is already private."""
        checkpoint = self._own(args)
        if not checkpoint.is_public:
            raise HttpError(409, "Checkpoint is already private")
        checkpoint.is_public = False
        return self._done()

    def set_ttl(self, request: Request, args: dict[str, str]) -> Reply:
        """Set or clear the expiry of a checkpoint."""
        checkpoint = self._own(args)
        body = self._lookup.body(request)
        ttl_s: Any = body.get("ttl_seconds")
        if "ttl_seconds" not in body or isinstance(ttl_s, (bool, str, float, list, dict)):
            raise HttpError(422, [{"loc": ["body", "ttl_seconds"], "msg": "integer or null"}])
        min_s, max_s = TTL_RANGE_S
        if ttl_s is not None and not min_s <= ttl_s <= max_s:
            raise HttpError(400, f"ttl_seconds must be from {min_s} to {max_s}")
        expires_at_s = None if ttl_s is None else math.floor(self._clock()) + ttl_s
        self._account.set_expiry(args["run"], checkpoint, expires_at_s)
        return self._done()

    def delete(self, _request: Request, args: dict[str, str]) -> Reply:
        """Delete a checkpoint; 425 while it is being created."""
        try:
            checkpoint = self._own(args)
        except HttpError as error:
            if self._profile.is_delete_blind and "/" not in args["ckpt"] and error.detail:
                return json_reply({"deleted": True})
            raise
        if checkpoint.is_pending:
            raise HttpError(425, "Checkpoint is still being created")
        self._account.delete_checkpoint(args["run"], checkpoint.id)
        return json_reply({"deleted": True}) if self._profile.is_delete_blind else self._done()

    def _own(self, args: dict[str, str]) -> Checkpoint:
        """Return a checkpoint of the account's own; 404 for those of other users."""
        _run, checkpoint = self._lookup.checkpoint(
            args["run"], args["ckpt"], self._profile.change_ids, self._profile.kinds
        )
        if not self._account.owns(args["run"]):
            raise HttpError(404, f"Checkpoint not found: {args['run']}/{args['ckpt']}")
        return checkpoint

    def _done(self) -> Reply:
        if self._profile.change_status == 204:
            return Reply(204)
        return json_reply({}, self._profile.change_status)
