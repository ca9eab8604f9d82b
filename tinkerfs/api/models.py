"""Records of the API as immutable values. Pure.

`parsing` creates the records from responses. Each record provides its original JSON as `raw`, so
that unknown fields are shown unchanged. The representation is compact, because an account may have
100,000 records. All values may be shared by threads.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from sys import intern
from typing import Generic, Self, TypeVar

import msgspec

from tinkerfs.api.json_templates import fill_template, to_template
from tinkerfs.api.timestamps import canonical_timestamp

T = TypeVar("T")


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Record of a checkpoint; create it with `from_fields`.

    Records share equal kinds, types and JSON templates: the JSON of 100,000 checkpoints would need
    another 30 MB.

    Attributes:
        kind: part of the id before the first slash; None without a slash.
        name: part of the id after the first slash; the whole id without a slash.
        checkpoint_type: "training", "sampler", "external" or a newer type.
        time_ns: when the checkpoint was saved, nanoseconds since 1970.
        tinker_path: `tinker://<run>/<kind>/<name>`, not validated.
        size_bytes: size on the server, 0 or more.
        expires_at_ns: when the server deletes the checkpoint, nanoseconds since 1970; None without
            an expiry.
        json_template: the record's JSON with placeholders for the values above.
    """

    kind: str | None
    name: str
    checkpoint_type: str | None = None
    time_ns: int | None = None
    tinker_path: str | None = None
    size_bytes: int | None = None
    is_public: bool = False
    expires_at_ns: int | None = None
    json_template: str | bytes = b"{}"

    @classmethod
    def from_fields(
        cls,
        checkpoint_id: str,
        *,
        raw: bytes,
        checkpoint_type: str | None = None,
        time_ns: int | None = None,
        tinker_path: str | None = None,
        size_bytes: int | None = None,
        is_public: bool = False,
        expires_at_ns: int | None = None,
    ) -> Self:
        """Create a record from its parsed fields and its JSON."""
        kind, slash, name = checkpoint_id.partition("/")
        if not slash:
            name = checkpoint_id
        return cls(
            kind=intern(kind) if slash else None,
            name=name,
            checkpoint_type=intern(checkpoint_type) if checkpoint_type is not None else None,
            time_ns=time_ns,
            tinker_path=tinker_path,
            size_bytes=size_bytes,
            is_public=is_public,
            expires_at_ns=expires_at_ns,
            json_template=to_template(
                raw, *_template_values(tinker_path, time_ns, expires_at_ns, name, size_bytes)
            ),
        )

    def with_raw(self, raw: bytes) -> Self:
        """Return a copy of the record with different JSON."""
        template = to_template(raw, *self._template_values())
        return msgspec.structs.replace(self, json_template=template)

    @property
    def raw(self) -> bytes:
        """The record's original JSON."""
        return fill_template(self.json_template, *self._template_values())

    def _template_values(self) -> tuple[str | None, ...]:
        return _template_values(
            self.tinker_path, self.time_ns, self.expires_at_ns, self.name, self.size_bytes
        )

    @property
    def checkpoint_id(self) -> str:
        """The id as in the server's listing: `<kind>/<name>` or `<name>`."""
        return self.name if self.kind is None else f"{self.kind}/{self.name}"

    @property
    def identity(self) -> Hashable:
        """Key that is unique among all runs, unlike ids without a kind."""
        if self.tinker_path is None:
            return (self.kind, self.name, self.checkpoint_type, self.time_ns)
        return self.tinker_path


def _template_values(
    tinker_path: str | None,
    time_ns: int | None,
    expires_at_ns: int | None,
    name: str,
    size_bytes: int | None,
) -> tuple[str | None, ...]:
    """Return the values that a template replaces, as in the JSON, the shortest last."""
    return (
        tinker_path,
        None if time_ns is None else canonical_timestamp(time_ns),
        None if expires_at_ns is None else canonical_timestamp(expires_at_ns),
        f'{name}"',  # with the closing quote, because a name such as "1" occurs in other values
        None if size_bytes is None else str(size_bytes),
    )


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Record of a training run; times are in nanoseconds since 1970.

    `raw` includes the JSON of the last checkpoints; their own `raw` is empty.
    """

    run_id: str
    base_model: str | None = None
    lora_rank: int | None = None
    is_lora: bool | None = None
    last_request_time_ns: int | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    raw: bytes


class WeightsInfo(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base model and LoRA parameters of a checkpoint's weights."""

    base_model: str | None = None
    lora_rank: int | None = None
    is_lora: bool | None = None
    raw: bytes


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a session."""

    session_id: str
    training_run_ids: tuple[str, ...] = ()
    sampler_ids: tuple[str, ...] = ()
    raw: bytes


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Record of a session in a search result."""

    session_id: str
    display_name: str | None = None
    project_id: str | None = None
    created_at_ns: int | None = None
    raw: bytes


class Sampler(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Record of a sampler; `model_path` is the tinker path that it serves, if any."""

    sampler_id: str
    base_model: str | None = None
    model_path: str | None = None
    raw: bytes


@dataclass(frozen=True, slots=True)
class SignedUrl:
    """A signed http or https URL. It is a secret, so its repr omits it.

    Attributes:
        expires_at_s: seconds since 1970.
    """

    url: str
    expires_at_s: float

    def __repr__(self) -> str:
        """Return a string with the expiry but without the URL."""
        return f"SignedUrl(<secret>, expires_at_s={self.expires_at_s!r})"


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing.

    Attributes:
        items: the valid records.
        total_count: number of all records according to the server, which may be stale.
        limit: page size according to the server.
        received: number of records on the page, including invalid ones.
    """

    items: tuple[T, ...]
    total_count: int | None = None
    limit: int | None = None
    received: int = 0


@dataclass(frozen=True, slots=True)
class SessionSearchPage:
    """One page of a search; `next_cursor` is any JSON value, None on the last page."""

    items: tuple[SessionSummary, ...]
    next_cursor: object = None
