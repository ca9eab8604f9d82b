"""Reading through a caching proxy: what it receives, and what happens without it.

scripts/interop reads through a real nginx.
"""

import http.client
import itertools
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.hostile import tls_context
from tests.support.proxy import ProxyServer
from tests.unit.weights.conftest import subject_of, truth, weights_in
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.blob_proxy import SET_ASIDE_S, BlobProxy

SUPPORT = Path(__file__).parents[2] / "support"
NAME = "adapter_model.safetensors"
SIZE_BYTES = 9 << 20


class ForwardingProxy(ThreadingHTTPServer):
    """A proxy that forwards each request as nginx does, and caches nothing.

    Attributes:
        requests: The path and headers of each request.
        reply: Sends another response to a handler, if it is set.
        headers: Added to the responses of the store.
    """

    daemon_threads = True

    def __init__(self, tls, host="localhost"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests, self.reply, self.headers = [], None, {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
            self.url = f"https://{host}:{self.server_port}"

    def handle_error(self, _request, _client):
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if self.server.reply is not None:
            return self.server.reply(self)
        _, scheme, host, path = self.path.split("/", 3)
        assert scheme == "http"
        onward = http.client.HTTPConnection(host)
        headers = {"Range": self.headers["Range"], "If-Range": self.headers["Tinkerfs-Version"]}
        onward.request("GET", f"/{path}", headers=headers)
        response = onward.getresponse()
        body = response.read()
        onward.close()
        headers = dict(response.getheaders()) | self.server.headers
        return self.reply(response.status, headers, body)

    def reply(self, status, headers, body=b"", length=None):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


@pytest.fixture
def proxy(request):
    """A running proxy; with TLS if the test names a certificate of tests/support, and a host."""
    identity, _, host = getattr(request, "param", "").partition(" ")
    tls = tls_context(SUPPORT / identity) if identity else None
    with ForwardingProxy(tls, host or "localhost") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def site(proxy, demo_server, tmp_path):
    """A reader behind the proxy, and the time of its clock for outages."""
    server = demo_server(runs=1, checkpoints=1, size_bytes=SIZE_BYTES)
    telemetry, now = Telemetry(), [0.0]
    blob_proxy = BlobProxy(proxy.url, telemetry, lambda: now[0])
    subject = subject_of(server)
    readers = itertools.count()

    def read():
        """Read the whole file with an empty cache."""
        directory = tmp_path / f"cache-{next(readers)}"
        account = (directory, server.base_url, server.api_key)
        with (
            weights_in(*account, telemetry=telemetry, blob_proxy=blob_proxy) as mount,
            mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file,
        ):
            return b"".join(
                file.read(1 << 20, offset, BACKGROUND_CONTEXT)
                for offset in range(0, file.size_bytes, 1 << 20)
            )

    return SimpleNamespace(
        server=server,
        expected=truth(server, subject, NAME),
        read=read,
        now=now,
        counters=lambda: {
            name.removeprefix("blob_proxy_"): value
            for name, value in telemetry.counters().items()
            if name.startswith("blob_proxy_")
        },
        requests=lambda: telemetry.requests().get("GET proxy", {}),
        store_bytes=lambda: telemetry.counter_value("store_bytes_received"),
        errors=lambda: telemetry.errors.text().decode().splitlines(),
        direct=lambda: [
            each for each in server.journal.entries("store") if each.user_agent is not None
        ],
    )


def test_weights_are_read_through_the_proxy_without_the_key(site, proxy):
    assert site.read() == site.expected
    (version,) = {headers["tinkerfs-version"] for _, headers in proxy.requests}
    assert version.startswith('"')
    host = site.server.store_url.removeprefix("http://")
    for path, headers in proxy.requests:
        assert path.startswith(f"/http/{host}/")
        assert "X-Signature=" in path
        assert site.server.api_key not in f"{path} {headers}"
        assert not {"authorization", "x-api-key", "cookie"} & set(headers)
        first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
        assert first // BLOCK_BYTES == last // BLOCK_BYTES, "one slice per request"
    # The store itself is asked for the version only.
    assert sum(each.sent_bytes for each in site.direct()) == 1
    assert not site.errors()


@pytest.mark.parametrize("status", [421, 502, 504])
@pytest.mark.expect_warnings("blob proxy")
def test_failure_of_the_proxy_is_recorded_once_until_it_works(status, site, proxy):
    proxy.reply = lambda handler: handler.reply(status, {})
    assert site.read() == site.expected
    assert len(proxy.requests) == 1  # further requests go to the store
    site.now[0] += SET_ASIDE_S
    assert site.read() == site.expected
    assert len(proxy.requests) == 2
    (line,) = site.errors()
    assert f"status {status}" in line
    assert site.counters()["outages"] == 1
    assert site.store_bytes() >= 2 * SIZE_BYTES
    proxy.reply = None
    site.now[0] += SET_ASIDE_S
    assert site.read() == site.expected
    assert len(proxy.requests) > 3
    proxy.reply = lambda handler: handler.reply(status, {})
    assert site.read() == site.expected
    assert len(site.errors()) == 1  # the same line, with a count of 2
    assert site.errors()[0].endswith("(2 times)")


@pytest.mark.expect_warnings("blob proxy")
def test_proxy_that_is_gone_delays_no_read(site, proxy):
    proxy.socket.close()
    assert site.read() == site.expected
    (line,) = site.errors()
    assert "blob proxy 127.0.0.1" in line
    assert "X-Signature" not in line


@pytest.mark.parametrize(
    ("proxy", "bundle", "reason"),
    [
        ("localhost.pem", None, "self-signed"),
        ("invalid.pem", "invalid.pem", "mismatch"),
        ("expired.pem", "expired.pem", "expired"),
    ],
    indirect=["proxy"],
)
@pytest.mark.expect_warnings("blob proxy")
def test_proxy_with_a_rejected_certificate_is_one_outage(bundle, reason, site, proxy, monkeypatch):
    if bundle is not None:
        monkeypatch.setenv("SSL_CERT_FILE", str(SUPPORT / bundle))
    assert site.read() == site.expected
    assert not proxy.requests
    (line,) = site.errors()
    assert f"blob proxy localhost:{proxy.server_port} failed, weights are read from" in line
    assert reason in line
    assert "X-Signature" not in line
    counters = site.counters()
    assert (counters["outages"], site.requests()) == (1, {"failed": 1})
    assert counters["fallbacks"] > 1


@pytest.mark.parametrize("proxy", ["localhost.pem"], indirect=True)
def test_weights_are_read_through_a_proxy_with_tls(site, proxy, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(SUPPORT / "localhost.pem"))
    assert site.read() == site.expected
    assert proxy.requests
    assert not site.errors()


@pytest.mark.parametrize("proxy", ["invalid.pem store.invalid"], indirect=True)
def test_other_proxy_of_the_environment_sees_only_the_host(site, proxy, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(SUPPORT / "invalid.pem"))
    with ProxyServer() as forward:
        monkeypatch.setenv("HTTPS_PROXY", forward.address)
        assert site.read() == site.expected
        assert set(forward.targets) == {("CONNECT", f"store.invalid:{proxy.server_port}")}
    assert proxy.requests
    assert not site.errors()


@pytest.mark.parametrize(
    ("cache_status", "hits", "misses"),
    [
        ("tinkerfs; hit", 1, 0),
        ("cdn; fwd=miss; stored, tinkerfs;hit;detail=match", 1, 0),
        ("tinkerfs; fwd=miss", 0, 1),
        ("cdn; hit, tinkerfs; fwd=uri-miss; stored", 0, 1),
        ("tinkerfs", 0, 0),
        ("tinkerfs; hits=3", 0, 0),
        ("", 0, 0),
    ],
)
def test_hits_are_counted_as_the_proxy_reports_them(cache_status, hits, misses, site, proxy):
    proxy.headers = {"Cache-Status": cache_status}
    assert site.read() == site.expected
    counters, count = site.counters(), len(proxy.requests)
    assert site.requests() == {"206": count}
    assert counters["bytes_received"] >= SIZE_BYTES
    assert site.store_bytes() == 1
    assert (counters.get("hits", 0), counters.get("misses", 0)) == (hits * count, misses * count)
    # Each response counts as a whole slice, which is what the proxy requests from the store.
    assert (counters.get("missed_bytes", 0) >= counters["bytes_received"]) == (misses > 0)
    assert not counters.get("fallbacks")


def _other_version(handler):
    start, stop = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    total = f"bytes {start}-{stop}/{1 << 30}"
    handler.reply(206, {"ETag": '"other"', "Content-Range": total}, b"?" * (stop + 1 - start))


def _other_length(handler):
    start, stop = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    headers = {"ETag": handler.headers["Tinkerfs-Version"]}
    headers["Content-Range"] = f"bytes {start}-{stop}/{1 << 30}"
    handler.reply(206, headers, b"?" * (stop + 1 - start))


RESPONSES = {
    "another version": _other_version,
    "another length": _other_length,
    "a rejected signature": lambda handler: handler.reply(403, {}),
    "a page": lambda handler: handler.reply(200, {"Content-Type": "text/html"}, b"<html>"),
    "a redirect": lambda handler: handler.reply(302, {"Location": "http://x.invalid/"}),
    "an overload": lambda handler: handler.reply(503, {}),
}


@pytest.mark.parametrize("response", RESPONSES)
def test_unusable_response_of_the_proxy_is_never_used(response, site, proxy):
    proxy.reply = RESPONSES[response]
    assert site.read() == site.expected
    assert proxy.requests
    assert not site.errors()


def test_body_that_breaks_off_is_resumed_from_the_store(site, proxy):
    sizes = defaultdict(int)

    def cut(handler):
        start, stop = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        headers = {"ETag": handler.headers["Tinkerfs-Version"]}
        total = site.server.archive_size()
        headers["Content-Range"] = f"bytes {start}-{stop}/{total}"
        sizes[handler.headers["Range"]] += 1
        handler.reply(206, headers, b"", stop + 1 - start)
        handler.close_connection = True

    site.server.archive_size = lambda: next(
        site.server.archive(run.id, run.checkpoints[0].id).size_bytes
        for run in site.server.account.runs()
    )
    proxy.reply = cut
    assert site.read() == site.expected
    assert sizes
    assert max(sizes.values()) == 1


def test_store_without_ranges_is_read_directly(site):
    site.server.faults.add("store", ignore_range=True, times=None)
    assert site.read() == site.expected
    assert any(each.status == 200 for each in site.direct())
    assert not site.errors()


def test_store_without_strong_etags_is_read_directly(site, proxy):
    site.server.faults.add("store", headers={"ETag": None}, times=None)
    assert site.read() == site.expected
    assert not proxy.requests
