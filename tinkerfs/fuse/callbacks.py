"""C callbacks for the operations that a walk calls most, in place of those of the bindings.

The bindings define libfuse's structures, find its library, and translate every operation. For the
operations here, that translation takes longer than the operation itself. These callbacks avoid it:

- Arguments are addresses, and not objects that ctypes creates for each pointer. Attributes are
  copied as one packed structure, and not field by field from a dictionary.
- Listings include attributes on libfuse 3 (readdirplus), which neither binding supports. Then
  `ls -l` of 10,000 entries sends 2 getattr requests, and not 20,002.
- The session's worker threads are Python threads (`worker_pool`). In a thread of libfuse, ctypes
  creates and destroys a thread state for each request.

libfuse calls the callbacks from several threads at once.
"""

import ctypes
import functools
import operator
import os
import stat
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tinkerfs import errors
from tinkerfs.context import Validity
from tinkerfs.fuse.reply_cache import ReplyCache
from tinkerfs.vfs.node import DOT_ENTRY_COUNT, Attr, Entry, dot_entries

if TYPE_CHECKING:
    from tinkerfs.fuse.operations import OpenDirectory, OpenFile, Operations
    from tinkerfs.vfs.directory_cache import CachedDirectory

#: Flag of readdir: the kernel wants attributes (libfuse's fuse.h, enum fuse_readdir_flags).
_READDIR_PLUS: Final = 1
#: Flag of an entry: its attributes are complete (fuse.h, enum fuse_fill_dir_flags).
_FILL_DIR_PLUS: Final = 2

_INT, _PATH, _ADDRESS, _SIZE, _OFFSET = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int64,
)

#: Maximum numbers of cached replies: 500 bytes each, and 800 bytes plus the open file.
_MAX_CACHED_STATS: Final = 32_768
_MAX_CACHED_FILES: Final = 12_288

#: Maximum number of entries of a prepared listing, which takes 144 bytes per entry. The names of
#: short directories are shared with other directories, those of long ones are not.
_MAX_PREPARED: Final = 128

#: Flag of a memoryview: it is writable (CPython's pybuffer.h, PyBUF_WRITE).
_WRITABLE: Final = 0x200

#: Flags of an open that is not a plain open for reading.
_NOT_PLAIN: Final = os.O_ACCMODE | os.O_NOATIME

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


def override_callbacks(structure: Any, callbacks: Mapping[str, Any]) -> Any:
    """Return a subclass of a binding's `fuse_operations` that contains `callbacks`.

    The binding assigns its own callbacks field by field; the subclass replaces them.
    """
    types = {field[0]: field[1] for field in structure._fields_}
    ours = {name: ctypes.cast(callback, types[name]) for name, callback in callbacks.items()}

    class Callbacks(structure):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, ours.get(name, value))

    # ctypes does not own callbacks, so they must live as long as libfuse may call them.
    Callbacks.callbacks = callbacks
    return Callbacks


def build_callbacks(operations: "Operations", module: Any, major: int) -> dict[str, Any]:
    """Return callbacks that call `operations`, by the name of libfuse's operation.

    `module` is the binding, which defines the layout of libfuse's structures. `major` is libfuse's
    major version, 2 or 3.
    """
    pack = make_stat_packer(module.c_stat)
    stat_bytes = ctypes.sizeof(module.c_stat)
    file_info = module.fuse_file_info.from_address
    fh_offset = module.fuse_file_info.fh.offset
    fh_at = ctypes.c_uint64.from_address
    memmove = _memmove()
    memory_at = _memory_at()
    cached_stats: ReplyCache[_CachedStat] = ReplyCache(operations.is_valid, _MAX_CACHED_STATS)
    cached_files: ReplyCache[OpenFile] = ReplyCache(operations.is_valid, _MAX_CACHED_FILES)

    def fh_of(info: int) -> int:
        return fh_at(info + fh_offset).value

    def getattr_(path: bytes | None, buffer: int, info: int | None = None) -> int:
        reply = None
        if path is not None and not info:
            reply = cached_stats.get(path) or stat_from_listing(path)
        if reply is None:
            reply = stat_uncached(path, info)
        elif not reply.is_directory:
            operations.note_file_stat()
        if reply.errno:
            return -reply.errno
        memmove(buffer, reply.packed, stat_bytes)
        return 0

    def cached_sibling(path: bytes) -> "tuple[CachedDirectory | None, Entry | None]":
        """Return the cached listing of the parent directory, and its entry for the path."""
        parent, _, name = path.decode("utf-8", "surrogateescape").rpartition("/")
        listing = operations.cached_directory(parent or "/")
        return listing, None if listing is None else listing.entry(name)

    def stat_from_listing(path: bytes) -> _CachedStat | None:
        listing, entry = cached_sibling(path)
        if listing is None or entry is None or entry.attr is None:
            return None
        reply = _CachedStat(pack(entry.attr), stat.S_ISDIR(entry.mode))
        if cached_stats.note_and_check(path):  # a hit by path takes half the time of this function
            cached_stats.put(path, reply, listing.validity, listing.generation)
        return reply

    def stat_uncached(path: bytes | None, info: int | None) -> _CachedStat:
        is_cacheable = path is not None and not info and cached_stats.note_and_check(path)
        validity, generation = Validity() if is_cacheable else None, operations.generation
        try:
            attr = operations.getattr(_text(path), fh_of(info) if info else None, validity)
            reply = _CachedStat(pack(attr), stat.S_ISDIR(attr.mode))
        except OSError as error:
            reply = _CachedStat(b"", True, -_negative_errno(error))
            if not errors.is_missing(error):
                return reply
        if path is not None and validity is not None:
            cached_stats.put(path, reply, validity, generation)
        return reply

    def readlink(path: bytes, buffer: int, size: int) -> int:
        _listing, entry = cached_sibling(path)
        target = None if entry is None else entry.target
        decoded = path.decode("utf-8", "surrogateescape")
        if target is not None:
            operations.on_readlink(decoded)
        else:
            try:
                target = operations.readlink(decoded)
            except OSError as error:
                return _negative_errno(error)
        text = target.encode("utf-8", "surrogateescape")[: size - 1] + b"\0"
        memmove(buffer, text, len(text))
        return 0

    def open_(path: bytes, info: int) -> int:
        fields = file_info(info)
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
                return _negative_errno(error)
            if validity is not None and not file.direct_io:
                cached_files.put(path, file, validity, generation)
        fields.fh = operations.register_handle(file)
        fields.direct_io, fields.keep_cache = file.direct_io, file.keep_cache
        return 0

    def read(_path: bytes | None, buffer: int, size: int, offset: int, info: int) -> int:
        try:
            return operations.read(fh_of(info), memory_at(buffer, size, _WRITABLE), offset)
        except OSError as error:
            return _negative_errno(error)

    def release(_path: bytes | None, info: int) -> int:
        try:
            operations.release(fh_of(info))
        except OSError as error:
            return _negative_errno(error)
        return 0

    def opendir(path: bytes, info: int) -> int:
        try:
            fh = operations.opendir(path.decode("utf-8", "surrogateescape"))
        except OSError as error:
            return _negative_errno(error)
        fh_at(info + fh_offset).value = fh
        return 0

    def releasedir(_path: bytes | None, info: int) -> int:
        try:
            operations.releasedir(fh_of(info))
        except OSError as error:
            return _negative_errno(error)
        return 0

    fill_arguments = (_ADDRESS, _PATH, _ADDRESS, _OFFSET, *([_INT] if major == 3 else []))
    # PYFUNCTYPE and not CFUNCTYPE, which releases the GIL around each call and takes twice as long.
    # The cache is small: libfuse has two fillers.
    filler_at = functools.lru_cache(8)(ctypes.PYFUNCTYPE(_INT, *fill_arguments))
    plain, plus = ((0,), (_FILL_DIR_PLUS,)) if major == 3 else ((), ())
    # Most names occur in many directories.
    encoded = functools.lru_cache(4096)(lambda name: name.encode("utf-8", "surrogateescape"))

    def readdir(
        _path: bytes | None, buffer: int, filler: int, offset: int, info: int, flags: int = 0
    ) -> int:
        fill = filler_at(filler)
        try:
            directory = operations.open_directory(fh_of(info))
            is_plus = bool(flags & _READDIR_PLUS)
            # Past the first buffer, the kernel asks for attributes only if the caller used some.
            wants_files = is_plus and (offset > 0 or operations.wants_attributes())
            if wants_files and operations.is_unmodified(directory):
                prepared = prepare_listing(directory)
                if prepared is not None:
                    return fill_prepared(prepared, fill, buffer, offset)
            entries = operations.readdir(fh_of(info), offset)  # may block
        except OSError as error:
            return _negative_errno(error)
        # The kernel creates a dentry from attributes, so a listing from before a deletion has none.
        is_plus = is_plus and operations.is_unmodified(directory)
        wants_files = wants_files and is_plus
        # With a nonzero offset, libfuse stops when its buffer is full, and resumes there. With 0 it
        # would collect all entries first, and libfuse 3 would drop their attributes.
        for index, entry in enumerate(entries, offset + 1):
            rest = plain
            # The kernel looks up an entry without PLUS only if a process needs its attributes, so
            # that a plain `ls` does not pay for them. An entry with PLUS uses memory in the kernel
            # and in libfuse. Directories always have PLUS, because most callers will enter them.
            if entry.attr is not None and (wants_files or (is_plus and stat.S_ISDIR(entry.mode))):
                rest = plus
            if fill(buffer, encoded(entry.name), packed(entry), index, *rest):
                break
        return 0

    def packed(entry: Entry) -> bytes:
        return pack(entry.attr or Attr(entry.mode, 0, 0, entry.ino, 0, 0, 0))

    def prepare_listing(directory: "OpenDirectory") -> _PreparedListing | None:
        """Return the prepared entries of a short cached listing; prepare them on first use.

        None while each operation is logged.
        """
        listing = None if operations.is_debug_logging else directory.stream.listing
        if listing is None or len(listing.entries) > _MAX_PREPARED:
            return None
        if listing.ready is None:
            entries = (*dot_entries(directory.path), *listing.entries)
            attributes = b"".join(map(packed, entries))
            address = ctypes.cast(ctypes.c_char_p(attributes), _ADDRESS).value
            assert address is not None
            names = tuple(encoded(entry.name) for entry in entries)
            listing.ready = _PreparedListing(names, attributes, address)
        prepared: _PreparedListing = listing.ready
        return prepared

    def fill_prepared(
        prepared: _PreparedListing, fill: Callable[..., int], buffer: int, offset: int
    ) -> int:
        address = prepared.address + offset * stat_bytes
        for index, name in enumerate(prepared.names[offset:], offset + 1):
            rest = plus if index > DOT_ENTRY_COUNT else plain  # `.` and `..` have no attributes
            if fill(buffer, name, address, index, *rest):
                break
            address += stat_bytes
        return 0

    getattr_arguments = (_PATH, _ADDRESS, _ADDRESS)
    with_info = (_PATH, _ADDRESS)
    callbacks = {
        "getattr": _callback(getattr_, *getattr_arguments[: 3 if major == 3 else 2]),
        "readlink": _callback(readlink, _PATH, _ADDRESS, _SIZE),
        "open": _callback(open_, *with_info),
        "read": _callback(read, _PATH, _ADDRESS, _SIZE, _OFFSET, _ADDRESS),
        "release": _callback(release, *with_info),
        "opendir": _callback(opendir, *with_info),
        "readdir": _callback(
            readdir,
            *(_PATH, _ADDRESS, _ADDRESS, _OFFSET, _ADDRESS),
            *([_INT] if major == 3 else []),
        ),
        "releasedir": _callback(releasedir, *with_info),
    }
    if major == 2:
        callbacks["fgetattr"] = _callback(getattr_, *getattr_arguments)
    return callbacks


class _PreparedListing(msgspec.Struct, frozen=True, gc=False):
    """A directory's entries, including `.` and `..`, in the layout that libfuse copies.

    Attributes:
        attributes: the `struct stat` of each name, in the same order.
        address: memory address of `attributes`.
    """

    names: tuple[bytes, ...]
    attributes: bytes
    address: int


class _CachedStat(msgspec.Struct, frozen=True, gc=False):
    """The reply to a getattr: a packed `struct stat`, or an errno for a negative entry."""

    packed: bytes
    is_directory: bool
    errno: int = 0


def _memmove() -> Callable[[int, bytes, int], object]:
    """Return a function that copies bytes to an address, without releasing the GIL.

    `ctypes.memmove` releases it, and then has to wait for it again if another thread has taken it.
    """
    memmove = ctypes.PyDLL(None).memmove
    memmove.argtypes, memmove.restype = (_ADDRESS, _PATH, _SIZE), _ADDRESS
    return memmove


def _memory_at() -> Callable[[int, int, int], memoryview]:
    """Return a function from an address, a length and a flag to a memoryview."""
    make = ctypes.pythonapi.PyMemoryView_FromMemory
    make.argtypes, make.restype = (_ADDRESS, ctypes.c_ssize_t, _INT), ctypes.py_object
    return make


def _callback(function: Callable[..., int], *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(_INT, *arguments)(function)


def _text(path: bytes | None) -> str | None:
    return None if path is None else path.decode("utf-8", "surrogateescape")


def _negative_errno(error: OSError) -> int:
    assert error.errno
    return -error.errno


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
