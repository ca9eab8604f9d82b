"""Parsers of URLs in options. Pure."""

from urllib.parse import parse_qs, urlsplit

from tinkerfs.proxies import is_loopback


def parse_base_url(text: str) -> str:
    """Return the URL of an API, without a trailing slash.

    Raises:
        ValueError: the text is not such a URL.
    """
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL must start with http:// or https:// and a host name")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL must not contain a user name or password, which ps would show")
    if parts.query or parts.fragment:
        raise ValueError("the URL must not contain a query (?) or a fragment (#)")
    del port
    return text.strip().rstrip("/")


def parse_blob_proxy(text: str) -> str:
    """Return the URL of a caching proxy.

    Raises:
        ValueError: the text is not such a URL, or signed URLs would be sent in plain text.
    """
    url = parse_base_url(text)
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("signed URLs are secrets: a proxy on another host needs https://")
    return url


def parse_shared_cache(text: str) -> str:
    """Return the URL of a Redis server: redis, rediss or unix.

    Raises:
        ValueError: the text is not such a URL; the message has no part of it.
    """
    try:
        parts = urlsplit(text.strip())
        port = parts.port
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
    except ValueError:
        raise ValueError("not a URL (hint: redis://HOST:6379/0 or unix:///PATH?db=0)") from None
    del port
    database = parts.path.strip("/")
    if parts.scheme == "unix":
        if not parts.path.strip("/") or parts.hostname:
            raise ValueError("the URL needs an absolute path (hint: unix:///run/redis.sock)")
        database = query.pop("db", ["0"])[0]
    elif parts.scheme not in ("redis", "rediss"):
        raise ValueError("a URL must start with redis://, rediss:// or unix://")
    elif not parts.hostname:
        raise ValueError("the URL has no host (hint: redis://HOST:6379/0)")
    if query or parts.fragment:
        raise ValueError("the URL must not contain parameters but db of unix://")
    if database and not (database.isascii() and database.isdigit()):
        raise ValueError("the number of the database is not a number (hint: redis://HOST:6379/0)")
    return text.strip()


def has_password(url: str) -> bool:
    """Return whether a valid URL contains a password."""
    return urlsplit(url).password is not None
