"""Passwords and tokens of the server, from a file that only its owner may read."""

import base64
import hashlib
import hmac
import os
import stat
from dataclasses import dataclass
from typing import Final, Self

from tinkerfs import errors
from tinkerfs.errors import StartupError
from tinkerfs.printable import hide_secret
from tinkerfs.safe_open import open_regular

_MAX_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Accounts:
    """The secrets of the server.

    Attributes:
        passwords: pairs of a user's name and a digest of the password.
        tokens: digests of tokens, which need no name.
    """

    passwords: tuple[tuple[bytes, bytes], ...]
    tokens: tuple[bytes, ...]

    @classmethod
    def from_file(cls, path: str) -> Self:
        """Read a file with a line `user:password` or a line with a token for each account.

        Raises:
            StartupError: the file cannot be read, is readable by others, or has no account.
        """
        lines = [line for line in _read(path).splitlines() if line.strip()]
        pairs = [line.split(b":", 1) for line in lines if b":" in line]
        if not lines or not all(name and password for name, password in pairs):
            raise StartupError(
                f"{path}: no account found (hint: a line with user:password or with a token)"
            )
        tokens = [line.strip() for line in lines if b":" not in line]
        for secret in (*tokens, *(password for _, password in pairs)):
            hide_secret(os.fsdecode(secret), "account")
        return cls(
            tuple((name, _digest(password)) for name, password in pairs),
            tuple(map(_digest, tokens)),
        )

    def user(self, authorization: str) -> str | None:
        """Return the user's name for the header `Authorization`; None if it is not valid.

        A token is accepted as `Bearer TOKEN`, and as a password of any user, because few clients
        send the former. The time depends neither on the secrets nor on the user's name.
        """
        scheme, _, value = authorization.strip().partition(" ")
        name, secret = b"", value.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                name, _, secret = base64.b64decode(value.strip(), validate=True).partition(b":")
            except ValueError:
                return None
        elif scheme.lower() != "bearer":
            return None
        digest, is_valid = _digest(secret), False
        for own_name, own_digest in self.passwords:
            has_name = hmac.compare_digest(_digest(own_name), _digest(name))
            is_valid |= hmac.compare_digest(own_digest, digest) & has_name
        for token in self.tokens:
            is_valid |= hmac.compare_digest(token, digest)
        return name.decode("utf-8", "replace") or "token" if is_valid else None


def _digest(secret: bytes) -> bytes:
    # Secrets of equal length, so that a comparison takes the same time for every length.
    return hashlib.sha256(secret).digest()


def _read(path: str) -> bytes:
    try:
        fd = open_regular(path, os.O_RDONLY, follow_symlinks=True)
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror} (hint: --auth-file FILE)") from None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if status.st_uid not in (os.getuid(), 0):
            raise StartupError(f"{path}: owned by another user (hint: chown it to yourself)")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise StartupError(f"{path}: other users may read it (hint: chmod 600 {path})")
        try:
            return file.read(_MAX_BYTES)
        except OSError as error:
            raise StartupError(f"{path}: {errors.redact(error.strerror or '')}") from None
