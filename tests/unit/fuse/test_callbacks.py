"""What libfuse is given: through real callbacks, without a kernel."""

import ctypes
import errno
import os
import stat
import threading
from types import SimpleNamespace

import msgspec
import pytest

from tests.support.memoryfs import MTIME_NS, MemoryFileSystem
from tests.unit.fuse.test_operations import Requests
from tinkerfs.context import Validity
from tinkerfs.fuse import binding, reply_cache
from tinkerfs.fuse.callbacks import build_callbacks, make_stat_packer, override_callbacks
from tinkerfs.fuse.operations import Operations
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
def test_attributes_are_packed_as_the_system_lays_them_out(structure):
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


def test_a_time_before_1970_is_told():
    time = OnX86.from_buffer_copy(make_stat_packer(OnX86)(Attr(0, 0, -1, 2, 1, 0, 0))).st_mtimespec
    assert (time.tv_sec, time.tv_nsec) == (-1, 999_999_999)


class FileInfo(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_int),
        ("direct_io", ctypes.c_uint, 1),
        ("keep_cache", ctypes.c_uint, 1),
        ("fh", ctypes.c_uint64),
    )


class Folder:
    """What libfuse collects of a listing: as many entries at a time as its buffer holds."""

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
    """Calls the callbacks as libfuse of a version does."""

    def __init__(self, major, filesystem=None):
        self.major = major
        module = SimpleNamespace(c_stat=OnX86, fuse_file_info=FileInfo)
        self.filesystem = filesystem or MemoryFileSystem(many=50)
        self.operations = Operations(
            self.filesystem,
            Requests(),
            timeout_s=30,
            stopping=threading.Event(),
            ready=lambda: None,
        )
        self.call = build_callbacks(self.operations, module, major)

    def stat(self, path, info=None):
        status = OnX86()
        place = ctypes.addressof(status)
        if self.major == 3:
            return self.call["getattr"](path, place, info), status
        if info is None:
            return self.call["getattr"](path, place), status
        return self.call["fgetattr"](path, place, info), status

    def target(self, path, size=4096):
        buffer = ctypes.create_string_buffer(size)
        status = self.call["readlink"](path, ctypes.addressof(buffer), size)
        return status or buffer.value

    def bytes(self, path, flags=os.O_RDONLY):
        """What is read of a file, and whether past the kernel's cache; or an errno."""
        info, buffer = FileInfo(flags=flags), ctypes.create_string_buffer(1 << 16)
        place = ctypes.addressof(info)
        status = self.call["open"](path, place)
        if status:
            return status
        length = self.call["read"](path, ctypes.addressof(buffer), len(buffer), 0, place)
        assert self.call["release"](path, place) == 0
        return buffer.raw[:length], bool(info.direct_io)

    def listed(self, path, room, flags):
        info = FileInfo()
        assert self.call["opendir"](path, ctypes.addressof(info)) == 0
        folder = Folder(self.major, room)
        filler = ctypes.cast(folder.filler, ctypes.c_void_p)
        rest = (flags,) if self.major == 3 else ()
        while True:
            folder.left, before = room, len(folder.found)
            place = ctypes.addressof(info)
            assert self.call["readdir"](None, 0, filler, before, place, *rest) == 0
            if len(folder.found) == before:
                break
        assert self.call["releasedir"](None, ctypes.addressof(info)) == 0
        assert self.call["readdir"](None, 0, filler, 0, place, *rest) == -errno.EBADF
        return folder.found


@pytest.fixture(params=[2, 3])
def libfuse(request):
    return Libfuse(request.param)


def test_attributes_arrive_by_path_and_by_handle(libfuse):
    status, found = libfuse.stat(b"/hello")
    assert (status, found.st_size, found.st_mtimespec.tv_nsec) == (0, 6, MTIME_NS % 10**9)
    info = FileInfo(flags=os.O_RDONLY)
    assert libfuse.call["open"](b"/hello", ctypes.addressof(info)) == 0
    assert (info.direct_io, info.keep_cache) == (1, 0)
    status, found = libfuse.stat(None, ctypes.addressof(info))
    assert (status, found.st_size) == (0, 6)
    assert libfuse.stat(b"/none")[0] == -errno.ENOENT
    assert libfuse.stat(b"/\xff")[0] == 0


def test_bytes_arrive_by_position(libfuse):
    info = FileInfo(flags=os.O_RDONLY)
    place = ctypes.addressof(info)
    assert libfuse.call["open"](b"/cached-1048576", place) == 0
    assert (info.direct_io, info.keep_cache) == (0, 1)
    buffer = ctypes.create_string_buffer(16)
    assert libfuse.call["read"](None, ctypes.addressof(buffer), 8, 250, place) == 8
    assert buffer.raw == bytes([250, 251, 252, 253, 254, 255, 0, 1]) + bytes(8)
    assert libfuse.call["read"](None, ctypes.addressof(buffer), 8, 1 << 20, place) == 0
    assert libfuse.call["release"](None, place) == 0
    assert libfuse.call["read"](None, ctypes.addressof(buffer), 8, 0, place) == -errno.EBADF
    assert libfuse.call["open"](b"/none", place) == -errno.ENOENT


def test_a_target_is_cut_to_its_buffer(libfuse):
    for size, target in ((20, b"folder/0000"), (7, b"folder"), (12, b"folder/0000")):
        assert libfuse.target(b"/link", size) == target


def test_a_look_that_is_made_again_is_answered_once_while_the_answer_holds(libfuse):
    looks = ["/hello", "/none", "/control"]
    for epoch in (1, 2):
        libfuse.filesystem.epoch, libfuse.filesystem.stats = epoch, []
        for _ in range(4):
            assert libfuse.stat(b"/hello")[1].st_size == 6
            assert libfuse.stat(b"/none")[0] == -errno.ENOENT
            libfuse.stat(b"/control")
        made = 2 if epoch == 1 else 1
        assert libfuse.filesystem.stats == looks * made + ["/control"] * (4 - made)


def test_no_answer_by_path_is_that_of_a_handle(libfuse):
    libfuse.filesystem.epoch = 1
    for _ in range(3):
        assert libfuse.stat(b"/control")[1].st_size == 2
    info = FileInfo(flags=os.O_RDONLY)
    assert libfuse.call["open"](b"/control", ctypes.addressof(info)) == 0
    libfuse.filesystem.control = b"longer"
    for path in (b"/control", None):
        assert libfuse.stat(path, ctypes.addressof(info))[1].st_size == 6


def test_only_what_is_opened_to_be_read_is_opened_once(libfuse, monkeypatch):
    opened = []
    monkeypatch.setattr(
        libfuse.filesystem,
        "open",
        lambda path, flags, call: (
            opened.append(flags) or MemoryFileSystem.open(libfuse.filesystem, path, flags, call)
        ),
    )
    libfuse.filesystem.epoch = 1
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_NOATIME):
        for _ in range(4):
            libfuse.bytes(b"/cached-1048576", flags)
    assert opened == [os.O_RDONLY] * 2 + [os.O_RDONLY | os.O_NOATIME] * 4
    opened.clear()
    for _ in range(4):
        libfuse.bytes(b"/hello")
    assert opened == [os.O_RDONLY] * 4, "what passes the kernel's cache by may be another next time"
    info = FileInfo(flags=os.O_RDWR)
    opened.clear()
    for _ in range(4):
        assert libfuse.call["open"](b"/control", ctypes.addressof(info)) == 0
    assert opened == [os.O_RDWR] * 4


def test_cached_opens_and_links_are_reported_to_the_guard(libfuse, monkeypatch):
    libfuse.filesystem.epoch, heard = 1, []
    for name in ("on_open", "on_readlink"):
        monkeypatch.setattr(
            libfuse.filesystem.guard, name, lambda path, *rest: heard.append((path, rest[-1]().pid))
        )
    for _ in range(3):  # of which the third is opened without the file system
        libfuse.bytes(b"/cached-1048576")
    libfuse.listed(b"/many", 1000, 1)
    libfuse.target(b"/many/link")
    assert heard == [("/cached-1048576", os.getpid()), ("/many/link", os.getpid())]


def test_who_is_answered_again_looks_at_files_too(libfuse, monkeypatch):
    libfuse.filesystem.epoch = 1
    for path in (b"/hello", b"/folder", b"/none") * 2:
        libfuse.stat(path)
    looked = []
    monkeypatch.setattr(libfuse.operations, "looked_at_file", lambda: looked.append(1))
    libfuse.stat(b"/folder")
    libfuse.stat(b"/none")
    assert looked == []
    libfuse.stat(b"/hello")
    assert looked == [1]


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(reply_cache, "_ASKED", 5)
    return reply_cache.ReplyCache(lambda _lease, _epoch: True, most=3)


def test_answers_are_bounded(kept):
    for number in range(20):
        kept.keep(b"%d" % number, number, Validity(), 1)
        there = [n for n in range(20) if kept.get(b"%d" % n) is not None]
        assert len(there) <= 3
        assert there[-1] == number


def test_what_a_walk_comes_by_again_and_again_is_not_asked_again(kept):
    for _ in range(3):
        assert not any(kept.seen_recently(b"%d" % number) for number in range(20))
    assert [kept.seen_recently(b"%d" % number) for number in (19, 15, 2)] == [True, True, False]


@pytest.mark.parametrize("major", [2, 3])
@pytest.mark.parametrize("many", [8, 40])
def test_what_is_known_of_a_folder_is_told_without_a_look_while_it_holds(many, major, monkeypatch):
    libfuse = Libfuse(major, MemoryFileSystem(many=many, epoch=1))
    filesystem = libfuse.filesystem
    first = libfuse.listed(b"/many", 1000, 1)
    again = libfuse.listed(b"/many", 7, 1)
    assert [(name, at) for name, _status, at, _plus in first] == [
        (name, at) for name, _status, at, _plus in again
    ]
    filesystem.stats.clear()
    looked = []
    monkeypatch.setattr(libfuse.operations, "note_file_stat", lambda: looked.append(1))
    monkeypatch.setattr(filesystem, "readlink", lambda _path, _call: "another")
    for name in (b"0000", b"%04d" % (many - 1)):
        status, found = libfuse.stat(b"/many/" + name)
        assert (status, found.st_size, found.st_mtimespec.tv_nsec) == (0, 6, MTIME_NS % 10**9)
    assert looked == [1, 1]
    assert libfuse.target(b"/many/link") == b"folder/0000"
    assert libfuse.target(b"/many/link", 7) == b"folder"
    assert filesystem.stats == []
    assert libfuse.stat(b"/many/none")[0] == -errno.ENOENT
    assert libfuse.stat(b"/many/0000/none")[0] == -errno.ENOENT
    filesystem.epoch, filesystem.stats = 2, []
    libfuse.stat(b"/many/0000")
    assert filesystem.stats == ["/many/0000"]
    assert libfuse.target(b"/many/link") == b"another"


def test_each_look_is_made_and_logged_where_operations_are_traced(caplog, monkeypatch):
    libfuse = Libfuse(3, MemoryFileSystem(epoch=1))
    monkeypatch.setattr(libfuse.operations, "is_debug_logging", True)
    caplog.set_level("DEBUG")
    for _ in range(3):
        libfuse.listed(b"/many", 1000, 1)
        libfuse.stat(b"/many/0000")
        libfuse.target(b"/many/link")
    assert libfuse.filesystem.stats == ["/many/0000"] * 3
    for line in ("opendir /many", "getattr /many/0000", "readlink /many/link"):
        assert caplog.messages.count(line) == 3
    readings = [line for line in caplog.messages if line.startswith("readdir ")]
    assert len(readings) == 6, "each to its end"


@pytest.mark.parametrize("count", [2, 15, 16, 40])
def test_of_two_of_one_name_the_first_counts(count):
    entries = [msgspec.structs.replace(ENTRY, name=f"{n}", target=f"to {n}") for n in range(count)]
    listing = CachedDirectory((msgspec.structs.replace(ENTRY, name="0"), *entries), Validity(), 1)
    assert listing.entry("0").target is None
    assert listing.entry("1") is entries[1]
    assert listing.entry("none") is None


@pytest.mark.parametrize("room", [1, 7, 1000])
def test_a_listing_is_resumed_where_the_buffer_was_full(libfuse, room):
    found = libfuse.listed(b"/folder", room, 0)
    names = [name for name, *_rest in found]
    assert names == [b".", b"..", b"costly", *(b"%04d" % i for i in range(50))]
    assert [offset for _name, _status, offset, _plus in found] == list(range(1, len(names) + 1))
    assert all(stat.S_IFMT(status.st_mode) for _name, status, *_rest in found)
    assert {plus for *_rest, plus in found} == {0 if libfuse.major == 3 else None}


def test_attributes_come_along_with_folders_and_to_who_looks_at_files():
    libfuse = Libfuse(3)
    of = {name: (status, plus) for name, status, _offset, plus in libfuse.listed(b"/", 1000, 1)}
    assert of[b"folder"][1] == 2, "who lists it will mostly go into it"
    assert of[b"hello"][1] == 0
    libfuse.stat(b"/hello")
    of = {name: (status, plus) for name, status, _offset, plus in libfuse.listed(b"/", 1000, 1)}
    assert (of[b"hello"][0].st_size, of[b"hello"][1]) == (6, 2)
    of = {name: (status, plus) for name, status, _offset, plus in libfuse.listed(b"/folder", 9, 1)}
    assert (of[b"costly"][0].st_size, of[b"costly"][1]) == (0, 0), "who wants them looks it up"
    of = {name: plus for name, _status, _offset, plus in libfuse.listed(b"/", 1000, 0)}
    assert set(of.values()) == {0}, "the kernel wants none"


@pytest.mark.parametrize("many", [8, 40, 400])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 1000])
def test_what_is_listed_again_is_what_was_listed(many, room):
    libfuse = Libfuse(3, MemoryFileSystem(many=many, epoch=1))
    libfuse.stat(b"/hello")
    first, *others = (
        [
            (name, bytes(status), at, plus)
            for name, status, at, plus in libfuse.listed(b"/many", room, 1)
        ]
        for _ in range(4)
    )
    assert len(first) == many + 3, "and the link"
    assert [plus for *_rest, plus in first] == [0, 0] + [2] * (len(first) - 2)
    assert others == [first] * 3
    assert (libfuse.filesystem.listings["/many"].ready is None) == (many == 400)


@pytest.mark.parametrize("epoch", [0, 1], ids=["new", "kept"])
def test_no_attributes_come_along_with_what_was_listed_before_a_change(epoch):
    libfuse = Libfuse(3, MemoryFileSystem(many=50, epoch=epoch))
    libfuse.stat(b"/hello")
    for _ in range(3):
        libfuse.listed(b"/many", 1000, 1)
    scandir = libfuse.filesystem.scandir

    def changed_meanwhile(path, call):
        libfuse.filesystem.local_mutations += 1
        return scandir(path, call)

    libfuse.filesystem.scandir = changed_meanwhile
    assert {plus for *_rest, plus in libfuse.listed(b"/many", 1000, 1)} == {0}


def test_past_the_first_buffer_the_kernel_knows_who_wants_attributes():
    found = [plus for *_rest, plus in Libfuse(3).listed(b"/folder", 10, 1)]
    assert found[:10] == [0] * 10
    assert found[10:] == [2] * (len(found) - 10)


def test_a_binding_gets_our_callbacks_in_place_of_its_own():
    plain = ctypes.CFUNCTYPE(ctypes.c_int)

    class Structure(ctypes.Structure):
        _fields_ = (("getattr", plain), ("mkdir", plain), ("flag", ctypes.c_uint, 1))

    ours = override_callbacks(Structure, {"getattr": plain(lambda: 7)})()
    ours.getattr = plain(lambda: 1)
    ours.mkdir = mkdir = plain(lambda: 2)
    ours.flag = 1
    assert (ours.getattr(), ours.mkdir(), ours.flag) == (7, 2, 1)
    del mkdir


@pytest.mark.parametrize(("module", "major"), [("fuse", 2), ("mfusepy", None)])
def test_the_bindings_structures_can_be_packed(module, major):
    if all(binding.find_library(each) is None for each in ([major] if major else (2, 3))):
        pytest.skip("the binding needs a libfuse to be imported")
    theirs = pytest.importorskip(module, exc_type=(ImportError, OSError))
    found = theirs.c_stat.from_buffer_copy(make_stat_packer(theirs.c_stat)(ATTR))
    assert (found.st_mode, found.st_size, found.st_ino) == (ATTR.mode, ATTR.size_bytes, ATTR.ino)
    assert found.st_mtimespec.tv_nsec == MTIME_NS % 10**9
