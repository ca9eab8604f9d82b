"""Select the proxy for a URL from the environment, like curl and requests.

Used for the API and for object stores. The variables are HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
NO_PROXY; the lower-case name of each takes precedence. A request to this machine never uses a
proxy. A login in a variable is a secret: it appears in no message and in no text of a `Proxy`.
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
from tinkerfs.printable import hide_secret

#: Protocol of the proxy by the scheme of its URL. GNOME's settings write `socks`.
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
    """A proxy server.

    Attributes:
        protocol: "http", "https" (TLS to the proxy), or "socks5h" (SOCKS 5; the proxy resolves
            names, because httpx supports only that).
        host: a name or an address, without brackets.
        port: TCP port.
        login: user name and password; None if the variable has none.
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
    """Return the proxy for an http or https URL, None for a direct connection.

    Args:
        url: URL of the request.
        environ: environment variables; None for those of the process.

    Raises:
        StartupError: the variable, which is in the message, does not contain a usable proxy.
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
            f"{variable} does not name a usable proxy: {errors.redact(str(error))}"
            " (hint: correct it or add the host to NO_PROXY, then start again)"
        ) from None


def is_loopback(host: str) -> bool:
    """Return whether a URL's host is this machine by name or address (RFC 6761)."""
    name = host.lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address_of(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _variable_for(scheme: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the name and value of the variable for a scheme; empty for no proxy."""
    variable, value = _read(environ, f"{scheme.upper()}_PROXY")
    return (variable, value) if value else _read(environ, "ALL_PROXY")


def _read(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the name under which the variable is set, and its value."""
    lower = environ.get(name.lower())
    if lower is not None:  # an empty value disables the upper-case variable
        return name.lower(), lower.strip()
    if name == "HTTP_PROXY" and "REQUEST_METHOD" in environ:
        return name, ""  # a header of the client in a CGI process (https://httpoxy.org)
    return name, environ.get(name, "").strip()


def _parse(value: str) -> Proxy:
    """Return the proxy for the value of a variable.

    Raises:
        ValueError: the value is not a proxy URL; the message does not contain the login.
    """
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:  # its message would quote the whole URL
        raise ValueError("not a URL") from None
    protocol = _PROTOCOLS.get(parts.scheme)
    if protocol is None:
        raise ValueError(f"the scheme is {parts.scheme!r}, not http, https or socks5h")
    if not host or port == 0:
        raise ValueError("the URL has no host or no port")
    login = None
    if parts.username or parts.password:
        login = unquote(parts.username or ""), unquote(parts.password or "")
        hide_secret(login[1], "proxy")
    return Proxy(protocol, host, port or _DEFAULT_PORTS[protocol], login)


def _port_of(parts: SplitResult) -> int:
    try:
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return 0


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Return whether NO_PROXY matches a host.

    Entries are separated by commas or spaces. An entry is `*`, a name that also matches its
    subdomains (`corp`, `.corp`, `*.corp`), an address, or a network (`10.0.0.0/8`), optionally
    followed by a port. An IPv6 address may have brackets.
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
    """Return the IP address of a URL's host, None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[0-9a-fA-FxX.]*[0-9a-fA-F]", host) or not host[0].isdigit():
            return None
        try:  # forms that the resolver accepts: 127.1, 0x7f000001
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return getattr(address, "ipv4_mapped", None) or address
