"""Cached listings of the account."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from tinkerfs.cache.cache_policy import CachePolicy
from tinkerfs.cache.metadata import Loader, MetadataCache
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.catalog.trash import Trash
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext

T = TypeVar("T", bound=Iterable[Any])


def _ignore() -> None:
    pass


class CachedListing(Generic[T]):
    """One listing of the metadata cache, as the server sent it. Thread-safe.

    Args:
        cache: the cache.
        key: the key of the listing in the cache.
        load: requests the listing.
        policy: how long the listing is fresh.
        on_read: called before each read that may send a request.
    """

    __slots__ = ("_cache", "_key", "_load", "_on_read", "_policy")

    def __init__(
        self,
        cache: MetadataCache,
        key: Hashable,
        load: Loader[T],
        policy: CachePolicy,
        on_read: Callable[[], None] = _ignore,
    ) -> None:
        self._cache = cache
        self._key = key
        self._load = load
        self._policy = policy
        self._on_read = on_read

    def get(self, ctx: RequestContext) -> T:
        """Return the listing; one request per page if it is not fresh."""
        self._on_read()
        return self._cache.get(self._key, self._load, self._policy, ctx)

    def iter(self, ctx: RequestContext) -> Iterator[Any]:
        """Yield the items of the listing; a slow first listing is yielded page by page.

        A request may fail after some items have been yielded.
        """
        self._on_read()
        found = self._cache.get_or_stream(self._key, self._load, self._policy, ctx)
        return found.iterate(ctx) if isinstance(found, ResultStream) else iter(found)

    def peek(self, ctx: RequestContext) -> T | None:
        """Return the cached listing, fresh or stale, without a request.

        Its absence is recorded in `ctx`.
        """
        return self._cache.peek(self._key, ctx)  # type: ignore[no-any-return]

    def peek_partial(self, part: Hashable, ctx: RequestContext) -> Any:
        """Return one item of a first listing in flight; None if it has not arrived."""
        found = self._cache.peek_partial(self._key, part)
        if found is not None:
            ctx.mark_uncacheable()
        return found

    def last_changed_ns(self) -> int | None:
        """Return when this mount last saw a change, in Unix nanoseconds; None for never."""
        changed_at = self._cache.last_changed(self._key)
        return None if changed_at is None else int(changed_at * 1e9)

    def prefetch(self) -> bool:
        """Request the listing in the background; return False if it is cached."""
        return self._cache.prefetch(self._key, self._load, self._policy)

    def reload(self) -> T:
        """Request the listing even if it is cached."""
        return self._cache.reload(self._key, self._load, self._policy, BACKGROUND_CONTEXT)

    def update(self, change: Callable[[T], T], *, is_authoritative: bool) -> None:
        """Change the cached listing, if any, see `MetadataCache.update`."""
        self._cache.update(self._key, change, is_authoritative=is_authoritative)

    def expire(self) -> None:
        """Request the listing again at the next read."""
        self._cache.expire(self._key)


class VisibleListing(Generic[T]):
    """A listing of checkpoints without those in the trash. Thread-safe.

    Args:
        listing: the listing as the server sent it.
        trash: the trash.
        visible: returns the listing without the checkpoints in the trash.
        run_id: the run of the checkpoints; None for all runs.
    """

    __slots__ = ("_listing", "_run_id", "_trash", "_visible")

    def __init__(
        self,
        listing: CachedListing[T],
        trash: Trash,
        visible: Callable[[T], T],
        run_id: str | None = None,
    ) -> None:
        self._listing = listing
        self._trash = trash
        self._visible = visible
        self._run_id = run_id

    def get(self, ctx: RequestContext) -> T:
        """Return the listing; one request per page if it is not fresh."""
        return self._visible(self._listing.get(ctx))

    def iter(self, ctx: RequestContext) -> Iterator[Any]:
        """Yield the checkpoints of the listing, see `CachedListing.iter`."""
        return (c for c in self._listing.iter(ctx) if not self._trash.is_trashed(c))

    def peek(self, ctx: RequestContext) -> T | None:
        """Return the cached listing, see `CachedListing.peek`."""
        listing = self._listing.peek(ctx)
        return None if listing is None else self._visible(listing)

    def last_changed_ns(self) -> int | None:
        """Return when the listing or the trash last changed, see `CachedListing`."""
        times_ns = (self._listing.last_changed_ns(), self._trash.changed_at_ns(self._run_id))
        return max((each for each in times_ns if each is not None), default=None)
