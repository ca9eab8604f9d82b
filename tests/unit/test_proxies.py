"""The proxy for a URL by the environment, like in curl and requests."""

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.proxies import Proxy, is_loopback, proxy_for

PROXY = "http://proxy.corp:3128"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://proxy.corp:3128", Proxy("http", "proxy.corp", 3128)),
        ("proxy.corp:3128", Proxy("http", "proxy.corp", 3128)),
        ("proxy.corp", Proxy("http", "proxy.corp", 80)),
        ("https://proxy.corp", Proxy("https", "proxy.corp", 443)),
        ("socks://10.0.0.1:1080/", Proxy("socks5h", "10.0.0.1", 1080)),
        ("socks5://h", Proxy("socks5h", "h", 1080)),
        ("SOCKS5H://[fd00::1]:9", Proxy("socks5h", "fd00::1", 9)),
        (" http://us%40er:p%3Ass@h:1 ", Proxy("http", "h", 1, ("us@er", "p:ss"))),
        ("", None),
    ],
)
def test_proxy_value_is_parsed_like_curl(value, expected):
    assert proxy_for("https://tinker.example/x", {"https_proxy": value}) == expected


@pytest.mark.parametrize(
    ("environ", "url", "host"),
    [
        ({"HTTPS_PROXY": "a", "ALL_PROXY": "b"}, "https://x", "a"),
        ({"HTTPS_PROXY": "a", "ALL_PROXY": "b"}, "http://x", "b"),
        ({"HTTPS_PROXY": "a", "https_proxy": "b"}, "https://x", "b"),
        ({"HTTPS_PROXY": "a", "https_proxy": ""}, "https://x", None),
        ({"HTTP_PROXY": "a"}, "http://x", "a"),
        ({"HTTP_PROXY": "a"}, "https://x", None),
        ({"HTTP_PROXY": "a", "REQUEST_METHOD": "GET"}, "http://x", None),
        ({"http_proxy": "a", "REQUEST_METHOD": "GET"}, "http://x", "a"),
        ({"all_proxy": "a"}, "http://x", "a"),
        ({}, "http://x", None),
    ],
)
def test_proxy_variable_of_the_scheme_has_precedence(environ, url, host):
    found = proxy_for(url, environ)
    assert (found and found.host) == host


@pytest.mark.parametrize(
    ("no_proxy", "host", "is_direct"),
    [
        ("*", "tinker.corp", True),
        ("corp", "tinker.corp", True),
        ("corp", "corp", True),
        ("corp", "incorp", False),
        (".corp", "tinker.corp", True),
        ("*.corp", "tinker.corp", True),
        ("*.CORP", "Tinker.Corp", True),
        ("*.corp", "tinker.corp.evil", False),
        ("tinker.*.corp", "tinker.eu.corp", True),
        ("other, tinker.corp", "tinker.corp", True),
        ("other tinker.corp", "tinker.corp", True),
        ("tinker.corp:443", "tinker.corp", True),
        ("tinker.corp:80", "tinker.corp", False),
        ("tinker.corp", "tinker.corp.", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:443", "10.1.2.3", True),
        ("10.*", "10.1.2.3", True),
        ("10.1", "10.1.2.3", False),
        ("fd00::/8", "[fd12::1]", True),
        ("[fd00::]/8", "[fd12::1]", True),
        ("fd12::1", "[fd12:0::1]", True),
        ("[fd12::1]", "[fd12::1]", True),
        ("[fd12::1]:443", "[fd12::1]", True),
        ("[fd12::1]:80", "[fd12::1]", False),
        ("fd00::/8", "[fe80::1]", False),
        ("10.0.0.0/8", "[::ffff:10.1.2.3]", True),
        ("10.0.0.0/99,[,::x,a/b/c,*.", "tinker.corp", False),
        ("", "tinker.corp", False),
        (",,", "tinker.corp", False),
    ],
)
def test_no_proxy_entry_selects_direct_hosts(no_proxy, host, is_direct):
    found = proxy_for(f"https://{host}/x", {"HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy})
    assert (found is None) == is_direct


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "a.localhost", "localhost."),
        *("127.0.0.1", "127.9.9.9", "127.1", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"),
    ],
)
@pytest.mark.parametrize("value", [PROXY, "nonsense://x"])
def test_proxy_for_loopback_is_none(host, value):
    assert proxy_for(f"http://{host}:8080/x", {"all_proxy": value, "HTTP_PROXY": value}) is None


@pytest.mark.parametrize("host", ["notlocalhost", "128.0.0.1", "localhost.corp", "fd00::1", "1.x"])
def test_is_loopback_of_other_hosts_is_false(host):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nonsense://me:c0ffee@x", "'nonsense'"),
        ("socks4://me:c0ffee@x", "'socks4'"),
        ("http://me:c0ffee@", "no host"),
        ("http://me:c0ffee@[::1", "not a URL"),
        ("http://me:c0ffee@h:99999", "not a URL"),
        ("http://me:c0ffee@h:0", "no port"),
        ("me:c0ffee@h:x", "not a URL"),
    ],
)
def test_unusable_proxy_is_reported_without_login(value, reason):
    with pytest.raises(StartupError, match=f"^HTTPS_PROXY .*{reason}") as failure:
        proxy_for("https://tinker.example", {"HTTPS_PROXY": value})
    assert "c0ffee" not in str(failure.value)
    assert "correct it" in str(failure.value)


def test_proxy_as_text_hides_its_login():
    proxy = proxy_for("http://x", {"http_proxy": "http://me:c0ffee@h:1"})
    assert (str(proxy), f"{proxy!r}") == ("http://h:1", "Proxy(http://h:1)")
