"""The API key of a mount: its renewal, and backoff after a rejected key. No HTTP.

    --api-key-file  ->  TINKER_API_KEY  ->  TINKER_CREDENTIAL_CMD
        ->  a credential of systemd  ->  the login stored by `tinker auth login`

The first one that is set is the source (`key_sources`). The output of a command and a file can
change during a mount. They are read again when necessary, but never once per request.

After a key was rejected twice, requests fail locally for a while (5 s, doubling to 5 min), so that
a wrong key does not cost one request per `stat`. No message, repr or log contains a key.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from tinkerfs.api.jwt import expiry_of
from tinkerfs.api.key_sources import COMMAND_TIMEOUT_S, RENEW_BEFORE_S, find_key_source
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.errors import ApiError, StartupError, TinkerfsError, Unauthorized
from tinkerfs.printable import hide_secret
from tinkerfs.retry import KEY_BACKOFF
from tinkerfs.telemetry import rfc3339


@dataclass(frozen=True, slots=True, repr=False)
class _Key:
    """A key and its expiry.

    Attributes:
        text: the key itself.
        expires_at_s: its `exp`, seconds since 1970. None if the key does not expire, or if it has
            expired by the local clock.
        expired_message: probable reason of a rejection if the key has expired by the local clock;
            empty otherwise.
    """

    text: str
    expires_at_s: float | None
    expired_message: str = ""

    def is_unexpired(self, now_s: float) -> bool:
        return self.expires_at_s is None or self.expires_at_s > now_s


class _State(Enum):
    """What happens to requests."""

    #: They are sent; without a key, or if it must be renewed, the source is read first.
    USABLE = "usable"
    #: They fail locally until the backoff ends or the source changes. Then the source is read.
    BACKING_OFF = "backing_off"
    #: One of them is sent with the rejected key; the others fail locally.
    RETRYING = "retrying"


class Credentials:
    """Provides the API key of one mount. Thread-safe.

    The first `get` reads the source. Only one thread reads it at a time, and others wait.

    Args:
        environ: environment variables, assumed to be constant; None for `os.environ`.
        key_file: the value of `--api-key-file`; None if not set.
        home: home directory; None for `$HOME`.
        command_timeout_s: timeout of the credential command, seconds.
    """

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        key_file: str | None = None,
        home: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        environ = os.environ if environ is None else environ
        home = home or environ.get("HOME") or os.path.expanduser("~")
        self._source = find_key_source(key_file, environ, home, clock, command_timeout_s)
        self._clock = clock
        #: Held while the source is read; acquired before _lock, never held during a request.
        self._read_lock = threading.Lock()
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._state = _State.USABLE
        self._key: _Key | None = None
        self._must_reload = False
        self._renew_at_s: float | None = None
        #: The key that the API rejected last, until it accepts one.
        self._rejected: _Key | None = None
        #: Raised locally unless the state is USABLE.
        self._failure: TinkerfsError | None = None
        #: Number of backoffs in a row, and the end of the current one.
        self._backoffs = 0
        self._backoff_until = 0.0

    def __repr__(self) -> str:
        """Return a string with the source but without the key."""
        return f"Credentials(source={self.source!r})"

    @property
    def source(self) -> str:
        """Name of the key's source for messages."""
        return self._source.name

    @property
    def state(self) -> str:
        """Name of what happens to requests."""
        return self._state.value

    def get(self) -> str:
        """Return the current key; may run the credential command.

        Raises:
            StartupError: the key is missing or cannot be read; the message has a hint.
            Unauthorized: the key was rejected, and the backoff has not ended.
        """
        with self._lock:
            key = self._cached_key()
        if key is not None:
            return key
        with self._read_lock:
            with self._lock:
                key = self._cached_key()
            return key if key is not None else self._reload()

    def fingerprint(self) -> str | None:
        """Return a digest that identifies the key; None without a valid key.

        Does not block, because it never reads the source.
        """
        with self._lock:
            if self._key is None or self._state is not _State.USABLE:
                return None
            return hashlib.sha256(b"tinkerfs\n" + self._key.text.encode()).hexdigest()

    def on_unauthorized(self, key: str, error: Unauthorized) -> bool:
        """Handle a 401 for `key`; return whether to send the request again.

        The source is read once more. If it has no other key, or that key is rejected, too, `get`
        raises a copy of `error` during the backoff.

        Args:
            key: the key that was sent.
            error: error of the request. If the key has expired by the local clock, that is added to
                its message.
        """
        with self._read_lock:
            with self._lock:
                if self._key is None or self._key.text != key:
                    return self._state is _State.USABLE  # another thread has handled it
                if self._state is _State.BACKING_OFF:
                    return False
                if self._key.expired_message:
                    error.message = f"{error.message}; {self._key.expired_message}"
                is_first, self._rejected = self._rejected is None, self._key
            if is_first:
                try:
                    fresh = self._read_source()
                except TinkerfsError:
                    fresh = None
                if fresh is not None and fresh.text != key:
                    with self._lock:
                        self._set_key(fresh)
                    return True
            with self._lock:
                self._back_off(error)
            return False

    def on_authorized(self, key: str) -> None:
        """Record that the API accepted `key`, and reset the backoff."""
        with self._lock:
            if self._rejected is None or self._key is None or self._key.text != key:
                return
            self._rejected = self._failure = None
            self._state, self._backoffs = _State.USABLE, 0

    def reload(self) -> None:
        """Read the source again before the next request, also during a backoff."""
        with self._lock:
            self._must_reload = True

    def describe_state(self) -> str:
        """Return the key's source and whether the API rejects the key; does not block."""
        with self._lock:
            if self._state is not _State.USABLE:
                return f"{self.source} rejected"
            return f"{self.source} {'not read yet' if self._key is None else 'in use'}"

    def close(self) -> None:
        """Kill a running credential command."""
        self._source.close()

    def _cached_key(self) -> str | None:
        """Return the cached key, None if the source must be read; _lock is held.

        Raises:
            StartupError, Unauthorized: the last failure, during the backoff.
        """
        if self._source.detect_change() or self._must_reload:
            return None
        if self._failure is not None:
            if self._clock.with_suspend() >= self._backoff_until:
                return None
            raise _copy_of_error(self._failure)
        if self._renew_at_s is not None and self._clock.now() >= self._renew_at_s:
            return None
        return None if self._key is None else self._key.text

    def _reload(self) -> str:
        """Read the source and return its key; _read_lock is held.

        Raises:
            StartupError, Unauthorized: see `get`.
        """
        with self._lock:
            old = self._key
        try:
            fresh = self._read_source()
        except TinkerfsError as error:
            with self._lock:
                now_s = self._clock.now()
                is_kept = self._state is _State.USABLE and self._source.can_renew
                if is_kept and old is not None and old.is_unexpired(now_s):
                    # The command failed, but the previous token is still valid.
                    retry_at_s = now_s + KEY_BACKOFF.first_s
                    self._renew_at_s = min(retry_at_s, old.expires_at_s or now_s)
                    return old.text
                self._back_off(error)
                raise
        with self._lock:
            rejected = self._rejected
            if self._failure is not None and rejected is not None and fresh.text == rejected.text:
                self._state = _State.RETRYING
                self._start_backoff()
            else:
                self._state, self._failure = _State.USABLE, None
                if rejected is None:
                    # Otherwise only an accepted key resets the backoff, because a command may print
                    # a different wrong token each time.
                    self._backoffs = 0
            self._set_key(fresh)
            return fresh.text

    def _set_key(self, key: _Key) -> None:
        """Set the key and the time of its renewal."""
        self._key, self._renew_at_s = key, None
        now_s = self._clock.now()
        if key.expires_at_s is not None:
            self._renew_at_s = now_s + self._source.renewal_delay_s(key.expires_at_s - now_s)
        elif key.expired_message and self._source.can_renew:
            self._renew_at_s = now_s + RENEW_BEFORE_S

    def _back_off(self, error: TinkerfsError) -> None:
        """Fail locally with `error`, for twice as long as the last time."""
        self._backoffs += 1
        self._state, self._failure = _State.BACKING_OFF, error
        self._start_backoff()

    def _start_backoff(self) -> None:
        self._backoff_until = self._clock.with_suspend() + KEY_BACKOFF.delay_s(self._backoffs)

    def _read_source(self) -> _Key:
        """Read the source and validate the key.

        Raises:
            StartupError: the key is missing or malformed.
            Unauthorized: the API has already rejected the key as expired.
        """
        with self._lock:
            self._must_reload = False
        text, hint = self._source.read(), self._source.hint
        if not text.isascii() or not text.isprintable() or " " in text:
            raise StartupError(f"the key of {self.source} contains invalid characters {hint}")
        hide_secret(text, "key")
        expires_at_s = expiry_of(text)
        if expires_at_s is None or expires_at_s > self._clock.now():
            return _Key(text, expires_at_s)
        # The local clock may be wrong: the API decides, so the token is sent once.
        message = f"the token of {self.source} expired at {_format_time(expires_at_s)} {hint}"
        with self._lock:
            rejected = self._rejected
            if rejected is not None and rejected.expired_message and rejected.text == text:
                raise Unauthorized(message)
        return _Key(text, None, message)


def _copy_of_error(error: TinkerfsError) -> TinkerfsError:
    return error.as_local() if isinstance(error, ApiError) else type(error)(*error.args)


def _format_time(seconds: float) -> str:
    try:
        return rfc3339(seconds)
    except (ValueError, OverflowError):
        return "an invalid time"
