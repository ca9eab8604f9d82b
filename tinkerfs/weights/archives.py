"""Archives: one signed URL a checkpoint, shared by all who ask, fresh when handed out.

The server builds an archive when its URL is first asked for, which costs it something and can take
minutes. So one build is waited for however many ask, a reader that gives up does not abandon it, a
URL serves until shortly before it expires, and one process group starts only so many in a minute: a
walk that follows links would otherwise ask for every archive of the account. Thread-safe.
"""

import threading
from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.api.client import CheckpointRef, Client
from tinkerfs.cache.flight import in_thread
from tinkerfs.call import Call
from tinkerfs.clock import Clock
from tinkerfs.telemetry import Telemetry

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tinkerfs.api.models import SignedUrl

__all__ = ["Archives"]

#: A URL is not handed out within this time of its expiry, seconds, or a tenth of its life.
EXPIRY_MARGIN_S = 60.0
#: Between two questions whether an archive is ready, where the server names no time: from, to.
POLL_S = (1.0, 15.0)
#: Within which `burst` builds may be started.
BURST_WINDOW_S = 60.0


class Archives:
    """The signed URLs of archives."""

    def __init__(
        self,
        client: Client,
        telemetry: Telemetry,
        clock: Clock,
        *,
        timeout_s: float,
        burst: int,
    ) -> None:
        self._client = client
        self._telemetry = telemetry
        self._clock = clock
        self._timeout_s = timeout_s
        self._burst = burst
        self._lock = threading.RLock()  # a flight that failed at once lands within it
        # Guarded by _lock.
        self._urls: dict[Hashable, tuple[SignedUrl, float]] = {}
        self._flights: dict[Hashable, Future[SignedUrl]] = {}
        self._started: dict[int, deque[float]] = {}

    def known(self, key: Hashable) -> "SignedUrl | None":
        """Return a URL that is still good, without a call."""
        with self._lock:
            return self._known(key)

    def url(self, key: Hashable, ref: CheckpointRef, path: str, call: Call) -> "SignedUrl":
        """Return a URL that is good for some time yet, waiting for the archive to be built.

        Args:
            key: the checkpoint and its version.
            ref: how the API is asked for it.
            path: the file on whose behalf it is asked, for messages.
            call: whose process group may start a build, and how long to wait.

        Raises:
            ApiError: what the server said in the end; NotReady never.
            OSError: ETIMEDOUT when it was not built in time, EBUSY when this process group has
                started too many builds, EINTR when the caller gave up.
        """
        with self._lock:
            known = self._known(key)
            if known is not None:
                return known
            flight = self._flights.get(key)
            if flight is None:
                self._admit(call.caller().group, path)
                flight = in_thread(lambda: self._build(key, ref, path), f"archive {path}")
                self._flights[key] = flight
                flight.add_done_callback(lambda _done: self._landed(key))
        return call.within(self._timeout_s).wait(flight)

    def forget(self) -> None:
        """Drop every URL that is kept; builds under way go on."""
        with self._lock:
            self._urls.clear()

    def _known(self, key: Hashable) -> "SignedUrl | None":
        kept = self._urls.get(key)
        if kept is None:
            return None
        url, good_until = kept
        if self._clock.now() >= good_until:
            del self._urls[key]
            return None
        return url

    def _landed(self, key: Hashable) -> None:
        with self._lock:
            self._flights.pop(key, None)

    def _admit(self, group: int, path: str) -> None:
        """Let a process group start a build, or refuse; the caller holds the lock."""
        if not self._burst:
            return
        now = self._clock.monotonic()
        for other in [g for g, s in self._started.items() if now - s[-1] >= BURST_WINDOW_S]:
            del self._started[other]
        started = self._started.setdefault(group, deque(maxlen=self._burst))
        if len(started) == self._burst and now - started[0] < BURST_WINDOW_S:
            raise errors.busy(
                path,
                f"one process group may start {self._burst} archive builds a minute "
                "(--archive-burst): this looks like a walk that follows links",
            )
        started.append(now)

    def _build(self, key: Hashable, ref: CheckpointRef, path: str) -> "SignedUrl":
        """Ask until the archive is there; runs on a thread of its own."""
        began = self._clock.monotonic()
        pause_s, longest_s = POLL_S
        with self._telemetry.waiting(f"archive {path}"):
            while True:
                try:
                    url = self._client.archive(ref)
                    break
                except errors.NotReady as error:
                    wait_s = error.retry_after_s if error.retry_after_s is not None else pause_s
                    pause_s = min(pause_s * 2, longest_s)
                    waited_s = self._clock.monotonic() - began
                    if waited_s + wait_s > self._timeout_s:
                        raise errors.TimedOut(
                            f"the archive was not built within {self._timeout_s:g} s "
                            f"(--archive-timeout); the server's last word: {error.message}",
                            endpoint=error.endpoint,
                            status=error.status,
                        ) from None
                threading.Event().wait(max(wait_s, 0.02))
        now = self._clock.now()
        margin_s = min(EXPIRY_MARGIN_S, max(url.expires_at_s - now, 0.0) / 10)
        with self._lock:
            self._urls[key] = (url, url.expires_at_s - margin_s)
        return url
