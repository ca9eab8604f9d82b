"""Signed URLs in the answers that hold them (pure).

A signed URL is a bearer secret: no message here tells one.
"""

from urllib.parse import urljoin, urlsplit

from tinkerfs.api.endpoints import REDIRECTS
from tinkerfs.api.http_client import Response
from tinkerfs.api.models import SignedUrl
from tinkerfs.api.raw_json import parse_object
from tinkerfs.api.timestamps import parse_http_date_s, parse_time_ns
from tinkerfs.errors import ProtocolError

#: How long a signed URL is taken to be good where the server does not say, seconds.
LIFETIME_S = 15 * 60.0


def archive_url(answer: Response, now_s: float) -> SignedUrl:
    """Return where an archive is: a redirect's Location, or the `url` of an object.

    Args:
        answer: the archive endpoint's.
        now_s: seconds since 1970.

    Raises:
        ProtocolError: it tells no such place.
    """
    if answer.status in REDIRECTS:
        place = answer.headers.get("location")
        expires_at_s = parse_http_date_s(answer.headers.get("expires", ""))
        return SignedUrl(_checked(_joined(answer.url, place)), _expiry(expires_at_s, now_s))
    _, fields = parse_object(answer.body)
    return SignedUrl(_checked(fields.get("url")), _expiry(_seconds(fields.get("expires")), now_s))


def external_urls(answer: Response, now_s: float) -> tuple[dict[str, str], float]:
    """Return a signed URL for each file of an external checkpoint, and when they expire.

    Args:
        answer: the external weights endpoint's.
        now_s: seconds since 1970, as is the expiry.

    Raises:
        ProtocolError: it has no such list, or one of them is no URL: a file that is left out in
            silence is worse than no file.
    """
    _, fields = parse_object(answer.body)
    urls = fields.get("urls")
    if not isinstance(urls, dict):
        raise ProtocolError("the answer has no urls")
    return (
        {name: _checked(url) for name, url in urls.items()},
        _expiry(_seconds(fields.get("expires")), now_s),
    )


def _joined(asked: str, place: str | None) -> str | None:
    try:
        return urljoin(asked, place) if place else None
    except ValueError:
        return None


def _checked(url: object) -> str:
    try:
        if isinstance(url, str) and url.isprintable() and " " not in url:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https") and parts.hostname:
                return url
    except ValueError:
        pass
    raise ProtocolError("the answer has no http or https URL to read from")


def _expiry(told_s: float | None, now_s: float) -> float:
    """Return when a URL expires; a time that has passed is another's clock, or a plain `0`."""
    return told_s if told_s is not None and told_s > now_s else now_s + LIFETIME_S


def _seconds(value: object) -> float | None:
    ns = parse_time_ns(value)
    return None if ns is None else ns / 1e9
