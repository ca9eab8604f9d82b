"""C callbacks for opendir, readdir and releasedir.

Listings include attributes on libfuse 3 (readdirplus), which neither binding supports. Then `ls -l`
of 10,000 entries sends 2 getattr requests, and not 20,002.
"""

import ctypes
import functools
import stat
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tinkerfs.cache.validated_cache import ValidatedCache
from tinkerfs.fuse.abi import (
    ADDRESS,
    INT,
    OFFSET,
    PATH,
    make_fh_reader,
    make_stat_packer,
    negative_errno,
)
from tinkerfs.fuse.operations import OpenDirectory, Operations
from tinkerfs.vfs.node import DOT_ENTRY_COUNT, Attr, Entry, dot_entries

#: Flag of readdir: the kernel wants attributes (libfuse's fuse.h, enum fuse_readdir_flags).
_READDIR_PLUS: Final = 1
#: Flag of an entry: its attributes are complete (fuse.h, enum fuse_fill_dir_flags).
_FILL_DIR_PLUS: Final = 2

#: Maximum number of entries of a prepared listing, which takes 160 bytes per entry. The names of
#: short directories are shared with other directories, those of long ones are not.
_MAX_PREPARED: Final = 128
#: Maximum number of entries of all prepared listings, slightly more than the directory cache has.
_MAX_PREPARED_IN_ALL: Final = 131_072


class _PreparedListing(msgspec.Struct, frozen=True, gc=False):
    """A directory's entries, including `.` and `..`, in the layout that libfuse copies.

    Attributes:
        cached_entries: the entries of the cached listing that it was prepared from.
        attributes: the `struct stat` of each name, in the same order.
        address: memory address of `attributes`.
    """

    cached_entries: tuple[Entry, ...]
    names: tuple[bytes, ...]
    attributes: bytes
    address: int


class DirectoryCallbacks:
    """Callbacks for listing directories. Thread-safe.

    Args:
        module: the binding, which defines the layout of the structures.
        major: libfuse's major version, 2 or 3.
    """

    __slots__ = (
        "_encoded",
        "_fh_of",
        "_file_info_at",
        "_filler_at",
        "_operations",
        "_pack",
        "_plain",
        "_plus",
        "_prepared",
        "_stat_bytes",
    )

    def __init__(self, operations: Operations, module: Any, major: int) -> None:
        self._operations = operations
        self._pack = make_stat_packer(module.c_stat)
        self._stat_bytes = ctypes.sizeof(module.c_stat)
        self._file_info_at = module.fuse_file_info.from_address
        self._fh_of = make_fh_reader(module.fuse_file_info)
        #: Last arguments of the filler, for an entry without and with attributes.
        self._plain: tuple[int, ...] = (0,) if major == 3 else ()
        self._plus: tuple[int, ...] = (_FILL_DIR_PLUS,) if major == 3 else ()
        fill_arguments = (ADDRESS, PATH, ADDRESS, OFFSET, *([INT] if major == 3 else []))
        # PYFUNCTYPE and not CFUNCTYPE, which releases the GIL around each call and takes twice as
        # long. The cache is small: libfuse has two fillers.
        self._filler_at = functools.lru_cache(8)(ctypes.PYFUNCTYPE(INT, *fill_arguments))
        # Most names occur in many directories.
        self._encoded = functools.lru_cache(4096)(
            lambda name: name.encode("utf-8", "surrogateescape")
        )
        self._prepared: ValidatedCache[str, _PreparedListing] = ValidatedCache(
            operations.check_and_touch, _MAX_PREPARED_IN_ALL
        )

    def opendir(self, path: bytes, info: int) -> int:
        """Open a directory, and store its handle number in `info`."""
        try:
            fh = self._operations.opendir(path.decode("utf-8", "surrogateescape"))
        except OSError as error:
            return negative_errno(error)
        self._file_info_at(info).fh = fh
        return 0

    def releasedir(self, _path: bytes | None, info: int) -> int:
        """Close an open directory."""
        try:
            self._operations.releasedir(self._fh_of(info))
        except OSError as error:
            return negative_errno(error)
        return 0

    def readdir(
        self,
        _path: bytes | None,
        buffer: int,
        filler: int,
        offset: int,
        info: int,
        flags: int = 0,
    ) -> int:
        """Pass entries from `offset` on to `filler`, until it returns that `buffer` is full."""
        operations, fill = self._operations, self._filler_at(filler)
        try:
            fh = self._fh_of(info)
            directory = operations.open_directory(fh)
            is_plus = bool(flags & _READDIR_PLUS)
            # Past the first buffer, the kernel asks for attributes only if the caller used some.
            wants_files = is_plus and (offset > 0 or operations.wants_attributes())
            if wants_files and operations.is_unmodified(directory):
                prepared = self._prepare(directory)
                if prepared is not None:
                    operations.operation_log.counts.cached_readdirs += 1
                    return self._fill_prepared(prepared, fill, buffer, offset)
            entries = operations.readdir(fh, offset)  # may block
        except OSError as error:
            return negative_errno(error)
        # The kernel creates a dentry from attributes, so a listing from before a deletion has none.
        is_plus = is_plus and operations.is_unmodified(directory)
        wants_files = wants_files and is_plus
        encoded, packed, plain, plus = self._encoded, self._packed, self._plain, self._plus
        # With a nonzero offset, libfuse stops when its buffer is full, and resumes there. With 0 it
        # would collect all entries first, and libfuse 3 would drop their attributes.
        for index, entry in enumerate(entries, offset + 1):
            fill_flags = plain
            # The kernel looks up an entry without PLUS only if a process needs its attributes, so
            # that a plain `ls` does not pay for them. An entry with PLUS uses memory in the kernel
            # and in libfuse. Directories always have PLUS, because most callers will enter them.
            if entry.attr is not None and (wants_files or (is_plus and stat.S_ISDIR(entry.mode))):
                fill_flags = plus
            if fill(buffer, encoded(entry.name), packed(entry), index, *fill_flags):
                break
        return 0

    def _packed(self, entry: Entry) -> bytes:
        return self._pack(entry.attr or Attr(entry.mode, 0, 0, entry.ino, 0, 0, 0))

    def _prepare(self, directory: OpenDirectory) -> _PreparedListing | None:
        """Return the prepared entries of a short cached listing; prepare them on first use."""
        cached_entries = directory.stream.cached_entries
        if (
            cached_entries is None
            or len(cached_entries) > _MAX_PREPARED
            or self._operations.operation_log.is_observed
        ):
            return None
        # The cache may have another listing since the directory was opened.
        prepared = self._prepared.peek(directory.path)
        if prepared is not None and prepared.cached_entries is cached_entries:
            return prepared
        listing = self._operations.cached_directory(directory.path)
        if listing is None or listing.entries is not cached_entries:
            return None
        entries = (*dot_entries(directory.path), *cached_entries)
        attributes = b"".join(map(self._packed, entries))
        address = ctypes.cast(ctypes.c_char_p(attributes), ADDRESS).value
        assert address is not None
        names = tuple(self._encoded(entry.name) for entry in entries)
        prepared = _PreparedListing(cached_entries, names, attributes, address)
        self._prepared.put(
            directory.path, prepared, listing.validity, listing.generation, weight=len(entries)
        )
        return prepared

    def _fill_prepared(
        self, prepared: _PreparedListing, fill: Callable[..., int], buffer: int, offset: int
    ) -> int:
        stat_bytes, plain, plus = self._stat_bytes, self._plain, self._plus
        address = prepared.address + offset * stat_bytes
        for index, name in enumerate(prepared.names[offset:], offset + 1):
            # `.` and `..` have no attributes.
            fill_flags = plus if index > DOT_ENTRY_COUNT else plain
            if fill(buffer, name, address, index, *fill_flags):
                break
            address += stat_bytes
        return 0
