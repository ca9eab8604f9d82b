"""libfuse's C interface: argument types, and access to its structures and buffers.

Arguments of the callbacks of walks and reads are addresses, and not objects that ctypes creates
for each pointer. The functions here keep the GIL, because releasing it takes longer than the call.
"""

import ctypes
import operator
import struct
from collections.abc import Callable
from typing import Any, Final

from tinkerfs.vfs.node import Attr

INT, PATH, ADDRESS, SIZE, OFFSET = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int64,
)

#: Fields of `struct stat` other than times, and the corresponding attributes.
_FIELDS: Final = {
    "st_ino": "ino",
    "st_mode": "mode",
    "st_nlink": "nlink",
    "st_uid": "uid",
    "st_gid": "gid",
    "st_size": "size_bytes",
    "st_blocks": "blocks",
}
_TIMES: Final = ("st_atimespec", "st_mtimespec", "st_ctimespec")
_NS_PER_S: Final = 1_000_000_000


def _memmove() -> Callable[[int, bytes, int], object]:
    """Return a function that copies bytes to an address.

    `ctypes.memmove` releases the GIL, and then has to wait for it if another thread has taken it.
    """
    memmove = ctypes.PyDLL(None).memmove
    memmove.argtypes, memmove.restype = (ADDRESS, PATH, SIZE), ADDRESS
    return memmove


def _memory_at() -> Callable[[int, int, int], memoryview]:
    """Return a function from an address, a length and a flag to a memoryview."""
    make = ctypes.pythonapi.PyMemoryView_FromMemory
    make.argtypes, make.restype = (ADDRESS, ctypes.c_ssize_t, INT), ctypes.py_object
    return make


memmove = _memmove()
memory_at = _memory_at()

#: Flag of `memory_at`: the memory is writable (CPython's pybuffer.h, PyBUF_WRITE).
WRITABLE: Final = 0x200


def callback(function: Callable[..., int], *arguments: Any) -> Any:
    """Return a C function that returns an int and calls `function`."""
    return ctypes.CFUNCTYPE(INT, *arguments)(function)


def decode_name(name: bytes) -> str:
    """Return a path or name as text; other bytes than UTF-8 are escaped."""
    return name.decode("utf-8", "surrogateescape")


def decode_path(path: bytes | None) -> str | None:
    """Return a path as text; None, which stands for an unlinked file, remains None."""
    return None if path is None else path.decode("utf-8", "surrogateescape")


def negative_errno(error: OSError) -> int:
    """Return the value by which a callback reports an error."""
    assert error.errno
    return -error.errno


def make_fh_reader(file_info: Any) -> Callable[[int], int]:
    """Return a function from the address of a `struct fuse_file_info` to its handle number."""
    offset, number_at = file_info.fh.offset, ctypes.c_uint64.from_address

    def fh_of(info: int) -> int:
        return number_at(info + offset).value

    return fh_of


def make_stat_packer(structure: Any) -> Callable[[Attr], bytes]:
    """Return a function that packs attributes as a `struct stat`, in the platform's layout.

    Args:
        structure: the binding's `struct stat`. Its times must be last, as they are on Linux.
    """
    offsets = sorted((getattr(structure, name).offset, name) for name in (*_FIELDS, *_TIMES))
    names = [name for _offset, name in offsets]
    assert sorted(names[-len(_TIMES) :]) == sorted(_TIMES)
    layout, end = "=", 0
    for offset, name in offsets:
        size = getattr(structure, name).size
        code = "qq" if name in _TIMES else {4: "I", 8: "Q"}[size]
        layout += f"{offset - end}x{code}"
        end = offset + size
    layout += f"{ctypes.sizeof(structure) - end}x"
    values = operator.attrgetter(*(_FIELDS[name] for name in names[: -len(_TIMES)]))
    pack = struct.Struct(layout).pack

    def packed(attr: Attr) -> bytes:
        seconds, ns = divmod(attr.mtime_ns, _NS_PER_S)
        return pack(*values(attr), seconds, ns, seconds, ns, seconds, ns)

    return packed
