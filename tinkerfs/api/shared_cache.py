"""Responses of the API that all mounts with one API key share, through a Redis server.

A response is used as long as it would be fresh in the cache of the mount that requested it. One
mount requests a response, and the others wait for it. A change that a mount makes begins a new
generation, and no response of an earlier one is used, except what belongs to one version of a
checkpoint. A response has the generation in which it was
requested, so that one that is stored later is not used either. Every failure has the same effect
as a miss.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Generic, Self, TypeAlias, TypeVar

from tinkerfs import errors
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.http_client import Response
from tinkerfs.api.pagination import SnapshotGone
from tinkerfs.api.redis_server import Reading, RedisServer, ServerFailedError
from tinkerfs.api.shared_records import (
    HEAD_BYTES,
    MAX_VALUE_BYTES,
    REFUSALS,
    InvalidRecordError,
    SharedRecord,
)
from tinkerfs.api.shared_session import (
    CLAIM_S,
    GENERATION_S,
    SessionKeeper,
    SharedSession,
    new_generation,
)
from tinkerfs.api.transport import Request
from tinkerfs.clock import Clock
from tinkerfs.retry import BUILD_POLL
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import SharedReads, Snapshot

T = TypeVar("T")

#: Sends a request, and returns its response and the parsed response. With an error, it raises that
#: as if the server had responded with it, so that circuit breakers count it.
Send: TypeAlias = Callable[[errors.ApiError | None], tuple[Response, T]]

#: Maximum lifetime of a response, also of one that never changes, seconds.
MAX_LIFE_S: Final = 86400.0

#: Lifetime of a refusal, seconds; as of a negative entry.
NEGATIVE_LIFE_S: Final = 5.0

#: Maximum wait for another mount's request, seconds. An archive is waited for half as long as its
#: request may take, so that a claim that is never given up delays it, and does not fail it.
MAX_WAIT_S: Final = 10.0

#: How often a waiter looks for the response, at first and later, seconds.
_MIN_POLL_S: Final = 0.01
_MAX_POLL_S: Final = 0.1

#: Bound on the connection to the server and on each wait for a reply, seconds.
SERVER_TIMEOUT_S: Final = 0.5

#: Stands in place of a claim after its request failed: each mount has to find out itself.
_FAILED: Final = b"failed"
_FAILED_S: Final = 1.0
#: Stands in place of a claim until the server may have what was requested.
_NOT_READY: Final = b"not ready"

#: A listing with an older first page is read only if the other pages are shared, too, seconds.
#: A page that is requested now might not fit to it.
MAX_SKEW_S: Final = 5.0

#: Tolerance for the clock of the server, microseconds: it may be set back a little.
_CLOCK_TOLERANCE_US: Final = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """The turn of this mount to request a response.

    Attributes:
        generation: the generation before the request.
        requested_us: the time before the request, by the clock of the server.
        has_claim: whether other mounts wait for it.
    """

    session: SharedSession
    name: str
    generation: bytes
    requested_us: int
    has_claim: bool

    @property
    def claim_key(self) -> str:
        """The name of the claim: one for each generation."""
        return self.session.seal.name("c", self.name, self.generation.hex())


@dataclass(frozen=True, slots=True, eq=False)
class _Found(Generic[T]):
    """A shared response, parsed, or the error by which the server refused it."""

    outcome: T | errors.ApiError


class SharedCache:
    """The shared responses of one mount. Thread-safe.

    Args:
        url: redis, rediss or unix URL of the server.
        base_url: URL of the API.

    Raises:
        StartupError: the trusted certificates cannot be read.
    """

    def __init__(
        self,
        url: str,
        base_url: str,
        credentials: Credentials,
        telemetry: Telemetry,
        clock: Clock,
    ) -> None:
        self._server = RedisServer(url, SERVER_TIMEOUT_S)
        self._base_url = base_url
        self._credentials = credentials
        self._telemetry = telemetry
        self._clock = clock
        self._keeper: SessionKeeper | None = None
        #: Responses that were requested before are not used; on `Clock.with_suspend`.
        self._not_before = float("-inf")

    def start(self, on_change: Callable[[str | None], None]) -> Self:
        """Connect in the background; see `SessionKeeper` for `on_change`."""
        self._keeper = SessionKeeper(
            self._server, self._base_url, self._credentials, self._telemetry, on_change
        )
        return self

    def __enter__(self) -> Self:
        """Return the cache itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Disconnect."""
        if self._keeper is not None:
            self._keeper.close()

    def reset(self) -> None:
        """Use no response that was requested before now."""
        self._not_before = self._clock.with_suspend()

    def announce(self, run_id: str) -> None:
        """Announce that this mount may have changed a run; empty for anything."""
        if self._keeper is not None:
            self._keeper.announce(run_id)

    def fetch(
        self,
        request: Request,
        reads: SharedReads,
        send: Send[T],
        parse: Callable[[Response], T],
        life_s: Callable[[T], float],
    ) -> T:
        """Return the parsed response of a request, from this mount or another.

        Args:
            request: the request; its path identifies the response, together with its version.
            reads: bounds the age of the response.
            send: see `Send`.
            parse: parses a response.
            life_s: returns how long a parsed response may be used, seconds.

        Raises:
            ApiError: the request failed.
            SnapshotGone: the page is missing, and the listing is too old to request it.
        """
        if reads.max_age_s <= 0:
            return send(None)[1]
        session = None if self._keeper is None else self._keeper.current()
        if session is None:
            _begin_snapshot(request, reads, None)
            return send(None)[1]
        name = self._name(session, request, reads)
        if name is None:
            return send(None)[1]
        found = self._find(session, name, request, reads, parse)
        if isinstance(found, _Found):
            outcome = found.outcome
            return send(outcome)[1] if isinstance(outcome, errors.ApiError) else outcome
        if request.page is not None and not request.page.is_first:
            snapshot = reads.snapshots.get(request.page.listing)
            if snapshot is not None and snapshot.is_old:
                self._give_up(found, _FAILED, 0.0)
                raise SnapshotGone
        return self._send(found, request, reads, send, life_s)

    def _name(self, session: SharedSession, request: Request, reads: SharedReads) -> str | None:
        """Return the name of a response; None if it belongs to a listing that is not shared."""
        identity = ""
        if request.page is not None and not request.page.is_first:
            snapshot = reads.snapshots.get(request.page.listing)
            if snapshot is None:
                return None
            identity = snapshot.identity
        body = "" if request.body is None else request.body.decode("ascii", "replace")
        # An error may be another one if the resource is known to exist.
        exists = "exists" if request.exists else ""
        parts = (request.endpoint.label, request.path, body, request.version, exists, identity)
        return session.seal.name("v", *parts)

    # Reading

    def _find(
        self,
        session: SharedSession,
        name: str,
        request: Request,
        reads: SharedReads,
        parse: Callable[[Response], T],
    ) -> _Found[T] | _Turn | None:
        """Return the shared response, or this mount's turn to request it; None in an outage."""
        max_wait_s = request.hold_s / 2 if request.endpoint.is_long_running else MAX_WAIT_S
        started_at, poll_s, is_waiting = time.monotonic(), _MIN_POLL_S, False
        turn: _Turn | None = None
        unusable = b""
        not_before = max(
            self._not_before, reads.not_before, self._clock.with_suspend() - reads.max_age_s
        )
        page = request.page
        if page is not None and page.is_first and page.listing in reads.snapshots:
            # The load lists again, because the pages did not fit to each other.
            not_before = self._clock.with_suspend()
        try:
            while True:
                reading = _read(session, name, unusable)
                unusable = reading.value[:HEAD_BYTES] or unusable
                found = self._use(session, name, reading, request, reads, parse, not_before)
                if found is not None:
                    self._telemetry.count("shared_metadata_hits")
                    self._give_up(turn, b"", 0.0)
                    return found
                if turn is not None:
                    self._telemetry.count("shared_metadata_misses")
                    return turn
                is_over = time.monotonic() - started_at >= max_wait_s
                turn = self._take_turn(session, name, reading, is_over=is_over)
                if turn is not None:
                    continue  # the response may have been stored before the claim was
                if not is_waiting:
                    is_waiting = True
                    self._telemetry.count("shared_metadata_waits")
                time.sleep(poll_s)
                poll_s = min(2 * poll_s, _MAX_POLL_S)
        except ServerFailedError as error:
            if turn is not None:
                self._release(turn)
            self._on_failure(session, error)
            return None

    def _use(
        self,
        session: SharedSession,
        name: str,
        reading: Reading,
        request: Request,
        reads: SharedReads,
        parse: Callable[[Response], T],
        not_before: float,
    ) -> _Found[T] | None:
        """Return the response that was read if it may be used."""
        if not reading.value:
            return None
        try:
            record = session.seal.unseal(reading.value, name)
        except InvalidRecordError:
            self._telemetry.count("shared_metadata_rejections")
            return None
        # No change alters what belongs to one version of a checkpoint.
        is_current = bool(request.version) or record.generation == reading.generation
        age_us = reading.now_us - record.requested_us
        if not is_current or not -_CLOCK_TOLERANCE_US <= age_us < 1000 * record.life_ms:
            return None
        age_s = max(age_us, 0) / 1e6
        requested_at = self._clock.with_suspend() - age_s
        if requested_at < not_before:
            return None
        outcome = record.outcome
        found: _Found[T]
        if isinstance(outcome, Response):
            try:
                found = _Found(parse(replace(outcome, age_s=age_s)))
            except errors.ApiError:  # an older mount has accepted what this one does not
                self._telemetry.count("shared_metadata_rejections")
                return None
            _begin_snapshot(request, reads, Snapshot(record.identity, age_s > MAX_SKEW_S))
        else:
            outcome.endpoint = request.endpoint.label
            found = _Found(outcome)
        reads.record(requested_at)
        return found

    def _take_turn(
        self, session: SharedSession, name: str, reading: Reading, *, is_over: bool
    ) -> _Turn | None:
        """Return the turn to request a response; None if it is another mount's.

        Args:
            is_over: whether this mount has waited long enough.
        """
        generation = reading.generation
        if not generation:  # the server has lost it
            generation = session.server.begin(
                session.generation_key, new_generation(), GENERATION_S
            )
        turn = _Turn(session, name, generation, reading.now_us, has_claim=False)
        if is_over:
            return turn
        claim = secrets.token_bytes(16)
        current = session.server.claim(turn.claim_key, claim, CLAIM_S)
        if current == _FAILED:
            return turn
        if current != claim:
            return None
        assert self._keeper is not None
        self._keeper.add_claim(turn.claim_key)
        return replace(turn, has_claim=True)

    # Requesting

    def _send(
        self,
        turn: _Turn | None,
        request: Request,
        reads: SharedReads,
        send: Send[T],
        life_s: Callable[[T], float],
    ) -> T:
        """Send a request, and share its response."""
        identity = secrets.token_hex(16)
        try:
            response, parsed = send(None)
        except REFUSALS as error:
            if turn is not None and not error.is_local:
                self._store(turn, error, identity, min(reads.max_age_s, NEGATIVE_LIFE_S))
            else:
                self._give_up(turn, _FAILED)
            raise
        except errors.ResourceNotReady as error:
            # The next request is sent when the server asks for it, by this mount or another.
            self._give_up(turn, _NOT_READY, error.retry_after_s or BUILD_POLL.delay_s(1))
            raise
        except BaseException:
            self._give_up(turn, _FAILED)
            raise
        is_stored = turn is not None and self._store(
            turn, response, identity, min(reads.max_age_s, life_s(parsed), MAX_LIFE_S)
        )
        _begin_snapshot(request, reads, Snapshot(identity, is_old=False) if is_stored else None)
        return parsed

    def _store(
        self, turn: _Turn, outcome: Response | errors.ApiError, identity: str, life_s: float
    ) -> bool:
        """Store a response or refusal; return whether it is shared."""
        session = turn.session
        self._release(turn)
        record = SharedRecord(
            turn.generation, turn.requested_us, int(1000 * life_s), identity, outcome
        )
        # With another key than the session's, the response may be of another account.
        has_key = self._keeper is not None and self._keeper.has_key(session)
        value = session.seal.seal(record, turn.name) if has_key else None
        if value is None or life_s <= 0:
            self._give_up(turn, _FAILED)
            return False
        try:
            session.server.store(turn.name, value, life_s, turn.claim_key)
        except ServerFailedError as error:
            self._on_failure(session, error)
            return False
        return True

    def _give_up(self, turn: _Turn | None, mark: bytes, life_s: float = _FAILED_S) -> None:
        """Replace the claim of a request without a response, for `life_s`."""
        if turn is None or not turn.has_claim:
            return
        self._release(turn)
        try:
            turn.session.server.mark(turn.claim_key, mark, life_s)
        except ServerFailedError as error:
            self._on_failure(turn.session, error)

    def _release(self, turn: _Turn) -> None:
        """Extend the claim of a request no longer."""
        if self._keeper is not None:
            self._keeper.remove_claim(turn.claim_key)

    def _on_failure(self, session: SharedSession, error: ServerFailedError) -> None:
        self._telemetry.count("shared_metadata_failures")
        assert self._keeper is not None
        self._keeper.on_failure(session, error)


def _read(session: SharedSession, name: str, unusable: bytes) -> Reading:
    """Read a response, except one that starts like an unusable one, which may be large."""
    key = session.generation_key
    if unusable:
        reading = session.server.read(key, name, HEAD_BYTES)
        if reading.value == unusable:
            return replace(reading, value=b"")
    return session.server.read(key, name, MAX_VALUE_BYTES + 1)


def _begin_snapshot(request: Request, reads: SharedReads, snapshot: Snapshot | None) -> None:
    """Record the first page of a listing, with which the others are looked up."""
    if request.page is not None and request.page.is_first:
        reads.snapshots[request.page.listing] = snapshot
