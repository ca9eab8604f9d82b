"""C callbacks for open, read and release."""

from typing import Any

from tinkerfs.fuse.abi import WRITABLE, make_fh_reader, memory_at, negative_errno
from tinkerfs.fuse.operations import Operations
from tinkerfs.fuse.passthrough import make_backing_id_writer


class FileCallbacks:
    """Callbacks for reading files. Thread-safe.

    Args:
        module: the binding, which defines the layout of the structures.
    """

    __slots__ = ("_fh_of", "_file_info_at", "_operations", "_set_backing_id")

    def __init__(self, operations: Operations, module: Any) -> None:
        self._operations = operations
        self._file_info_at = module.fuse_file_info.from_address
        self._fh_of = make_fh_reader(module.fuse_file_info)
        self._set_backing_id = make_backing_id_writer(module.fuse_file_info)

    def open(self, path: bytes, info: int) -> int:
        """Open a file, and store its handle number and flags in `info`."""
        fields = self._file_info_at(info)
        try:
            handle = self._operations.open(path.decode("utf-8", "surrogateescape"), fields.flags)
        except OSError as error:
            return negative_errno(error)
        fields.fh = fh = self._operations.register_handle(handle)
        fields.direct_io, fields.keep_cache = handle.direct_io, handle.keep_cache
        if handle.backing_fd is not None and (backing_id := self._operations.back(fh, handle)):
            self._set_backing_id(info, backing_id)
            fields.keep_cache = False  # the kernel refuses it together with a backing file
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
