"""How the known servers of the API differ, as data.

The handlers ask a profile for facts and never for its name. Facts as observed: the official
service through its SDK, SkyRL's `skyrl/tinker/api.py` 0.4.0, hatchery-core's `tinker_compat.py`
0.3.0.
"""

from dataclasses import dataclass
from typing import Literal

KIND_TYPES = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""The `checkpoint_type` of each kind of checkpoint."""

_ALL_KINDS = frozenset(KIND_TYPES)

IdForm = Literal["kind/name", "name"]


@dataclass(frozen=True, slots=True)
class Profile:
    """What one server does.

    Attributes:
        name: What the command line calls it.
        requires_key: Whether requests without a valid key are refused.
        missing: Endpoints that are answered with 404 `{"detail": "Not Found"}`.
        kinds: The kinds of checkpoint it knows.
        listed_ids: The form of `checkpoint_id` in listings.
        archive_ids: The form that the archive's URL takes.
        change_ids: The form that publish, TTL and delete take; the other one is refused.
        refuses_with: Status of that refusal: 400 said by a handler, 404 of a missing route.
        has_open_delete_route: Whether the route of deletions takes any path below a run's
            checkpoints, so that the framework answers 405 to other methods there.
        is_delete_blind: Whether deleting what is not there succeeds.
        flat_paths: Whether tinker paths read `tinker://<run>/checkpoints/<name>`.
        shares_names: Whether a run's training and sampler checkpoints may have the same name.
        times: How times are written: with `Z`, without a zone, or as Unix numbers.
        forgets_times: Whether the times of some checkpoints are null.
        omitted: Fields that its records do not have.
        nulls: Fields of its records that are always null.
        owner: What `model_owner` says, when not the account's own name.
        weights_info_kinds: Kinds that `weights_info` takes; others are 400.
        archive_kinds: Kinds that have an archive.
        archive_form: What the archive is.
        serves_archives_itself: Whether archives come from the API's own origin, without a
            signature, and then without Range and ETag.
        page_max: The largest page, silently applied; None for no bound.
        is_total_zero_past_end: Whether `total_count` is 0 on a page past the end.
        change_status: Status of a change that succeeded.
    """

    name: str
    requires_key: bool = True
    missing: frozenset[str] = frozenset()
    kinds: frozenset[str] = _ALL_KINDS
    listed_ids: IdForm = "kind/name"
    archive_ids: IdForm = "kind/name"
    change_ids: IdForm = "kind/name"
    refuses_with: int = 400
    has_open_delete_route: bool = False
    is_delete_blind: bool = False
    flat_paths: bool = False
    shares_names: bool = True
    times: Literal["utc", "naive", "unix"] = "utc"
    forgets_times: bool = False
    omitted: frozenset[str] = frozenset()
    nulls: frozenset[str] = frozenset()
    owner: str | None = None
    weights_info_kinds: frozenset[str] = _ALL_KINDS
    archive_kinds: frozenset[str] = frozenset({"weights", "sampler_weights"})
    archive_form: Literal["tar", "gzip"] = "tar"
    serves_archives_itself: bool = False
    page_max: int | None = 100
    is_total_zero_past_end: bool = False
    change_status: int = 200


_EXTERNAL = frozenset({"GET external_weights_urls"})
_SESSIONS = frozenset(
    {
        "GET sessions",
        "GET sessions/{session}",
        "POST sessions/search",
        "GET trace_export",
    }
)
_CHANGES = frozenset({"POST publish", "DELETE publish", "PUT ttl"})
_ACCOUNT = frozenset({"GET checkpoints", "GET auth/apikey/me"})

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("official", missing=frozenset({"GET download"})),
        Profile("official-0.36", missing=frozenset({"GET archive", "GET download"})),
        Profile(
            "skyrl",
            requires_key=False,
            missing=_EXTERNAL | _SESSIONS | _CHANGES | _ACCOUNT | {"POST client/dynamic_config"},
            kinds=frozenset({"weights", "sampler_weights"}),
            listed_ids="name",
            archive_ids="name",
            has_open_delete_route=True,
            times="naive",
            omitted=frozenset({"size_bytes", "public", "expires_at", "user_metadata"}),
            nulls=frozenset({"last_checkpoint", "last_sampler_checkpoint"}),
            owner="default",
            weights_info_kinds=frozenset({"weights"}),
            archive_kinds=frozenset({"sampler_weights"}),
            archive_form="gzip",
            serves_archives_itself=True,
            page_max=None,
            is_total_zero_past_end=True,
            change_status=204,
        ),
        Profile(
            "hatchery",
            missing=_EXTERNAL
            | _SESSIONS
            | _CHANGES
            | _ACCOUNT
            | {
                "GET samplers/{sampler}",
                "GET training_runs",
                "GET training_runs/{run}",
                "GET archive",
                "GET download",
            },
            kinds=frozenset({"weights", "sampler_weights"}),
            listed_ids="name",
            change_ids="name",
            refuses_with=404,
            is_delete_blind=True,
            flat_paths=True,
            shares_names=False,
            times="unix",
            forgets_times=True,
            omitted=frozenset({"size_bytes", "user_metadata"}),
            archive_kinds=frozenset(),
        ),
    )
}
"""Every profile by name."""
