"""Which proxy a URL is asked through, by the environment, as curl and requests read it.

The one module that decides that, for the API and for object stores alike. Read are HTTP_PROXY,
HTTPS_PROXY, ALL_PROXY and NO_PROXY; the lower-case name of each comes first. A request to this
machine is never sent through a proxy. A login in a variable is a secret: it is in no message, and
in no text that a `Proxy` is shown as.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from tinkerfs import errors
from tinkerfs.errors import StartupError

#: Scheme of a variable's value -> what the proxy speaks. GNOME's settings write `socks`.
_PROTOCOLS: Final = {
    "http": "http",
    "https": "https",
    "socks": "socks5h",
    "socks5": "socks5h",
    "socks5h": "socks5h",
}

_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "socks5h": 1080}

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Proxy:
    """One proxy.

    Attributes:
        protocol: "http", "https" (TLS to the proxy), or "socks5h" (SOCKS 5; the proxy resolves
            names, because httpx has no other way).
        host: a name or an address, without brackets.
        port: TCP port.
        login: user name and password; None for a proxy that asks for none.
    """

    protocol: str
    host: str
    port: int
    login: tuple[str, str] | None = None

    @property
    def url(self) -> str:
        """The proxy's URL, without its login."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}://{host}:{self.port}"

    def __str__(self) -> str:
        """Return the URL, without the login."""
        return self.url

    def __repr__(self) -> str:
        """Return the URL, without the login."""
        return f"Proxy({self.url})"


def proxy_for(url: str, environ: Mapping[str, str] | None = None) -> Proxy | None:
    """Return the proxy for a URL of http or https, None for a direct connection.

    Args:
        url: what is to be requested.
        environ: the environment; None for the process's.

    Raises:
        SetupError: the variable that counts holds no proxy that can be used; names the variable.
    """
    environ = os.environ if environ is None else environ
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if is_loopback(host):
        return None
    variable, value = _variable_for(parts.scheme, environ)
    if not value or _is_exempt(host, _port_of(parts), _read(environ, "NO_PROXY")[1]):
        return None
    try:
        return _parse(value)
    except ValueError as error:
        raise StartupError(
            f"{variable} names no proxy that can be used: {errors.redact(str(error))}"
            " (hint: correct it, or name the host in NO_PROXY, and start again)"
        ) from None


def is_loopback(host: str) -> bool:
    """Tell whether a host of a URL is this machine by its very name or address (RFC 6761, 6.3)."""
    name = host.lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address_of(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _variable_for(scheme: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the variable that counts for a scheme, and its value; empty for no proxy."""
    variable, value = _read(environ, f"{scheme.upper()}_PROXY")
    return (variable, value) if value else _read(environ, "ALL_PROXY")


def _read(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the variable's name as it is set, and its value."""
    lower = environ.get(name.lower())
    if lower is not None:  # an empty one switches the other off
        return name.lower(), lower.strip()
    if name == "HTTP_PROXY" and "REQUEST_METHOD" in environ:
        return name, ""  # in a CGI process that is a client's header (https://httpoxy.org)
    return name, environ.get(name, "").strip()


def _parse(value: str) -> Proxy:
    """Return the proxy that a variable names.

    Raises:
        ValueError: the value does not name one; the message holds nothing of a login.
    """
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:  # whose text would quote all of it
        raise ValueError("not a URL") from None
    protocol = _PROTOCOLS.get(parts.scheme)
    if protocol is None:
        raise ValueError(f"its scheme is {parts.scheme!r}, not http, https or socks5h")
    if not host or port == 0:
        raise ValueError("it has no host or no port")
    login = None
    if parts.username or parts.password:
        login = unquote(parts.username or ""), unquote(parts.password or "")
    return Proxy(protocol, host, port or _DEFAULT_PORTS[protocol], login)


def _port_of(parts: SplitResult) -> int:
    try:
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return 0


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Tell whether NO_PROXY names a host.

    Its entries have commas or spaces between them. One is `*`, a name that stands for its
    subdomains too (`corp`, `.corp`, `*.corp`), an address, or a network (`10.0.0.0/8`); behind it
    may stand a port. An IPv6 address may have brackets.
    """
    address = _address_of(host)
    return any(
        _matches(entry, host.lower(), address, port) for entry in re.split(r"[,\s]+", no_proxy)
    )


def _matches(entry: str, host: str, address: _Address | None, port: int) -> bool:
    pattern, wanted_port = _split_port(entry.rpartition("://")[2].lower())
    if not pattern or (wanted_port is not None and wanted_port != port):
        return False
    if pattern == "*":
        return True
    if address is not None:
        try:
            return address in ipaddress.ip_network(pattern, strict=False)
        except ValueError:
            return "*" in pattern and fnmatchcase(str(address), pattern)
    name = pattern.removeprefix("*").strip(".")
    if "*" in name:
        return fnmatchcase(host, name)
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _split_port(entry: str) -> tuple[str, int | None]:
    """Return an entry's host or network without brackets, and its port."""
    match = re.fullmatch(r"\[([^\]]*)\](/\d+)?(?::(\d+))?", entry)
    if match:
        host, bits, port = match.groups()
        return host + (bits or ""), int(port) if port else None
    host, colon, port = entry.rpartition(":")
    if colon and port.isascii() and port.isdigit() and ":" not in host:
        return host, int(port)
    return entry, None


def _address_of(host: str) -> _Address | None:
    """Return the address that a host of a URL is, None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[0-9a-fA-FxX.]*[0-9a-fA-F]", host) or not host[0].isdigit():
            return None
        try:  # as the resolver takes it: 127.1, 0x7f000001
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return getattr(address, "ipv4_mapped", None) or address
