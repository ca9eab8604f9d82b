"""Maps error responses to the exceptions in `tinkerfs.errors`. Pure.

    status and body  ->  error_message, is_generic  ->  error_from_response  ->  ApiError

`classify_missing` decides whether a resource or the whole endpoint is missing.
"""

import re
from collections.abc import Iterator, Mapping
from html import unescape

from tinkerfs import errors
from tinkerfs.api import raw_json
from tinkerfs.api.endpoints import Endpoint, Scope
from tinkerfs.api.http_client import request_id_of
from tinkerfs.errors import ApiError
from tinkerfs.retry import parse_retry_after_s


def withheld(error: ApiError, *, is_own: bool) -> errors.UnsupportedEndpoint:
    """Return the error for a "not found" response about a listed checkpoint.

    The server lacks the endpoint or denies access: many servers send "not found" for public
    checkpoints of other accounts.

    Args:
        error: error of a 404 or 410.
        is_own: False if the checkpoint is known to belong to another account.
    """
    message = error.message
    if not isinstance(error, errors.UnsupportedEndpoint):
        message += " (but it is listed)"
    failure = errors.UnsupportedEndpoint(message, endpoint=error.endpoint, status=error.status)
    if not is_own:
        failure.reason = "the server does not provide this for another account's checkpoint"
    elif not isinstance(error, errors.UnsupportedEndpoint):
        failure.reason += ", or not for this checkpoint"
    return failure


def classify_missing(
    status: int, scope: Scope, *, is_generic_body: bool, exists: bool
) -> type[ApiError]:
    """Decide whether a 404, 405, 410 or 501 means a missing resource or endpoint.

    A router without a matching route sends a response of its framework: 405, 501, or a 404 with a
    generic body. A handler that looked for a resource names it in the body. Therefore:

    - 405 and 501 always refer to the endpoint.
    - ACCOUNT: a generic 404 and every 410 refer to the endpoint, because no resource is addressed.
    - OPTIONAL_RESOURCE: a generic 404 refers to the endpoint.
    - OPTIONAL_ACTION: if the checkpoint is listed, a generic 404 and every 410 refer to the
      endpoint, otherwise to the checkpoint. The official service sends 410 for removed endpoints.
    - RESOURCE: 404 and 410 refer to the resource.

    Args:
        status: 404, 405, 410 or 501.
        scope: scope of the endpoint.
        is_generic_body: whether the body names no resource, see `is_generic`.
        exists: whether the resource is known to exist from a listing.
    """
    if status in (405, 501):
        return errors.UnsupportedEndpoint
    if scope is Scope.ACCOUNT:
        is_endpoint = status == 410 or is_generic_body
    elif scope is Scope.OPTIONAL_RESOURCE:
        is_endpoint = status == 404 and is_generic_body
    elif scope is Scope.OPTIONAL_ACTION:
        is_endpoint = exists and (status == 410 or is_generic_body)
    else:
        is_endpoint = False
    return errors.UnsupportedEndpoint if is_endpoint else errors.NotFound


#: Messages for a missing route by Starlette, Werkzeug, nginx, Go's net/http, Express and Rails. The
#: quantifiers are possessive, so that matching takes linear time.
_GENERIC_MESSAGE = re.compile(
    r"(?:error\W*+)?+(?:404\W*+)?+(?:page )?+"
    r"(?:not found|no such route|no route matches.*|cannot (?:get|post|put|delete) /.*"
    r"|the requested url was not found on (?:the|this) server.*)?+\W*+",
    re.IGNORECASE | re.DOTALL,
)


def is_generic(content_type: str, body: bytes) -> bool:
    """Return whether an error body was sent by a router and not by a handler.

    A router's body is empty, HTML, or a message without details such as `{"detail": "Not Found"}`.
    """
    if _is_html(content_type, body):
        return True
    return _GENERIC_MESSAGE.fullmatch(_plain_message(body).strip()) is not None


#: Error classes of statuses with a fixed meaning.
_ERROR_OF_STATUS: dict[int, type[ApiError]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    402: errors.PaymentRequired,
    403: errors.Unauthorized,
    408: errors.RequestTimeout,
    409: errors.Conflict,
    422: errors.BadRequest,
    425: errors.ResourceNotReady,
    429: errors.RateLimited,
}
_MISSING_STATUSES = frozenset({404, 405, 410, 501})


def error_from_response(
    endpoint: Endpoint,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    host: str,
    now_s: float,
    exists: bool = False,
) -> ApiError:
    """Return the exception for an error response, with the server's message.

    The status is 300 or more, and `now_s` is in seconds since 1970. The message names `host` if the
    response does not conform to the API. `exists` is True if the resource is known to exist.
    """
    error_class: type[ApiError]
    message = error_message(status, headers.get("content-type", ""), body)
    if status < 400:
        # Without the Location, which may be a signed URL.
        error_class, message = errors.ProtocolError, f"unexpected redirect by {host}"
    elif status in _MISSING_STATUSES:
        error_class = classify_missing(
            status,
            endpoint.scope,
            is_generic_body=is_generic(headers.get("content-type", ""), body),
            exists=exists,
        )
    elif status == 503 and status in endpoint.non_retryable_statuses:
        error_class = errors.ResourceNotReady
    elif status >= 600:
        error_class, message = errors.ProtocolError, f"{host} sent an invalid HTTP status"
    else:
        error_class = _ERROR_OF_STATUS.get(
            status, errors.ServerError if status >= 500 else errors.ClientError
        )
    error = error_class(
        message,
        endpoint=endpoint.label,
        status=status,
        retry_after_s=parse_retry_after_s(headers, now_s),
    )
    error.request_id = request_id_of(headers)
    return error


#: Messages for responses without a message.
_DEFAULT_MESSAGES = {
    400: "bad request",
    401: "the API key was rejected",
    402: "the account's billing does not allow this",
    403: "not allowed",
    404: "not found",
    405: "the server has no such endpoint",
    408: "the server timed out waiting for the request",
    409: "conflict",
    410: "gone",
    425: "not ready yet",
    429: "too many requests",
    501: "the server has no such endpoint",
    502: "the proxy in front of the API got no response",
    503: "the service is temporarily unavailable",
    504: "the proxy in front of the API got no response in time",
}


def error_message(status: int, content_type: str, body: bytes) -> str:
    """Return the server's message in one redacted line, a default if it sent none."""
    is_html = _is_html(content_type, body)
    message = _html_message(_as_text(body)) if is_html else _plain_message(body)
    return errors.redact(message) or _DEFAULT_MESSAGES.get(status, f"status {status}, no message")


#: Only this much of an error body is examined, bytes or characters; users see 500 characters.
_MAX_LENGTH = 20_000


def _plain_message(body: bytes) -> str:
    """Return the message in a JSON or plain-text error body."""
    try:
        _, fields = raw_json.parse_object(body)
    except errors.ProtocolError:
        text = _as_text(body).strip()
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    for name in ("detail", "error", "message"):
        if message := _detail_text(fields.get(name)):
            return message
    return _as_text(body) if fields else ""


#: Maximum nesting at which a message is found; a validation error is a list of objects.
_MAX_DEPTH = 8


def _detail_text(value: object, depth: int = 0) -> str:
    """Return the message in a string, a list of validation errors, or an object."""
    if isinstance(value, str):
        return value[:_MAX_LENGTH].strip()
    if depth >= _MAX_DEPTH:
        return ""
    if isinstance(value, list):
        return "; ".join(text for item in value[:5] if (text := _detail_text(item, depth + 1)))
    if isinstance(value, dict):
        message = next(
            (
                text
                for name in ("msg", "message", "detail", "error")
                if (text := _detail_text(value.get(name), depth + 1))
            ),
            "",
        )
        location = value.get("loc")
        if message and isinstance(location, list) and location:
            names = (str(name)[:100] for name in location[:8] if isinstance(name, str | int))
            return ".".join(names) + ": " + message
        return message
    return ""


def _as_text(body: bytes) -> str:
    return body[:_MAX_LENGTH].decode("utf-8", "replace")


def _is_html(content_type: str, body: bytes) -> bool:
    start = body[:200].lstrip().lower()
    return "html" in content_type.lower() or start.startswith((b"<!doctype", b"<html", b"<?xml"))


_TITLE = re.compile(r"<title[^>]{0,200}>", re.IGNORECASE)
_TITLE_END = re.compile(r"</title", re.IGNORECASE)
#: Start of an invisible element of a page, and the end of each kind.
_INVISIBLE_START = re.compile(r"<(script|style|head)\b|<(!--)", re.IGNORECASE)
_INVISIBLE_ENDS = {
    "script": re.compile(r"</script\b", re.IGNORECASE),
    "style": re.compile(r"</style\b", re.IGNORECASE),
    "head": re.compile(r"</head\b", re.IGNORECASE),
    "!--": re.compile(r"--"),
}
#: An invalid character reference; `unescape` raises an error for one of 4,301 digits.
_LONG_REFERENCE = re.compile(r"&#\d{9,}+;?")


def _html_message(page: str) -> str:
    """Return the title of a page, its visible text without a title."""
    title = _TITLE.search(page)
    end = _TITLE_END.search(page, title.end()) if title else None
    if title and end and (message := _unescape(page[title.end() : end.start()]).strip()):
        return message
    return _unescape("".join(_visible_text(page)))


def _unescape(text: str) -> str:
    return unescape(_LONG_REFERENCE.sub(" ", text))


def _visible_text(page: str) -> Iterator[str]:
    """Yield the text between the tags of a page.

    Takes linear time: a failed search for the end of an element is not repeated.
    """
    position = 0
    unterminated: set[str] = set()
    while (start := page.find("<", position)) >= 0:
        yield page[position:start]
        yield " "
        position = start
        invisible = _INVISIBLE_START.match(page, start)
        kind = invisible[invisible.lastindex or 0].lower() if invisible else ""
        if invisible and kind not in unterminated:
            end = _INVISIBLE_ENDS[kind].search(page, invisible.end())
            if end:
                position = end.end()
            else:
                unterminated.add(kind)
        position = page.find(">", position) + 1
        if not position:
            yield page[start:]
            return
    yield page[position:]
