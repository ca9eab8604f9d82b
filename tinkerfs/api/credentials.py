"""Where the key comes from, and what happens when it is refused.

    TINKER_API_KEY  ->  TINKER_CREDENTIAL_CMD  ->  the login that `tinker auth login` stored

The first that is set is the source, as in the Tinker SDK. A command's output and a stored login can
change while the mount lives; both are read again when they must be, and never once per call. After
a key was refused twice, calls are answered from memory for a while (5 s, doubling to 5 min), so
that a wrong key is not one call per `stat`.

Knows nothing of HTTP. No key is in any message, repr or log.
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
from tinkerfs.errors import ApiError, SetupError, TinkerfsError, Unauthorized
from tinkerfs.safe_open import open_regular
from tinkerfs.telemetry import rfc3339

__all__ = ["Credentials"]

log = logging.getLogger(__name__)

#: How long the credential command may take, seconds.
COMMAND_TIMEOUT_S = 30.0

#: A token is renewed this long before it expires, seconds.
RENEW_BEFORE_S = 60.0

#: How long calls are answered from memory after a refusal, seconds.
FIRST_BACKOFF_S, LAST_BACKOFF_S = 5.0, 300.0

#: How often the stored login is looked at for a change, seconds.
LOOK_EVERY_S = 1.0

_MAX_BYTES = 1 << 20

#: A process that serves a mount blocks the signals that end it, and what it starts inherits that:
#: a `timeout 5 ...` in the command would end nothing. Between fork and exec no Python may run
#: (other threads hold locks), and an exec keeps the mask, so a small program goes in between. It
#: undoes what Python ignores, too.
_WITH_ALL_SIGNALS = (
    "import os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_SETMASK, ())\n"
    "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)

API_KEY = "TINKER_API_KEY"
COMMAND = "TINKER_CREDENTIAL_CMD"
STORED = "~/.tinker/credentials.json"

_CURE = f"set {API_KEY} or {COMMAND}, or run `tinker auth login`"


@dataclass(frozen=True, slots=True, repr=False)
class _Key:
    """A key that was read.

    Attributes:
        text: the key itself.
        expires_at_s: its `exp`, seconds since 1970; None for a key that does not expire, or that
            has by our clock.
        doubt: what a refusal of it means where it has expired by our clock; empty otherwise.
    """

    text: str
    expires_at_s: float | None
    doubt: str = ""


class Credentials:
    """The key of one mount, from wherever it comes. Thread-safe.

    Nothing is read before the first `get`. One thread reads the source, the others wait for it.

    Args:
        environ: the environment; it is taken as unchanging.
        home: the home folder; None for the environment's.
        clock: whose `now` tokens expire by, and whose `monotonic` back-offs run by.
        command_timeout_s: bound on the credential command, seconds.
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
        #: Held while the source is read; taken before _lock, never across HTTP.
        self._reading = threading.Lock()
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._key: _Key | None = None
        self._renew_at_s: float | None = None
        #: What the stored login's file looked like when it was read, and whether it changed since.
        self._version: tuple[int, ...] | None = None
        self._has_changed = False
        self._look_at = 0.0
        #: A token that has expired by our clock, and by the API's as well: it is not sent again.
        self._expired: str | None = None
        self._was_reread = False
        self._failure: TinkerfsError | None = None
        #: Whether that was the API's word; and whether one caller tries the key again meanwhile.
        self._is_refused = False
        self._is_retrying = False
        self._backoff_s = 0.0
        self._backoff_until = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._closings = 0  # how often `close` was called
        #: Guarded by _reading.
        self._warned_version: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        """Tell only where the key comes from."""
        return f"Credentials(source={self.source!r})"

    @property
    def source(self) -> str:
        """Where the key comes from, for people; never the key."""
        if self._variable:
            return API_KEY
        return COMMAND if self._command else STORED

    @property
    def _is_stored(self) -> bool:
        return not self._variable and not self._command

    def get(self) -> str:
        """Return the key to send now.

        May take as long as the credential command does.

        Raises:
            SetupError: there is no key, or it cannot be read; the message names the cure.
            Unauthorized: the key was refused, and is not tried again, or not yet.
        """
        with self._lock:
            key = self._usable()
        if key is not None:
            return key
        with self._reading:
            with self._lock:
                key = self._usable()
            return key if key is not None else self._read_now()

    def account(self) -> str | None:
        """Return what tells this key from others, a digest; None while there is none that is good.

        Never waits: the source is not read, `get` does that.
        """
        with self._lock:
            if self._key is None or self._failure is not None:
                return None
            return hashlib.sha256(b"tinkerfs\n" + self._key.text.encode()).hexdigest()

    def rejected(self, key: str, error: Unauthorized) -> bool:
        """Take note that the API refused `key` with a 401; return whether to try once more.

        The source is read again once. Where it has no other key, or that was refused too, `get`
        raises a copy of `error` for a while. The message of `error` gets what we know of the key.

        Args:
            key: the key that was sent.
            error: what the caller was told, for those who ask meanwhile.
        """
        with self._reading:
            with self._lock:
                if self._key is None or self._key.text != key:
                    return self._failure is None  # somebody else has dealt with it
                if self._failure is not None and not self._is_retrying:
                    return False
                if self._key.doubt:
                    self._expired = key
                    error.message = f"{error.message} ({self._key.doubt})"
                self._is_retrying = False
                was_reread, self._was_reread = self._was_reread, True
            if not was_reread:
                try:
                    fresh = self._read_source()
                except TinkerfsError:
                    fresh = None
                if fresh is not None and fresh.text != key:
                    with self._lock:
                        self._keep(fresh)
                    return True
            with self._lock:
                self._back_off(error)
                self._is_refused = True
            return False

    def accepted(self, key: str) -> None:
        """Take note that the API took `key`: what was held against earlier ones is forgotten."""
        with self._lock:
            if self._was_reread and self._key is not None and self._key.text == key:
                self._failure = None
                self._is_refused = False
                self._is_retrying = False
                self._was_reread = False
                self._backoff_s = 0.0

    def close(self) -> None:
        """End the credential command, if it runs just now: nobody waits for its key any more."""
        with self._lock:
            self._closings += 1
            if self._process is not None:
                _kill(self._process)

    def _usable(self) -> str | None:
        """Return the key if it may be sent as it is, None if the source must be read (locked).

        Raises:
            SetupError: remembered, see `get`.
            Unauthorized: remembered, see `get`.
        """
        now = self._clock.monotonic()
        if self._is_stored and now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._has_changed = self._has_changed or _version_of(self._path) != self._version
        if self._failure is not None:
            if self._has_changed or now >= self._backoff_until:
                return None
            raise _again(self._failure)
        if self._key is None or self._has_changed:
            return None
        if self._renew_at_s is not None and self._clock.now() >= self._renew_at_s:
            return None
        return self._key.text

    def _read_now(self) -> str:
        """Read the source and return its key (_reading held).

        Raises:
            SetupError: see `get`.
            Unauthorized: see `get`.
        """
        with self._lock:
            old = self._key
        try:
            fresh = self._read_source()
        except TinkerfsError as error:
            with self._lock:
                now_s = self._clock.now()
                if self._failure is None and old and not self._is_stored and _lives(old, now_s):
                    # The command failed, and the token that it gave last time is still good.
                    self._renew_at_s = min(now_s + FIRST_BACKOFF_S, old.expires_at_s or now_s)
                    return old.text
                self._back_off(error)
                raise
        with self._lock:
            if self._is_refused and old is not None and fresh.text == old.text:
                # One caller tries the same key again; the others go on being answered from memory.
                self._backoff_until = self._clock.monotonic() + self._backoff_s
                self._is_retrying = True
            else:
                # What a refusal cost so far is forgotten only once a key is accepted: a command may
                # print another wrong token each time.
                self._failure = None
                self._backoff_s = self._backoff_s if self._is_refused else 0.0
            self._keep(fresh)
            return fresh.text

    def _keep(self, key: _Key) -> None:
        """Use `key` from now on; renew a token a minute before its end, a shorter one halfway."""
        self._key = key
        if key.expires_at_s is None:
            is_renewed = bool(key.doubt and self._command)
            self._renew_at_s = self._clock.now() + RENEW_BEFORE_S if is_renewed else None
            return
        left_s = key.expires_at_s - self._clock.now()
        wait_s = left_s if self._variable else max(left_s - RENEW_BEFORE_S, left_s / 2)
        self._renew_at_s = self._clock.now() + wait_s

    def _back_off(self, error: TinkerfsError) -> None:
        """Answer from memory for a while, twice as long as the last time."""
        self._backoff_s = min(max(self._backoff_s * 2, FIRST_BACKOFF_S), LAST_BACKOFF_S)
        self._backoff_until = self._clock.monotonic() + self._backoff_s
        self._failure = error

    def _read_source(self) -> _Key:
        """Read the source, whatever it is, and check the key.

        Raises:
            SetupError: there is no key, or none that can be sent.
            Unauthorized: it has expired by the API's clock too.
        """
        if self._variable:
            text, cure = self._variable, f"set {API_KEY} to a valid key"
        elif self._command:
            text, cure = self._run_command(), f"make {COMMAND} print a valid key"
        else:
            text = self._read_stored()
            cure = "run `tinker auth login` again"
        if not text.isascii() or not text.isprintable() or " " in text:
            raise SetupError(f"the key of {self.source} has characters that no key has: {cure}")
        expires_at_s = _expiry_of(text)
        if expires_at_s is None or expires_at_s > self._clock.now():
            return _Key(text, expires_at_s)
        # Our clock may be wrong, and the API's word is the one that counts: it is sent once.
        doubt = f"the token of {self.source} expired at {_time_words(expires_at_s)}: {cure}"
        with self._lock:
            if text == self._expired:
                raise Unauthorized(doubt)
        return _Key(text, None, doubt)

    def _run_command(self) -> str:
        """Return what the credential command prints.

        Raises:
            SetupError: it fails, takes too long, or prints nothing.
        """
        with self._lock:
            closings = self._closings
        try:
            # A shell command by its contract (Tinker SDK), written by the user. Its standard
            # error may tell secrets, so nobody sees it. A session of its own, so that all it
            # started can be ended. In the folder where a mount runs, so that a relative path fails
            # when the mount is made, and not when its token ends.
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
            raise SetupError(f"{COMMAND} cannot be run ({error}): correct it") from None
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
                raise SetupError(
                    f"{COMMAND} did not end within {self._command_timeout_s:g} s: "
                    "run it in a terminal to see why"
                ) from None
            finally:
                with self._lock:
                    self._process = None
        if process.returncode != 0:
            raise SetupError(
                f"{COMMAND} failed with status {process.returncode}: "
                "run it in a terminal to see why"
            )
        text = output.decode("utf-8", "replace").strip()
        if not text:
            raise SetupError(f"{COMMAND} printed nothing: run it in a terminal to see why")
        return text

    def _read_stored(self) -> str:
        """Return the key that `tinker auth login` stored.

        Raises:
            SetupError: there is none.
        """
        with self._lock:
            # Before it is read: a change meanwhile is seen at the next look.
            self._version = _version_of(self._path)
            self._has_changed = False
        try:
            fd = open_regular(self._path, os.O_RDONLY, follow_symlinks=True)
        except FileNotFoundError:
            raise SetupError(f"no API key: {_CURE}") from None
        except OSError as error:
            raise SetupError(f"{STORED} cannot be read ({error.strerror}): {_CURE}") from None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            try:
                content = file.read(_MAX_BYTES)
            except OSError as error:
                raise SetupError(f"{STORED} cannot be read ({error.strerror}): {_CURE}") from None
        if status.st_mode & 0o077 and self._warned_version != _version(status):
            self._warned_version = _version(status)
            log.warning("%s can be read by other users: chmod 600 %s", STORED, STORED)
        try:
            stored = json.loads(content)
        except (ValueError, RecursionError):
            raise SetupError(f"{STORED} is damaged: run `tinker auth login` again") from None
        fields = stored if isinstance(stored, dict) else {}
        name, keys = fields.get("default"), fields.get("keys")
        entry = keys.get(name) if isinstance(keys, dict) and isinstance(name, str) else None
        key = entry.get("key") if isinstance(entry, dict) else None
        if not isinstance(key, str) or not key.strip():
            raise SetupError(f"{STORED} has no default key: {_CURE}")
        return key.strip()


def _shell(command: str) -> list[str]:
    """Return the arguments that run a shell command with no signal blocked."""
    shell = ["/bin/sh", "-c", command]
    if not signal.pthread_sigmask(signal.SIG_BLOCK, ()) or not sys.executable:
        return shell
    return [sys.executable, "-I", "-S", "-c", _WITH_ALL_SIGNALS, *shell]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a command and all that it started in its session."""
    if process.returncode is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _read_bounded(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
    """Return the standard output of a process up to its end.

    Raises:
        TimeoutError: the end, or a mebibyte, did not come in time; a key is no such stream.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    output = bytearray()
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while len(output) < _MAX_BYTES:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            break
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            return bytes(output)
        output += piece
    raise TimeoutError


def _again(error: TinkerfsError) -> TinkerfsError:
    return error.remembered() if isinstance(error, ApiError) else type(error)(*error.args)


def _lives(key: _Key, now_s: float) -> bool:
    return key.expires_at_s is None or key.expires_at_s > now_s


def _version(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _version_of(path: str) -> tuple[int, ...] | None:
    try:
        return _version(os.stat(path))
    except OSError:
        return None


def _expiry_of(key: str) -> float | None:
    """Return the `exp` of a JWT (RFC 7519, 4.1.4), None for a key that is none or has none."""
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


def _time_words(seconds: float) -> str:
    try:
        return rfc3339(seconds)
    except (ValueError, OverflowError):
        return "an impossible time"
