"""How long values that are derived from cached API responses may be cached."""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Expiry:
    """Expiry of a cached value.

    A separate object, so that a derived value can refer to it without keeping the cached value
    alive.

    Attributes:
        fresh_until: end of freshness on `Clock.with_suspend`; -inf once the value was replaced.
        last_used: time of the last read on `Clock.with_suspend`.
    """

    fresh_until: float
    last_used: float = float("-inf")


class Validity:
    """Tracks how long a derived value may be cached.

    A derived value (a directory listing, a rendered file, a stat reply) depends on one or more
    cached API responses. Each dependency adds its `Expiry`. The derived value is valid until the
    first of them expires. A dependency that may change at any time (a stale or partial response,
    an archive member) marks the validity uncacheable.

    Not thread-safe while it is being built; read-only afterwards.
    """

    __slots__ = ("_expiries", "_is_uncacheable")

    def __init__(self) -> None:
        self._expiries: tuple[Expiry, ...] = ()
        self._is_uncacheable = False

    def add(self, expiry: Expiry) -> None:
        """Add a dependency."""
        if expiry not in self._expiries:
            self._expiries += (expiry,)

    def add_all(self, other: "Validity") -> None:
        """Add every dependency of another derived value."""
        for expiry in other._expiries:
            self.add(expiry)
        self._is_uncacheable = self._is_uncacheable or other._is_uncacheable

    def mark_uncacheable(self) -> None:
        """Mark the derived value as never valid."""
        self._is_uncacheable = True

    @property
    def is_uncacheable(self) -> bool:
        """Whether the derived value is never valid."""
        return self._is_uncacheable

    def copy(self) -> "Validity":
        """Return an independent validity with the same dependencies."""
        copied = Validity()
        copied._expiries, copied._is_uncacheable = self._expiries, self._is_uncacheable
        return copied

    def check_and_touch(self, now: float) -> bool:
        """Return whether the value is valid; if so, mark its dependencies as used.

        Args:
            now: time on `Clock.with_suspend`.
        """
        if self._is_uncacheable:
            return False
        for expiry in self._expiries:
            if now >= expiry.fresh_until:
                return False
        for expiry in self._expiries:
            expiry.last_used = now
        return True


@dataclass(slots=True, eq=False)
class SharedReads:
    """Bounds the age of the shared responses that a load uses, and records the oldest.

    Instants are on `Clock.with_suspend`.

    Attributes:
        max_age_s: maximum age of a shared response, seconds; 0 if the load uses none.
        not_before: a response that was requested before is not used.
        oldest_at: when the oldest response was requested; infinite if none was shared.
        snapshots: the first page of each listing of several pages, by the listing.
    """

    max_age_s: float = 0.0
    not_before: float = float("-inf")
    oldest_at: float = float("inf")
    snapshots: dict[str, "Snapshot | None"] = field(default_factory=dict)

    def record(self, requested_at: float) -> None:
        """Record that a shared response is used."""
        # Pages are newer than the first page, which is requested alone: no lock is needed.
        self.oldest_at = min(self.oldest_at, requested_at)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The first page of a shared listing; other pages belong to it.

    Attributes:
        identity: differs for each request of the first page.
        is_old: whether the listing has to be complete, because a page that is requested now might
            not fit to the first page.
    """

    identity: str
    is_old: bool
