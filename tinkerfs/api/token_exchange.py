"""Exchange of the API key for short-lived tokens, on servers that require it.

Such a server accepts the key only at `auth/token`, which returns a token (a JWT) to send in its
place. Whether a server requires that is asked once, after it has rejected a key. So the exchange
costs nothing on servers that accept the key, and nothing before the first request.
"""

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.api.jwt import expiry_of
from tinkerfs.clock import Clock
from tinkerfs.concurrency import SingleFlight
from tinkerfs.printable import hide_secret

#: Sends a POST request with an object, authenticated by a key; returns the object in the response.
Post = Callable[[Endpoint, str, Mapping[str, object], str], dict[str, Any]]

#: A server that requires no exchange, or does not say, is not asked again for this long, seconds.
RECHECK_S = 600.0
#: Delay after a failed renewal while the current token is still valid, seconds.
RENEWAL_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, repr=False)
class _Token:
    """A token, with times in seconds since 1970; None if it has no expiry."""

    key: str
    text: str
    expires_at_s: float | None
    renew_at_s: float | None


class TokenExchange:
    """Returns what to send in place of the API key. Thread-safe.

    Args:
        post: sends requests.
    """

    def __init__(self, post: Post, clock: Clock) -> None:
        self._post = post
        self._clock = clock
        self._flights: SingleFlight[str, Future[Any]] = SingleFlight()
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._is_required = False
        self._next_check_at = 0.0
        self._token: _Token | None = None
        self._next_renewal_at = 0.0

    def credential(self, key: str, timeout_s: float) -> str:
        """Return the key itself, or a token if the server requires one.

        A token is renewed after half of its lifetime, in the background while it is valid.

        Raises:
            ApiError: the exchange failed; Unauthorized if the server rejected the key.
        """
        if not self._is_required:
            return key
        with self._lock:
            token = self._valid_token(key)
            if token is not None and not self._is_renewal_due(token):
                return token.text
            flight = self._flights.run(key, lambda: self._exchange(key), "token exchange", Future())
        return token.text if token is not None else self._result(flight, timeout_s)

    def on_unauthorized(self, key: str, sent: str, timeout_s: float) -> bool:
        """Handle a 401; return whether `credential` now returns something else to send.

        Args:
            key: the API key.
            sent: the credential that the server rejected.
        """
        with self._lock:
            if self._is_required:
                if self._token is not None and self._token.text == sent:
                    self._token = None
                return True
            if self._clock.monotonic() < self._next_check_at:
                return False
            flight = self._flights.run("", lambda: self._check(key), "client config", Future())
        try:
            return bool(self._result(flight, timeout_s))
        except errors.ApiError:
            return False

    def _valid_token(self, key: str) -> _Token | None:
        """Return the current token if it is of `key` and has not expired; _lock is held."""
        token = self._token
        if token is None or token.key != key:
            return None
        expires_at_s = token.expires_at_s
        return token if expires_at_s is None or self._clock.now() < expires_at_s else None

    def _is_renewal_due(self, token: _Token) -> bool:
        if token.renew_at_s is None or self._clock.now() < token.renew_at_s:
            return False
        return self._clock.monotonic() >= self._next_renewal_at

    def _result(self, flight: "Future[Any]", timeout_s: float) -> Any:
        try:
            return flight.result(max(timeout_s, 0.0))
        except TimeoutError:
            raise errors.RequestTimeout(
                "no token within the timeout", endpoint=endpoints.TOKEN.label
            ) from None
        except errors.ApiError as error:
            raise copy.copy(error) from None

    def _check(self, key: str) -> bool:
        """Ask the server whether it requires the exchange."""
        is_required = False
        try:
            fields = {"sdk_version": endpoints.SDK_VERSION}
            config = self._post(endpoints.CLIENT_CONFIG, "client/config", fields, key)
            is_required = config.get("pjwt_auth_enabled") is True
        finally:
            with self._lock:
                self._is_required = is_required
                self._next_check_at = self._clock.monotonic() + RECHECK_S
        return is_required

    def _exchange(self, key: str) -> str:
        """Exchange the key for a token; return the key if the server does not do that any more."""
        try:
            text = self._post(endpoints.TOKEN, "auth/token", {}, key).get("jwt")
            if not isinstance(text, str) or not _is_header_value(text):
                raise errors.ProtocolError(
                    "the response has no token", endpoint=endpoints.TOKEN.label
                )
        except errors.UnsupportedEndpoint:
            with self._lock:
                self._is_required = False
            return key
        except errors.ApiError:
            with self._lock:
                self._next_renewal_at = self._clock.monotonic() + RENEWAL_RETRY_S
            raise
        hide_secret(text, "token")
        now_s, expires_at_s = self._clock.now(), expiry_of(text)
        if expires_at_s is not None and expires_at_s <= now_s:
            expires_at_s = None  # the local clock is wrong: the server decides
        renew_at_s = None if expires_at_s is None else (now_s + expires_at_s) / 2
        with self._lock:
            self._token = _Token(key, text, expires_at_s, renew_at_s)
        return text


def _is_header_value(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and " " not in text
