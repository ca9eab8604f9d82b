"""Server name <-> file name: reversible, no two alike, none escapes its folder (pure).

A name that is a file name as it stands is shown as it stands; bytes that are no UTF-8 travel as
surrogate escapes (PEP 383). A name that cannot be a file name (empty, `.`, `..`, with `/`, NUL or
a lone surrogate that stands for no byte), or that could be taken for an encoded one (`%` and two
hex digits, or `%~`), has each offending byte and each `%` written `%XX`; the empty name is `%~`.
One that only software asks for (`.git`), which is absent unasked, has its first character encoded.
What is longer than a file name may be is cut and ends in `%~` and a hash of the whole: such a name
cannot be decoded, it is found by encoding the names that are listed.
"""

import hashlib
import re

__all__ = ["decode", "encode", "is_cut", "is_software_probe"]

#: The longest file name Linux takes, bytes (NAME_MAX, limits.h(0p)).
NAME_MAX_BYTES = 255
_HASH_CHARACTERS = 32
_EMPTY = "%~"
_LOOKS_ENCODED = re.compile(r"%(?:[0-9A-Fa-f]{2}|~)")
_OFFENDING = re.compile("[%/\0]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODED = re.compile(r"%(ED%[AB][0-9A-F]%[89AB][0-9A-F]|[0-9A-F]{2})")

#: Names that file managers, version control and desktops ask for in every folder.
_PROBES = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        ".Trash",
        ".hidden",
        ".directory",
        ".xdg-volume-info",
        ".DS_Store",
        "autorun.inf",
        "Thumbs.db",
        "desktop.ini",
    }
)


def is_software_probe(name: str) -> bool:
    """Tell whether only software asks for this name, so that no API call is worth it."""
    return name in _PROBES or name.startswith((".Trash-", "._"))


def encode(name: str) -> str:
    """Return the file name that stands for a server's name."""
    has_odd_surrogates = not _round_trips(name)
    is_probe = is_software_probe(name)
    if not name:
        encoded = _EMPTY
    elif name in (".", ".."):
        encoded = "%2E" * len(name)
    elif (
        has_odd_surrogates
        or is_probe
        or _LOOKS_ENCODED.search(name)
        or _OFFENDING.search(name.replace("%", ""))
    ):
        encoded = _OFFENDING.sub(_escape, name)
        if has_odd_surrogates:
            encoded = _LONE_SURROGATE.sub(_escape, encoded)
        if is_probe:
            encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    else:
        encoded = name
    raw = encoded.encode("utf-8", "surrogateescape")
    if len(raw) <= NAME_MAX_BYTES:
        return encoded
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARACTERS]
    kept = raw[: NAME_MAX_BYTES - len(_EMPTY) - _HASH_CHARACTERS]
    return kept.decode("utf-8", "ignore") + _EMPTY + digest


def decode(file_name: str) -> str:
    """Return the server's name that `encode` made this file name of.

    Raises:
        ValueError: `encode` never returns this name, or it was cut and so cannot be decoded.
    """
    if is_cut(file_name):
        raise ValueError(f"a name that was cut cannot be decoded: {file_name!r}")
    name = "" if file_name == _EMPTY else _ENCODED.sub(_unescape, file_name)
    if encode(name) != file_name:
        raise ValueError(f"not the file name of any server name: {file_name!r}")
    return name


def is_cut(file_name: str) -> bool:
    """Tell whether `encode` had to cut the name, so that `decode` cannot restore it."""
    return file_name != _EMPTY and _EMPTY in file_name


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
