"""Keeps a session with the Redis server of `--shared-cache`, in a thread of its own.

A session is a subscription to the changes that other mounts make. Responses are shared only during
a session, so that an outage delays at most the requests in flight: later ones do not try. The
thread connects again. It is also the only one that notices a failure between requests.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tinkerfs import errors
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.redis_server import RedisServer, ServerFailedError, Subscription
from tinkerfs.api.shared_records import Change, InvalidRecordError, RecordSeal
from tinkerfs.concurrency import run_in_thread
from tinkerfs.errors import TinkerfsError
from tinkerfs.retry import Backoff
from tinkerfs.telemetry import Telemetry

log = logging.getLogger(__name__)

#: How long a claim lives unless its holder extends it, and how often it does, seconds.
CLAIM_S: Final = 3.0
_TICK_S: Final = 0.5

#: The server is asked for a sign of life so often, and is down after twice that, seconds.
_PING_S: Final = 2.0

#: How long a generation lives after its last use, seconds. Longer than any value.
GENERATION_S: Final = 2 * 86400.0

#: Delay before the next connection.
_RECONNECT: Final = Backoff(0.5, 10.0)

#: A session that lasted as long ends an outage, seconds: its next failure is reported.
_SETTLED_S: Final = 30.0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SharedSession:
    """The time between two outages, with one API key.

    Attributes:
        api_key: the key of which `seal` is derived.
        generation_key: the name of the current generation.
        channel: where changes are announced.
    """

    api_key: str
    seal: RecordSeal
    server: RedisServer
    generation_key: str
    channel: str


class SessionKeeper:
    """Opens a session and, after a failure, the next one. Thread-safe.

    Args:
        server: the server.
        base_url: the API; mounts of other servers share nothing.
        on_change: called with the run that another mount changed, or with None if anything may
            have changed. It must not block.
    """

    def __init__(
        self,
        server: RedisServer,
        base_url: str,
        credentials: Credentials,
        telemetry: Telemetry,
        on_change: Callable[[str | None], None],
    ) -> None:
        self._server = server
        self._base_url = base_url
        self._credentials = credentials
        self._telemetry = telemetry
        self._on_change = on_change
        self._mount_id = secrets.token_hex(8)
        self._closing = threading.Event()
        #: Set when the first attempt to open a session has ended.
        self._is_tried = threading.Event()
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._session: SharedSession | None = None
        self._failure: str | None = None
        self._is_reported = False
        self._claims: set[str] = set()
        #: The generation of the last message; None before the first session.
        self._generation: bytes | None = None
        #: Whether a change could not be announced.
        self._has_unannounced = False
        telemetry.add_gauge("shared_metadata_up", lambda: int(self._session is not None))
        self._thread = run_in_thread(self._run, "shared cache")

    def close(self) -> None:
        """End the session."""
        self._closing.set()
        self._server.close()  # wakes the thread
        with contextlib.suppress(TimeoutError):  # it may be waiting for a credential command
            self._thread.exception(timeout=self._server.timeout_s)

    def current(self) -> SharedSession | None:
        """Return the session; None during an outage, or if the API key has changed.

        Right after the start it waits for the first session, as long as a failure would take.
        """
        session = self._tried_session()
        return session if session is not None and self.has_key(session) else None

    def _tried_session(self) -> SharedSession | None:
        self._is_tried.wait(2 * self._server.timeout_s)
        return self._session

    def has_key(self, session: SharedSession) -> bool:
        """Return whether requests are sent with the key of a session."""
        try:
            return self._credentials.get() == session.api_key
        except TinkerfsError:
            return False  # the request itself reports it

    def on_failure(self, session: SharedSession, error: ServerFailedError) -> None:
        """End a session because a command failed."""
        with self._lock:
            if self._session is session:
                self._session, self._failure = None, str(error)

    def add_claim(self, key: str) -> None:
        """Extend a claim until it is removed."""
        with self._lock:
            self._claims.add(key)

    def remove_claim(self, key: str) -> None:
        """Extend a claim no longer."""
        with self._lock:
            self._claims.discard(key)

    def announce(self, run_id: str) -> None:
        """Announce a change of a run to the other mounts; empty if anything may have changed.

        If the server is down, it is announced as soon as it is up again.
        """
        session = self._tried_session()
        if session is None:
            with self._lock:
                self._has_unannounced = True
            return
        try:
            self._announce(session, run_id)
        except ServerFailedError as error:
            with self._lock:
                self._has_unannounced = True
            self.on_failure(session, error)

    def _announce(self, session: SharedSession, run_id: str) -> None:
        generation = new_generation()
        change = Change(self._mount_id, generation, run_id)
        message = session.seal.seal_change(change, session.channel)
        session.server.announce(
            session.generation_key, generation, GENERATION_S, session.channel, message
        )

    # The thread

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            started_at, failure = time.monotonic(), None
            try:
                self._keep_session(self._credentials.get())
            except ServerFailedError as error:
                failure = str(error)
            except TinkerfsError:
                pass  # there is no key; requests report it
            finally:
                with self._lock:
                    self._session = None
                self._is_tried.set()
            if failure is not None and not self._closing.is_set():
                self._report(failure, has_settled=time.monotonic() - started_at > _SETTLED_S)
            failures = failures + 1 if time.monotonic() - started_at < _SETTLED_S else 1
            self._closing.wait(_RECONNECT.delay_s(failures))

    def _keep_session(self, api_key: str) -> None:
        """Open a session; return when the key has changed or the mount ends.

        Raises:
            ServerFailedError: the server failed.
        """
        seal, server = RecordSeal(api_key, self._base_url), self._server
        session = SharedSession(api_key, seal, server, seal.name("g"), seal.name("changes"))
        with server.subscribe(session.channel) as subscription:
            generation = server.begin(session.generation_key, new_generation(), GENERATION_S)
            with self._lock:
                has_missed = self._generation not in (None, generation)
                has_unannounced, self._has_unannounced = self._has_unannounced, False
                self._generation = generation
            if has_missed:
                self._on_change(None)
            if has_unannounced:
                self._announce(session, "")
            with self._lock:
                self._session, self._failure = session, None
            self._is_tried.set()
            self._serve(session, subscription)

    def _serve(self, session: SharedSession, subscription: Subscription) -> None:
        next_ping_at = opened_at = time.monotonic()
        while not self._closing.is_set() and self.has_key(session):
            message = subscription.next(_TICK_S)
            if message is not None:
                self._receive(session, message)
            with self._lock:
                failure, claims = self._failure, list(self._claims)
                if self._is_reported and time.monotonic() - opened_at > _SETTLED_S:
                    self._is_reported = False
            if failure is not None:
                raise ServerFailedError(failure)
            if claims:
                session.server.extend(claims, CLAIM_S)
            if time.monotonic() >= next_ping_at:
                next_ping_at = time.monotonic() + _PING_S
                subscription.ping(2 * _PING_S)

    def _receive(self, session: SharedSession, message: bytes) -> None:
        try:
            change = session.seal.unseal_change(message, session.channel)
        except InvalidRecordError:
            self._telemetry.count("shared_metadata_rejections")
            return
        # Also after an own change: without its message, the subscription may have missed others.
        with self._lock:
            self._generation = change.generation
        if change.sender == self._mount_id:
            return
        self._telemetry.count("shared_metadata_changes")
        self._on_change(change.run_id or None)

    def _report(self, failure: str, *, has_settled: bool) -> None:
        """Record the failure, unless it belongs to an outage that is recorded already."""
        with self._lock:
            is_known, self._is_reported = self._is_reported and not has_settled, True
        if is_known:
            log.info("shared cache %s: %s", self._server.name, failure)
            return
        error = errors.ConnectionFailed(
            f"failed, responses are requested from the API: {failure}",
            endpoint=f"shared cache {self._server.name}",
        )
        self._telemetry.record_error("-", "shared cache", errors.os_error_from_api(error, "-"))


def new_generation() -> bytes:
    """Return a generation that has never been and will never be another's."""
    return secrets.token_bytes(16)
