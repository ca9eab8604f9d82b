"""Server name <-> file name: reversible, no two alike, none escapes its folder (pure).

A name that is a file name as it stands is shown as it stands; bytes that are no UTF-8 travel as
surrogate escapes (PEP 383). A name that cannot be a file name (empty, `.`, `..`, with `/`, NUL or
a lone surrogate that stands for no byte), or that could be taken for an encoded one (`%` and two
hex digits, or `%~`), has each offending byte and each `%` written `%XX`; the empty name is `%~`.
One that only software asks for (`.git`), which is absent unasked, has its first character encoded.
What is longer than a file name may be is cut and ends in `%~` and a hash of the whole: such a name
cannot be decoded, it is found by encoding the names that are listed.

A composite name, `<part>@<part>@<part>`, has each part encoded by itself, `@` being one more byte
that offends, so that it parts again only where it was joined.
"""

import hashlib
import json
import re
from collections.abc import Iterable

#: The longest file name Linux takes, bytes (NAME_MAX, limits.h(0p)).
NAME_MAX_BYTES = 255
_HASH_CHARACTERS = 32
_EMPTY = "%~"
_LOOKS_ENCODED = re.compile(r"%(?:[0-9A-Fa-f]{2}|~)")
_UNSAFE_CHARS = re.compile("[%/\0]")
_SEPARATOR = "@"
_OFFENDING_PART = re.compile("[%/\0@]")
_CUT = re.compile(f"{_EMPTY}[0-9a-f]{{{_HASH_CHARACTERS}}}\\Z")
#: Nearly every name that servers give out: nothing in it offends, and it fits.
_is_plain = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.:+-]{0,254}").fullmatch
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODED = re.compile(r"%(ED%[AB][0-9A-F]%[89AB][0-9A-F]|[0-9A-F]{2})")

#: Names that software asks for in every folder that it comes to, or in all above the current one.
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
        # Version control; git asks whether each folder is a bare repository.
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
    """Tell whether only software asks for this name, so that no API call is worth it."""
    return name in _PROBES or name.startswith((".Trash-", "._"))


def encode(name: str) -> str:
    """Return the file name that stands for a server's name."""
    if _is_plain(name) and name not in _PROBES:
        return name
    return _truncate(_encoded(name, _UNSAFE_CHARS), name)


def encode_composite(parts: Iterable[str]) -> str:
    """Return the composite file name that stands for several names of the server."""
    joined = _SEPARATOR.join(_encoded(part, _OFFENDING_PART) for part in parts)
    return _truncate(joined, joined)


def _encoded(name: str, offending: re.Pattern[str]) -> str:
    """Return a name with what offends encoded, of any length."""
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
        or offending.search(name.replace("%", ""))
    ):
        return name
    encoded = offending.sub(_escape, name)
    if has_odd_surrogates:
        encoded = _LONE_SURROGATE.sub(_escape, encoded)
    return f"%{ord(encoded[0]):02X}{encoded[1:]}" if is_probe else encoded


def _truncate(encoded: str, whole: str) -> str:
    """Return an encoded name, cut where it is too long; `whole` tells the cut ones apart."""
    raw = encoded.encode("utf-8", "surrogateescape")
    if len(raw) <= NAME_MAX_BYTES:
        return encoded
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARACTERS]
    kept = raw[: NAME_MAX_BYTES - len(_EMPTY) - _HASH_CHARACTERS]
    return kept.decode("utf-8", "ignore") + _EMPTY + digest


def decode(file_name: str) -> str:
    """Return the server's name that `encode` made this file name of.

    Raises:
        ValueError: `encode` never returns this name, or it was cut and so cannot be decoded.
    """
    if _is_plain(file_name) and file_name not in _PROBES:
        return file_name
    name = _decoded(file_name)
    if encode(name) != file_name:
        raise ValueError(f"not the file name of any server name: {file_name!r}")
    return name


def decode_composite(file_name: str) -> tuple[str, ...]:
    """Return the names that `join` made this composite file name of.

    Raises:
        ValueError: `join` never returns this name, or it was cut and so cannot be parted.
    """
    parts = tuple(_decoded(part) for part in file_name.split(_SEPARATOR))
    if encode_composite(parts) != file_name:
        raise ValueError(f"not a composite of server names: {file_name!r}")
    return parts


def is_truncated(file_name: str) -> bool:
    """Tell whether a name had to be cut to fit, so that nothing can restore it."""
    return _CUT.search(file_name) is not None


def _decoded(text: str) -> str:
    return "" if text == _EMPTY else _ENCODED.sub(_unescape, text)


def _round_trips(name: str) -> bool:
    """Tell whether the name survives being a file name's bytes and coming back."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == name
    except UnicodeEncodeError:
        return False


def _escape(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogatepass"))


def _unescape(match: re.Match[str]) -> str:
    return bytes.fromhex(match.group(1).replace("%", "")).decode("utf-8", "surrogatepass")


def compound_key(*parts: str | float | None) -> str:
    """Return a text that stands for these parts and no others: a key of a cache or a store."""
    return json.dumps(parts)
