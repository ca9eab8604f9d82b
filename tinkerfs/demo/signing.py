"""Signed URLs, which allow anyone to read one object until they expire."""

import hashlib
import hmac
import itertools
import secrets
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote, urlencode


class Signer:
    """Makes and checks signed URLs. Thread-safe.

    Args:
        clock: Returns Unix time.
        lifetime_s: Lifetime of new URLs. May be changed at any time.
    """

    def __init__(self, clock: Callable[[], float] = time.time, lifetime_s: float = 900.0) -> None:
        self.lifetime_s = lifetime_s
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._numbers = itertools.count(1)
        self._revoked_before = 0

    def sign(self, origin: str, path: str) -> tuple[str, float]:
        """Return a new unique URL for a path, and its expiry (Unix time).

        Args:
            origin: Scheme, host and port.
            path: Absolute, not percent-encoded.
        """
        expires_s = round(self._clock() + self.lifetime_s, 3)
        fields = {"X-Id": str(next(self._numbers)), "X-Expires": f"{expires_s:.3f}"}
        query = urlencode(fields | {"X-Signature": self._signature(path, fields)})
        return f"{origin}{quote(path, errors='surrogateescape')}?{query}", expires_s

    def rejection_reason(self, path: str, query: Mapping[str, str]) -> str | None:
        """Return the S3 error code for a request; None if its signature is valid."""
        fields = {key: query.get(key, "") for key in ("X-Id", "X-Expires")}
        expected = self._signature(path, fields)
        if not hmac.compare_digest(expected, query.get("X-Signature", "")):
            return "SignatureDoesNotMatch"
        if self._clock() >= float(fields["X-Expires"]):
            return "ExpiredToken"
        if int(fields["X-Id"]) < self._revoked_before:
            return "AccessDenied"
        return None

    def revoke_all(self) -> None:
        """Reject every URL created so far, even before its expiry."""
        self._revoked_before = next(self._numbers) + 1

    def _signature(self, path: str, fields: Mapping[str, str]) -> str:
        text = "\n".join((path, *(f"{key}={fields[key]}" for key in sorted(fields))))
        return hmac.new(
            self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256
        ).hexdigest()
