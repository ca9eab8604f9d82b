"""Profiles of the known API servers: how they differ, as data.

Handlers depend on the attributes of a profile and never on its name. Sources: the official service
through its SDK, SkyRL's `skyrl/tinker/api.py` 0.4.0, and hatchery-core's `tinker_compat.py` 0.3.0.
Of Twinkle and mlx_tinker only the endpoints and archives are known; their records are assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KIND_TYPES = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""The `checkpoint_type` of each kind of checkpoint."""

_ALL_KINDS = frozenset(KIND_TYPES)

IdForm = Literal["kind/name", "name", "any"]


@dataclass(frozen=True, slots=True)
class Profile:
    """The behaviour of one server.

    Attributes:
        name: Its name on the command line.
        requires_key: Whether requests without a valid key are rejected.
        missing: Unsupported endpoints: the response is 404 `{"detail": "Not Found"}`.
        kinds: The kinds of checkpoints that it supports.
        listed_ids: The form of `checkpoint_id` in listings.
        archive_ids: The form of the checkpoint id in archive URLs.
        change_ids: The form in the URLs of publish, TTL and delete; the other is rejected.
        rejection_status: Status of that rejection: 400 of a handler, or 404 of the framework.
        has_open_delete_route: Whether the delete route matches any path below a run's
            checkpoints, so that the framework rejects other methods there with 405.
        is_delete_blind: Whether deleting an absent checkpoint succeeds.
        flat_paths: Whether tinker paths read `tinker://<run>/checkpoints/<name>`.
        shares_names: Whether a run's training and sampler checkpoints may have the same name.
        times: Format of times: with `Z`, without a zone, or as Unix numbers.
        forgets_times: Whether the times of some checkpoints are null.
        omitted: Fields that its records lack.
        nulls: Fields of its records that are always null.
        owner: Value of `model_owner`; None for the account's name.
        weights_info_kinds: Kinds that `weights_info` supports; the status for others is 400.
        archive_kinds: Kinds that have an archive.
        archive_form: Format of archives.
        serves_archives_itself: Whether the API's origin serves archives, without signature, Range
            and ETag.
        lists_accessible: Whether runs of other users that the account may read can be listed.
        page_max: Maximum page size, to which limits are silently reduced; None if unbounded.
        account_page_max: The same for the listing of the account's checkpoints.
        is_total_zero_past_end: Whether `total_count` is 0 on a page past the end.
        publishes_to_hub: Whether publishing uploads to a model hub and changes no record.
        has_archive_ids: Whether the URL of an archive that the API serves has an opaque id.
        member_names: Names of files, by the names that an adapter of PEFT has.
        change_status: Status of a successful mutation.
    """

    name: str
    requires_key: bool = True
    missing: frozenset[str] = frozenset()
    kinds: frozenset[str] = _ALL_KINDS
    listed_ids: IdForm = "kind/name"
    archive_ids: IdForm = "kind/name"
    change_ids: IdForm = "kind/name"
    rejection_status: int = 400
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
    lists_accessible: bool = False
    page_max: int | None = 100
    account_page_max: int | None = 100
    is_total_zero_past_end: bool = False
    publishes_to_hub: bool = False
    has_archive_ids: bool = False
    member_names: Mapping[str, str] = field(default_factory=dict)
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
_ACCOUNT = frozenset(
    {
        "GET checkpoints",
        "GET auth/apikey/me",
        "POST auth/token",
        "GET billing/usage/checkpoints/current",
    }
)
_EXPORTS = frozenset(
    {
        "POST create_session",
        "POST load_weights",
        "POST get_info",
        "POST save_weights_external",
        "POST retrieve_future",
        "POST session_heartbeat",
        "POST finish",
    }
)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "official",
            missing=frozenset({"GET download"}),
            lists_accessible=True,
            account_page_max=1000,
        ),
        Profile(
            "official-0.36",
            missing=frozenset({"GET archive", "GET download"}),
            lists_accessible=True,
            account_page_max=1000,
        ),
        Profile(
            "skyrl",
            requires_key=False,
            missing=_EXTERNAL
            | _SESSIONS
            | _CHANGES
            | _ACCOUNT
            | _EXPORTS
            | {"POST client/dynamic_config"},
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
            | _EXPORTS
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
            rejection_status=404,
            is_delete_blind=True,
            flat_paths=True,
            shares_names=False,
            times="unix",
            forgets_times=True,
            omitted=frozenset({"size_bytes", "user_metadata"}),
            archive_kinds=frozenset(),
        ),
        Profile(
            "twinkle",
            missing=_EXTERNAL
            | _SESSIONS
            | _ACCOUNT
            | _EXPORTS
            | {
                "DELETE publish",
                "PUT ttl",
                "GET samplers/{sampler}",
                "GET archive",
                "GET download",
            },
            kinds=frozenset({"weights", "sampler_weights"}),
            archive_kinds=frozenset(),
            publishes_to_hub=True,
            change_status=204,
        ),
        Profile(
            "mlx_tinker",
            requires_key=False,
            missing=_EXTERNAL | _SESSIONS | _CHANGES | _ACCOUNT | _EXPORTS,
            kinds=frozenset({"weights", "sampler_weights"}),
            archive_ids="any",
            change_ids="any",
            archive_form="gzip",
            serves_archives_itself=True,
            has_archive_ids=True,
            member_names={
                "adapter_config.json": "config.json",
                "adapter_model.safetensors": "adapters.safetensors",
            },
        ),
    )
}
"""Every profile by name."""
