"""The operations that a walk makes by the thousand, as libfuse calls them.

The bindings lay out libfuse's structures, find its library, and translate every operation; of the
nine here they are relieved, because translating costs more than answering. Measured with a file
system that does nothing, one `stat` took 24-42 us through mfusepy and takes 8-9 us through this:

- A thread of libfuse's is new to Python at each request: ctypes makes a thread state for it, with a
  stack of its own mapped from the kernel, and throws both away after. Ours are Python's (`loops`).
- Arguments come as addresses, not as objects that ctypes makes of each pointer, and attributes go
  in one copy of a packed structure instead of by a dictionary and fifteen assignments.
- Listings bring their attributes along on libfuse 3 (readdirplus), which neither binding does: with
  them `ls -l` of 10,000 entries makes 2 calls of getattr, and not 20,002.

Called from many threads at once, each in one request.
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

#: Of a readdir: the kernel wants attributes (libfuse's fuse.h, enum fuse_readdir_flags).
_READDIR_PLUS: Final = 1
#: Of one entry: its attributes are all there (fuse.h, enum fuse_fill_dir_flags).
_FILL_DIR_PLUS: Final = 2

_INT, _PATH, _ADDRESS, _SIZE, _OFFSET = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int64,
)

#: How many answers are kept: of 500 bytes each, and of 800 bytes beside those of the file.
_MOST_ATTRIBUTES: Final = 32_768
_MOST_FILES: Final = 12_288

#: The most entries of a folder that is made ready to be handed on, which takes 144 bytes of each:
#: short folders share their names' bytes with others, a long one's would be kept for it alone.
_MOST_READY: Final = 128

#: Of memory: it may be written to (CPython's pybuffer.h, PyBUF_WRITE).
_WRITABLE: Final = 0x200

#: Flags of an open that has more to it than that something is to be read.
_NOT_PLAIN: Final = os.O_ACCMODE | os.O_NOATIME

#: What attributes a `struct stat` has besides its times, by the name of its field.
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
_NS_OF_A_SECOND: Final = 1_000_000_000


def override_callbacks(structure: Any, callbacks: Mapping[str, Any]) -> Any:
    """Return a binding's `fuse_operations` that takes `callbacks` in place of the binding's own.

    A binding fills in its structure field by field, and passes it to libfuse.
    """
    types = {field[0]: field[1] for field in structure._fields_}
    ours = {name: ctypes.cast(callback, types[name]) for name, callback in callbacks.items()}

    class Callbacks(structure):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, ours.get(name, value))

    # What libfuse calls must live as long as it may.
    Callbacks.kept = callbacks
    return Callbacks


def build_callbacks(operations: "Operations", module: Any, major: int) -> dict[str, Any]:
    """Return the callbacks over `operations`, by the name of libfuse's operation.

    Args:
        operations: their methods raise nothing but `OSError` with an errno.
        module: the binding, for the layout of libfuse's structures.
        major: libfuse's version, 2 or 3.
    """
    pack = make_stat_packer(module.c_stat)
    stat_bytes = ctypes.sizeof(module.c_stat)
    file_info = module.fuse_file_info.from_address
    fh_offset = module.fuse_file_info.fh.offset
    fh_at = ctypes.c_uint64.from_address
    memmove = _memmove()
    memory_at = _memory_at()
    attributes: ReplyCache[_CachedStat] = ReplyCache(operations.holds, _MOST_ATTRIBUTES)
    files: ReplyCache[OpenFile] = ReplyCache(operations.holds, _MOST_FILES)

    def fh_of(info: int) -> int:
        return fh_at(info + fh_offset).value

    def getattr_(path: bytes | None, buffer: int, info: int | None = None) -> int:
        answer = None
        if path is not None and not info:
            answer = attributes.get(path) or known_attributes(path)
        if answer is None:
            answer = look(path, info)
        elif not answer.is_of_folder:
            operations.note_file_stat()
        if answer.errno:
            return -answer.errno
        memmove(buffer, answer.packed, stat_bytes)
        return 0

    def known_beside(path: bytes) -> "tuple[CachedDirectory | None, Entry | None]":
        """Return what is known of the folder that a path is in, and of the path, if that holds."""
        folder, _, name = path.decode("utf-8", "surrogateescape").rpartition("/")
        known = operations.known(folder or "/")
        return known, None if known is None else known.entry(name)

    def known_attributes(path: bytes) -> _CachedStat | None:
        known, entry = known_beside(path)
        if known is None or entry is None or entry.attr is None:
            return None
        answer = _CachedStat(pack(entry.attr), stat.S_ISDIR(entry.mode))
        if attributes.seen_recently(path):  # by the path alone it is found in half the time
            attributes.keep(path, answer, known.lease, known.epoch)
        return answer

    def look(path: bytes | None, info: int | None) -> _CachedStat:
        is_kept = path is not None and not info and attributes.seen_recently(path)
        lease, epoch = Validity() if is_kept else None, operations.epoch
        try:
            attr = operations.getattr(_text(path), fh_of(info) if info else None, lease)
            answer = _CachedStat(pack(attr), stat.S_ISDIR(attr.mode))
        except OSError as error:
            answer = _CachedStat(b"", True, -_negative_errno(error))
            if not errors.is_missing(error):
                return answer
        if path is not None and lease is not None:
            attributes.keep(path, answer, lease, epoch)
        return answer

    def readlink(path: bytes, buffer: int, size: int) -> int:
        _known, entry = known_beside(path)
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
        file = files.get(path) if is_plain else None
        if file is not None:
            operations.on_open(file.path)
        else:
            lease = Validity() if is_plain and files.seen_recently(path) else None
            epoch = operations.epoch
            try:
                text = path.decode("utf-8", "surrogateescape")
                file = operations.open(text, fields.flags, lease)
            except OSError as error:
                return _negative_errno(error)
            if lease is not None and not file.direct_io:
                files.keep(path, file, lease, epoch)
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
    # Not `CFUNCTYPE`: it lets go of the interpreter around each entry, which takes as long again.
    # libfuse has two of them.
    filler_at = functools.lru_cache(8)(ctypes.PYFUNCTYPE(_INT, *fill_arguments))
    plain, plus = ((0,), (_FILL_DIR_PLUS,)) if major == 3 else ((), ())
    # Most names are in many folders.
    encoded = functools.lru_cache(4096)(lambda name: name.encode("utf-8", "surrogateescape"))

    def readdir(
        _path: bytes | None, buffer: int, filler: int, offset: int, info: int, flags: int = 0
    ) -> int:
        fill = filler_at(filler)
        try:
            folder = operations.open_directory(fh_of(info))
            is_plus = bool(flags & _READDIR_PLUS)
            # Past the first buffer the kernel wants attributes where the caller looked at some.
            is_wanted = is_plus and (offset > 0 or operations.wants_attributes())
            if is_wanted and operations.is_unmodified(folder) and (ready := ready_of(folder)):
                return hand_on(ready, fill, buffer, offset)
            entries = operations.readdir(fh_of(info), offset)  # which may wait
        except OSError as error:
            return _negative_errno(error)
        # Of attributes the kernel makes names: of what was deleted meanwhile it must make none.
        is_plus = is_plus and operations.is_unmodified(folder)
        is_wanted = is_wanted and is_plus
        # Offsets that are not 0 make libfuse stop at one full buffer, and ask again from there;
        # with 0 it would collect everything first, on libfuse 3 without the attributes.
        for index, entry in enumerate(entries, offset + 1):
            rest = plain
            # An entry without PLUS is looked up by who wants its attributes, and by nobody else:
            # so a plain `ls` costs nothing that only `ls -l` must pay for. libfuse and the kernel
            # remember what came with PLUS, 1.2 kB for the files of a checkpoint: those of folders
            # are sent to everybody, who will mostly go into them, those of files to who wants them.
            if entry.attr is not None and (is_wanted or (is_plus and stat.S_ISDIR(entry.mode))):
                rest = plus
            if fill(buffer, encoded(entry.name), packed(entry), index, *rest):
                break
        return 0

    def packed(entry: Entry) -> bytes:
        return pack(entry.attr or Attr(entry.mode, 0, 0, entry.ino, 0, 0, 0))

    def ready_of(folder: "OpenDirectory") -> _PreparedListing | None:
        """Return the entries of a short listing that is kept, made ready where they are not.

        Never where each operation is to be logged.
        """
        listing = None if operations.is_debug_logging else folder.scan.listing
        if listing is None or len(listing.entries) > _MOST_READY:
            return None
        if listing.ready is None:
            entries = (*dot_entries(folder.path), *listing.entries)
            attributes = b"".join(map(packed, entries))
            address = ctypes.cast(ctypes.c_char_p(attributes), _ADDRESS).value
            assert address is not None
            names = tuple(encoded(entry.name) for entry in entries)
            listing.ready = _PreparedListing(names, attributes, address)
        ready: _PreparedListing = listing.ready
        return ready

    def hand_on(ready: _PreparedListing, fill: Callable[..., int], buffer: int, offset: int) -> int:
        address = ready.address + offset * stat_bytes
        for index, name in enumerate(ready.names[offset:], offset + 1):
            rest = plus if index > DOT_ENTRY_COUNT else plain  # those have no attributes
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
    """What a folder holds, `.` and `..` too, as libfuse copies it: names, and a `struct stat` each.

    Attributes:
        names: in order.
        attributes: one after the other.
        address: of the first.
    """

    names: tuple[bytes, ...]
    attributes: bytes
    address: int


class _CachedStat(msgspec.Struct, frozen=True, gc=False):
    """What a look at attributes is answered: a `struct stat`, or an errno."""

    packed: bytes
    is_of_folder: bool
    errno: int = 0


def _memmove() -> Callable[[int, bytes, int], object]:
    """Return what copies bytes to an address.

    Not ctypes's own: that lets go of the interpreter meanwhile, and another thread that waits for
    it takes it, so that this one has to wait in turn. Eight processes at a time took 1.2 times as
    long by that.
    """
    memmove = ctypes.PyDLL(None).memmove
    memmove.argtypes, memmove.restype = (_ADDRESS, _PATH, _SIZE), _ADDRESS
    return memmove


def _memory_at() -> Callable[[int, int, int], memoryview]:
    """Return what makes a view of memory of an address, a length and a flag."""
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
    """Return what packs attributes as a `struct stat`, which every system lays out otherwise.

    Args:
        structure: the binding's, whose times come last, as they do on Linux.
    """
    places = sorted((getattr(structure, name).offset, name) for name in (*_FIELDS, *_TIMES))
    names = [name for _offset, name in places]
    assert sorted(names[-len(_TIMES) :]) == sorted(_TIMES)
    layout, end = "=", 0
    for offset, name in places:
        size = getattr(structure, name).size
        code = "qq" if name in _TIMES else {4: "I", 8: "Q"}[size]
        layout += f"{offset - end}x{code}"
        end = offset + size
    layout += f"{ctypes.sizeof(structure) - end}x"
    values = operator.attrgetter(*(_FIELDS[name] for name in names[: -len(_TIMES)]))
    pack = struct.Struct(layout).pack

    def packed(attr: Attr) -> bytes:
        seconds, ns = divmod(attr.mtime_ns, _NS_OF_A_SECOND)
        return pack(*values(attr), seconds, ns, seconds, ns, seconds, ns)

    return packed
