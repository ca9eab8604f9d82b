"""Trusted certificates if the environment names none."""

import ssl
from pathlib import Path
from types import SimpleNamespace

import certifi
import pytest

from tinkerfs import tls


def loaded(environ=None):
    return tls.trusting_context(environ or {}).cert_store_stats()["x509_ca"]


@pytest.fixture
def no_openssl_paths(monkeypatch):
    """Make OpenSSL search missing directories, like an interpreter with its own OpenSSL."""
    paths = SimpleNamespace(cafile=None, capath=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths)
    monkeypatch.setattr(tls, "_SYSTEM_BUNDLES", ())
    return monkeypatch


def test_context_without_a_system_store_trusts_mozillas(no_openssl_paths):
    assert loaded() > 100


def test_context_prefers_the_bundle_of_the_distribution(no_openssl_paths, tmp_path):
    bundle = tmp_path / "bundle.pem"
    lines = Path(certifi.where()).read_text().split("-----END CERTIFICATE-----", 1)[0]
    bundle.write_text(f"{lines}-----END CERTIFICATE-----\n")
    no_openssl_paths.setattr(tls, "_SYSTEM_BUNDLES", ("/nonexistent", str(bundle)))
    assert loaded() == 1
    assert loaded({"SSL_CERT_FILE": "", "REQUESTS_CA_BUNDLE": ""}) == 1
    assert loaded({"CURL_CA_BUNDLE": str(bundle), "SSL_CERT_DIR": f"{tmp_path}:"}) == 1


def test_context_with_empty_variables_still_verifies():
    context = tls.trusting_context({"REQUESTS_CA_BUNDLE": "", "CURL_CA_BUNDLE": ""})
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
