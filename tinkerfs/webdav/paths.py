"""Paths of the tree in URLs: UTF-8, with other bytes as surrogate escapes, in percent-encoding."""

from typing import Final
from urllib.parse import quote, unquote_to_bytes

#: Characters of RFC 3986 that GNOME Files expects to be unencoded in responses.
_SAFE: Final = "/!*'(),$-_|."


def path_from_target(target: str) -> str:
    """Return the path for the target of a request, without a trailing slash except for the root.

    Args:
        target: the request's target, with each byte as one character.

    Raises:
        ValueError: a component is `.` or `..`, or contains a slash or NUL.
    """
    encoded = target.partition("?")[0].split("/")
    names = [unquote_to_bytes(name.encode("latin-1")) for name in encoded if name]
    if encoded[0] or any(name in (b".", b"..") or b"/" in name or b"\0" in name for name in names):
        raise ValueError("the path is not valid")
    return "/" + "/".join(name.decode("utf-8", "surrogateescape") for name in names)


def href(path: str, *, is_directory: bool) -> str:
    """Return the path of a URL; that of a directory ends with a slash."""
    slash = "/" if is_directory and path != "/" else ""
    return quote(path + slash, safe=_SAFE, errors="surrogateescape")
