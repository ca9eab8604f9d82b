"""Which certificates are trusted, by the API and by object stores alike, and why one is refused.

The certificates that REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE and SSL_CERT_DIR name, all
of them together; where none is set, those of the system; where the system has none, Mozilla's.

The truststore package reads the system's store likewise. It reads it again for each connection,
and holds a lock through each handshake, so one server that stalls would stall all the others.
"""

import os
import re
import ssl
from collections.abc import Mapping
from typing import Final

from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

#: Variables that each name a bundle of certificates, or a directory of them, of one or more tools.
_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")

#: Bundles of distributions: an interpreter that brings its own OpenSSL looks in other places.
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

_HINT_OF_TIME: Final = "check this machine's clock; the server's owner renews a certificate"
_HINT_OF_NAME: Final = "check the host in --base-url, and what answers for it, such as a portal"
_HINT_OF_TRUST: Final = (
    "name the certificates to trust, such as your company's, in SSL_CERT_FILE or"
    " REQUESTS_CA_BUNDLE, or add them to the system's"
)


def trusting_context(environ: Mapping[str, str] | None = None) -> ssl.SSLContext:
    """Return a new context that verifies servers; not shared, so its user may change it.

    Args:
        environ: the environment; None for the process's.

    Raises:
        SetupError: what a variable names cannot be read; names the variable.
    """
    environ = os.environ if environ is None else environ
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # As curl does: a bundle may name an intermediate alone.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # An empty value means that nothing is named. It never means that nothing is verified.
    named: dict[str, str] = {}  # path -> variable; often all name one bundle, which takes 0.03 s
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
            # OpenSSL would wait for the other end of a FIFO.
            os.close(open_regular(path, os.O_RDONLY, follow_symlinks=True))
            context.load_verify_locations(cafile=path)
    except OSError as error:  # ssl.SSLError too: a file without a certificate
        reason = error.strerror if not isinstance(error, ssl.SSLError) else "not certificates"
        raise StartupError(
            f"{variable}: the certificates in {path} cannot be read: {reason}"
            f" (hint: correct {variable}, and start again)"
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
    """Tell whether OpenSSL finds a certificate in a directory: by the hash that names it."""
    try:
        return any(re.fullmatch(r"[0-9a-f]{8}\.\d+", name) for name in os.listdir(directory))
    except OSError:
        return False


def describe_refusal(error: BaseException, host: str) -> str | None:
    """Return why a server's certificate is refused, with a hint; None for another error.

    Args:
        error: what an HTTP library raised; the errors that it stands for are searched.
        host: the server, for the message.
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
