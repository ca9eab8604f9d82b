"""Versions of checkpoints, as weights are asked for."""

from dataclasses import dataclass

from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.name_encoding import compound_key


@dataclass(frozen=True, slots=True)
class CheckpointVersion:
    """One version of a checkpoint, as its weights are asked for.

    Attributes:
        server: the API's base URL.
        key: what tells the checkpoint from others of the server, and its version from others.
        ref: how the API is asked for it.
        path: the file on whose behalf, for messages.
        mtime_ns: of files that have no time of their own, nanoseconds since 1970.
        is_dated: whether another version has another key, because its record has a time.
    """

    server: str
    key: tuple[str | float | None, ...]
    ref: CheckpointRef
    path: str
    mtime_ns: int
    is_dated: bool = True

    @property
    def cache_key(self) -> str:
        """The same text for the same version of the same checkpoint, and no other, on this host."""
        return compound_key(self.server, *self.key)

    @property
    def is_external(self) -> bool:
        """Whether it is a file each, and no archive."""
        return self.ref.path_id.startswith("external_weights/")

    @property
    def about(self) -> str:
        """What it is, for people."""
        return f"tinker://{self.ref.run_id}/{self.ref.path_id or self.ref.listed_id}"
