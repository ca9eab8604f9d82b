"""Sources of the API key: file, environment, command, stored login. No HTTP.

No message, repr or log contains a key.
"""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

from tinkerfs.clock import Clock
from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

log = logging.getLogger(__name__)

#: Timeout of the credential command, seconds.
COMMAND_TIMEOUT_S = 30.0

#: A token is renewed this long before it expires, seconds.
RENEW_BEFORE_S = 60.0

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

#: Name of the key among the credentials of a systemd service (systemd.exec(5), `LoadCredential=`).
CREDENTIAL = "tinker-api-key"

_HINT = f"(hint: set {API_KEY} or {COMMAND}, or run `tinker auth login`)"
_LOGIN_HINT = "(hint: run `tinker auth login` again)"
_COMMAND_HINT = "(hint: run it in a terminal to see why)"


class KeySource(ABC):
    """Where the API key is read from.

    Attributes:
        name: name of the source, for messages.
        hint: what to do about an invalid key.
        can_renew: whether reading again may return another key although `detect_change` is false.
    """

    name: str
    hint: str
    can_renew = False

    @abstractmethod
    def read(self) -> str:
        """Return the key. Only one thread reads at a time.

        Raises:
            StartupError: the key is missing or cannot be read; the message has a hint.
        """

    def detect_change(self) -> bool:
        """Look whether the source has changed since the last `read`; fast."""
        return False

    def renewal_delay_s(self, lifetime_s: float) -> float:
        """Return how long a token with a remaining lifetime is used until it is read again.

        A token is renewed a minute before it expires, or after half of a short lifetime.
        """
        return max(lifetime_s - RENEW_BEFORE_S, lifetime_s / 2)

    def close(self) -> None:  # noqa: B027  (most sources have nothing to interrupt)
        """Interrupt a running `read`."""


def find_key_source(
    key_file: str | None,
    environ: Mapping[str, str],
    home: str,
    clock: Clock,
    command_timeout_s: float,
) -> KeySource:
    """Return the first source that is set; without a file, as in the Tinker SDK.

    Args:
        key_file: the value of `--api-key-file`; None if not set.
    """
    if key_file is not None:
        return _KeyFile(key_file, clock)
    if key := environ.get(API_KEY, "").strip():
        return _EnvironmentKey(key)
    if command := environ.get(COMMAND, "").strip():
        return _CredentialCommand(command, environ, command_timeout_s)
    credential = os.path.join(environ.get("CREDENTIALS_DIRECTORY", ""), CREDENTIAL)
    if os.path.isabs(credential) and os.path.exists(credential):
        return _KeyFile(credential, clock)
    path = os.path.join(home, ".tinker", "credentials.json")
    return _StoredLogin(path, clock, _explain_absence(path, environ))


def _explain_absence(path: str, environ: Mapping[str, str]) -> str:
    """Return the error message for a missing stored login."""
    where = f"{API_KEY} and {COMMAND} are not set, and {path} does not exist"
    if not environ.get("SUDO_USER"):
        return f"no API key: {where} {_HINT}"
    return (
        f"no API key: under sudo {where} (hint: sudo drops variables and does not use the home of"
        f" {environ['SUDO_USER']}; name a file with --api-key-file, or use sudo"
        f" --preserve-env={API_KEY})"
    )


class _EnvironmentKey(KeySource):
    """The key in an environment variable, which never changes."""

    name = API_KEY
    hint = f"(hint: set {API_KEY} to a valid key)"

    def __init__(self, key: str) -> None:
        self._key = key

    def read(self) -> str:
        return self._key

    def renewal_delay_s(self, lifetime_s: float) -> float:
        return lifetime_s


class _CredentialCommand(KeySource):
    """The output of a shell command. Thread-safe.

    Args:
        environ: environment of the command.
        timeout_s: timeout of the command, seconds.
    """

    name = COMMAND
    hint = f"(hint: make {COMMAND} print a valid key)"
    can_renew = True

    def __init__(self, command: str, environ: Mapping[str, str], timeout_s: float) -> None:
        self._command = command
        self._environ = dict(environ)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._process: subprocess.Popen[bytes] | None = None
        self._closings = 0  # how often `close` was called

    def read(self) -> str:
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
                output = _read_bounded(process, self._timeout_s)
                process.wait(timeout=1.0)
            except (TimeoutError, subprocess.TimeoutExpired):
                _kill(process)
                raise StartupError(
                    f"{COMMAND} did not end within {self._timeout_s:g} s {_COMMAND_HINT}"
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

    def close(self) -> None:
        with self._lock:
            self._closings += 1
            if self._process is not None:
                _kill(self._process)


class _WatchedFile(KeySource):
    """A file with a key, which is read again after a change. Thread-safe.

    Args:
        missing: error message if the file does not exist.
    """

    def __init__(self, path: str, clock: Clock, missing: str) -> None:
        self._path = path
        self._clock = clock
        self._missing = missing
        self._lock = threading.Lock()
        # Guarded by _lock.
        #: Version of the file when it was read, and whether it has changed since.
        self._version: tuple[int, ...] | None = None
        self._has_changed = False
        self._next_check_at = 0.0

    def detect_change(self) -> bool:
        now = self._clock.monotonic()
        with self._lock:
            if now >= self._next_check_at:
                self._next_check_at = now + CHECK_INTERVAL_S
                if _version_of(self._path) != self._version:
                    self._has_changed = True
            return self._has_changed

    def read(self) -> str:
        with self._lock:
            # Before the file is read, so that the next check detects a change during the read.
            self._version = _version_of(self._path)
            self._has_changed = False
        try:
            fd = open_regular(self._path, os.O_RDONLY, follow_symlinks=True)
        except FileNotFoundError:
            raise StartupError(self._missing) from None
        except OSError as error:
            raise StartupError(f"{self.name} cannot be read: {error.strerror} {_HINT}") from None
        with open(fd, "rb") as file:
            self._check_mode(os.fstat(fd))
            try:
                content = file.read(_MAX_BYTES)
            except OSError as error:
                raise StartupError(
                    f"{self.name} cannot be read: {error.strerror} {_HINT}"
                ) from None
        return self._parse(content)

    @abstractmethod
    def _check_mode(self, status: os.stat_result) -> None:
        """Object if other users can read the file."""

    @abstractmethod
    def _parse(self, content: bytes) -> str:
        """Return the key in the content of the file."""


class _KeyFile(_WatchedFile):
    """A file with nothing but a key, which other users must not be able to read."""

    hint = "(hint: write a valid key to it)"

    def __init__(self, path: str, clock: Clock) -> None:
        super().__init__(path, clock, f"{path} does not exist (hint: write the API key to it)")
        self.name = path

    def _check_mode(self, status: os.stat_result) -> None:
        # As PostgreSQL checks its `ssl_key_file`: a group may read a file of root, because only
        # root chooses that group. Kubernetes and systemd provide secrets in this way.
        forbidden = 0o037 if status.st_uid == 0 else 0o077
        if status.st_mode & forbidden:
            mode = f"{status.st_mode & 0o777:03o}"
            raise StartupError(
                f"{self.name} can be read by other users: mode {mode} (hint: chmod 600 {self.name})"
            )

    def _parse(self, content: bytes) -> str:
        key = content.decode("utf-8", "replace").strip()
        if not key:
            raise StartupError(f"{self.name} is empty {self.hint}")
        return key


class _StoredLogin(_WatchedFile):
    """The default key that `tinker auth login` stored in a file."""

    name = STORED
    hint = _LOGIN_HINT

    _warned_version: tuple[int, ...] | None = None

    def _check_mode(self, status: os.stat_result) -> None:
        if status.st_mode & 0o077 and self._warned_version != _version(status):
            self._warned_version = _version(status)
            log.warning("%s can be read by other users (hint: chmod 600 %s)", STORED, STORED)

    def _parse(self, content: bytes) -> str:
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


def _version(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _version_of(path: str) -> tuple[int, ...] | None:
    try:
        return _version(os.stat(path))
    except OSError:
        return None
