"""TLS contexts for the API and object stores, and certificate errors.

Trusted are the certificates in REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE and SSL_CERT_DIR
together. If none of the variables is set, the system's certificates are trusted; if the system has
none, Mozilla's are.

The truststore package also reads the system's certificates. But it reads them again for each
connection and holds a lock during each handshake, so a stalled server would delay all others.
"""

import os
import re
import ssl
from collections.abc import Mapping
from typing import Final

from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

#: Variables of several tools that name a bundle, or a directory, of certificates.
_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")

#: Bundles of distributions; an interpreter with its own OpenSSL searches other directories.
_SYSTEM_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Gentoo
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/pki/tls/certs/ca-bundle.crt",  # older RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine
)

# X509_V_ERR_* of openssl/x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAMES: Final = frozenset({62, 63, 64})

_HINT_OF_TIME: Final = "check this machine's clock; otherwise the server needs a new certificate"
_HINT_OF_NAME: Final = (
    "check the host in --base-url or --blob-proxy, and whether a captive portal intercepts it"
)
_HINT_OF_TRUST: Final = (
    "set SSL_CERT_FILE or REQUESTS_CA_BUNDLE to the certificates to trust, such as your company's,"
    " or add them to the system's"
)


def trusting_context(environ: Mapping[str, str] | None = None) -> ssl.SSLContext:
    """Return a new context that verifies servers; the caller may change it.

    Args:
        environ: environment variables; None for those of the process.

    Raises:
        StartupError: the certificates of a variable, which is in the message, cannot be read.
    """
    environ = os.environ if environ is None else environ
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Like curl: a bundle may contain only an intermediate certificate.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # An empty value counts as unset. It never disables verification.
    named: dict[str, str] = {}  # path -> variable; often all variables name the same bundle
    for variable in _VARIABLES:
        value = environ.get(variable, "")
        for path in value.split(":") if variable == "SSL_CERT_DIR" else [value]:
            if path:
                named.setdefault(os.path.expanduser(path), variable)
    for path, variable in named.items():
        _load(context, variable, path)
    if not named:
        _load_system(context)
    return context


def _load(context: ssl.SSLContext, variable: str, path: str) -> None:
    try:
        if os.path.isdir(path):
            context.load_verify_locations(capath=path)
        else:
            # OpenSSL would block on a FIFO.
            os.close(open_regular(path, os.O_RDONLY, follow_symlinks=True))
            context.load_verify_locations(cafile=path)
    except OSError as error:  # includes ssl.SSLError, for a file without certificates
        reason = error.strerror if not isinstance(error, ssl.SSLError) else "not certificates"
        raise StartupError(
            f"{variable}: the certificates in {path} cannot be read: {reason}"
            f" (hint: correct {variable} and start again)"
        ) from None


def _load_system(context: ssl.SSLContext) -> None:
    paths = ssl.get_default_verify_paths()
    if paths.cafile or (paths.capath and _has_certificates(paths.capath)):
        context.set_default_verify_paths()
        return
    bundle = next(filter(os.path.isfile, _SYSTEM_BUNDLES), None)
    if bundle is None:
        import certifi

        bundle = certifi.where()
    context.load_verify_locations(cafile=bundle)


def _has_certificates(directory: str) -> bool:
    """Return whether a directory has certificates with OpenSSL's hashed names."""
    try:
        return any(re.fullmatch(r"[0-9a-f]{8}\.\d+", name) for name in os.listdir(directory))
    except OSError:
        return False


def describe_refusal(error: BaseException, host: str) -> str | None:
    """Return the message for a rejected certificate; None for another error.

    Args:
        error: exception of an HTTP library; its causes are searched.
        host: host of the server, for the message.
    """
    refusal = _find_refusal(error, set())
    if refusal is None:
        return None
    code = refusal.verify_code
    reason = refusal.verify_message or "it is not trusted"
    if code in (_NOT_YET_VALID, _EXPIRED):
        hint = _HINT_OF_TIME
    else:
        hint = _HINT_OF_NAME if code in _OTHER_NAMES else _HINT_OF_TRUST
    return f"the certificate of {host} is refused: {reason} (hint: {hint})"


def _find_refusal(
    error: BaseException | None, seen: set[int]
) -> ssl.SSLCertVerificationError | None:
    if error is None or id(error) in seen:
        return None
    if isinstance(error, ssl.SSLCertVerificationError):
        return error
    seen.add(id(error))
    inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
    for each in inner:
        if isinstance(each, BaseException) and (found := _find_refusal(each, seen)):
            return found
    return None
