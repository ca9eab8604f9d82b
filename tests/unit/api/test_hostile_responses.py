"""Malformed and unusual responses are parsed correctly or raise an ApiError."""

import gzip
import json
from contextlib import suppress

import pytest

from tests.support.hostile import HostileServer, close, endless, genuine, reset, response
from tinkerfs import errors
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.pagination import RecordList

RUNS = "GET training_runs"
OK = b"HTTP/1.1 200 OK\r\n"
PROTOCOL, UNREACHABLE = errors.ProtocolError, errors.ConnectionFailed


@pytest.fixture
def server():
    with HostileServer(runs=2, checkpoints=1) as server:
        yield server


def edited(change):
    """A script that applies `change` to the body of the genuine response."""
    return (genuine(lambda _head, body: (change(body), close)),)


def head(*lines):
    return OK + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def chunked(body, *, extension=b"", trailer=b"", te=b"chunked", length=None):
    lines = [b"Transfer-Encoding: " + te]
    if length is not None:
        lines.insert(0, b"Content-Length: %d" % length)
    middle = len(body) // 2
    chunks = b"".join(
        b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in (body[:middle], body[middle:])
    )
    return head(*lines) + chunks + b"0" + extension + b"\r\n" + trailer + b"\r\n"


def sized(body, *lines):
    return head(b"Content-Length: %d" % len(body), *lines) + body


def with_field(body, text):
    """The body with one more field, given as JSON."""
    return b'{"odd": ' + text + b", " + body[1:]


#: Unusual responses that are equivalent to the genuine response.
UNUSUAL_RESPONSES = {
    "chunks": chunked,
    "chunks and a length": lambda b: chunked(b, length=7),
    "chunks and a larger length": lambda b: chunked(b, length=10**9),
    "chunk extensions": lambda b: chunked(b, extension=b';a="b"'),
    "trailers": lambda b: chunked(b, trailer=b"X: y\r\nContent-Length: 1\r\n"),
    "chunked in capitals": lambda b: chunked(b, te=b"Chunked"),
    "length twice, the same": lambda b: sized(b, b"Content-Length: %d" % len(b)),
    "length in a list": lambda b: head(b"Content-Length: %d, %d" % (len(b), len(b))) + b,
    "length with zeros": lambda b: head(b"Content-Length: 000%d" % len(b)) + b,
    "no length": lambda b: head() + b,
    "HTTP/1.0": lambda b: b"HTTP/1.0 200 OK\r\n\r\n" + b,
    "bare line feeds": lambda b: b"HTTP/1.1 200 OK\nContent-Length: %d\n\n" % len(b) + b,
    "no reason": lambda b: b"HTTP/1.1 200\r\n\r\n" + b,
    "a reason in bytes": lambda b: b"HTTP/1.1 200 \xff\xfe\r\n\r\n" + b,
    "a header in bytes": lambda b: sized(b, b"X-Odd: \xff\xfe\xe2\x82"),
    "a folded header": lambda b: sized(b, b"X-Odd: a", b" b"),
    "an empty header": lambda b: sized(b, b"X-Odd:"),
    "90 KB of headers": lambda b: sized(b, *[b"X-%d: %s" % (n, b"x" * 900) for n in range(100)]),
    "3,000 headers": lambda b: sized(b, *[b"X-%d: y" % n for n in range(3000)]),
    "other content type": lambda b: sized(b, b"Content-Type: text/html"),
    "content type in bytes": lambda b: sized(b, b"Content-Type: \xff/\xfe; charset=\xfd"),
    "gzip": lambda b: sized(gzip.compress(b), b"Content-Encoding: gzip"),
    "identity": lambda b: sized(b, b"Content-Encoding: identity"),
    "a cookie": lambda b: sized(b, b"Set-Cookie: a=b; Domain=.example; Path=/"),
    "an Upgrade": lambda b: sized(b, b"Upgrade: h2c", b"Connection: upgrade, close"),
    "a byte order mark": lambda b: sized(b"\xef\xbb\xbf" + b),
    "white space around": lambda b: sized(b" \r\n\t" + b + b"\n " * 1000),
    "a field twice": lambda b: sized(b'{"training_runs": 7, ' + b[1:]),
    "NaN in a field": lambda b: sized(with_field(b, b"NaN")),
    "a number of 5,000 digits": lambda b: sized(with_field(b, b"9" * 5000)),
    "a lone surrogate": lambda b: sized(with_field(b, b'"\\ud800"')),
    "a NUL": lambda b: sized(with_field(b, b'"\\u0000"')),
    "bytes that are not UTF-8": lambda b: sized(with_field(b, b'"\xff\xfe"')),
    "900 levels in a field": lambda b: sized(with_field(b, b"[" * 900 + b"]" * 900)),
    "a record that is a number": lambda b: sized(b.replace(b"[{", b"[7, {", 1)),
    "a cursor that is a list": lambda b: sized(
        json.dumps(json.loads(b) | {"cursor": [1]}).encode()
    ),
    "a count below zero": lambda b: sized(
        json.dumps(json.loads(b) | {"cursor": {"total_count": -5}}).encode()
    ),
}


@pytest.mark.parametrize("case", UNUSUAL_RESPONSES)
@pytest.mark.expect_warnings("could not be parsed")
def test_unusual_response_is_parsed(server, client_of, case):
    server.on(RUNS, *edited(UNUSUAL_RESPONSES[case]), times=None)
    runs = client_of(server).all_training_runs()
    assert {run.run_id for run in runs} == set(server.account.run_ids)


def cut(at):
    return (genuine(lambda whole, body: ((whole + body)[:at], close)),)


def raw(data):
    return (data, close)


def lines(*each):
    """A response with an empty listing and these header lines."""
    return raw(sized(b'{"training_runs": []}', *each))


#: Responses that raise an error: their steps and the error class.
HOSTILE_RESPONSES = {
    # Closed early: retried, ten attempts in all.
    "no response": ((close,), UNREACHABLE),
    "reset": ((reset,), UNREACHABLE),
    "reset in the body": ((genuine(lambda h, b: (h + b[:9], reset)),), UNREACHABLE),
    "half a status line": (cut(7), UNREACHABLE),
    "half a header": (cut(30), UNREACHABLE),
    "all but a byte": (cut(-1), UNREACHABLE),
    "chunks that end early": (edited(lambda b: chunked(b)[:-5]), UNREACHABLE),
    "a length too large": (
        edited(lambda b: head(b"Content-Length: %d" % (len(b) + 1)) + b),
        UNREACHABLE,
    ),
    "a length of 10^15": (
        edited(lambda b: head(b"Content-Length: 1%s" % (b"0" * 15))),
        UNREACHABLE,
    ),
    # Ambiguous or invalid framing.
    "a length too small": (edited(lambda b: head(b"Content-Length: 9") + b), PROTOCOL),
    "two lengths": (edited(lambda b: sized(b, b"Content-Length: 9")), PROTOCOL),
    "two lengths in a list": (edited(lambda b: head(b"Content-Length: 9, 10") + b), PROTOCOL),
    **{
        f"length {value!r}": (raw(head(b"Content-Length: " + value) + b"{}"), PROTOCOL)
        for value in (b"-1", b"+2", b"0x2", b"2e0", b"2.0", b"two", b"1 1", b"\xb2", b"9" * 5000)
    },
    **{
        f"transfer coding {value!r}": (edited(lambda b, v=value: chunked(b, te=v)), PROTOCOL)
        for value in (b"gzip", b"gzip, chunked", b"chunked, gzip", b"identity", b"x\xff", b"chunke")
    },
    "transfer coding twice": (
        raw(head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip") + b"0\r\n\r\n"),
        PROTOCOL,
    ),
    **{
        f"chunk size {value!r}": (
            raw(head(b"Transfer-Encoding: chunked") + value + b"\r\n{}\r\n0\r\n\r\n"),
            PROTOCOL,
        )
        for value in (b"zz", b"-2", b"+2", b"0x2", b"", b" 2", b"f" * 40, b"2" * 200_000)
    },
    "a chunk longer than its size": (
        raw(head(b"Transfer-Encoding: chunked") + b"1\r\n{}\r\n0\r\n\r\n"),
        PROTOCOL,
    ),
    # Invalid heads.
    **{
        f"status line {value[:20]!r}": (raw(value + b"\r\n\r\n"), PROTOCOL)
        for value in (
            b"SSH-2.0-OpenSSH_9.2",
            b"HTTP/1.1 abc",
            b"HTTP/1.1 99 X",
            b"HTTP/1.1 1000 X",
            b"HTTP/1.1 -200 X",
            b"HTTP/1.1 2 00 X",
            b"HTTP/9 200 OK",
            b"HTTP/2.0 200 OK",
            b"http/1.1 200 OK",
            b"ICY 200 OK",
            b"\x15\x03\x01\x00\x02\x02\x46",
            b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
            b"\xff" * 200,
            b"H" * 200_000,
        )
    },
    **{
        f"header {value[:20]!r}": (lines(value), PROTOCOL)
        for value in (
            b"no colon",
            b": no name",
            b"Space : before",
            b"N\x00ul: x",
            b"X: n\x00ul",
            b"X: carriage\rreturn",
            b"\xff: name",
            b"X: " + b"x" * 300_000,
        )
    },
    "300 KB of headers": (lines(*[b"X-%d: %s" % (n, b"x" * 3000) for n in range(100)]), PROTOCOL),
    "endless interim responses": ((endless(b"HTTP/1.1 102 X\r\n\r\n" * 99),), PROTOCOL),
    "101": (raw(b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), PROTOCOL),
    # Invalid bodies.
    **{
        f"body {value[:16]!r} of {len(value)}": (raw(sized(value)), PROTOCOL)
        for value in (
            b"",
            b"null",
            b"7",
            b'"text"',
            b"[]",
            b"{",
            b"{}",
            b'{"training_runs": 7}',
            b'{"training_runs": {}}',
            b'{"training_runs": [}',
            b'{"training_runs": []',
            b'{"training_runs": []}{}',
            b"<html>login</html>",
            b"\x00" * 99,
            b"\xff\xfe{\x00}\x00",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"training_runs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        )
    },
    "invalid gzip": (raw(sized(b"abc", b"Content-Encoding: gzip")), PROTOCOL),
    "truncated gzip": (
        raw(sized(gzip.compress(b'{"training_runs": []}')[:20], b"Content-Encoding: gzip")),
        PROTOCOL,
    ),
    "gzip three times": (
        raw(
            sized(
                gzip.compress(gzip.compress(gzip.compress(bytes(9 << 20)))),
                b"Content-Encoding: gzip, gzip, gzip",
            )
        ),
        PROTOCOL,
    ),
    "a coding in two headers": (
        raw(sized(b"{}", b"Content-Encoding: gzip", b"Content-Encoding: gzip")),
        PROTOCOL,
    ),
    # Successes without content, and redirects.
    **{f"{status}": (raw(response(status)), PROTOCOL) for status in (201, 202, 204, 205, 206, 226)},
    **{
        f"{status} to another": (
            raw(response(status, b"", "Location: https://elsewhere.invalid/?sig=c0ffee")),
            PROTOCOL,
        )
        for status in (300, 301, 302, 303, 304, 305, 307, 308, 399)
    },
    **{
        f"redirect to {location!r}": (raw(response(302, b"", f"Location: {location}")), PROTOCOL)
        for location in (
            "",
            "file:///etc/passwd",
            "//[",
            "http://[::1",
            "javascript:x",
            "\xff",
            "x" * 9999,
        )
    },
    # Invalid and unknown statuses.
    "status 600": (raw(response(600)), PROTOCOL),
    "status 999": (raw(response(999)), PROTOCOL),
    "status 418": (raw(response(418)), errors.ClientError),
    "status 451": (raw(response(451)), errors.ClientError),
}


@pytest.mark.parametrize("case", HOSTILE_RESPONSES)
def test_hostile_response_raises_error_of_its_class(server, client_of, case):
    steps, kind = HOSTILE_RESPONSES[case]
    server.on(RUNS, *steps, times=None)
    with pytest.raises(kind) as caught:
        client_of(server, key="tml-secret").all_training_runs()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.isprintable()
    assert not {"c0ffee", "tml-secret"} & {
        text[i : i + n] for n in (6, 10) for i in range(len(text))
    }
    assert len(text) < 1000
    assert {request.header("x-api-key")[0] for request in server.received} == {b"tml-secret"}


# --- surplus bytes -------------------------------------------------------------------------------

SURPLUS = {
    "bytes": b"surplus",
    "a response": sized(b'{"training_runs": []}'),
    "a refusal": response(401, b"{}"),
    "an interim response": b"HTTP/1.1 100 Continue\r\n\r\n",
    "half a response": b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{",
    "line ends": b"\r\n\r\n",
}


@pytest.mark.parametrize("surplus", SURPLUS)
@pytest.mark.parametrize("form", [sized, chunked])
def test_surplus_bytes_do_not_affect_next_response(server, client_of, surplus, form):
    server.on(RUNS, genuine(lambda _head, body: (form(body) + SURPLUS[surplus],)))
    client = client_of(server)
    for _ in range(3):
        runs = client.all_training_runs()
        assert {run.run_id for run in runs} == set(server.account.run_ids)


def test_redirect_with_key_is_not_followed(server, client_of):
    with HostileServer(runs=1) as other:
        for status in (301, 302, 303, 307, 308):
            location = f"Location: {other.base_url}/api/v1/training_runs"
            server.on(RUNS, response(status, b"", location))
            with pytest.raises(errors.ProtocolError):
                client_of(server).all_training_runs()
        assert other.received == []
    assert len(server.received) == 5


# --- every endpoint ------------------------------------------------------------------------------

REF = CheckpointRef("r:train:0", "weights/1", "weights/1")
CALLS = {
    "runs": lambda c: c.all_training_runs(),
    "run": lambda c: c.training_run("r:train:0"),
    "checkpoints of a run": lambda c: c.list_checkpoints("r:train:0"),
    "checkpoints": lambda c: c.all_user_checkpoints(lambda: RecordList(lambda each: each.identity)),
    "weights info": lambda c: c.weights_info("tinker://r:train:0/weights/1"),
    "archive": lambda c: c.archive(REF),
    "external weights": lambda c: c.external_weights_urls(REF),
    "publish": lambda c: c.publish(REF),
    "unpublish": lambda c: c.unpublish(REF),
    "ttl": lambda c: c.set_ttl(REF, 3600),
    "delete": lambda c: c.delete(REF),
    "sessions": lambda c: c.all_sessions(),
    "session": lambda c: c.session("s"),
    "found sessions": lambda c: c.all_found_sessions(),
    "sampler": lambda c: c.sampler("s:sample:0"),
    "whoami": lambda c: c.whoami(),
}

NAMES = (
    b"training_runs checkpoints sessions training_run_id checkpoint_id tinker_path session_id"
    b" training_run_ids sampler_ids sampler_id urls url expires cursor total_count time status"
    b" supported_models base_model lora_rank size_bytes public expires_at next_cursor"
).split()


def every_field(value):
    """An object with one value for every field of the API, also in its lists of records."""
    inner = b"{" + b",".join(b'"%s":%s' % (name, value) for name in NAMES) + b"}"
    listed = b",".join(b'"%s":[%s,%s]' % (name, value, inner) for name in NAMES[:3])
    return b"{" + listed + b"," + inner[1:]


ODD_VALUES = (
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"[[]]",
        b'""',
        b'".."',
        b'"a/b"',
        b'"\\u0000"',
        b'"\\ud800"',
    ),
    *(b"0", b"-1", b"1e308", b"1e999", b"NaN", b"-Infinity", b"9" * 400, b"0.1", b'"0001-01-01"'),
    *(b'"%s"' % (b"x" * 3_000), b'"9999-12-31T23:59:60Z"', b'"http://[::1"', b'"file:///x"'),
    *(b"[" * 400 + b"]" * 400, b'{"a":' * 400 + b"1" + b"}" * 400, b'"%s"' % (b" " * 3_000)),
    b'"\\u202e\\u001b[31m"',
)
ODD_HEADERS = (
    *("Location: http://h/\x7f", "Location: //", "Location: \xe9", "Location: http://h:99999/"),
    *("Expires: never", "Expires: " + "9" * 5000, "Retry-After: -1", "Retry-After: nan"),
    *("Retry-After: " + "9" * 5000, "Retry-After: 1e999", "x-should-retry: \xff"),
    *("Retry-After-Ms: " + " " * 9000 + "x", "Content-Type: " + "text/" * 2000),
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.expect_warnings("could not be parsed")
def test_unusual_field_value_raises_only_api_errors(server, client_of, call):
    client = client_of(server, timeout_s=2.0)
    bodies = [every_field(value) for value in ODD_VALUES]
    odd = [response(200, body) for body in bodies]
    odd += [response(status, bodies[0], each) for each in ODD_HEADERS for status in (200, 302)]
    odd += [response(status, bodies[n]) for n, status in enumerate((400, 404, 409, 422, 501))]
    odd += [response(503, b"", each, "x-should-retry: false") for each in ODD_HEADERS]
    for steps in odd:
        rule = server.on("api", steps, times=None)
        client.reset()
        with suppress(errors.ApiError):
            CALLS[call](client)
        rule.remove()
