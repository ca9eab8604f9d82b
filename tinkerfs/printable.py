"""Text from outside, as people may see it: no secrets, one line, nothing that steers a terminal.

The one place that does so, for `.tinkerfs/errors` and `changes`, the log, and the command line.
Each expression here takes time in proportion to the text, whatever a server sends.
"""

import re
from typing import Final

#: Of a text this many times the limit is looked at: redaction may shorten what it keeps.
_MARGIN: Final = 8

_TOKEN: Final = re.compile(r"[^\s\"'<>]+")

#: The end of a URL's scheme; in JSON a slash may be escaped.
_SCHEME_END: Final = re.compile(r":(?://|\\/\\/)")

#: A query without a URL: behind a path, or parameters by themselves.
_QUERY: Final = re.compile(r"\?[\w.%~-]+=")
_PARAMETER: Final = re.compile(r"[\w.%~-]+=[^&]*&[\w.%~-]+=")

#: A parameter or header whose value is a secret by its name: signatures of S3, GCS, Azure, CDNs.
_SECRET_PAIR: Final = re.compile(
    r"((?:signature|credential|token|secret|password|\bsig|api[-_]?key|accesskeyid)(?:=|%3D))"
    r"[^&\s\"'<>]+",
    re.IGNORECASE,
)

#: A key of the API, a JSON web token. Within a word (`html-`) only what is as long as a key is.
_KEY: Final = re.compile(
    r"(?<![a-z0-9])tml-[\w.-]+|tml-[\w.-]{20,}|(?<![a-z0-9])eyJ[\w-]{4,}(?:\.[\w-]*)*",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    r"""Return text on one line that is harmless on a terminal, e.g. `\x1b[31m` for red.

    Escaped are control characters (C0 and C1), line ends, what turns the direction of writing, what
    has no width, and bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def redacted(text: str, *, limit: int) -> str:
    """Return text on one printable line, without keys and signatures.

    A signed URL keeps its host and path but loses its query, where the signature is.

    Args:
        text: from outside, of any length.
        limit: the most characters to return.
    """
    text = " ".join(text[: 40 * limit].split())[: _MARGIN * limit]
    text = _KEY.sub("[redacted key]", _TOKEN.sub(_without_query, text))
    text = printable(_SECRET_PAIR.sub(r"\1[redacted]", text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _without_query(match: re.Match[str]) -> str:
    """Return a word without the query and the login of a URL in it."""
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
