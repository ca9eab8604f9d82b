"""What the API tells, as frozen values (pure).

Each record tells its own JSON bytes as `raw`: unknown fields are shown as the server wrote them,
and 100,000 records stay small (no dicts, no text twice). Everything here is immutable, so threads
may share it. `parsing` makes these of answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from sys import intern
from typing import Generic, Self, TypeVar

import msgspec

from tinkerfs.api.json_templates import fill_template, to_template
from tinkerfs.api.timestamps import canonical_timestamp

T = TypeVar("T")


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One checkpoint's record, made by `of`.

    What many records say is kept once for all of them, and no text twice: of 100,000, an id and a
    tinker path each would be 18 MB.

    Attributes:
        kind: what its id has before the first slash, None where it has none.
        name: the rest of its id.
        checkpoint_type: "training", "sampler", "external", or anything newer.
        time_ns: when it was saved, nanoseconds since 1970.
        path_start: its tinker path, but for the id at its end.
        path_has_id: whether an id is at its end.
        size_bytes: what the server stores, 0 or more.
        is_public: whether it is published.
        expires_at_ns: when the server will delete it, nanoseconds since 1970; None for never.
        outline: the record's own JSON, but for what the above says.
    """

    kind: str | None
    name: str
    checkpoint_type: str | None = None
    time_ns: int | None = None
    path_prefix: str | None = None
    path_has_id: bool = False
    size_bytes: int | None = None
    is_public: bool = False
    expires_at_ns: int | None = None
    json_template: str | bytes = b"{}"

    @classmethod
    def of(
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
        """Make a record of what it tells."""
        kind, slash, name = checkpoint_id.partition("/")
        if not slash:
            name = checkpoint_id
        path_start, path_has_id = tinker_path, False
        if tinker_path is not None and tinker_path.endswith("/" + checkpoint_id):
            path_start, path_has_id = intern(tinker_path[: -len(checkpoint_id)]), True
        return cls(
            kind=intern(kind) if slash else None,
            name=name,
            checkpoint_type=intern(checkpoint_type) if checkpoint_type is not None else None,
            time_ns=time_ns,
            path_prefix=path_start,
            path_has_id=path_has_id,
            size_bytes=size_bytes,
            is_public=is_public,
            expires_at_ns=expires_at_ns,
            json_template=to_template(
                raw, *_texts(path_start, time_ns, expires_at_ns, name, size_bytes)
            ),
        )

    def with_raw(self, raw: bytes) -> Self:
        """Return the same record with another JSON of its own."""
        return msgspec.structs.replace(self, json_template=to_template(raw, *self._texts()))

    @property
    def raw(self) -> bytes:
        """The record's own JSON."""
        return fill_template(self.json_template, *self._texts())

    def _texts(self) -> tuple[str | None, ...]:
        return _texts(
            self.path_prefix, self.time_ns, self.expires_at_ns, self.name, self.size_bytes
        )

    @property
    def checkpoint_id(self) -> str:
        """The id as the server lists it, `<kind>/<name>` or bare `<name>`."""
        return self.name if self.kind is None else f"{self.kind}/{self.name}"

    @property
    def tinker_path(self) -> str | None:
        """`tinker://<run>/<kind>/<name>`, unchecked."""
        if self.path_prefix is None or not self.path_has_id:
            return self.path_prefix
        return self.path_prefix + self.checkpoint_id

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from those of all runs: bare ids repeat. Made of texts that are kept."""
        if self.path_prefix is None:
            return (self.kind, self.name, self.checkpoint_type, self.time_ns)
        return (self.path_prefix, self.path_has_id, self.kind, self.name)


def _texts(
    path_start: str | None,
    time_ns: int | None,
    expires_at_ns: int | None,
    name: str,
    size_bytes: int | None,
) -> tuple[str | None, ...]:
    """Return what few records say alike, as servers write it, the shortest last."""
    return (
        path_start,
        None if time_ns is None else canonical_timestamp(time_ns),
        None if expires_at_ns is None else canonical_timestamp(expires_at_ns),
        f'{name}"',  # it ends its text, and "1" stands in many others
        None if size_bytes is None else str(size_bytes),
    )


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One training run's record; times in nanoseconds since 1970, `raw` its own JSON.

    The last checkpoints' JSON is in the run's, and not once more in theirs.
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
    """What the weights of a checkpoint are."""

    base_model: str | None = None
    lora_rank: int | None = None
    is_lora: bool | None = None
    raw: bytes


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One session's record."""

    session_id: str
    training_run_ids: tuple[str, ...] = ()
    sampler_ids: tuple[str, ...] = ()
    raw: bytes


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One session as the search tells it."""

    session_id: str
    display_name: str | None = None
    created_at_ns: int | None = None
    raw: bytes


class Sampler(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sampler's record; `model_path` is the tinker path that it serves, if any."""

    sampler_id: str
    base_model: str | None = None
    model_path: str | None = None
    raw: bytes


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What the server offers: the names of its base models, and the whole answer."""

    models: tuple[str, ...] = ()
    raw: bytes


@dataclass(frozen=True, slots=True)
class SignedUrl:
    """A URL that anyone may read until it expires: a secret, so its repr does not tell it.

    Attributes:
        url: http or https.
        expires_at_s: seconds since 1970.
    """

    url: str
    expires_at_s: float

    def __repr__(self) -> str:
        """Tell only when it expires."""
        return f"SignedUrl(<secret>, expires_at_s={self.expires_at_s!r})"


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing.

    Attributes:
        items: the records that could be read.
        total_count: how many there are in all, by the server's word, which may be stale.
        limit: the page size that the server says it used.
        received: how many records came, those that could not be read included.
    """

    items: tuple[T, ...]
    total_count: int | None = None
    limit: int | None = None
    received: int = 0

    def mapped(self, change: Callable[[T], T]) -> "Page[T]":
        """Return the page with other records in place of its own."""
        return replace(self, items=tuple(map(change, self.items)))


@dataclass(frozen=True, slots=True)
class SessionSearchPage:
    """One page of a search; `next_cursor`, any JSON, asks for the next one; None at the end."""

    items: tuple[SessionSummary, ...]
    next_cursor: object = None
