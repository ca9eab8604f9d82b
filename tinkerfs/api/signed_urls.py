"""Extracts signed URLs from responses. Pure.

A signed URL is a bearer secret, so no error message contains one.
"""

from urllib.parse import urljoin, urlsplit

from tinkerfs.api.endpoints import REDIRECTS, TRACE
from tinkerfs.api.http_client import Response
from tinkerfs.api.models import SignedUrl
from tinkerfs.api.raw_json import parse_object
from tinkerfs.api.timestamps import parse_time_ns
from tinkerfs.errors import BuildFailed, ProtocolError, ResourceNotReady, redact
from tinkerfs.retry import parse_http_date_s, parse_retry_after_s

#: Assumed lifetime of a signed URL without an expiry, seconds.
LIFETIME_S = 15 * 60.0


def archive_url(response: Response, now_s: float) -> SignedUrl:
    """Return the archive's URL from a redirect's Location or a JSON object's `url`.

    Args:
        response: response of the archive endpoint.
        now_s: seconds since 1970.

    Raises:
        ProtocolError: the response has no valid URL.
    """
    if response.status in REDIRECTS:
        location = response.headers.get("location")
        expires_at_s = parse_http_date_s(response.headers.get("expires", ""))
        url = _validate(_resolve(response.url, location))
        return SignedUrl(url, _expiry_s(expires_at_s, now_s))
    _, fields = parse_object(response.body)
    url = _validate(fields.get("url"))
    return SignedUrl(url, _expiry_s(_seconds(fields.get("expires")), now_s))


def external_urls(response: Response, now_s: float) -> tuple[dict[str, str], float]:
    """Return signed URLs for an external checkpoint's files, and their expiry.

    Args:
        response: response of the external weights endpoint.
        now_s: seconds since 1970, like the expiry.

    Raises:
        ProtocolError: the response has no `urls`, or an invalid URL. An error is better than a
            silently missing file.
    """
    _, fields = parse_object(response.body)
    urls = fields.get("urls")
    if not isinstance(urls, dict):
        raise ProtocolError("the response has no urls")
    return (
        {name: _validate(url) for name, url in urls.items()},
        _expiry_s(_seconds(fields.get("expires")), now_s),
    )


def trace_url(response: Response, now_s: float) -> SignedUrl:
    """Return the URL of a session's trace (Tinker SDK 0.38, `rest_client.py`).

    Args:
        response: response of the trace endpoint.
        now_s: seconds since 1970.

    Raises:
        ResourceNotReady: the server is still building the trace.
        BuildFailed: the server could not build it.
        ProtocolError: the response has no status, or no valid URL.
    """
    _, fields = parse_object(response.body)
    status = fields.get("status")
    if status == "failed":
        reason = redact(str(fields.get("error") or "")) or "no reason given"
        raise BuildFailed(f"the trace could not be built: {reason}", endpoint=TRACE.label)
    if status == "ready" or fields.get("url") is not None:
        url = _validate(fields.get("url"))
        return SignedUrl(url, _expiry_s(_seconds(fields.get("expires")), now_s))
    if not isinstance(status, str):
        raise ProtocolError("the response has no status of the trace")
    raise ResourceNotReady(
        f"the trace is not built yet: {redact(status)}",
        endpoint=TRACE.label,
        retry_after_s=parse_retry_after_s(response.headers, now_s),
    )


def _resolve(base_url: str, location: str | None) -> str | None:
    try:
        return urljoin(base_url, location) if location else None
    except ValueError:
        return None


def _validate(url: object) -> str:
    try:
        if isinstance(url, str) and url.isprintable() and " " not in url:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https") and parts.hostname:
                return url
    except ValueError:
        pass
    raise ProtocolError("the response has no http or https URL to read from")


def _expiry_s(expires_at_s: float | None, now_s: float) -> float:
    """Return the expiry, or a default if it is missing, 0 or past due to clock skew."""
    if expires_at_s is not None and expires_at_s > now_s:
        return expires_at_s
    return now_s + LIFETIME_S


def _seconds(value: object) -> float | None:
    ns = parse_time_ns(value)
    return None if ns is None else ns / 1e9
