"""How long the outcomes of a load are cached."""

from dataclasses import dataclass

from tinkerfs import errors

#: TTL of a cached failure that says nothing about the object, seconds. A walk during an outage
#: sends few requests, and a recovery is still noticed quickly.
ERROR_TTL_S = 2.0

#: A value that was read within this time, seconds, is served once after its expiry while it is
#: refreshed in the background.
STALE_WHILE_REVALIDATE_S = 2.0


@dataclass(slots=True)
class CachePolicy:
    """How long the outcomes of a load are cached; a change applies to later loads.

    Attributes:
        ttl_s: freshness of a value.
        stale_if_error_s: a value is served this long after its load while refreshes fail.
        negative_ttl_s: TTL of a negative entry.
        negative_errors: the errors that are cached as negative entries.
    """

    ttl_s: float
    stale_if_error_s: float
    negative_ttl_s: float
    negative_errors: tuple[type[errors.ApiError], ...] = (
        errors.NotFound,
        errors.UnsupportedEndpoint,
    )

    @property
    def revalidate_grace_s(self) -> float:
        """Maximum time since the last read for stale-while-revalidate, seconds."""
        return min(STALE_WHILE_REVALIDATE_S, self.ttl_s / 4)

    def error_ttl_s(self, error: errors.ApiError) -> float:
        """Return how long an error is cached, seconds."""
        # An error that was raised without a request is cheap to raise again.
        if error.is_local and isinstance(error, errors.UNAVAILABLE_ERRORS):
            return 0.0
        return self.negative_ttl_s if isinstance(error, self.negative_errors) else ERROR_TTL_S
