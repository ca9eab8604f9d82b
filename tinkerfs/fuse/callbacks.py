"""C callbacks for every operation, as libfuse calls them.

The bindings define libfuse's structures and find its library. Their own callbacks are not used,
because they take longer than the operations themselves:

- For each request they create a ctypes object per pointer, and copy attributes field by field.
- They do not support attributes in listings (readdirplus).

The session's worker threads are Python threads (`worker_pool`). In a thread of libfuse, ctypes
creates and destroys a thread state for each request. libfuse calls from several threads at once.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final

from tinkerfs import errors
from tinkerfs.fuse.abi import (
    ADDRESS,
    INT,
    OFFSET,
    PATH,
    SIZE,
    callback,
    decode_name,
    decode_path,
    negative_errno,
)
from tinkerfs.fuse.directory_callbacks import DirectoryCallbacks
from tinkerfs.fuse.file_callbacks import FileCallbacks
from tinkerfs.fuse.operations import Operations, XattrOperations
from tinkerfs.fuse.stat_callbacks import StatCallbacks

#: Operations on a path that need no other argument, and the index of the path. A mode, an owner or
#: a time has no effect; the second path of a rename is not needed to refuse it.
_PATH_OPERATIONS: Final = {
    "chmod": 0,
    "chown": 0,
    "create": 0,
    "fsync": 0,
    "fsyncdir": 0,
    "link": 1,
    "mkdir": 0,
    "mknod": 0,
    "rename": 0,
    "rmdir": 0,
    "symlink": 1,
    "unlink": 0,
    "utimens": 0,
}


def build_operations(
    operations: Operations,
    module: Any,
    major: int,
    configure: Callable[[Any, Any], None] = lambda _connection, _config: None,
) -> Any:
    """Return the binding's `struct fuse_operations`, with callbacks of the operations.

    The structure owns the callbacks, so it must live as long as libfuse may call them.

    Args:
        operations: what the callbacks call.
        module: the binding, which defines the layout of libfuse's structures.
        major: libfuse's major version, 2 or 3.
        configure: called at the kernel's first request on libfuse 3, with pointers to the
            structures `fuse_conn_info` and `fuse_config`.
    """
    structure = module.fuse_operations()
    types = {field[0]: field[1] for field in structure._fields_}
    for name, function in _frequent_callbacks(operations, module, major).items():
        setattr(structure, name, ctypes.cast(function, types[name]))
    for name, call in _other_callbacks(operations, major, configure).items():
        setattr(structure, name, types[name](call))
    if major == 2:
        # Otherwise libfuse 2 fails reads of an open file that was unlinked, with ENOENT.
        structure.flag_nullpath_ok = 1
    return structure


def _frequent_callbacks(operations: Operations, module: Any, major: int) -> dict[str, Any]:
    """Return the callbacks of walks and reads; their arguments are plain addresses."""
    stats = StatCallbacks(operations, module)
    files = FileCallbacks(operations, module)
    directories = DirectoryCallbacks(operations, module, major)
    is_3 = major == 3
    callbacks = {
        "getattr": callback(stats.getattr, PATH, ADDRESS, *([ADDRESS] if is_3 else [])),
        "readlink": callback(stats.readlink, PATH, ADDRESS, SIZE),
        "open": callback(files.open, PATH, ADDRESS),
        "read": callback(files.read, PATH, ADDRESS, SIZE, OFFSET, ADDRESS),
        "release": callback(files.release, PATH, ADDRESS),
        "opendir": callback(directories.opendir, PATH, ADDRESS),
        "readdir": callback(
            directories.readdir,
            *(PATH, ADDRESS, ADDRESS, OFFSET, ADDRESS),
            *([INT] if is_3 else []),
        ),
        "releasedir": callback(directories.releasedir, PATH, ADDRESS),
    }
    if not is_3:
        callbacks["fgetattr"] = callback(stats.getattr, PATH, ADDRESS, ADDRESS)
    return callbacks


def _other_callbacks(
    operations: Operations, major: int, configure: Callable[[Any, Any], None]
) -> dict[str, Callable[..., int]]:
    """Return functions for the remaining callbacks, with the binding's types of arguments."""

    def init(connection: Any, config: Any = None) -> int:
        if major == 3:
            configure(connection, config)
        operations.init()
        return 0

    def statfs(path: bytes, buffer: Any) -> int:
        for name, value in operations.statfs(decode_name(path)).items():
            setattr(buffer.contents, name, value)
        return 0

    def write(path: bytes | None, buffer: Any, size: int, _offset: int, info: Any) -> int:
        data = ctypes.string_at(buffer, size)
        return operations.write(decode_path(path), data, info.contents.fh)

    def truncate(path: bytes | None, length: int, info: Any = None) -> int:
        operations.truncate(decode_path(path), length, info.contents.fh if info else None)
        return 0

    callbacks: dict[str, Callable[..., int]] = {
        "statfs": statfs,
        "write": write,
        "truncate": truncate,
    }
    if major == 2:
        callbacks["ftruncate"] = truncate
    for name, index in _PATH_OPERATIONS.items():
        callbacks[name] = _path_callback(getattr(operations, name), index)
    if isinstance(operations, XattrOperations):
        callbacks |= _xattr_callbacks(operations)
    return {"init": init} | {
        name: _reporting_errno(function) for name, function in callbacks.items()
    }


def _xattr_callbacks(operations: XattrOperations) -> dict[str, Callable[..., int]]:
    def getxattr(path: bytes, name: bytes, buffer: Any, size: int) -> int:
        value = operations.getxattr(decode_name(path), decode_name(name))
        return _copy_value(value, buffer, size)

    def listxattr(path: bytes, buffer: Any, size: int) -> int:
        names = operations.listxattr(decode_name(path))
        return _copy_value(
            b"".join(name.encode("utf-8", "surrogateescape") + b"\0" for name in names),
            buffer,
            size,
        )

    def setxattr(path: bytes, name: bytes, *_value: Any) -> int:
        operations.setxattr(decode_name(path), decode_name(name))
        return 0

    def removexattr(path: bytes, name: bytes) -> int:
        operations.removexattr(decode_name(path), decode_name(name))
        return 0

    return {
        "getxattr": getxattr,
        "listxattr": listxattr,
        "setxattr": setxattr,
        "removexattr": removexattr,
    }


def _copy_value(value: bytes, buffer: Any, size: int) -> int:
    """Copy a value to a caller's buffer; return its length, and only that if `size` is 0."""
    if size:
        if len(value) > size:
            raise errors.out_of_range("", "the buffer is too small")
        ctypes.memmove(buffer, value, len(value))
    return len(value)


def _path_callback(operation: Callable[[str | None], object], index: int) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        operation(decode_path(arguments[index]))
        return 0

    return call


def _reporting_errno(function: Callable[..., int]) -> Callable[..., int]:
    def call(*arguments: Any) -> int:
        try:
            return function(*arguments)
        except OSError as error:
            return negative_errno(error)

    return call
