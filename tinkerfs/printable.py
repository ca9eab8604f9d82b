"""Sanitize external text: one line without secrets or control characters.

Used for `.tinkerfs/errors` and `changes`, the log, the audit log, bug reports, and the command
line. Every regular expression here takes linear time, whatever a server sends. Thread-safe.
"""

import base64
import re
import threading
from typing import Final
from urllib.parse import quote

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


#: A shorter secret is not hidden by its value, because ordinary words would be hidden too.
MIN_SECRET_CHARS: Final = 8
#: Maximum number of secrets of a kind; the oldest ones are forgotten, because tokens are renewed.
_MAX_SECRETS: Final = 32


class _KnownSecrets:
    """The secrets of this process, which have no recognizable form.

    The only state here: a key belongs to the process, and so does the log that must not show it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._secrets: dict[str, dict[str, None]] = {}  # by kind; modified under _lock
        self.pattern: re.Pattern[str] | None = None

    def add(self, secret: str, kind: str) -> None:
        if len(secret) < MIN_SECRET_CHARS or secret in self._secrets.get(kind, ()):
            return
        with self._lock:
            secrets = self._secrets.setdefault(kind, {})
            secrets[secret] = None
            if len(secrets) > _MAX_SECRETS:
                del secrets[next(iter(secrets))]
            forms = {
                form
                for secrets in self._secrets.values()
                for each in secrets
                for form in forms_of_secret(each)
            }
            longest_first = sorted(forms, key=len, reverse=True)
            self.pattern = re.compile("|".join(map(re.escape, longest_first)))


_known_secrets: Final = _KnownSecrets()


def hide_secret(secret: str, kind: str) -> None:
    """Redact a key or password of this process from now on, whatever its form.

    Args:
        kind: of each kind, the last secrets are redacted: many tokens displace no password.
    """
    _known_secrets.add(secret, kind)


def forms_of_secret(secret: str) -> set[str]:
    """Return the forms in which a secret may occur: itself, quoted in a URL, in base64."""
    encoded = base64.b64encode(secret.encode("utf-8", "surrogateescape")).decode()
    return {secret, quote(secret, safe="", errors="surrogateescape"), encoded.rstrip("=")}


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
    return _truncated(escape_control_chars(without_secrets(text)), limit)


def redacted_lines(text: str, *, limit: int) -> str:
    """Return lines without keys and signatures, and with their white space.

    Args:
        text: lines of a log or a file.
        limit: maximum number of characters to return of a line.
    """
    # Not splitlines, which also splits at characters that are not line ends in a log.
    return "\n".join(_redacted_line(line, limit) for line in text.split("\n"))


def _redacted_line(line: str, limit: int) -> str:
    text = without_secrets(line[: _MARGIN * limit].rstrip("\r"))
    text = "\t".join(map(escape_control_chars, text.split("\t")))
    return _truncated(text, limit)


def _truncated(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def valid_unicode(text: str) -> str:
    r"""Return text with `\xff` for each byte that is not UTF-8, which is a lone surrogate."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def without_secrets_up_to(text: str, limit: int) -> str:
    """Return the start of a text as `without_secrets` does, at most `limit` characters.

    A secret that the limit cuts in two is redacted too.
    """
    return without_secrets(text[: _MARGIN * limit])[:limit]


def without_secrets(text: str) -> str:
    """Return text without keys, signatures and logins; white space is preserved."""
    pattern = _known_secrets.pattern
    if pattern is not None:
        text = pattern.sub("[redacted key]", text)
    text = _KEY.sub("[redacted key]", _TOKEN.sub(_without_query, text))
    return _SECRET_PAIR.sub(r"\1[redacted]", text)


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
