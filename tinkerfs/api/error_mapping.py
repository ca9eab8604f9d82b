"""What an answer that is no success means, and in whose words (pure).

    status and body  ->  server_words, is_generic  ->  failure_of  ->  one of tinkerfs.errors

The one decision with judgement in it, whether a thing or a whole endpoint is missing, is
`missing_kind`.
"""

import re
from collections.abc import Iterator, Mapping
from html import unescape

from tinkerfs import errors
from tinkerfs.api import raw_json, timestamps
from tinkerfs.api.endpoints import Endpoint, Scope
from tinkerfs.errors import ApiError


def withheld(error: ApiError, *, is_foreign: bool) -> errors.UnsupportedEndpoint:
    """Return the failure that a server does not give something of a checkpoint that it lists.

    It may lack the endpoint, or refuse it: another account's public checkpoint is often refused by
    "not found".

    Args:
        error: a 404 or 410.
        is_foreign: whether the checkpoint is known to be another account's.
    """
    message = error.message
    if not isinstance(error, errors.UnsupportedEndpoint):
        message += " (which is listed all the same)"
    failure = errors.UnsupportedEndpoint(message, endpoint=error.endpoint, status=error.status)
    if is_foreign:
        failure.reason = "the server does not give this of another account's checkpoint"
    elif not isinstance(error, errors.UnsupportedEndpoint):
        failure.reason += ", or not for this checkpoint"
    return failure


def classify_missing(
    status: int, scope: Scope, *, is_generic_body: bool, is_known: bool
) -> type[ApiError]:
    """Tell whether a 404, 405, 410 or 501 means a missing thing or a missing endpoint.

    A router that has no such route answers as its framework does: 405 or 501, or a 404 with a body
    that names nothing. A handler that looked for a thing says what it did not find. So:

    - 405 and 501 always speak of the endpoint.
    - ACCOUNT names nothing: a generic 404 speaks of the endpoint, and so does every 410.
    - OPTIONAL_THING: a generic 404 speaks of the endpoint. Nobody knows whether the thing exists.
    - OPTIONAL_DEED: where a listing has just shown the checkpoint, a generic 404, and every 410
      (the official service's word for what it dropped), speak of the endpoint; else of the thing.
    - THING: 404 and 410 speak of the thing.

    Args:
        status: 404, 405, 410 or 501.
        scope: what the endpoint is.
        is_generic_body: whether the body names nothing, see `is_generic`.
        is_known: whether the thing is known to exist, from a listing.
    """
    if status in (405, 501):
        return errors.UnsupportedEndpoint
    if scope is Scope.ACCOUNT:
        is_endpoint = status == 410 or is_generic_body
    elif scope is Scope.OPTIONAL_RESOURCE:
        is_endpoint = status == 404 and is_generic_body
    elif scope is Scope.OPTIONAL_ACTION:
        is_endpoint = is_known and (status == 410 or is_generic_body)
    else:
        is_endpoint = False
    return errors.UnsupportedEndpoint if is_endpoint else errors.NotFound


#: What frameworks and proxies say of a route that they do not have: Starlette and Werkzeug, nginx,
#: Go's net/http, Express, Rails. No part gives back what it matched: time stays linear.
_GENERIC_WORDS = re.compile(
    r"(?:error\W*+)?+(?:404\W*+)?+(?:page )?+"
    r"(?:not found|no such route|no route matches.*|cannot (?:get|post|put|delete) /.*"
    r"|the requested url was not found on (?:the|this) server.*)?+\W*+",
    re.IGNORECASE | re.DOTALL,
)


def is_generic(content_type: str, body: bytes) -> bool:
    """Tell whether an error's body comes from a router rather than from a handler.

    That is: it is empty, HTML, or words that name nothing, such as `{"detail": "Not Found"}`.
    """
    if _is_html(content_type, body):
        return True
    return _GENERIC_WORDS.fullmatch(_plain_words(body).strip()) is not None


#: Which failure a status is, where nothing else decides.
_KIND_OF_STATUS: dict[int, type[ApiError]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    403: errors.Unauthorized,
    408: errors.RequestTimeout,
    409: errors.Conflict,
    422: errors.BadRequest,
    425: errors.ResourceNotReady,
    429: errors.RateLimited,
}
_MISSING = frozenset({404, 405, 410, 501})


def error_from_response(
    endpoint: Endpoint,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    host: str,
    now_s: float,
    is_known: bool = False,
) -> ApiError:
    """Return the failure that an answer is, with the server's own words in it.

    Args:
        endpoint: what was asked.
        status: the answer's status, 300 or more.
        headers: the answer's headers.
        body: the answer's body.
        host: whose answer it is, told where it is no API's answer at all.
        now_s: seconds since 1970.
        is_known: whether the thing asked about is known to exist.
    """
    kind: type[ApiError]
    words = error_message(status, headers.get("content-type", ""), body)
    if status < 400:
        # Only the host: the place that it points to may be a signed URL.
        kind, words = errors.ProtocolError, f"unexpected redirect by {host}"
    elif status in _MISSING:
        kind = classify_missing(
            status,
            endpoint.scope,
            is_generic_body=is_generic(headers.get("content-type", ""), body),
            is_known=is_known,
        )
    elif status == 503 and status in endpoint.non_retryable_statuses:
        kind = errors.ResourceNotReady
    elif status >= 600:
        kind, words = errors.ProtocolError, f"{host} answered with no HTTP status"
    else:
        kind = _KIND_OF_STATUS.get(
            status, errors.ServerError if status >= 500 else errors.ClientError
        )
    return kind(
        words,
        endpoint=endpoint.label,
        status=status,
        retry_after_s=timestamps.parse_retry_after_s(headers, now_s),
    )


_PHRASES = {
    400: "bad request",
    401: "the key was refused",
    403: "not allowed",
    404: "not found",
    405: "the server has no such endpoint",
    408: "the server gave up waiting for the request",
    409: "conflict",
    410: "gone",
    425: "not ready yet",
    429: "too many requests",
    501: "the server has no such endpoint",
    502: "the proxy in front of the API got no answer",
    503: "the service is not available now",
    504: "the proxy in front of the API got no answer in time",
}


def error_message(status: int, content_type: str, body: bytes) -> str:
    """Return what the server says of its failure, redacted, on one line; never empty."""
    words = _html_words(_as_text(body)) if _is_html(content_type, body) else _plain_words(body)
    return errors.redact(words) or _PHRASES.get(status, f"status {status}, without a word")


#: How much of an error is looked at, bytes or characters: people see 500 of them.
_MAX_WORDS = 20_000


def _plain_words(body: bytes) -> str:
    """Return the words of a JSON or plain-text error body."""
    try:
        _, fields = raw_json.parse_object(body)
    except errors.ProtocolError:
        text = _as_text(body).strip()
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    for name in ("detail", "error", "message"):
        if words := _detail_text(fields.get(name)):
            return words
    return _as_text(body) if fields else ""


#: How deep the words of an error are looked for: a validation error is a list of objects.
_MAX_DEPTH = 8


def _detail_text(value: object, depth: int = 0) -> str:
    """Return the words in a `detail`: a string, a list of validation errors, or an object."""
    if isinstance(value, str):
        return value[:_MAX_WORDS].strip()
    if depth >= _MAX_DEPTH:
        return ""
    if isinstance(value, list):
        return "; ".join(words for item in value[:5] if (words := _detail_text(item, depth + 1)))
    if isinstance(value, dict):
        words = next(
            (
                w
                for name in ("msg", "message", "detail", "error")
                if (w := _detail_text(value.get(name), depth + 1))
            ),
            "",
        )
        place = value.get("loc")
        if words and isinstance(place, list) and place:
            names = (str(part)[:100] for part in place[:8] if isinstance(part, str | int))
            return ".".join(names) + ": " + words
        return words
    return ""


def _as_text(body: bytes) -> str:
    return body[:_MAX_WORDS].decode("utf-8", "replace")


def _is_html(content_type: str, body: bytes) -> bool:
    start = body[:200].lstrip().lower()
    return "html" in content_type.lower() or start.startswith((b"<!doctype", b"<html", b"<?xml"))


_TITLE = re.compile(r"<title[^>]{0,200}>", re.IGNORECASE)
_TITLE_END = re.compile(r"</title", re.IGNORECASE)
#: What begins a part of a page that is not shown -> what ends it.
_UNSEEN = re.compile(r"<(script|style|head)\b|<(!--)", re.IGNORECASE)
_UNSEEN_ENDS = {
    "script": re.compile(r"</script\b", re.IGNORECASE),
    "style": re.compile(r"</style\b", re.IGNORECASE),
    "head": re.compile(r"</head\b", re.IGNORECASE),
    "!--": re.compile(r"--"),
}
#: A reference to a character that no character has; `unescape` raises for one of 4,301 digits.
_LONG_REFERENCE = re.compile(r"&#\d{9,}+;?")


def _html_words(page: str) -> str:
    """Return a page's title, else its text."""
    title = _TITLE.search(page)
    end = _TITLE_END.search(page, title.end()) if title else None
    if title and end and (words := _unescaped(page[title.end() : end.start()]).strip()):
        return words
    return _unescaped("".join(_seen(page)))


def _unescaped(text: str) -> str:
    return unescape(_LONG_REFERENCE.sub(" ", text))


def _seen(page: str) -> Iterator[str]:
    """Yield the text between the tags of a page.

    In time in proportion to the page: no search goes on from where one like it has found nothing.
    """
    position = 0
    endless: set[str] = set()
    while (start := page.find("<", position)) >= 0:
        yield page[position:start]
        yield " "
        position = start
        unseen = _UNSEEN.match(page, start)
        kind = unseen[unseen.lastindex or 0].lower() if unseen else ""
        if unseen and kind not in endless:
            end = _UNSEEN_ENDS[kind].search(page, unseen.end())
            if end:
                position = end.end()
            else:
                endless.add(kind)
        position = page.find(">", position) + 1
        if not position:
            yield page[start:]
            return
    yield page[position:]
