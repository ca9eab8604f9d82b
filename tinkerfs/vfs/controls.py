"""What may be written to the control files, and what it does.

Each `write` is one whole value: bash, dash, tee and dd see an error of `write`, and lose one of
`flush` or `close` (measured; docs/semantics.md).
"""

import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.config import TTL_RANGE_S, parse_duration_s

if TYPE_CHECKING:
    from tinkerfs.vfs.schema import NodeContext

_YES = frozenset(("1", "true", "yes", "on"))
_NO = frozenset(("0", "false", "no", "off"))


def parse_flag(text: str, path: str) -> bool:
    """Read what is written to `published`.

    Raises:
        OSError: EINVAL for anything else than the eight words.
    """
    word = text.strip().lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise errors.invalid(
        path, "write 1, true, yes or on to publish; 0, false, no or off to unpublish"
    )


def parse_expiry_s(text: str, now: float, path: str) -> int | None:
    """Read what is written to `expires_at`: whole seconds from now, None for never.

    Raises:
        OSError: ERANGE for a time that the API does not take, EINVAL for nonsense.
    """
    word = text.strip()
    if word.lower() == "never":
        return None
    if re.fullmatch(r"-\d+(\.\d*)?", word):
        raise _out_of_range(path)
    try:
        seconds = parse_duration_s(word)
    except ValueError:
        seconds = _seconds_until(word, now, path)
    shortest, longest = TTL_RANGE_S
    if not shortest <= seconds < longest + 1:
        raise _out_of_range(path)
    return math.floor(seconds)


def _seconds_until(word: str, now: float, path: str) -> float:
    try:
        time = datetime.fromisoformat(word.upper())
    except ValueError:
        time = None
    # RFC 3339 has a date, a time and a zone; fromisoformat also takes less.
    if time is None or time.tzinfo is None or not re.match(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d", word):
        raise errors.invalid(
            path,
            "write a number of seconds (3600 to 315360000), a duration such as 12h or 30d, "
            "an RFC 3339 time such as 2030-01-31T12:00:00Z, or never",
        )
    return time.astimezone(UTC).timestamp() - now


def _out_of_range(path: str) -> OSError:
    shortest, longest = TTL_RANGE_S
    return errors.out_of_range(
        path, f"a checkpoint can expire between {shortest} and {longest} seconds from now"
    )


def store_published(site: "NodeContext", text: str) -> None:
    """Publish or unpublish the checkpoint."""
    if not text.strip():
        return
    wanted = parse_flag(text, site.path)
    site.model.mutations.set_published(site.entity, wanted, site.path, site.call)


def store_expires_at(site: "NodeContext", text: str) -> None:
    """Set or clear the checkpoint's expiry."""
    if not text.strip():
        return
    ttl_s = parse_expiry_s(text, site.model.clock.now(), site.path)
    site.model.mutations.set_ttl(site.entity, ttl_s, site.path, site.call)


def store_trashed_expires_at(site: "NodeContext", text: str) -> None:
    """Restore a checkpoint from the trash, with the expiry that it had before."""
    word = text.strip().lower()
    if not word:
        return
    if word != "never":
        raise errors.invalid(site.path, "write never to restore it with the expiry it had before")
    site.model.mutations.undelete(site.entity, site.path, site.call)


def store_refresh(site: "NodeContext", text: str) -> None:
    """Drop every cached entry."""
    del text
    site.model.catalogue.refresh()
    site.model.archives.forget()
