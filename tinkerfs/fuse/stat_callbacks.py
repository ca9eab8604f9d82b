"""C callbacks for getattr and readlink, served from cached replies if they are valid."""

import ctypes
import stat
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tinkerfs import errors
from tinkerfs.cache.validated_cache import ValidatedCache
from tinkerfs.fuse.abi import decode_path, make_fh_reader, make_stat_packer, memmove, negative_errno
from tinkerfs.fuse.operations import Operations
from tinkerfs.validity import Validity

if TYPE_CHECKING:
    from tinkerfs.vfs.directory_cache import CachedDirectory
    from tinkerfs.vfs.node import Entry

#: Maximum number of cached replies, 500 bytes each.
_MAX_CACHED_STATS: Final = 32_768


class _CachedStat(msgspec.Struct, frozen=True, gc=False):
    """The reply to a getattr: a packed `struct stat`, or an errno for a negative entry."""

    packed: bytes
    is_directory: bool
    errno: int = 0


class StatCallbacks:
    """Callbacks for attributes and targets of links. Thread-safe.

    Args:
        module: the binding, which defines the layout of the structures.
    """

    __slots__ = ("_cached_stats", "_counts", "_fh_of", "_operations", "_pack", "_stat_bytes")

    def __init__(self, operations: Operations, module: Any) -> None:
        self._operations = operations
        self._counts = operations.operation_log.counts
        self._pack = make_stat_packer(module.c_stat)
        self._stat_bytes = ctypes.sizeof(module.c_stat)
        self._fh_of = make_fh_reader(module.fuse_file_info)
        self._cached_stats: ValidatedCache[bytes, _CachedStat] = ValidatedCache(
            operations.check_and_touch, _MAX_CACHED_STATS
        )

    def getattr(self, path: bytes | None, buffer: int, info: int | None = None) -> int:
        """Copy the attributes of a path, or of an open file, to `buffer`."""
        reply = None
        if path is not None and not info:
            reply = self._cached_stats.get(path) or self._stat_from_listing(path)
        if reply is None:
            reply = self._stat_uncached(path, info)
        else:
            self._counts.cached_getattrs += 1
            if not reply.is_directory:
                self._operations.note_file_stat()
        if reply.errno:
            return -reply.errno
        memmove(buffer, reply.packed, self._stat_bytes)
        return 0

    def readlink(self, path: bytes, buffer: int, size: int) -> int:
        """Copy the target of a symbolic link to `buffer`, truncated if necessary."""
        _listing, entry = self._cached_sibling(path)
        target = None if entry is None else entry.target
        decoded = path.decode("utf-8", "surrogateescape")
        if target is not None:
            self._counts.cached_readlinks += 1
            self._operations.on_readlink(decoded)
        else:
            try:
                target = self._operations.readlink(decoded)
            except OSError as error:
                return negative_errno(error)
        text = target.encode("utf-8", "surrogateescape")[: size - 1] + b"\0"
        memmove(buffer, text, len(text))
        return 0

    def _cached_sibling(self, path: bytes) -> "tuple[CachedDirectory | None, Entry | None]":
        """Return the cached listing of the parent directory, and its entry for the path."""
        parent, _, name = path.decode("utf-8", "surrogateescape").rpartition("/")
        listing = self._operations.cached_directory(parent or "/")
        return listing, None if listing is None else listing.entry(name)

    def _stat_from_listing(self, path: bytes) -> _CachedStat | None:
        listing, entry = self._cached_sibling(path)
        if listing is None or entry is None or entry.attr is None:
            return None
        reply = _CachedStat(self._pack(entry.attr), stat.S_ISDIR(entry.mode))
        # A hit by path takes half the time of this function.
        self._cached_stats.put(path, reply, listing.validity, listing.generation)
        return reply

    def _stat_uncached(self, path: bytes | None, info: int | None) -> _CachedStat:
        validity = Validity() if path is not None and not info else None
        generation = self._operations.generation
        try:
            fh = self._fh_of(info) if info else None
            attr = self._operations.getattr(decode_path(path), fh, validity)
            reply = _CachedStat(self._pack(attr), stat.S_ISDIR(attr.mode))
        except OSError as error:
            reply = _CachedStat(b"", True, -negative_errno(error))
            if not errors.is_missing(error):
                return reply
        if path is not None and validity is not None:
            self._cached_stats.put(path, reply, validity, generation)
        return reply
