import json

import pytest

from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.endpoints import Scope
from tinkerfs.api.error_mapping import (
    classify_missing,
    error_from_response,
    error_message,
    is_generic,
)

JSON = "application/json"
GENERIC = [
    ("", b""),
    (JSON, b'{"detail": "Not Found"}'),
    (JSON, b'{"detail":"Not found."}'),
    (JSON, b'{"error": "404 not found"}'),
    (JSON, b"{}"),
    ("text/plain", b"404 page not found\n"),
    ("text/html", b"<h1>Checkpoint x not found</h1>"),
    ("", b"  <!DOCTYPE html><html><title>404 Not Found</title></html>"),
    ("text/plain", b"Cannot GET /api/v1/sessions"),
]
SPECIFIC = [
    (JSON, b'{"detail": "Checkpoint not found: weights/0001"}'),
    (JSON, b'{"detail": "Training run abc does not exist"}'),
    (JSON, b'{"error": {"message": "no such checkpoint"}}'),
    ("text/plain", b"checkpoint expired"),
]


@pytest.mark.parametrize(("content_type", "body"), GENERIC)
def test_is_generic_router_body_returns_true(content_type, body):
    assert is_generic(content_type, body)


@pytest.mark.parametrize(("content_type", "body"), SPECIFIC)
def test_is_generic_handler_body_returns_false(content_type, body):
    assert not is_generic(content_type, body)


UNSUPPORTED, NOT_FOUND = errors.UnsupportedEndpoint, errors.NotFound


@pytest.mark.parametrize(
    ("status", "scope", "is_generic_body", "exists", "kind"),
    [
        (405, Scope.RESOURCE, False, False, UNSUPPORTED),
        (501, Scope.OPTIONAL_ACTION, False, False, UNSUPPORTED),
        (404, Scope.ACCOUNT, True, False, UNSUPPORTED),
        (404, Scope.ACCOUNT, False, False, NOT_FOUND),
        (410, Scope.ACCOUNT, False, False, UNSUPPORTED),
        (404, Scope.OPTIONAL_RESOURCE, True, False, UNSUPPORTED),
        (404, Scope.OPTIONAL_RESOURCE, False, False, NOT_FOUND),
        (410, Scope.OPTIONAL_RESOURCE, True, False, NOT_FOUND),
        (404, Scope.OPTIONAL_ACTION, True, True, UNSUPPORTED),
        (404, Scope.OPTIONAL_ACTION, True, False, NOT_FOUND),
        (404, Scope.OPTIONAL_ACTION, False, True, NOT_FOUND),
        (410, Scope.OPTIONAL_ACTION, False, True, UNSUPPORTED),
        (410, Scope.OPTIONAL_ACTION, False, False, NOT_FOUND),
        (404, Scope.RESOURCE, True, True, NOT_FOUND),
        (410, Scope.RESOURCE, True, True, NOT_FOUND),
    ],
)
def test_classify_missing_returns_error_class(status, scope, is_generic_body, exists, kind):
    assert classify_missing(status, scope, is_generic_body=is_generic_body, exists=exists) is kind


@pytest.mark.parametrize(
    ("endpoint", "status", "kind"),
    [
        (endpoints.RUNS, 302, errors.ProtocolError),
        (endpoints.RUNS, 400, errors.BadRequest),
        (endpoints.RUNS, 401, errors.Unauthorized),
        (endpoints.RUNS, 403, errors.Unauthorized),
        (endpoints.RUNS, 408, errors.RequestTimeout),
        (endpoints.RUNS, 418, errors.ClientError),
        (endpoints.RUNS, 422, errors.BadRequest),
        (endpoints.RUNS, 429, errors.RateLimited),
        (endpoints.RUNS, 500, errors.ServerError),
        (endpoints.RUNS, 503, errors.ServerError),
        (endpoints.RUNS, 599, errors.ServerError),
        (endpoints.RUNS, 999, errors.ProtocolError),
        (endpoints.ARCHIVE, 503, errors.ResourceNotReady),
        (endpoints.ARCHIVE, 425, errors.ResourceNotReady),
        (endpoints.ARCHIVE, 500, errors.ServerError),
        (endpoints.DELETE, 409, errors.Conflict),
        (endpoints.DELETE, 425, errors.ResourceNotReady),
        (endpoints.TTL, 409, errors.Conflict),
    ],
)
def test_error_from_response_maps_status(endpoint, status, kind):
    headers = {"retry-after": "7", "content-type": JSON}
    error = error_from_response(
        endpoint, status, headers, b'{"detail":"busy"}', host="api.example", now_s=0.0
    )
    assert type(error) is kind
    assert (error.endpoint, error.status, error.retry_after_s) == (endpoint.label, status, 7.0)
    assert error.message in ("busy", "unexpected redirect by api.example") or status == 999


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        (JSON, b'{"detail": "no\\n way"}', "no way"),
        (JSON, b'{"error": "no"}', "no"),
        (JSON, b'{"error": {"message": "no", "code": 3}}', "no"),
        (JSON, b'{"message": "no"}', "no"),
        (JSON, b'"no"', "no"),
        ("text/plain", b"no way", "no way"),
        ("text/html", b"<html><head><title> Bad\nGateway </title></head>x</html>", "Bad Gateway"),
        ("text/html", b"<body><script>x()</script><p>No &amp; <b>never</b></p>", "No & never"),
        ("text/html", b"", "the proxy in front of the API got no response"),
        ("", b"", "the proxy in front of the API got no response"),
        (JSON, b"{}", "the proxy in front of the API got no response"),
        (JSON, b'{"code": 5}', '{"code": 5}'),
        ("", b"\xff\xfe\x00", "\ufffd\ufffd\\x00"),
    ],
)
def test_error_message_returns_server_message(content_type, body, message):
    assert error_message(502, content_type, body) == message


def test_error_message_of_validation_error_names_field():
    detail = [
        {"loc": ["body", "ttl_seconds"], "msg": "must be more", "type": "value_error"},
        {"msg": "and less"},
    ]
    message = error_message(422, JSON, json.dumps({"detail": detail}).encode())
    assert message == "body.ttl_seconds: must be more; and less"


def test_error_message_is_redacted_and_short():
    message = error_message(400, JSON, b'{"detail": "key tml-abc https://s/x?sig=1 ' + b"y" * 9999)
    assert "tml-abc" not in message
    assert "sig" not in message
    assert len(message) <= 500


#: Pages and messages for which backtracking expressions take quadratic time.
SLOW_PAGES = {
    "tags": b"<" * 20_000,
    "titles": b"<title>" * 3_000,
    "unclosed titles": b"<title " * 3_000,
    "scripts": b"<script>" * 2_500,
    "styles": b"<style " * 2_900,
    "heads": b"<head>" * 3_300,
    "comments": b"<!--" * 5_000,
    "closed by another": b"<script></style>" * 1_250,
    "references": b"<p>" + b"&#" * 10_000,
}
SLOW_MESSAGES = {
    "punctuation": b"error" + b"!" * 19_000 + b"x",
    "numbers": b"404" + b"!" * 19_000 + b"x",
    "routes": b"no route matches " * 1_100,
    "URLs": b"http://" * 2_800,
    "logins": b"https://a@" * 2_000,
    "keys": b"eyJ-" * 5_000,
    "tokens": b"tml-eyJ." * 2_500,
    "parameters": b"a=" * 10_000,
}


@pytest.mark.parametrize(
    "body", [*SLOW_PAGES.values(), *SLOW_MESSAGES.values()], ids=[*SLOW_PAGES, *SLOW_MESSAGES]
)
def test_error_message_takes_linear_time(body):
    """Repeat enough times for quadratic time to exceed the test's timeout."""
    bodies = (b"<html>" + body, json.dumps({"detail": body.decode()}).encode())
    for _ in range(60):
        for error_body in bodies:
            assert error_message(502, "", error_body)
            is_generic("", error_body)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (b"<html>a<!-- b <p> --> c", "a c"),
        (b"<html><head>x</head>a<HEAD>b</head >c", "a c"),
        (b"<html><header>a</header>", "a"),
        (b"<html>a<style>b</style>c<style>d", "a c d"),
        (b"<html>1 < 2", "1 < 2"),
        (b"<html><title></title>a", "a"),
        (b"<html><title>a", "a"),
        (b"<html>&lt;a&#62; &#" + b"9" * 5_000 + b"; b &#x" + b"9" * 5_000 + b";", "<a> b"),
    ],
)
def test_error_message_of_page_is_visible_text(page, text):
    assert error_message(500, "", page).rstrip("\ufffd ") == text


def test_error_message_ignores_deeply_nested_text():
    detail: object = "here"
    for _ in range(900):
        detail = [detail]
    body = json.dumps({"detail": detail, "loc": detail})
    assert error_message(500, JSON, body.encode())
    deep = {"detail": {"msg": "bad", "loc": [[detail], "field", 3]}}
    assert error_message(422, JSON, json.dumps(deep).encode()) == "field.3: bad"
