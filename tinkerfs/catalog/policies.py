"""Cache policies: how long each kind of API response stays fresh."""

from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.api.circuit_breaker import UNSUPPORTED_TTL_S
from tinkerfs.cache.cache_policy import CachePolicy

#: Maximum TTL of negative entries, seconds; a shorter listing TTL applies to them too.
NEGATIVE_TTL_S = 5.0


@dataclass(frozen=True, slots=True)
class CachePolicies:
    """The cache policies of one mount.

    Attributes:
        listing: for listings and mutable records.
        by_name: for single records, where a status of 400 or 422 also means absence.
        immutable: for values that never change; errors are cached for `UNSUPPORTED_TTL_S`.
        without_time: for such values of a checkpoint without a time, which may have been replaced.
    """

    listing: CachePolicy
    by_name: CachePolicy
    immutable: CachePolicy
    without_time: CachePolicy

    @classmethod
    def from_settings(cls, ttl_s: float, stale_s: float) -> "CachePolicies":
        """Return the policies for the values of `--ttl` and `--stale`, in seconds."""
        negative_ttl_s = _negative_ttl_s(ttl_s)
        absence = (errors.NotFound, errors.UnsupportedEndpoint)
        absence_by_name = (*absence, errors.BadRequest)
        rejection = (*absence_by_name, errors.ClientError)
        forever = float("inf")
        return cls(
            listing=CachePolicy(ttl_s, stale_s, negative_ttl_s, absence),
            by_name=CachePolicy(ttl_s, stale_s, negative_ttl_s, absence_by_name),
            immutable=CachePolicy(forever, forever, UNSUPPORTED_TTL_S, rejection),
            without_time=CachePolicy(ttl_s, stale_s, UNSUPPORTED_TTL_S, rejection),
        )

    def update(self, ttl_s: float, stale_s: float) -> None:
        """Adopt changed values of `--ttl` and `--stale`, in seconds, for later loads."""
        for policy in (self.listing, self.by_name, self.without_time):
            policy.ttl_s, policy.stale_if_error_s = ttl_s, stale_s
        self.listing.negative_ttl_s = self.by_name.negative_ttl_s = _negative_ttl_s(ttl_s)


def _negative_ttl_s(ttl_s: float) -> float:
    return min(NEGATIVE_TTL_S, ttl_s)
