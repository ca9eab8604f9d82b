"""Renderings: the bytes of small files, made once for each version of what they tell.

`ls -l` asks for their length and `cat` for their bytes, again and again; making them takes 30 us
each time. Thread-safe.
"""

from typing import Any

import msgspec

from tinkerfs.clock import Clock
from tinkerfs.context import Validity
from tinkerfs.vfs.resolver import Node
from tinkerfs.vfs.schema import NodeContext

#: So much is kept before all is forgotten: of some 10,000 files.
_MAX_BYTES = 16 << 20

#: What each takes beside its path and its bytes: objects, and a place in a dictionary.
_OVERHEAD_BYTES = 320

#: What the kernel was told of a file's length it forgets within 1 s of when the process that asked
#: takes the answer, on a busy machine up to 1 s later; and a little for its clock.
KERNEL_ATTR_EXPIRY_S = 2.05

#: A page of the kernel's cache is all of one version; of several, each may be of another.
_PAGE_BYTES = 4096


class _Rendering(msgspec.Struct, frozen=True):
    """Bytes, what they are of, and since when they are these, on the monotonic clock."""

    data: bytes
    subject: Any
    lease: Validity
    made_at: float


class GeneratedFileCache:
    """The bytes of files, by path and the subject that they were made of."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Single operations on a dict are atomic; a sum that two threads got wrong evens out when
        # all is forgotten.
        self._kept: dict[str, _Rendering] = {}
        self._kept_bytes = 0

    def get(self, node: Node, site: NodeContext) -> bytes:
        """Return a file's bytes, those that are kept or new ones."""
        now = self._clock.monotonic()
        kept = self._kept.get(node.path)
        if kept is not None and _is_of(kept, node, now):
            site.call.depends_on_all(kept.lease)
            return kept.data
        lease = Validity()
        of_now = msgspec.structs.replace(site, call=site.call.tracking(lease))
        try:
            data: bytes = node.row.render(of_now)
        finally:
            site.call.depends_on_all(lease)
        if not lease.is_uncacheable:
            is_same = kept is not None and kept.data == data
            made_at = kept.made_at if kept is not None and is_same else now
            self._keep(node.path, _Rendering(data, node.subject, lease, made_at))
        return data

    def has(self, node: Node) -> bool:
        """Tell whether a file's bytes are known already."""
        kept = self._kept.get(node.path)
        return kept is not None and _is_of(kept, node, self._clock.monotonic())

    def may_use_page_cache(self, node: Node) -> bool:
        """Tell whether the kernel may keep a file's bytes while it is open.

        It reads no further than the length that it was told up to 1 s ago, so that must have been
        the length of these bytes.
        """
        now = self._clock.monotonic()
        kept = self._kept.get(node.path)
        return (
            kept is not None
            and now - kept.made_at > KERNEL_ATTR_EXPIRY_S
            and len(kept.data) <= _PAGE_BYTES
            and _is_of(kept, node, now)
        )

    def _keep(self, path: str, rendering: _Rendering) -> None:
        if self._kept_bytes > _MAX_BYTES:
            self._kept.clear()
            self._kept_bytes = 0
        self._kept[path] = rendering
        self._kept_bytes += len(path) + len(rendering.data) + _OVERHEAD_BYTES


def _is_of(kept: _Rendering, node: Node, now: float) -> bool:
    return kept.subject is node.subject and kept.lease.check_and_touch(now)
