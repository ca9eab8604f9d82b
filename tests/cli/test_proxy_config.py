"""`tinkerfs proxy-config` and `--blob-proxy`; scripts/interop runs nginx with the output."""

import re

import pytest

from tests.support.mount import tinkerfs

NGINX = ("proxy-config", "nginx", "--resolver=127.0.0.53")
STORE = "--allow-host=store.example.com"


def configuration(*options):
    done = tinkerfs(*NGINX, *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def allowed_patterns(text):
    block = re.search(r"map \$store_origin \$is_allowed \{(.*?)\}", text, re.DOTALL)[1]
    return [re.compile(each, re.IGNORECASE) for each in re.findall(r'"~\*(.*)" 1;', block)]


@pytest.mark.parametrize(
    ("pattern", "origin", "is_allowed"),
    [
        ("store.example.com", "https://store.example.com", True),
        ("store.example.com", "http://store.example.com", False),
        ("store.example.com", "https://store.example.com:8443", False),
        ("store.example.com", "https://store-example.com", False),
        ("store.example.com", "https://evil.store.example.com", False),
        ("store.example.com", "https://store.example.com.evil.org", False),
        ("store.example.com:8443", "https://store.example.com:8443", True),
        ("*.example.com", "https://a.b.example.com", True),
        ("*.example.com", "https://example.com", False),
        ("*.example.com", "https://evilexample.com", False),
        ("127.0.0.1:80", "http://127.0.0.1:80", True),
        ("127.0.0.1:80", "http://127.0.0.1:81", False),
        ("127.0.0.1:80", "http://127.0.0.1:80@evil.org", False),
    ],
)
def test_configuration_allows_only_the_stores(pattern, origin, is_allowed):
    patterns = allowed_patterns(configuration(f"--allow-host={pattern}"))
    assert any(each.search(origin) for each in patterns) == is_allowed


def test_configuration_has_the_options_and_logs_no_request():
    text = configuration(
        STORE,
        "--listen=[::1]:8443",
        "--certificate=/etc/a b.pem",
        "--certificate-key=/etc/key.pem",
        "--cache-dir=/srv/cache",
        "--cache-size=2T",
        "--log=/srv/log",
        "--ca-file=/srv/ca.pem",
        "--resolver=fd00::1",
    )
    for line in (
        "listen [::1]:8443 ssl;",
        'ssl_certificate "/etc/a b.pem";',
        'ssl_certificate_key "/etc/key.pem";',
        'proxy_cache_path "/srv/cache" levels=1:2 keys_zone=tinkerfs:64m max_size=2097152m',
        'access_log "/srv/log" tinkerfs;',
        'proxy_ssl_trusted_certificate "/srv/ca.pem";',
        "resolver 127.0.0.53 [fd00::1];",
    ):
        assert line in text
    assert "@" not in text
    log_format = re.search(r"log_format (.*?);", text, re.DOTALL)[1]
    assert not re.search(r"\$(request\b|request_uri|args|query|uri|http_)", log_format)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "--allow-host"),
        (("--allow-host=https://x",), "not a host"),
        (("--allow-host=*",), "not a host"),
        ((STORE, "--listen=0.0.0.0:80"), "needs --certificate"),
        ((STORE, "--certificate=/x"), "belong together"),
        ((STORE, "--cache-size=0"), "caches nothing"),
        ((STORE, "--resolver=dns"), "not an address"),
        ((STORE, '--cache-dir=/a"b'), "not a path for nginx"),
    ],
)
def test_invalid_option_of_the_configuration_is_an_error(options, reason):
    done = tinkerfs(*NGINX, *options)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://cache.example.com:8080", "needs https://"),
        ("http://10.0.0.1", "needs https://"),
        ("ftp://127.0.0.1", "must start with http"),
        ("https://me:c0ffee@cache", "must not contain a user name"),
        ("cache:8080", "must start with http"),
    ],
)
def test_insecure_proxy_is_an_error(url, reason, tmp_path):
    done = tinkerfs("mount", f"--blob-proxy={url}", tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "c0ffee" not in done.stderr
