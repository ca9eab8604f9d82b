"""Values that can be written to control files, and the actions that they trigger.

Each write(2) is one whole value, because bash, dash, tee and dd report an error of write(2) but
ignore one of close(2) (docs/semantics.md).
"""

import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.config import TTL_RANGE_S, parse_duration_s

if TYPE_CHECKING:
    from tinkerfs.context import RequestContext
    from tinkerfs.vfs.schema import Node

_YES = frozenset(("1", "true", "yes", "on"))
_NO = frozenset(("0", "false", "no", "off"))


def parse_flag(text: str, path: str) -> bool:
    """Parse a value of `published`; raise EINVAL if it is unknown."""
    value = text.strip().lower()
    if value in _YES:
        return True
    if value in _NO:
        return False
    raise errors.invalid(
        path,
        "invalid value"
        " (hint: write 1, true, yes or on to publish; 0, false, no or off to unpublish)",
    )


def parse_expiry_s(text: str, now: float, path: str) -> int | None:
    """Parse `expires_at`; return whole seconds from now, or None for never.

    Raises:
        OSError: ERANGE for a time that the API does not accept, EINVAL for an unknown format.
    """
    value = text.strip()
    if value.lower() == "never":
        return None
    if re.fullmatch(r"-\d+(\.\d*)?", value):
        raise _out_of_range(path)
    try:
        seconds = parse_duration_s(value)
    except ValueError:
        seconds = _seconds_until(value, now, path)
    min_s, max_s = TTL_RANGE_S
    if not min_s <= seconds < max_s + 1:
        raise _out_of_range(path)
    return math.floor(seconds)


def _seconds_until(value: str, now: float, path: str) -> float:
    try:
        time = datetime.fromisoformat(value.upper())
    except ValueError:
        time = None
    # RFC 3339 requires a date, a time and a zone; fromisoformat accepts less.
    if time is None or time.tzinfo is None or not re.match(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d", value):
        raise errors.invalid(
            path,
            "invalid expiry (hint: write a number of seconds (3600 to 315360000), a duration such"
            " as 12h or 30d, an RFC 3339 time such as 2030-01-31T12:00:00Z, or never)",
        )
    return time.astimezone(UTC).timestamp() - now


def _out_of_range(path: str) -> OSError:
    min_s, max_s = TTL_RANGE_S
    return errors.out_of_range(
        path, f"expiry out of range; it must be between {min_s} and {max_s} seconds from now"
    )


def write_published(node: "Node", text: str, ctx: "RequestContext") -> None:
    """Publish or unpublish the checkpoint."""
    if not text.strip():
        return
    is_published = parse_flag(text, node.path)
    node.backend.mutations.set_published(node.entity, is_published, node.path, ctx)


def write_expires_at(node: "Node", text: str, ctx: "RequestContext") -> None:
    """Set or clear the checkpoint's expiry."""
    if not text.strip():
        return
    ttl_s = parse_expiry_s(text, node.backend.clock.now(), node.path)
    node.backend.mutations.set_ttl(node.entity, ttl_s, node.path, ctx)


def write_trashed_expires_at(node: "Node", text: str, ctx: "RequestContext") -> None:
    """Restore a checkpoint from the trash, with the expiry that it had before."""
    value = text.strip().lower()
    if not value:
        return
    if value != "never":
        raise errors.invalid(
            node.path,
            "invalid value (hint: write never to restore the checkpoint with its previous expiry)",
        )
    node.backend.mutations.undelete(node.entity, node.path, ctx)


def write_refresh(node: "Node", text: str, _ctx: "RequestContext") -> None:
    """Invalidate all cached metadata and signed URLs."""
    del text
    node.backend.catalog.refresh()
    node.backend.weights.drop_urls()
