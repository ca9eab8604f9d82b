"""Tests of which requests are admitted, and with which headers every response is sent."""

import base64
import os
import ssl
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.webdav.authentication import Accounts
from tinkerfs.webdav.gate import allowed_hosts
from tinkerfs.webdav.server import Address, Certificate, serving

IDENTITY = str(Path(__file__).parents[2] / "support/localhost.pem")


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def accounts(tmp_path):
    """Accounts of a token and of a user; the password has a colon."""
    return Accounts.from_file(auth_file(tmp_path, "ada:pass:word\n\ntoken-123\n"))


def auth_file(directory, text, mode=0o600):
    path = directory / "auth"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example:8080", 421),
        ("[", 421),
        ("", 421),
    ],
)
def test_host_must_name_the_server(shared_site, host, status):
    assert shared_site.client.request("GET", "/README.md", Host=host).status == status


@pytest.mark.parametrize(
    ("host", "addresses", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], {"127.0.0.1", "::1", "localhost"}),
        ("NAS.example", ["192.0.2.1", "2001:db8::1"], {"nas.example", "192.0.2.1", "2001:db8::1"}),
        ("192.0.2.1", ["192.0.2.1"], {"192.0.2.1"}),
        ("0.0.0.0", ["0.0.0.0"], None),
        ("::", ["::"], None),
    ],
)
def test_allowed_hosts_are_the_name_and_its_addresses(host, addresses, expected):
    assert allowed_hosts(host, map(ip_address, addresses)) == expected


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 204),
        ({}, 204),
    ],
)
def test_change_by_another_origin_is_refused(site, headers, status):
    path = quote(f"{site.checkpoint}/published")
    assert site.client.request("PUT", path, b"1", **headers).status == status
    expected = b"1\n" if status == 204 else b"0\n"
    assert site.client.get(f"{site.checkpoint}/published") == expected
    for method in ("DELETE", "PROPFIND", "OPTIONS", "LOCK") if status == 403 else ():
        assert site.client.request(method, quote(site.checkpoint), **headers).status == 403
    assert site.client.properties(site.checkpoint).is_directory


def test_change_by_the_own_page_is_accepted(site):
    headers = {"Origin": site.url.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    path = quote(f"{site.checkpoint}/published")
    assert site.client.request("PUT", path, b"1", **headers).status == 204


def test_another_origin_may_link_and_not_include(shared_site):
    link = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert shared_site.client.request("GET", "/runs/", **link).status == 200
    for part in ("image", "script", "iframe", "empty"):
        headers = link | {"Sec-Fetch-Dest": part, "Sec-Fetch-Mode": "no-cors"}
        assert shared_site.client.request("GET", "/README.md", **headers).status == 403


def test_preflight_of_another_origin_gets_no_permission(shared_site):
    response = shared_site.client.request(
        "OPTIONS", "/", Origin="http://evil.example", Access_Control_Request_Method="PUT"
    )
    assert response.status == 403
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("target", ["/", "/README.md", "/runs/", "/nothing", "/../x"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PROPFIND"])
def test_every_response_has_the_restricting_headers(shared_site, method, target):
    headers = shared_site.client.request(method, target, Depth="0").headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert headers["Server"] == "tinkerfs"


# Passwords and tokens.


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        (basic("ada", "pass:word"), 200),
        (basic("ada", "wrong"), 401),
        (basic("eve", "pass:word"), 401),
        (basic("ada", ""), 401),
        (basic("anybody", "token-123"), 200),
        ("Bearer token-123", 200),
        ("bearer  token-123", 200),
        ("Bearer token-12", 401),
        ("Bearer ", 401),
        ("Basic !!", 401),
        ("Digest token-123", 401),
    ],
)
def test_credentials_are_required(make_site, accounts, authorization, status):
    site = make_site(accounts=accounts)
    headers = {} if authorization is None else {"Authorization": authorization}
    for method in ("GET", "PROPFIND", "OPTIONS"):
        response = site.client.request(method, "/", Depth="0", **headers)
        assert response.status == (207 if method == "PROPFIND" and status == 200 else status)
        assert ("WWW-Authenticate" in response.headers) == (status == 401)
    assert site.server.api_key not in response.text


def test_users_of_one_program_have_groups_of_their_own(make_site, tmp_path):
    accounts = Accounts.from_file(auth_file(tmp_path, "ada:a\nbob:b\n"))
    site = make_site(accounts=accounts)
    ada = site.connect(headers={"Authorization": basic("ada", "a")})
    bob = site.connect(headers={"Authorization": basic("bob", "b")})
    ada.request("DELETE", f"{quote(site.checkpoint)}/info.json")
    assert "info.json" not in ada.listdir(site.checkpoint)
    assert "info.json" in bob.listdir(site.checkpoint)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("ada:x", 0o644, "other users may read it"),
        ("ada:x", 0o640, "other users may read it"),
        ("", 0o600, "no account found"),
        (":x", 0o600, "no account found"),
        ("ada:", 0o600, "no account found"),
    ],
)
def test_unsuitable_auth_file_is_refused(tmp_path, text, mode, message):
    with pytest.raises(StartupError, match=message):
        Accounts.from_file(auth_file(tmp_path, text, mode))


def test_missing_auth_file_is_refused(tmp_path):
    with pytest.raises(StartupError, match="No such file"):
        Accounts.from_file(str(tmp_path / "nothing"))


def test_auth_file_of_another_user_is_refused(tmp_path, needs_root):
    path = auth_file(tmp_path, "token")
    os.chown(path, 1234, 1234)
    with pytest.raises(StartupError, match="owned by another user"):
        Accounts.from_file(path)


# Addresses and TLS.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:1", ("localhost", 1)),
        (":8080", ("", 8080)),
    ],
)
def test_address_parse_returns_host_and_port(text, expected):
    assert Address.parse(text) == expected


@pytest.mark.parametrize("text", ["8080", "::1:80", "[::1]", "a:b", "a:70000", "a:-1", "", "a:٣"])
def test_address_parse_rejects_other_forms(text):
    with pytest.raises(ValueError, match="not ADDRESS:PORT"):
        Address.parse(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_other_hosts_need_accounts(shared_site, host):
    with (
        pytest.raises(StartupError, match="--auth-file"),
        serving(shared_site.filesystem, Address(host, 0), timeout_s=1.0, is_read_only=True),
    ):
        pass


def test_all_addresses_accept_every_host_with_a_password(make_site, accounts):
    site = make_site()
    options = {"timeout_s": 30.0, "is_read_only": False, "accounts": accounts}
    with serving(site.filesystem, Address("0.0.0.0", 0), **options) as server:
        site.url = server.url
        client = site.connect(headers={"Authorization": "Bearer token-123"})
        assert client.request("GET", "/", Host="nas.example").status == 200
        assert client.request("GET", "/", Authorization="", Host="nas.example").status == 401


# cheroot leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_used_port_is_refused_in_one_line(shared_site):
    port = int(shared_site.url.rstrip("/").rpartition(":")[2])
    with (
        pytest.raises(StartupError, match="cannot listen on"),
        serving(
            shared_site.filesystem, Address("127.0.0.1", port), timeout_s=1.0, is_read_only=True
        ),
    ):
        pass


def test_certificate_serves_tls(make_site):
    site = make_site(certificate=Certificate(IDENTITY, IDENTITY))
    assert site.url.startswith("https://")
    context = ssl.create_default_context(cafile=IDENTITY)
    context.check_hostname = False
    client = site.connect(context=context)
    assert client.get("/README.md").startswith(b"#")
    # A wait for the client's departure polls the socket below TLS.
    assert "adapter_config.json" in client.listdir(f"{site.checkpoint}/files")


def test_unusable_certificate_is_refused(site, tmp_path):
    path = tmp_path / "cert.pem"
    path.write_text("no certificate")
    for file in (str(path), str(tmp_path / "nothing")):
        options = {"timeout_s": 1.0, "is_read_only": True, "certificate": Certificate(file, file)}
        with (
            pytest.raises(StartupError, match="cannot use the certificate"),
            serving(site.filesystem, Address("127.0.0.1", 0), **options),
        ):
            pass
