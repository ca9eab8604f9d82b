"""Encoding of server names as file names: reversible, unique and safe (pure).

- A name that is a valid file name stays unchanged. Non-UTF-8 bytes are surrogate escapes (PEP 383).
- A name that is not a valid file name has each unsafe byte and each `%` written as `%XX`. These
  are names with `/`, NUL or a lone surrogate that is not a byte, and `.` and `..`. The same holds
  for a name that looks encoded, with `%` and two hex digits or `%~`. The empty name is `%~`.
- A name that only software looks up (`.git`) has its first character encoded. So a lookup of the
  plain name needs no API request.
- A name that is too long for a file name is truncated, and ends in `%~` and a hash of the whole.
  It cannot be decoded; it is found by encoding the listed names.

A composite name, `<part>@<part>@<part>`, has each part encoded separately with `@` as an unsafe
byte, so that it can be split unambiguously.
"""

import hashlib
import json
import re
from collections.abc import Iterable

#: Maximum length of a file name on Linux, bytes (NAME_MAX, limits.h(0p)).
NAME_MAX_BYTES = 255
_HASH_CHARACTERS = 32
_EMPTY = "%~"
_LOOKS_ENCODED = re.compile(r"%(?:[0-9A-Fa-f]{2}|~)")
_UNSAFE_CHARS = re.compile("[%/\0]")
_SEPARATOR = "@"
_UNSAFE_PART_CHARS = re.compile("[%/\0@]")
_TRUNCATED = re.compile(f"{_EMPTY}[0-9a-f]{{{_HASH_CHARACTERS}}}\\Z")
#: Matches names without unsafe characters that fit, which are nearly all names.
_is_plain = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.:+-]{0,254}").fullmatch
#: Matches composite names of such parts, of any length.
_is_plain_composite = re.compile(
    r"[0-9A-Za-z][0-9A-Za-z_.:+-]*(?:@[0-9A-Za-z][0-9A-Za-z_.:+-]*)*"
).fullmatch
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODED = re.compile(r"%(ED%[AB][0-9A-F]%[89AB][0-9A-F]|[0-9A-F]{2})")

#: Names that software looks up in every directory it visits, or in all parents of its own.
_PROBES = frozenset(
    {
        # File managers and desktops.
        ".Trash",
        ".hidden",
        ".directory",
        ".xdg-volume-info",
        ".DS_Store",
        "autorun.inf",
        "Thumbs.db",
        "desktop.ini",
        # Version control; git checks whether each directory is a bare repository.
        ".git",
        ".gitattributes",
        ".gitmodules",
        ".hg",
        ".svn",
        "HEAD",
        # ripgrep and fd.
        ".gitignore",
        ".ignore",
        ".rgignore",
        ".fdignore",
        # Shells' hooks and editors.
        ".editorconfig",
        ".envrc",
        ".python-version",
        ".tool-versions",
        # Web servers, `python -m http.server` among them.
        "index.html",
        "index.htm",
    }
)


def is_probe_name(name: str) -> bool:
    """Return whether only software looks up this name, so it needs no request."""
    return name in _PROBES or name.startswith((".Trash-", "._"))


def encode(name: str) -> str:
    """Return the file name for a server's name."""
    if _is_plain(name) and name not in _PROBES:
        return name
    return _truncate(_encoded(name, _UNSAFE_CHARS), name)


def encode_composite(parts: Iterable[str]) -> str:
    """Return the composite file name for several names of the server."""
    parts = tuple(parts)
    plain = _SEPARATOR.join(parts)
    if (
        len(plain) <= NAME_MAX_BYTES
        and plain.count(_SEPARATOR) == len(parts) - 1
        and _is_plain_composite(plain)
        and _PROBES.isdisjoint(parts)
    ):
        return plain
    joined = _SEPARATOR.join(_encoded(part, _UNSAFE_PART_CHARS) for part in parts)
    return _truncate(joined, joined)


def _encoded(name: str, unsafe: re.Pattern[str]) -> str:
    """Return a name with its unsafe characters encoded, of any length."""
    if _is_plain(name) and name not in _PROBES:
        return name
    if not name:
        return _EMPTY
    if name in (".", ".."):
        return "%2E" * len(name)
    has_odd_surrogates = not _round_trips(name)
    is_probe = is_probe_name(name)
    if not (
        has_odd_surrogates
        or is_probe
        or _LOOKS_ENCODED.search(name)
        or unsafe.search(name.replace("%", ""))
    ):
        return name
    encoded = unsafe.sub(_escape, name)
    if has_odd_surrogates:
        encoded = _LONE_SURROGATE.sub(_escape, encoded)
    return f"%{ord(encoded[0]):02X}{encoded[1:]}" if is_probe else encoded


def _truncate(encoded: str, whole: str) -> str:
    """Return an encoded name, truncated with a hash of `whole` if it is too long."""
    raw = encoded.encode("utf-8", "surrogateescape")
    if len(raw) <= NAME_MAX_BYTES:
        return encoded
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARACTERS]
    prefix = raw[: NAME_MAX_BYTES - len(_EMPTY) - _HASH_CHARACTERS]
    return prefix.decode("utf-8", "ignore") + _EMPTY + digest


def decode(file_name: str) -> str:
    """Return the server's name for a file name that `encode` returned.

    Raises:
        ValueError: `encode` never returns this file name, or it was truncated.
    """
    if _is_plain(file_name) and file_name not in _PROBES:
        return file_name
    name = _decoded(file_name)
    if encode(name) != file_name:
        raise ValueError(f"not the file name of any server name: {file_name!r}")
    return name


def decode_composite(file_name: str) -> tuple[str, ...]:
    """Return the server's names for a file name that `encode_composite` returned.

    Raises:
        ValueError: `encode_composite` never returns this file name, or it was truncated.
    """
    parts = tuple(_decoded(part) for part in file_name.split(_SEPARATOR))
    if encode_composite(parts) != file_name:
        raise ValueError(f"not a composite of server names: {file_name!r}")
    return parts


def is_truncated(file_name: str) -> bool:
    """Return whether a file name was truncated, so that it cannot be decoded."""
    return _TRUNCATED.search(file_name) is not None


def _decoded(text: str) -> str:
    return "" if text == _EMPTY else _ENCODED.sub(_unescape, text)


def _round_trips(name: str) -> bool:
    """Return whether a conversion to file name bytes and back keeps the name."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == name
    except UnicodeEncodeError:
        return False


def _escape(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogatepass"))


def _unescape(match: re.Match[str]) -> str:
    return bytes.fromhex(match.group(1).replace("%", "")).decode("utf-8", "surrogatepass")


def compound_key(*parts: str | float | None) -> str:
    """Return a key of a cache or a store that is unique for these parts."""
    return json.dumps(parts)
