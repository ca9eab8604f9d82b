"""Encryption of the responses that hosts share, and the names of their keys. Pure.

Other users of the Redis server may read, replace, exchange and replay its values. So each value is
encrypted and authenticated with a key that is derived from the API key, together with its name and
the version of this format. What decides whether a value may be used is part of it: the time of the
request by the server's clock, its lifetime, and the generation. A replayed value gains no
time.
"""

import hashlib
import hmac
import secrets
import zlib
from dataclasses import dataclass
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tinkerfs import errors
from tinkerfs.api.http_client import Response
from tinkerfs.api.transport import MAX_RESPONSE_BYTES
from tinkerfs.errors import ApiError

#: Version of the format; part of every name, so that other versions never meet.
FORMAT: Final = 1

#: Maximum size of an encrypted value; a larger response is not shared.
MAX_VALUE_BYTES: Final = 16 << 20

#: Headers that are part of a response. The others are of no use to another host.
_HEADERS: Final[tuple[str, ...]] = ("expires", "location")

#: Errors that hosts share: the server responded, and would refuse another host as well.
REFUSALS: Final[tuple[type[ApiError], ...]] = (
    errors.NotFound,
    errors.UnsupportedEndpoint,
    errors.BadRequest,
)

#: A value differs from every other one in its first bytes.
HEAD_BYTES: Final = 12

_KEY_BYTES: Final = 32


class InvalidRecordError(Exception):
    """A value that no host with the same key has stored under this name."""


@dataclass(frozen=True, slots=True, repr=False)
class SharedRecord:
    """A shared response.

    Attributes:
        generation: the generation in which it was requested.
        requested_us: when it was requested, by the clock of the server, microseconds since 1970.
        life_ms: how long it may be used, milliseconds.
        identity: differs for each request.
        outcome: the response, or the error by which the server refused the request.
    """

    generation: bytes
    requested_us: int
    life_ms: int
    identity: str
    outcome: Response | ApiError


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """A `SharedRecord` as it is encoded.

    Attributes:
        refusal: the class of an error, empty for a response. The body has its message then, and the
            URL what distinguishes it from other errors of the class.
    """

    generation: bytes
    requested_us: int
    life_ms: int
    identity: str
    refusal: str
    status: int
    headers: dict[str, str]
    url: str
    body: bytes


class Change(msgspec.Struct, array_like=True, frozen=True):
    """A message that something has changed.

    Attributes:
        sender: the mount that made the change.
        generation: the generation that the change began.
        run_id: the run that was changed; empty if anything may have been.
    """

    sender: str
    generation: bytes
    run_id: str


class RecordSeal:
    """Encrypts and decrypts for the holders of one API key. Immutable."""

    def __init__(self, api_key: str, base_url: str) -> None:
        info = f"tinkerfs shared cache {FORMAT}\n{base_url}".encode()
        derived = HKDF(SHA256(), 2 * _KEY_BYTES, salt=None, info=info).derive(api_key.encode())
        self._name_key = derived[:_KEY_BYTES]
        self._cipher = AESGCM(derived[_KEY_BYTES:])
        self._prefix = f"tinkerfs:{FORMAT}:{self._digest('account')}"

    def name(self, kind: str, *parts: str) -> str:
        """Return the name of a key or channel; it reveals none of its parts."""
        return f"{self._prefix}:{kind}:{self._digest(kind, *parts)}"

    def _digest(self, *parts: str) -> str:
        # The length of each part is included, so that no two lists of parts are alike.
        text = "".join(f"{len(part)}:{part}" for part in parts)
        encoded = text.encode("utf-8", "surrogatepass")
        return hmac.new(self._name_key, encoded, hashlib.sha256).hexdigest()[:40]

    def seal(self, record: SharedRecord, name: str) -> bytes | None:
        """Return the value to store under a name; None if it is too large."""
        stored = _Stored(
            record.generation,
            record.requested_us,
            record.life_ms,
            record.identity,
            *_encode(record.outcome),
        )
        sealed = self._encrypt(msgspec.msgpack.encode(stored), name)
        return sealed if len(sealed) <= MAX_VALUE_BYTES else None

    def unseal(self, value: bytes, name: str) -> SharedRecord:
        """Return the record in a value.

        Raises:
            InvalidRecordError: it was not stored under this name by a holder of the key.
        """
        try:
            stored = msgspec.msgpack.decode(self._decrypt(value, name), type=_Stored)
            outcome = _decode(stored)
        except (msgspec.MsgspecError, zlib.error, UnicodeDecodeError):
            raise InvalidRecordError("not a record") from None
        return SharedRecord(
            stored.generation, stored.requested_us, stored.life_ms, stored.identity, outcome
        )

    def seal_change(self, change: Change, name: str) -> bytes:
        """Return the message of a change for the channel `name`."""
        return self._encrypt(msgspec.msgpack.encode(change), name)

    def unseal_change(self, value: bytes, name: str) -> Change:
        """Return the change in a message.

        Raises:
            InvalidRecordError: no holder of the key sent it to this channel.
        """
        try:
            return msgspec.msgpack.decode(self._decrypt(value, name), type=Change)
        except msgspec.MsgspecError:
            raise InvalidRecordError("not a change") from None

    def _encrypt(self, text: bytes, name: str) -> bytes:
        nonce = secrets.token_bytes(HEAD_BYTES)
        return nonce + self._cipher.encrypt(nonce, text, name.encode())

    def _decrypt(self, value: bytes, name: str) -> bytes:
        nonce, sealed = value[:HEAD_BYTES], value[HEAD_BYTES:]
        try:
            return self._cipher.decrypt(nonce, sealed, name.encode())
        except (InvalidTag, ValueError):  # ValueError: too short
            raise InvalidRecordError("not authentic") from None


def _encode(outcome: Response | ApiError) -> tuple[str, int, dict[str, str], str, bytes]:
    """Return the last fields of `_Stored`."""
    if isinstance(outcome, Response):
        found = {each: outcome.headers.get(each) for each in _HEADERS}
        headers = {each: value for each, value in found.items() if value is not None}
        return "", outcome.status, headers, outcome.url, zlib.compress(outcome.body, level=1)
    text = zlib.compress(outcome.message.encode("utf-8", "replace"))
    reason = getattr(outcome, "reason", "")
    return type(outcome).__name__, outcome.status or 0, {}, reason, text


def _decode(stored: _Stored) -> Response | ApiError:
    """Return the outcome that the last fields describe."""
    body = _decompress(stored.body)
    if not stored.refusal:
        headers = {each: stored.headers[each] for each in _HEADERS if each in stored.headers}
        return Response(stored.status, headers, body, stored.url)
    for kind in REFUSALS:
        if kind.__name__ == stored.refusal:
            error = kind(body.decode(), status=stored.status or None)
            if isinstance(error, errors.UnsupportedEndpoint):
                error.reason = stored.url
            return error
    raise InvalidRecordError("not a known error")


def _decompress(body: bytes) -> bytes:
    """Return a body, at most as large as a response of the API may be."""
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(body, MAX_RESPONSE_BYTES)
    if not decompressor.eof:
        raise InvalidRecordError("not a whole body")
    return text
