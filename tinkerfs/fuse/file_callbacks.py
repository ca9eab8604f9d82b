"""C callbacks for open, read and release; valid plain opens are served from a cache."""

import os
from typing import TYPE_CHECKING, Any, Final

from tinkerfs.context import Validity
from tinkerfs.fuse.abi import WRITABLE, make_fh_reader, memory_at, negative_errno
from tinkerfs.fuse.operations import Operations
from tinkerfs.fuse.reply_cache import ReplyCache

if TYPE_CHECKING:
    from tinkerfs.fuse.handles import OpenFile

#: Maximum number of cached open files, 800 bytes each plus the file.
_MAX_CACHED_FILES: Final = 12_288

#: Flags of an open that is not a plain open for reading.
_NOT_PLAIN: Final = os.O_ACCMODE | os.O_NOATIME


class FileCallbacks:
    """Callbacks for reading files. Thread-safe.

    Args:
        module: the binding, which defines the layout of the structures.
    """

    __slots__ = ("_cached_files", "_fh_of", "_file_info_at", "_operations")

    def __init__(self, operations: Operations, module: Any) -> None:
        self._operations = operations
        self._file_info_at = module.fuse_file_info.from_address
        self._fh_of = make_fh_reader(module.fuse_file_info)
        self._cached_files: ReplyCache[OpenFile] = ReplyCache(
            operations.is_valid, _MAX_CACHED_FILES
        )

    def open(self, path: bytes, info: int) -> int:
        """Open a file, and store its handle number and flags in `info`."""
        operations, cached_files = self._operations, self._cached_files
        fields = self._file_info_at(info)
        is_plain = not fields.flags & _NOT_PLAIN
        file = cached_files.get(path) if is_plain else None
        if file is not None:
            operations.on_open(file.path)
        else:
            is_cacheable = is_plain and cached_files.note_and_check(path)
            validity = Validity() if is_cacheable else None
            generation = operations.generation
            try:
                text = path.decode("utf-8", "surrogateescape")
                file = operations.open(text, fields.flags, validity)
            except OSError as error:
                return negative_errno(error)
            if validity is not None and not file.direct_io:
                cached_files.put(path, file, validity, generation)
        fields.fh = operations.register_handle(file)
        fields.direct_io, fields.keep_cache = file.direct_io, file.keep_cache
        return 0

    def read(self, _path: bytes | None, buffer: int, size: int, offset: int, info: int) -> int:
        """Fill `buffer` from `offset` on; return the number of bytes read."""
        try:
            return self._operations.read(
                self._fh_of(info), memory_at(buffer, size, WRITABLE), offset
            )
        except OSError as error:
            return negative_errno(error)

    def release(self, _path: bytes | None, info: int) -> int:
        """Close an open file."""
        try:
            self._operations.release(self._fh_of(info))
        except OSError as error:
            return negative_errno(error)
        return 0
