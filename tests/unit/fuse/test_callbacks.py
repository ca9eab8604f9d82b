"""The C callbacks, called as libfuse calls them, without a kernel."""

import ctypes
import errno
import gc
import os
import stat
import threading
from types import SimpleNamespace

import msgspec
import pytest

from tests.support.memoryfs import MTIME_NS, MemoryFileSystem
from tests.unit.fuse.test_operations import Requests
from tinkerfs.fuse import binding, directory_callbacks
from tinkerfs.fuse.abi import make_stat_packer
from tinkerfs.fuse.callbacks import build_operations
from tinkerfs.fuse.operations import Operations, XattrOperations
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.operation_log import OperationLog
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import Validity
from tinkerfs.vfs.directory_cache import CachedDirectory
from tinkerfs.vfs.node import Attr, Entry

ATTR = Attr(stat.S_IFREG | 0o640, 5_000_000_000, MTIME_NS, 2**63 - 25, 3, 1000, 65534)
ENTRY = Entry("file", ATTR.ino, ATTR.mode, ATTR)


class Time(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


TIMES = [(name, Time) for name in ("st_atimespec", "st_mtimespec", "st_ctimespec")]


class OnX86(ctypes.Structure):
    _fields_ = (
        ("st_dev", ctypes.c_ulong),
        ("st_ino", ctypes.c_ulong),
        ("st_nlink", ctypes.c_ulong),
        ("st_mode", ctypes.c_uint),
        ("st_uid", ctypes.c_uint),
        ("st_gid", ctypes.c_uint),
        ("__pad0", ctypes.c_int),
        ("st_rdev", ctypes.c_ulong),
        ("st_size", ctypes.c_long),
        ("st_blksize", ctypes.c_long),
        ("st_blocks", ctypes.c_long),
        *TIMES,
        ("reserved", ctypes.c_long * 3),
    )


class OnArm(ctypes.Structure):
    _fields_ = (
        ("st_dev", ctypes.c_ulong),
        ("st_ino", ctypes.c_ulong),
        ("st_mode", ctypes.c_uint),
        ("st_nlink", ctypes.c_uint),
        ("st_uid", ctypes.c_uint),
        ("st_gid", ctypes.c_uint),
        ("st_rdev", ctypes.c_ulong),
        ("__pad1", ctypes.c_ulong),
        ("st_size", ctypes.c_long),
        ("st_blksize", ctypes.c_int),
        ("__pad2", ctypes.c_int),
        ("st_blocks", ctypes.c_long),
        *TIMES,
        ("__reserved", ctypes.c_uint * 2),
    )


@pytest.mark.parametrize("structure", [OnX86, OnArm])
def test_packed_stat_matches_the_platform_layout(structure):
    packed = make_stat_packer(structure)(ATTR)
    assert len(packed) == ctypes.sizeof(structure)
    found = structure.from_buffer_copy(packed)
    assert (found.st_mode, found.st_size, found.st_ino) == (ATTR.mode, ATTR.size_bytes, ATTR.ino)
    assert (found.st_nlink, found.st_blocks) == (ATTR.nlink, ATTR.blocks)
    assert (found.st_uid, found.st_gid) == (ATTR.uid, ATTR.gid)
    for name, _type in TIMES:
        time = getattr(found, name)
        assert time.tv_sec * 1_000_000_000 + time.tv_nsec == MTIME_NS
    assert found.st_dev == found.st_rdev == found.st_blksize == 0


def test_stat_packer_supports_times_before_1970():
    time = OnX86.from_buffer_copy(make_stat_packer(OnX86)(Attr(0, 0, -1, 2, 1, 0, 0))).st_mtimespec
    assert (time.tv_sec, time.tv_nsec) == (-1, 999_999_999)


class FileInfo(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_int),
        ("direct_io", ctypes.c_uint, 1),
        ("keep_cache", ctypes.c_uint, 1),
        ("fh", ctypes.c_uint64),
    )


class FileSystemStatus(ctypes.Structure):
    _fields_ = (("f_bsize", ctypes.c_ulong), ("f_blocks", ctypes.c_ulong))


class Limits(ctypes.Structure):
    _fields_ = (("max_background", ctypes.c_uint),)


PATH, ADDRESS, NUMBER = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint
BYTES, INFO = ctypes.POINTER(ctypes.c_byte), ctypes.POINTER(FileInfo)


def operations_structure(major):
    """Return the fields of `struct fuse_operations` that the operations need."""
    is_3 = major == 3
    info = (INFO,) if is_3 else ()
    arguments = {
        "getattr": (PATH, ADDRESS, *([ADDRESS] if is_3 else [])),
        "readlink": (PATH, ADDRESS, ctypes.c_size_t),
        "mknod": (PATH, NUMBER, ctypes.c_ulong),
        "mkdir": (PATH, NUMBER),
        "unlink": (PATH,),
        "rmdir": (PATH,),
        "symlink": (PATH, PATH),
        "rename": (PATH, PATH, *([NUMBER] if is_3 else [])),
        "link": (PATH, PATH),
        "chmod": (PATH, NUMBER, *info),
        "chown": (PATH, NUMBER, NUMBER, *info),
        "truncate": (PATH, ctypes.c_int64, *info),
        "open": (PATH, ADDRESS),
        "read": (PATH, ADDRESS, ctypes.c_size_t, ctypes.c_int64, ADDRESS),
        "write": (PATH, BYTES, ctypes.c_size_t, ctypes.c_int64, INFO),
        "statfs": (PATH, ctypes.POINTER(FileSystemStatus)),
        "release": (PATH, ADDRESS),
        "fsync": (PATH, ctypes.c_int, INFO),
        "setxattr": (PATH, PATH, BYTES, ctypes.c_size_t, ctypes.c_int),
        "getxattr": (PATH, PATH, BYTES, ctypes.c_size_t),
        "listxattr": (PATH, BYTES, ctypes.c_size_t),
        "removexattr": (PATH, PATH),
        "opendir": (PATH, ADDRESS),
        "readdir": (
            *(PATH, ADDRESS, ADDRESS, ctypes.c_int64, ADDRESS),
            *([ctypes.c_int] if is_3 else []),
        ),
        "releasedir": (PATH, ADDRESS),
        "fsyncdir": (PATH, ctypes.c_int, INFO),
        "init": (ctypes.POINTER(Limits),) * (2 if is_3 else 1),
        "create": (PATH, NUMBER, INFO),
        "utimens": (PATH, ADDRESS, *info),
        "flush": (PATH, INFO),
    }
    if not is_3:
        arguments |= {"ftruncate": (PATH, ctypes.c_int64, INFO), "fgetattr": (PATH, ADDRESS, INFO)}
    fields = [(name, ctypes.CFUNCTYPE(ctypes.c_int, *each)) for name, each in arguments.items()]

    class Structure(ctypes.Structure):
        _fields_ = (*fields, *([] if is_3 else [("flag_nullpath_ok", NUMBER, 1)]))

    return Structure


class Listing:
    """The entries that libfuse collects, in buffers of limited size."""

    def __init__(self, major, room):
        self.found = []
        arguments = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
        arguments += [ctypes.c_int] if major == 3 else []
        self.filler = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(self.fill)
        self.room = self.left = room

    def fill(self, _buffer, name, attributes, offset, plus=None):
        if not self.left:
            return 1
        self.left -= 1
        status = OnX86.from_buffer_copy(ctypes.string_at(attributes, ctypes.sizeof(OnX86)))
        self.found.append((name, status, offset, plus))
        return 0


class Libfuse:
    """Calls the callbacks as a major version of libfuse does."""

    def __init__(self, major, filesystem=None, operations=Operations):
        self.major, self.is_ready, self.configured = major, False, []
        structure = operations_structure(major)
        module = SimpleNamespace(c_stat=OnX86, fuse_file_info=FileInfo, fuse_operations=structure)
        self.filesystem = filesystem or MemoryFileSystem(many=50)
        self.operations = operations(
            self.filesystem,
            Requests(),
            Passthrough(Telemetry()),
            timeout_s=30,
            stopping=threading.Event(),
            ready=self.on_ready,
            operation_log=OperationLog(),
        )
        self.table = build_operations(
            self.operations, module, major, lambda *pointers: self.configured.append(pointers)
        )
        self.call = {name: getattr(self.table, name) for name, *_type in structure._fields_}

    def on_ready(self):
        self.is_ready = True

    def stat(self, path, info=None):
        status = OnX86()
        address = ctypes.addressof(status)
        if self.major == 3:
            return self.call["getattr"](path, address, info), status
        if info is None:
            return self.call["getattr"](path, address), status
        info = None if info is None else ctypes.cast(info, INFO)
        return self.call["fgetattr"](path, address, info), status

    def target(self, path, size=4096):
        buffer = ctypes.create_string_buffer(size)
        status = self.call["readlink"](path, ctypes.addressof(buffer), size)
        return status or buffer.value

    def content(self, path, flags=os.O_RDONLY):
        """Return the content of a file and whether it has direct_io; or a negative errno."""
        info, buffer = FileInfo(flags=flags), ctypes.create_string_buffer(1 << 16)
        address = ctypes.addressof(info)
        status = self.call["open"](path, address)
        if status:
            return status
        length = self.call["read"](path, ctypes.addressof(buffer), len(buffer), 0, address)
        assert self.call["release"](path, address) == 0
        return buffer.raw[:length], bool(info.direct_io)

    def listed(self, path, room, flags):
        info = FileInfo()
        assert self.call["opendir"](path, ctypes.addressof(info)) == 0
        listing = Listing(self.major, room)
        filler = ctypes.cast(listing.filler, ctypes.c_void_p)
        rest = (flags,) if self.major == 3 else ()
        while True:
            listing.left, before = room, len(listing.found)
            address = ctypes.addressof(info)
            assert self.call["readdir"](None, 0, filler, before, address, *rest) == 0
            if len(listing.found) == before:
                break
        assert self.call["releasedir"](None, ctypes.addressof(info)) == 0
        assert self.call["readdir"](None, 0, filler, 0, address, *rest) == -errno.EBADF
        return listing.found


@pytest.fixture(params=[2, 3])
def libfuse(request):
    libfuse = Libfuse(request.param)
    gc.collect()  # the structure owns its callbacks
    return libfuse


def test_getattr_works_by_path_and_by_handle(libfuse):
    status, found = libfuse.stat(b"/hello")
    assert (status, found.st_size, found.st_mtimespec.tv_nsec) == (0, 6, MTIME_NS % 10**9)
    info = FileInfo(flags=os.O_RDONLY)
    assert libfuse.call["open"](b"/hello", ctypes.addressof(info)) == 0
    assert (info.direct_io, info.keep_cache) == (1, 0)
    status, found = libfuse.stat(None, ctypes.addressof(info))
    assert (status, found.st_size) == (0, 6)
    assert libfuse.stat(b"/none")[0] == -errno.ENOENT
    assert libfuse.stat(b"/\xff")[0] == 0


def test_read_returns_bytes_at_offset(libfuse):
    info = FileInfo(flags=os.O_RDONLY)
    address = ctypes.addressof(info)
    assert libfuse.call["open"](b"/cached-1048576", address) == 0
    assert (info.direct_io, info.keep_cache) == (0, 1)
    buffer = ctypes.create_string_buffer(16)
    assert libfuse.call["read"](None, ctypes.addressof(buffer), 8, 250, address) == 8
    assert buffer.raw == bytes([250, 251, 252, 253, 254, 255, 0, 1]) + bytes(8)
    assert libfuse.call["read"](None, ctypes.addressof(buffer), 8, 1 << 20, address) == 0
    assert libfuse.call["release"](None, address) == 0
    assert libfuse.call["read"](None, ctypes.addressof(buffer), 8, 0, address) == -errno.EBADF
    assert libfuse.call["open"](b"/none", address) == -errno.ENOENT


def test_readlink_truncates_target_to_buffer(libfuse):
    for size, target in ((20, b"folder/0000"), (7, b"folder"), (12, b"folder/0000")):
        assert libfuse.target(b"/link", size) == target


def test_repeated_getattr_is_served_from_reply_cache(libfuse):
    looks = ["/hello", "/none", "/control"]
    for generation in (1, 2):
        libfuse.filesystem.generation, libfuse.filesystem.stats = generation, []
        for _ in range(4):
            assert libfuse.stat(b"/hello")[1].st_size == 6
            assert libfuse.stat(b"/none")[0] == -errno.ENOENT
            libfuse.stat(b"/control")
        assert libfuse.filesystem.stats == looks + ["/control"] * 3


def test_fstat_is_not_served_from_reply_cache(libfuse):
    libfuse.filesystem.generation = 1
    for _ in range(3):
        assert libfuse.stat(b"/control")[1].st_size == 2
    info = FileInfo(flags=os.O_RDONLY)
    assert libfuse.call["open"](b"/control", ctypes.addressof(info)) == 0
    libfuse.filesystem.control = b"longer"
    for path in (b"/control", None):
        assert libfuse.stat(path, ctypes.addressof(info))[1].st_size == 6


def test_cached_readlink_is_reported_to_the_guard(libfuse, monkeypatch):
    libfuse.filesystem.generation, reported = 1, []
    monkeypatch.setattr(
        libfuse.filesystem.guard,
        "on_readlink",
        lambda path, caller: reported.append((path, caller().pid)),
    )
    libfuse.listed(b"/many", 1000, 1)
    libfuse.target(b"/many/link")
    assert reported == [("/many/link", os.getpid())]


def test_cached_getattr_of_file_notes_the_caller(libfuse, monkeypatch):
    libfuse.filesystem.generation = 1
    for path in (b"/hello", b"/folder", b"/none") * 2:
        libfuse.stat(path)
    noted = []
    monkeypatch.setattr(libfuse.operations, "note_file_stat", lambda: noted.append(1))
    libfuse.stat(b"/folder")
    libfuse.stat(b"/none")
    assert noted == []
    libfuse.stat(b"/hello")
    assert noted == [1]


@pytest.mark.parametrize("major", [2, 3])
@pytest.mark.parametrize("many", [8, 40])
def test_valid_listing_serves_getattr_and_readlink(many, major, monkeypatch):
    libfuse = Libfuse(major, MemoryFileSystem(many=many, generation=1))
    filesystem = libfuse.filesystem
    first = libfuse.listed(b"/many", 1000, 1)
    again = libfuse.listed(b"/many", 7, 1)
    assert [(name, at) for name, _status, at, _plus in first] == [
        (name, at) for name, _status, at, _plus in again
    ]
    filesystem.stats.clear()
    noted = []
    monkeypatch.setattr(libfuse.operations, "note_file_stat", lambda: noted.append(1))
    monkeypatch.setattr(filesystem, "readlink", lambda _path, _ctx: "another")
    for name in (b"0000", b"%04d" % (many - 1)):
        status, found = libfuse.stat(b"/many/" + name)
        assert (status, found.st_size, found.st_mtimespec.tv_nsec) == (0, 6, MTIME_NS % 10**9)
    assert noted == [1, 1]
    assert libfuse.target(b"/many/link") == b"folder/0000"
    assert libfuse.target(b"/many/link", 7) == b"folder"
    assert filesystem.stats == []
    assert libfuse.stat(b"/many/none")[0] == -errno.ENOENT
    assert libfuse.stat(b"/many/0000/none")[0] == -errno.ENOENT
    filesystem.generation, filesystem.stats = 2, []
    libfuse.stat(b"/many/0000")
    assert filesystem.stats == ["/many/0000"]
    assert libfuse.target(b"/many/link") == b"another"


@pytest.mark.parametrize("major", [2, 3])
def test_subscriber_disables_reply_caches(major):
    libfuse = Libfuse(major, MemoryFileSystem(many=8, generation=1))

    def walk():
        libfuse.listed(b"/many", 1000, 1)
        libfuse.stat(b"/many/0000")
        libfuse.target(b"/many/link")

    for _ in range(3):
        walk()
    libfuse.filesystem.stats.clear()
    records = []
    unsubscribe = libfuse.operations.operation_log.subscribe(records.append)
    for _ in range(3):
        walk()
    unsubscribe()
    walk()
    assert libfuse.filesystem.stats == ["/many/0000"] * 3
    found = [(record.operation, record.path) for record in records]
    for operation in ("opendir /many", "getattr /many/0000", "readlink /many/link"):
        assert found.count(tuple(operation.split())) == 3
    assert found.count(("readdir", "/many")) >= 3


@pytest.mark.parametrize("count", [2, 15, 16, 40])
def test_duplicate_name_resolves_to_first_entry(count):
    entries = [msgspec.structs.replace(ENTRY, name=f"{n}", target=f"to {n}") for n in range(count)]
    listing = CachedDirectory((msgspec.structs.replace(ENTRY, name="0"), *entries), Validity(), 1)
    assert listing.entry("0").target is None
    assert listing.entry("1") is entries[1]
    assert listing.entry("none") is None


@pytest.mark.parametrize("room", [1, 7, 1000])
def test_readdir_resumes_after_full_buffer(libfuse, room):
    found = libfuse.listed(b"/folder", room, 0)
    names = [name for name, *_rest in found]
    assert names == [b".", b"..", b"costly", *(b"%04d" % i for i in range(50))]
    assert [offset for _name, _status, offset, _plus in found] == list(range(1, len(names) + 1))
    assert all(stat.S_IFMT(status.st_mode) for _name, status, *_rest in found)
    assert {plus for *_rest, plus in found} == {0 if libfuse.major == 3 else None}


def test_readdirplus_includes_wanted_attributes_only():
    libfuse = Libfuse(3)
    of = {name: (status, plus) for name, status, _offset, plus in libfuse.listed(b"/", 1000, 1)}
    assert of[b"folder"][1] == 2, "a directory always has attributes"
    assert of[b"hello"][1] == 0
    libfuse.stat(b"/hello")
    of = {name: (status, plus) for name, status, _offset, plus in libfuse.listed(b"/", 1000, 1)}
    assert (of[b"hello"][0].st_size, of[b"hello"][1]) == (6, 2)
    of = {name: (status, plus) for name, status, _offset, plus in libfuse.listed(b"/folder", 9, 1)}
    assert (of[b"costly"][0].st_size, of[b"costly"][1]) == (0, 0), (
        "expensive attributes are omitted"
    )
    of = {name: plus for name, _status, _offset, plus in libfuse.listed(b"/", 1000, 0)}
    assert set(of.values()) == {0}, "the kernel requested no attributes"


@pytest.mark.parametrize("many", [8, 40, 400])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 1000])
def test_prepared_listing_equals_first_listing(many, room):
    libfuse = Libfuse(3, MemoryFileSystem(many=many, generation=1))
    libfuse.stat(b"/hello")
    first, *others = (
        [
            (name, bytes(status), at, plus)
            for name, status, at, plus in libfuse.listed(b"/many", room, 1)
        ]
        for _ in range(4)
    )
    assert len(first) == many + 3, "including `.`, `..` and the link"
    assert [plus for *_rest, plus in first] == [0, 0] + [2] * (len(first) - 2)
    assert others == [first] * 3


@pytest.mark.parametrize(("many", "is_prepared"), [(8, True), (400, False)])
def test_short_cached_listing_is_packed_once(many, is_prepared, monkeypatch):
    packed = []
    make_packer = directory_callbacks.make_stat_packer

    def make_recording_packer(structure):
        pack = make_packer(structure)
        return lambda attr: packed.append(attr) or pack(attr)

    monkeypatch.setattr(directory_callbacks, "make_stat_packer", make_recording_packer)
    libfuse = Libfuse(3, MemoryFileSystem(many=many, generation=1))
    libfuse.stat(b"/hello")
    for _ in range(2):
        libfuse.listed(b"/many", 1000, 1)
    packed.clear()
    libfuse.listed(b"/many", 1000, 1)
    assert (packed == []) == is_prepared


def test_open_directory_keeps_its_order_after_a_new_listing():
    libfuse = Libfuse(3, MemoryFileSystem(many=8, generation=1))
    libfuse.stat(b"/hello")
    for _ in range(2):
        before = libfuse.listed(b"/many", 1000, 1)
    info = FileInfo()
    address = ctypes.addressof(info)
    assert libfuse.call["opendir"](b"/many", address) == 0
    libfuse.filesystem.generation = 2
    libfuse.filesystem.removed = {"/many/link"}
    for _ in range(3):
        assert len(libfuse.listed(b"/many", 1000, 1)) == len(before) - 1
    listing = Listing(3, 1000)
    filler = ctypes.cast(listing.filler, ctypes.c_void_p)
    assert libfuse.call["readdir"](None, 0, filler, 0, address, 1) == 0
    assert [name for name, *_rest in listing.found] == [name for name, *_rest in before]


@pytest.mark.parametrize("generation", [0, 1], ids=["new", "cached"])
def test_listing_from_before_a_change_has_no_attributes(generation):
    libfuse = Libfuse(3, MemoryFileSystem(many=50, generation=generation))
    libfuse.stat(b"/hello")
    for _ in range(3):
        libfuse.listed(b"/many", 1000, 1)
    scandir = libfuse.filesystem.scandir

    def scandir_and_change(path, ctx):
        libfuse.filesystem.local_mutation_count += 1
        return scandir(path, ctx)

    libfuse.filesystem.scandir = scandir_and_change
    assert {plus for *_rest, plus in libfuse.listed(b"/many", 1000, 1)} == {0}


def test_readdirplus_past_first_buffer_includes_attributes():
    found = [plus for *_rest, plus in Libfuse(3).listed(b"/folder", 10, 1)]
    assert found[:10] == [0] * 10
    assert found[10:] == [2] * (len(found) - 10)


def test_init_configures_libfuse_3_and_reports_readiness(libfuse):
    pointers = [ctypes.pointer(Limits()) for _ in range(libfuse.major - 1)]
    assert libfuse.call["init"](*pointers) == 0
    assert libfuse.is_ready
    assert len(libfuse.configured) == (libfuse.major == 3)


def test_statfs_fills_the_structure(libfuse):
    status = FileSystemStatus()
    assert libfuse.call["statfs"](b"/", ctypes.byref(status)) == 0
    assert (status.f_bsize, status.f_blocks) == (4096, (1 << 30) // 4096)


def test_write_and_truncate_use_the_handle(libfuse):
    info = FileInfo(flags=os.O_RDWR)
    assert libfuse.call["open"](b"/control", ctypes.addressof(info)) == 0
    data = (ctypes.c_byte * 3)(*b"bad")
    assert libfuse.call["write"](None, data, 2, 7, info) == 2
    assert libfuse.filesystem.control == b"ba"
    assert libfuse.call["write"](None, data, 3, 0, info) == -errno.EINVAL
    by_handle = libfuse.call["ftruncate" if libfuse.major == 2 else "truncate"]
    assert by_handle(None, 0, info) == 0
    rest = () if libfuse.major == 2 else (None,)
    assert libfuse.call["truncate"](b"/control", 0, *rest) == 0
    assert libfuse.call["truncate"](b"/hello", 0, *rest) == -errno.EPERM


def test_changes_receive_the_path_that_they_change(libfuse, monkeypatch):
    changed = []

    def record(path, *_rest):
        changed.append(path)

    for name in ("create", "setattr", "unlink", "rmdir"):
        monkeypatch.setattr(libfuse.filesystem, name, record)
    is_3, info = libfuse.major == 3, FileInfo()
    rest = (None,) if is_3 else ()
    for name, arguments in {
        "chmod": (b"/chmod", 0o600, *rest),
        "chown": (b"/chown", 1, 2**32 - 1, *rest),
        "create": (b"/create", 0o600, info),
        "link": (b"/other", b"/link"),
        "mkdir": (b"/mkdir", 0o700),
        "mknod": (b"/mknod", 0o600, 0),
        "rename": (b"/rename", b"/other", *([0] if is_3 else [])),
        "rmdir": (b"/rmdir",),
        "symlink": (b"target", b"/symlink"),
        "unlink": (b"/unlink",),
        "utimens": (b"/utimens\xff", None, *rest),
    }.items():
        changed.clear()
        assert libfuse.call[name](*arguments) == 0
        expected = "/utimens\udcff" if name == "utimens" else f"/{name}"
        assert changed == [expected]
    changed.clear()
    for name in ("fsync", "fsyncdir"):
        assert libfuse.call[name](None, 0, info) == 0
    assert changed == []


def test_refused_change_returns_its_errno(libfuse):
    assert libfuse.call["mkdir"](b"/new", 0o700) == -errno.EPERM
    rest = (None,) if libfuse.major == 3 else ()
    assert libfuse.call["chmod"](None, 0o600, *rest) == -errno.ENOENT


class Attributed(MemoryFileSystem):
    """A file system with two extended attributes per file."""

    def getxattr(self, path, name, _ctx):
        return f"{name} of {path}".encode()

    def listxattr(self, _path, _ctx):
        return ["user.a", "user.\udcff"]

    def setxattr(self, path, name):
        raise PermissionError(errno.EPERM, name, path)


def test_xattr_callbacks_follow_the_size_protocol(libfuse):
    libfuse = Libfuse(libfuse.major, Attributed(), XattrOperations)
    buffer = (ctypes.c_byte * 32)()
    for call, value in (
        (lambda *rest: libfuse.call["getxattr"](b"/x", b"user.a", *rest), b"user.a of /x"),
        (lambda *rest: libfuse.call["listxattr"](b"/x", *rest), b"user.a\0user.\xff\0"),
    ):
        assert call(None, 0) == len(value)
        assert call(buffer, len(value) - 1) == -errno.ERANGE
        assert call(buffer, len(buffer)) == len(value)
        assert bytes(buffer)[: len(value)] == value
    assert libfuse.call["setxattr"](b"/x", b"user.a", buffer, 1, 0) == -errno.EPERM
    assert libfuse.call["removexattr"](b"/x", b"user.a") == -errno.EPERM


def test_absent_operations_have_no_callback(libfuse):
    # The kernel then handles them itself, which saves a request each.
    for name in ("flush", "getxattr", "listxattr", "setxattr", "removexattr"):
        assert not libfuse.call[name]
    assert getattr(libfuse.table, "flag_nullpath_ok", 1) == 1


@pytest.mark.parametrize(("module", "major"), [("fuse", 2), ("mfusepy", None)])
def test_stat_packer_supports_binding_structures(module, major):
    if all(binding.find_library(each) is None for each in ([major] if major else (2, 3))):
        pytest.skip("the binding needs a libfuse to be imported")
    theirs = pytest.importorskip(module, exc_type=(ImportError, OSError))
    found = theirs.c_stat.from_buffer_copy(make_stat_packer(theirs.c_stat)(ATTR))
    assert (found.st_mode, found.st_size, found.st_ino) == (ATTR.mode, ATTR.size_bytes, ATTR.ino)
    assert found.st_mtimespec.tv_nsec == MTIME_NS % 10**9


@pytest.mark.parametrize(("module", "major"), [("fuse", 2), ("mfusepy", None)])
def test_binding_structures_have_every_operation(module, major):
    if all(binding.find_library(each) is None for each in ([major] if major else (2, 3))):
        pytest.skip("the binding needs a libfuse to be imported")
    theirs = pytest.importorskip(module, exc_type=(ImportError, OSError))
    loaded = binding._probe(theirs._libfuse._name)
    operations = XattrOperations(
        MemoryFileSystem(),
        Requests(),
        Passthrough(Telemetry()),
        timeout_s=1,
        stopping=threading.Event(),
        ready=lambda: None,
        operation_log=OperationLog(),
    )
    table = build_operations(operations, theirs, loaded.major)
    status = theirs.c_stat()
    buffer = ctypes.pointer(status)
    rest = (None,) if loaded.major == 3 else ()
    assert table.getattr(b"/hello", buffer, *rest) == 0
    assert status.st_size == 6
    assert table.mkdir(b"/new", 0o700) == -errno.EPERM
