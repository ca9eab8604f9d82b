"""Source of the API key, its renewal, and backoff after a rejected key. No HTTP.

    TINKER_API_KEY  ->  TINKER_CREDENTIAL_CMD  ->  the login stored by `tinker auth login`

The first one that is set is the source, as in the Tinker SDK. The output of a command and a stored
login can change during a mount. They are read again when necessary, but never once per request.

After a key was rejected twice, requests fail locally for a while (5 s, doubling to 5 min), so that
a wrong key does not cost one request per `stat`. No message, repr or log contains a key.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.errors import ApiError, StartupError, TinkerfsError, Unauthorized
from tinkerfs.safe_open import open_regular
from tinkerfs.telemetry import rfc3339

log = logging.getLogger(__name__)

#: Timeout of the credential command, seconds.
COMMAND_TIMEOUT_S = 30.0

#: A token is renewed this long before it expires, seconds.
RENEW_BEFORE_S = 60.0

#: How long requests fail locally after a rejected key, seconds.
FIRST_BACKOFF_S, LAST_BACKOFF_S = 5.0, 300.0

#: Interval at which the stored login is checked for changes, seconds.
CHECK_INTERVAL_S = 1.0

_MAX_BYTES = 1 << 20

#: Program that unblocks all signals before it executes the credential command. A mount process
#: blocks termination signals, and child processes inherit the mask: `timeout 5 ...` in the command
#: would have no effect. No Python code may run between fork and exec, because other threads may
#: hold locks. The program also restores the signals that Python ignores.
_UNBLOCK_SIGNALS = (
    "import os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_SETMASK, ())\n"
    "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)

API_KEY = "TINKER_API_KEY"
COMMAND = "TINKER_CREDENTIAL_CMD"
STORED = "~/.tinker/credentials.json"

_HINT = f"(hint: set {API_KEY} or {COMMAND}, or run `tinker auth login`)"
_LOGIN_HINT = "(hint: run `tinker auth login` again)"
_COMMAND_HINT = "(hint: run it in a terminal to see why)"


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


class Credentials:
    """Provides the API key of one mount. Thread-safe.

    The first `get` reads the source. Only one thread reads it at a time, and others wait.

    Args:
        environ: environment variables, assumed to be constant; None for `os.environ`.
        home: home directory; None for `$HOME`.
        command_timeout_s: timeout of the credential command, seconds.
    """

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        home: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        environ = os.environ if environ is None else environ
        self._variable = environ.get(API_KEY, "").strip()
        self._command = environ.get(COMMAND, "").strip()
        self._environ = dict(environ)
        home = home or environ.get("HOME") or os.path.expanduser("~")
        self._path = os.path.join(home, ".tinker", "credentials.json")
        self._clock = clock
        self._command_timeout_s = command_timeout_s
        #: Held while the source is read; acquired before _lock, never held during a request.
        self._read_lock = threading.Lock()
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._key: _Key | None = None
        self._renew_at_s: float | None = None
        #: Version of the stored login when it was read, and whether the file has changed since.
        self._version: tuple[int, ...] | None = None
        self._has_changed = False
        self._next_check_at = 0.0
        #: A token that the API rejected after it had expired by the local clock; not sent again.
        self._expired: str | None = None
        self._already_reloaded = False
        self._failure: TinkerfsError | None = None
        #: Whether the API rejected the key, and whether one request is retrying it.
        self._is_rejected = False
        self._is_retrying = False
        self._backoff_s = 0.0
        self._backoff_until = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._closings = 0  # how often `close` was called
        #: Guarded by _read_lock.
        self._warned_version: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        """Return a string with the source but without the key."""
        return f"Credentials(source={self.source!r})"

    @property
    def source(self) -> str:
        """Name of the key's source for messages."""
        if self._variable:
            return API_KEY
        return COMMAND if self._command else STORED

    @property
    def _is_stored(self) -> bool:
        return not self._variable and not self._command

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
            if self._key is None or self._failure is not None:
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
                    return self._failure is None  # another thread has handled it
                if self._failure is not None and not self._is_retrying:
                    return False
                if self._key.expired_message:
                    self._expired = key
                    error.message = f"{error.message}; {self._key.expired_message}"
                self._is_retrying = False
                was_reloaded, self._already_reloaded = self._already_reloaded, True
            if not was_reloaded:
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
                self._is_rejected = True
            return False

    def on_authorized(self, key: str) -> None:
        """Record that the API accepted `key`, and reset the backoff."""
        with self._lock:
            if self._already_reloaded and self._key is not None and self._key.text == key:
                self._failure = None
                self._is_rejected = False
                self._is_retrying = False
                self._already_reloaded = False
                self._backoff_s = 0.0

    def close(self) -> None:
        """Kill a running credential command."""
        with self._lock:
            self._closings += 1
            if self._process is not None:
                _kill(self._process)

    def _cached_key(self) -> str | None:
        """Return the cached key, None if the source must be read; _lock is held.

        Raises:
            StartupError, Unauthorized: the last failure, during the backoff.
        """
        now = self._clock.monotonic()
        if self._is_stored and now >= self._next_check_at:
            self._next_check_at = now + CHECK_INTERVAL_S
            self._has_changed = self._has_changed or _version_of(self._path) != self._version
        if self._failure is not None:
            if self._has_changed or now >= self._backoff_until:
                return None
            raise _copy_of_error(self._failure)
        if self._key is None or self._has_changed:
            return None
        if self._renew_at_s is not None and self._clock.now() >= self._renew_at_s:
            return None
        return self._key.text

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
                if (
                    self._failure is None
                    and old
                    and not self._is_stored
                    and _is_unexpired(old, now_s)
                ):
                    # The command failed, but the previous token is still valid.
                    self._renew_at_s = min(now_s + FIRST_BACKOFF_S, old.expires_at_s or now_s)
                    return old.text
                self._back_off(error)
                raise
        with self._lock:
            if self._is_rejected and old is not None and fresh.text == old.text:
                # One request retries the same key; the others still fail locally.
                self._backoff_until = self._clock.monotonic() + self._backoff_s
                self._is_retrying = True
            else:
                # The backoff is reset only by an accepted key, because a command may print a
                # different wrong token each time.
                self._failure = None
                self._backoff_s = self._backoff_s if self._is_rejected else 0.0
            self._set_key(fresh)
            return fresh.text

    def _set_key(self, key: _Key) -> None:
        """Set the key and the time of its renewal.

        A token is renewed a minute before it expires, or after half of a short lifetime.
        """
        self._key = key
        if key.expires_at_s is None:
            is_renewed = bool(key.expired_message and self._command)
            self._renew_at_s = self._clock.now() + RENEW_BEFORE_S if is_renewed else None
            return
        lifetime_s = key.expires_at_s - self._clock.now()
        delay_s = lifetime_s if self._variable else max(lifetime_s - RENEW_BEFORE_S, lifetime_s / 2)
        self._renew_at_s = self._clock.now() + delay_s

    def _back_off(self, error: TinkerfsError) -> None:
        """Fail locally with `error`, for twice as long as the last time."""
        self._backoff_s = min(max(self._backoff_s * 2, FIRST_BACKOFF_S), LAST_BACKOFF_S)
        self._backoff_until = self._clock.monotonic() + self._backoff_s
        self._failure = error

    def _read_source(self) -> _Key:
        """Read the source and validate the key.

        Raises:
            StartupError: the key is missing or malformed.
            Unauthorized: the API has already rejected the key as expired.
        """
        if self._variable:
            text, hint = self._variable, f"(hint: set {API_KEY} to a valid key)"
        elif self._command:
            text, hint = self._run_command(), f"(hint: make {COMMAND} print a valid key)"
        else:
            text, hint = self._read_stored(), _LOGIN_HINT
        if not text.isascii() or not text.isprintable() or " " in text:
            raise StartupError(f"the key of {self.source} contains invalid characters {hint}")
        expires_at_s = _expiry_of(text)
        if expires_at_s is None or expires_at_s > self._clock.now():
            return _Key(text, expires_at_s)
        # The local clock may be wrong: the API decides, so the token is sent once.
        message = f"the token of {self.source} expired at {_format_time(expires_at_s)} {hint}"
        with self._lock:
            if text == self._expired:
                raise Unauthorized(message)
        return _Key(text, None, message)

    def _run_command(self) -> str:
        """Run the credential command and return its output.

        Raises:
            StartupError: the command fails, times out, or prints nothing.
        """
        with self._lock:
            closings = self._closings
        try:
            # The user's shell command, as specified by the Tinker SDK. Its standard error may
            # contain secrets, and is discarded. A new session allows to kill all its processes. It
            # runs in the working directory of a mount, so that a relative path fails when the mount
            # starts and not when the token expires.
            process = subprocess.Popen(  # noqa: S603
                _shell(self._command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env=self._environ,
            )
        except (OSError, ValueError) as error:
            raise StartupError(f"{COMMAND} cannot be run: {error} (hint: correct it)") from None
        with process:
            with self._lock:
                self._process = process
                if self._closings != closings:  # `close` came while the command was starting
                    _kill(process)
            try:
                output = _read_bounded(process, self._command_timeout_s)
                process.wait(timeout=1.0)
            except (TimeoutError, subprocess.TimeoutExpired):
                _kill(process)
                raise StartupError(
                    f"{COMMAND} did not end within {self._command_timeout_s:g} s {_COMMAND_HINT}"
                ) from None
            finally:
                with self._lock:
                    self._process = None
        if process.returncode != 0:
            raise StartupError(f"{COMMAND} failed with status {process.returncode} {_COMMAND_HINT}")
        text = output.decode("utf-8", "replace").strip()
        if not text:
            raise StartupError(f"{COMMAND} printed nothing {_COMMAND_HINT}")
        return text

    def _read_stored(self) -> str:
        """Return the key stored by `tinker auth login`.

        Raises:
            StartupError: the stored login is missing, unreadable or damaged.
        """
        with self._lock:
            # Before the file is read, so that the next check detects a change during the read.
            self._version = _version_of(self._path)
            self._has_changed = False
        try:
            fd = open_regular(self._path, os.O_RDONLY, follow_symlinks=True)
        except FileNotFoundError:
            raise StartupError(f"no API key {_HINT}") from None
        except OSError as error:
            raise StartupError(f"{STORED} cannot be read: {error.strerror} {_HINT}") from None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            try:
                content = file.read(_MAX_BYTES)
            except OSError as error:
                raise StartupError(f"{STORED} cannot be read: {error.strerror} {_HINT}") from None
        if status.st_mode & 0o077 and self._warned_version != _version(status):
            self._warned_version = _version(status)
            log.warning("%s can be read by other users (hint: chmod 600 %s)", STORED, STORED)
        try:
            stored = json.loads(content)
        except (ValueError, RecursionError):
            raise StartupError(f"{STORED} is damaged {_LOGIN_HINT}") from None
        fields = stored if isinstance(stored, dict) else {}
        name, keys = fields.get("default"), fields.get("keys")
        entry = keys.get(name) if isinstance(keys, dict) and isinstance(name, str) else None
        key = entry.get("key") if isinstance(entry, dict) else None
        if not isinstance(key, str) or not key.strip():
            raise StartupError(f"{STORED} has no default key {_HINT}")
        return key.strip()


def _shell(command: str) -> list[str]:
    """Return the arguments that run a shell command with all signals unblocked."""
    shell = ["/bin/sh", "-c", command]
    if not signal.pthread_sigmask(signal.SIG_BLOCK, ()) or not sys.executable:
        return shell
    return [sys.executable, "-I", "-S", "-c", _UNBLOCK_SIGNALS, *shell]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command and all processes of its session."""
    if process.returncode is None:  # otherwise its pid may have been reused
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _read_bounded(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
    """Return the standard output of a process.

    Raises:
        TimeoutError: the output did not end in time, or it exceeds `_MAX_BYTES`.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    output = bytearray()
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while len(output) < _MAX_BYTES:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0 or not poll.poll(remaining_s * 1000):
            break
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return bytes(output)
        output += chunk
    raise TimeoutError


def _copy_of_error(error: TinkerfsError) -> TinkerfsError:
    return error.as_local() if isinstance(error, ApiError) else type(error)(*error.args)


def _is_unexpired(key: _Key, now_s: float) -> bool:
    return key.expires_at_s is None or key.expires_at_s > now_s


def _version(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _version_of(path: str) -> tuple[int, ...] | None:
    try:
        return _version(os.stat(path))
    except OSError:
        return None


def _expiry_of(key: str) -> float | None:
    """Return the `exp` of a JWT (RFC 7519, 4.1.4); None without one."""
    parts = key.split(".")
    if len(parts) != 3 or not key.startswith("eyJ"):
        return None
    try:
        payload = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = json.loads(payload)
    except (ValueError, binascii.Error, RecursionError):
        return None
    expiry = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expiry, bool) or not isinstance(expiry, int | float):
        return None
    return float(expiry) if abs(expiry) < 1e15 else None


def _format_time(seconds: float) -> str:
    try:
        return rfc3339(seconds)
    except (ValueError, OverflowError):
        return "an invalid time"
