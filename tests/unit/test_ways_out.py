"""The clients of the API and of stores use the same proxies and trust the same certificates."""

import gc
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.hostile import HostileServer, response, tls_context
from tests.support.proxy import ProxyServer
from tinkerfs import errors
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.errors import StartupError
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.http import ObjectStoreClient
from tinkerfs.weights.transfer_monitor import TransferInterrupted, TransferMonitor

SUPPORT = Path(__file__).parents[1] / "support"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
LOGIN = "me:c0ffee"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*VARIABLES, *map(str.lower, VARIABLES), *BUNDLES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@contextmanager
def served(identity=None, host="tinker.invalid"):
    """A server with a name that only the proxy resolves."""
    context = None if identity is None else tls_context(SUPPORT / identity)
    with HostileServer(runs=2, tls=context) as server:
        server.on("/object", response(200, b"bytes"), times=None)
        server.on("GET training_runs", response(200, b'{"training_runs": []}'), times=None)
        yield server, server.base_url.replace("127.0.0.1", host)


@pytest.fixture(params=["API", "store"])
def ask(request, tmp_path):
    """Send a request to a server with one of the two clients."""

    def ask_api(base_url, timeout_s=10):
        credentials = Credentials({"TINKER_API_KEY": "tml-k"}, home=str(tmp_path))
        with Client(base_url, credentials, Telemetry(), timeout_s=timeout_s) as client:
            assert client.list_training_runs(limit=1).items == ()

    def ask_store(base_url, timeout_s=10):
        with ObjectStoreClient(TransferMonitor(Telemetry(), timeout_s)) as client:
            response = client.get(f"{base_url}/object", {})
            assert b"".join(response.chunks()) == b"bytes"

    return ask_api if request.param == "API" else ask_store


@pytest.mark.parametrize("login", [None, LOGIN])
@pytest.mark.parametrize(
    ("variable", "scheme", "is_secured", "protocol"),
    [
        ("HTTP_PROXY", "http", False, "http"),
        ("https_proxy", "http", True, "CONNECT"),
        ("ALL_PROXY", "socks5", False, "SOCKS"),
        ("all_proxy", "socks", True, "SOCKS"),
    ],
)
def test_proxy_of_any_protocol_serves_both_clients(
    environment, ask, variable, scheme, is_secured, protocol, login
):
    environment.setenv("SSL_CERT_FILE", str(SUPPORT / "invalid.pem"))
    with (
        served("invalid.pem" if is_secured else None) as (server, url),
        ProxyServer(login) as proxy,
    ):
        at = f"{login}@" if login else ""
        environment.setenv(variable, f"{scheme}://{at}{proxy.address}")
        ask(url)
        assert proxy.targets == [(protocol, url.partition("//")[2])]
        assert len(server.received) == 1


@pytest.mark.parametrize("is_secured", [False, True])
def test_proxy_with_tls_serves_both_clients(environment, ask, is_secured):
    environment.setenv("SSL_CERT_FILE", str(SUPPORT / "invalid.pem"))
    environment.setenv("REQUESTS_CA_BUNDLE", str(SUPPORT / "localhost.pem"))
    tls = tls_context(SUPPORT / "localhost.pem")
    with (
        served("invalid.pem" if is_secured else None) as (server, url),
        ProxyServer(LOGIN, tls) as proxy,
    ):
        environment.setenv("ALL_PROXY", f"https://{LOGIN}@localhost:{proxy.port}")
        ask(url)
        assert [protocol for protocol, _ in proxy.targets] == ["CONNECT" if is_secured else "http"]
        assert len(server.received) == 1


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_proxy_that_never_responds_leaks_no_socket(environment, ask, scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises((errors.RequestTimeout, TransferInterrupted)):
            ask("https://tinker.invalid", timeout_s=0.5)
    gc.collect()  # a leaked socket would be a warning


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_proxy_that_rejects_the_login_is_reported_without_it(environment, ask, scheme):
    with served() as (server, url), ProxyServer("other:word") as proxy:
        url = url.replace("http:", "https:")
        environment.setenv("ALL_PROXY", f"{scheme}://{LOGIN}@{proxy.address}")
        with pytest.raises((errors.ConnectionFailed, TransferInterrupted)) as failure:
            ask(url)
        assert f"through {scheme.replace('5', '5h')}://{proxy.address}" in str(failure.value)
        assert "c0ffee" not in str(failure.value)
        assert not server.received
    gc.collect()


def test_proxy_sees_only_the_host_name_of_a_store(environment):
    environment.setenv("SSL_CERT_FILE", str(SUPPORT / "invalid.pem"))
    with served("invalid.pem", host="store.invalid") as (server, url), ProxyServer() as proxy:
        environment.setenv("HTTPS_PROXY", proxy.address)
        with ObjectStoreClient(TransferMonitor(Telemetry(), 10)) as client:
            for _ in range(2):
                got = client.get(f"{url}/object?X-Amz-Signature=c0ffee", {})
                assert b"".join(got.chunks()) == b"bytes"
        assert proxy.targets == [("CONNECT", url.partition("//")[2])]
        assert len(server.received) == 2


@pytest.mark.parametrize("value", ["http://127.0.0.1:1", "socks4://x", "nonsense://x"])
def test_proxy_is_not_used_for_loopback(environment, ask, value):
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        environment.setenv(name, value)
    with served(host="127.0.0.1") as (server, url):
        ask(url)
        assert len(server.received) == 1


def test_error_of_an_unusable_proxy_names_its_variable(environment, ask):
    environment.setenv("HTTPS_PROXY", "socks4://me:c0ffee@x")
    with pytest.raises((StartupError, errors.ConnectionFailed), match="HTTPS_PROXY") as failure:
        ask("https://tinker.invalid:1")
    assert "c0ffee" not in str(failure.value)


@pytest.mark.parametrize("variable", BUNDLES[:3])
def test_bundle_of_any_variable_is_trusted(environment, ask, variable):
    environment.setenv(variable, str(SUPPORT / "localhost.pem"))
    other = "REQUESTS_CA_BUNDLE" if variable != "REQUESTS_CA_BUNDLE" else "SSL_CERT_FILE"
    environment.setenv(other, str(SUPPORT / "invalid.pem"))  # both variables are used
    with served("localhost.pem", host="localhost") as (server, url):
        ask(url)
        assert len(server.received) == 1


@pytest.mark.parametrize(
    ("identity", "host", "bundle", "reason", "hint"),
    [
        ("localhost.pem", "localhost", None, "self-signed", "SSL_CERT_FILE or REQUESTS_CA_BUNDLE"),
        ("invalid.pem", "localhost", "invalid.pem", "mismatch", "--base-url"),
        ("expired.pem", "localhost", "expired.pem", "expired", "clock"),
    ],
)
def test_rejected_certificate_is_reported_with_a_hint(
    environment, ask, identity, host, bundle, reason, hint
):
    if bundle is not None:
        environment.setenv("CURL_CA_BUNDLE", str(SUPPORT / bundle))
    with served(identity, host=host) as (server, url):
        with pytest.raises(errors.UntrustedCertificate) as failure:
            ask(url)
        assert not server.received
    message = failure.value.message
    assert message.startswith(f"the certificate of {host} is refused: ")
    assert reason in message
    assert hint in message
    assert errors.errno_name(errors.os_error_from_api(failure.value, "/runs")) == "EPROTO"


@pytest.mark.parametrize("content", [None, "", "not a certificate"])
def test_error_of_an_unreadable_bundle_names_its_variable(environment, ask, tmp_path, content):
    bundle = tmp_path / "bundle"
    if content is not None:
        bundle.write_text(content)
    environment.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with pytest.raises((StartupError, errors.ConnectionFailed), match="REQUESTS_CA_BUNDLE"):
        ask("https://localhost:1")


def test_bundle_is_not_read_without_tls(environment, ask):
    environment.setenv("SSL_CERT_FILE", "/nonexistent")
    with served(host="127.0.0.1") as (server, url):
        if ask.__name__ == "ask_api":
            ask(url)
            assert len(server.received) == 1
