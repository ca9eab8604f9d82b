"""Sanitize external text: one line without secrets or control characters.

Used for `.tinkerfs/errors` and `changes`, the log, and the command line. Every regular expression
here takes linear time, whatever a server sends.
"""

import re
from typing import Final

#: Multiple of the limit that is examined, because redaction may shorten the text.
_MARGIN: Final = 8

_TOKEN: Final = re.compile(r"[^\s\"'<>]+")

#: The end of a URL's scheme; in JSON a slash may be escaped.
_SCHEME_END: Final = re.compile(r":(?://|\\/\\/)")

#: A query without a URL: after a path, or as parameters alone.
_QUERY: Final = re.compile(r"\?[\w.%~-]+=")
_PARAMETER: Final = re.compile(r"[\w.%~-]+=[^&]*&[\w.%~-]+=")

#: A parameter or header with a secret value: signatures of S3, GCS, Azure and CDNs.
_SECRET_PAIR: Final = re.compile(
    r"((?:signature|credential|token|secret|password|\bsig|api[-_]?key|accesskeyid)(?:=|%3D))"
    r"[^&\s\"'<>]+",
    re.IGNORECASE,
)

#: An API key or a JSON web token. Within a word (`html-`) only a match of a key's length counts.
_KEY: Final = re.compile(
    r"(?<![a-z0-9])tml-[\w.-]+|tml-[\w.-]{20,}|(?<![a-z0-9])eyJ[\w-]{4,}(?:\.[\w-]*)*",
    re.IGNORECASE,
)


def escape_control_chars(text: str) -> str:
    r"""Return text on one line that is safe on a terminal, e.g. `\x1b[31m` for red.

    Escapes control characters (C0 and C1), newlines, bidirectional controls, zero-width characters
    and non-UTF-8 bytes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def redacted(text: str, *, limit: int) -> str:
    """Return text on one printable line, without keys and signatures.

    A signed URL keeps its host and path but loses its query, which has the signature.

    Args:
        text: external text of any length.
        limit: maximum number of characters to return.
    """
    text = " ".join(text[: 40 * limit].split())[: _MARGIN * limit]
    text = _KEY.sub("[redacted key]", _TOKEN.sub(_without_query, text))
    text = escape_control_chars(_SECRET_PAIR.sub(r"\1[redacted]", text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _without_query(match: re.Match[str]) -> str:
    """Return a word without the query and the login of a URL that it contains."""
    word = match.group()
    scheme = _SCHEME_END.search(word)
    if scheme is None:
        if _PARAMETER.match(word):
            return "[redacted query]"
        query = _QUERY.search(word)
        return word if query is None else f"{word[: query.start()]}?[redacted]"
    start = scheme.end()
    end = min((at for at in (word.find("?", start), word.find("#", start)) if at >= 0), default=-1)
    address, tail = (word, "") if end < 0 else (word[:end], "?[redacted]")
    slash = address.find("/", start)
    login = address.rfind("@", start, slash if slash >= 0 else len(address))
    if login >= 0:
        address = f"{address[:start]}[redacted]{address[login:]}"
    return address + tail
