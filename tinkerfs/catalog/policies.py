"""How long what the server told serves: the one place that says so."""

from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.api.capabilities import UNSUPPORTED_TTL_S
from tinkerfs.cache.metadata import CachePolicy

#: Absence is remembered this long at most, seconds; never longer than the TTL.
NEGATIVE_TTL_S = 5.0


@dataclass(frozen=True, slots=True)
class CachePolicies:
    """The policies of one mount.

    Attributes:
        listing: listings, and records that change.
        by_name: what is asked for by name: 400 and 422 also say that there is none.
        immutable: what never changes; a refusal serves for `REFUSED_TTL_S`.
        undated: the same of a checkpoint without a time, which may be another one by now.
    """

    listing: CachePolicy
    by_name: CachePolicy
    immutable: CachePolicy
    undated: CachePolicy

    @classmethod
    def from_settings(cls, ttl_s: float, stale_s: float) -> "CachePolicies":
        """Make the policies of a mount's `--ttl` and `--stale`, seconds."""
        negative_ttl_s = min(NEGATIVE_TTL_S, ttl_s)
        absence = (errors.NotFound, errors.UnsupportedEndpoint)
        refusal = (*absence, errors.BadRequest)
        forever = float("inf")
        return cls(
            listing=CachePolicy(ttl_s, stale_s, negative_ttl_s, absence),
            by_name=CachePolicy(ttl_s, stale_s, negative_ttl_s, refusal),
            immutable=CachePolicy(
                forever, forever, UNSUPPORTED_TTL_S, (*refusal, errors.ClientError)
            ),
            undated=CachePolicy(ttl_s, stale_s, UNSUPPORTED_TTL_S, (*refusal, errors.ClientError)),
        )
