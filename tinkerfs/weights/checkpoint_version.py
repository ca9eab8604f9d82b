"""Identify the version of a checkpoint for reads of its weights."""

import json
from dataclasses import dataclass

from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.name_encoding import compound_key

#: Start of the namespaces of the metadata store with `CheckpointVersion.cache_key` as keys.
NAMESPACE_PREFIX = "weights "


@dataclass(frozen=True, slots=True)
class CheckpointVersion:
    """One version of a checkpoint.

    Attributes:
        server: the API's base URL.
        key: identifies the checkpoint on the server, and its version.
        ref: identifies the checkpoint in API requests.
        path: the path that a user requested, for messages.
        mtime_ns: of files without a time of their own, nanoseconds since 1970.
        has_time: whether each version has its own key, because its record contains a time.
    """

    server: str
    key: tuple[str | float | None, ...]
    ref: CheckpointRef
    path: str
    mtime_ns: int
    has_time: bool = True

    @property
    def cache_key(self) -> str:
        """A text that is unique on this host for the checkpoint and its version."""
        return compound_key(self.server, *self.key)

    @property
    def is_external(self) -> bool:
        """Whether the weights are external: separate files and not an archive."""
        return self.ref.path_id.startswith("external_weights/")

    @property
    def is_sampler(self) -> bool:
        """Whether it is a sampler checkpoint, which no server exports."""
        return self.ref.path_id.startswith("sampler_weights/")

    @property
    def about(self) -> str:
        """The `tinker://` path of the checkpoint, for users."""
        return f"tinker://{self.ref.run_id}/{self.ref.path_id or self.ref.listed_id}"


def tinker_path_of(cache_key: str) -> str:
    """Return the `tinker://` path of the checkpoint with a `cache_key`."""
    _server, run_id, kind, name = json.loads(cache_key)[:4]
    return f"tinker://{run_id}/{kind}/{name}"
