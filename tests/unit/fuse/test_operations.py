"""The operations without a kernel."""

import ctypes
import errno
import logging
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tests.support.memoryfs import MemoryFileSystem
from tinkerfs.context import RequestContext, Validity
from tinkerfs.fuse import binding
from tinkerfs.fuse import operations as operations_module
from tinkerfs.fuse.operations import Operations, XattrOperations
from tinkerfs.fuse.stat_callers import StatCallers


class Requests:
    is_interrupted = False

    def interrupted(self):
        return self.is_interrupted

    def context(self):
        return os.getuid(), os.getgid(), os.getpid()

    blocking = staticmethod(nullcontext)


@pytest.fixture
def requests():
    return Requests()


@pytest.fixture
def stopping():
    return threading.Event()


def make_operations(requests, stopping):
    return Operations(
        MemoryFileSystem(), requests, timeout_s=30, stopping=stopping, ready=lambda: None
    )


@pytest.fixture
def operations(requests, stopping):
    return make_operations(requests, stopping)


def public_names(operations=Operations):
    return {name for name in dir(operations) if not name.startswith("_")}


@pytest.mark.parametrize(("module", "major"), [("fuse", 2), ("mfusepy", None)])
def test_a_misspelt_operation_cannot_hide(module, major):
    if all(binding.find_library(each) is None for each in ([major] if major else (2, 3))):
        pytest.skip("the binding needs a libfuse to be imported")
    theirs = pytest.importorskip(module, exc_type=(ImportError, OSError)).Operations
    ours = public_names(XattrOperations) - {
        "add",
        "epoch",
        "flag_nullpath_ok",
        "folder",
        "holds",
        "is_as_it_was",
        "is_stopping",
        "is_traced",
        "known",
        "looked_at_file",
        "looks_at_files",
        "on_open",
        "on_readlink",
        "use_ns",
    }
    assert {name for name in ours if not hasattr(theirs, name)} == set()


def test_extended_attributes_exist_only_where_they_are_wanted():
    assert not {name for name in public_names() if "xattr" in name}
    assert public_names(XattrOperations) - public_names() == {
        "getxattr",
        "listxattr",
        "removexattr",
        "setxattr",
    }


def test_an_interruption_is_eintr(operations, requests):
    requests.is_interrupted = True
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.opendir("/slow/list-1")
    assert failure.value.errno == errno.EINTR


def test_a_mount_that_goes_says_so_to_who_waits(operations, stopping):
    stopping.set()
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.getattr("/slow/stat-1")
    assert failure.value.errno == errno.ENOTCONN


def test_handles_are_used_by_number_alone(operations):
    file = operations.open("/hello", os.O_RDONLY, Validity())
    assert (file.direct_io, file.keep_cache) == (True, False)
    fh, other = operations.register_handle(file), operations.register_handle(file)
    operations.release(other)
    buffer = bytearray(9)
    assert operations.read(fh, memoryview(buffer)[:3], 1) == 3
    assert operations.read(fh, memoryview(buffer)[3:], 4) == 2
    assert bytes(buffer) == b"ello\n\0\0\0\0"
    assert operations.getattr(None, fh).size_bytes == 6
    assert operations.fsync(None, 0, SimpleNamespace(fh=fh)) == 0
    operations.release(fh)
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.read(fh, memoryview(buffer), 1)
    assert failure.value.errno == errno.EBADF


def test_a_path_that_is_gone_is_enoent(operations):
    for attempt in (
        lambda: operations.getattr(None),
        lambda: operations.chmod(None, 0o600),
        lambda: operations.truncate(None, 0),
    ):
        with pytest.raises(FileNotFoundError):
            attempt()


def test_the_page_cache_is_for_what_may_be_kept(operations):
    file = operations.open("/cached-1048576", os.O_RDONLY, Validity())
    assert (file.direct_io, file.keep_cache) == (False, True)


def test_a_listing_is_handed_out_from_any_entry_on(operations):
    fh = operations.opendir("/folder")
    entries = tuple(operations.readdir(fh, 0))
    assert [entry.name for entry in entries[:4]] == [".", "..", "costly", "0000"]
    for index in range(len(entries) + 1):
        assert tuple(operations.readdir(fh, index)) == entries[index:]
    by_name = {entry.name: entry for entry in entries}
    assert by_name["costly"].attr is None
    assert by_name["0000"].attr.size_bytes == 6
    operations.releasedir(fh)
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.readdir(fh, 0)
    assert failure.value.errno == errno.EBADF


def test_who_looks_at_files_is_known_again(operations):
    assert not operations.wants_attributes()
    operations.getattr("/folder")
    assert not operations.wants_attributes(), "who goes through folders may look at nothing else"
    operations.getattr("/hello")
    assert operations.wants_attributes()


def test_only_the_last_lookers_are_remembered():
    lookers = StatCallers()
    for pid in range(100):
        lookers.add(pid)
        lookers.add(pid)
    assert [pid for pid in range(100) if pid in lookers] == [*range(36, 100)]


def test_no_flush_is_asked_for(operations):
    # The kernel then sends none: each close of a file is one crossing less.
    assert not hasattr(operations, "flush")


@pytest.mark.expect_warnings("read 1 failed", "without an errno")
def test_nothing_but_an_errno_gets_out(operations, monkeypatch):
    fh = operations.register_handle(operations.open("/broken", os.O_RDONLY, Validity()))
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.read(fh, memoryview(bytearray(1)), 0)
    assert failure.value.errno == errno.EIO

    def nameless(*_args):
        raise OSError("no number")

    monkeypatch.setattr(operations, "_filesystem", SimpleNamespace(stat=nameless))
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.getattr("/hello")
    assert failure.value.errno == errno.EIO


def test_one_line_for_each_operation(requests, stopping, caplog):
    with caplog.at_level(logging.DEBUG, logger="tinkerfs.fuse.operations"):
        operations = make_operations(requests, stopping)
        operations.getattr("/hello")
        with pytest.raises(FileNotFoundError):
            operations.getattr("/none")
    assert caplog.messages == ["getattr /hello", "getattr /none: ENOENT"]


@pytest.mark.parametrize(
    ("told_ago_s", "took_s", "pause_s"),
    [
        (None, 0.0, None),
        (0.0, 0.0, 1.05),
        (0.3, 0.0, 1.05),  # the answer may have been taken just before the open was sent
        (0.3, 0.5, 0.55),
        (1.0, 0.0, 1.05),
        (1.5, 0.0, 0.55),
        (3.0, 0.0, -0.95),
        (-2.5, 3.0, 0.55),  # told to another process while this open waited
    ],
)
def test_an_open_returns_when_the_kernel_has_forgotten_a_bound(
    operations, monkeypatch, told_ago_s, took_s, pause_s
):
    asked_at, pauses = 1000.0, []
    told_at = None if told_ago_s is None else asked_at - told_ago_s
    now = iter([asked_at, asked_at + took_s])
    monkeypatch.setattr(operations_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    handle = SimpleNamespace(told_at=told_at, direct_io=True, keep_cache=False)
    monkeypatch.setattr(RequestContext, "sleep", lambda _call, seconds: pauses.append(seconds))
    opening = SimpleNamespace(open=lambda _path, _flags, _call: handle)
    monkeypatch.setattr(operations, "_filesystem", opening)
    operations.open("/x", os.O_RDONLY, Validity())
    assert pauses == ([] if pause_s is None else [pytest.approx(pause_s)])


def test_waits_have_the_bounds_of_the_specification(operations, monkeypatch):
    bounds = {}

    class Recording:
        def known(self, _path):
            return None

        def __getattr__(self, name):
            def method(*args):
                (ctx,) = [each for each in args if isinstance(each, RequestContext)]
                bounds[name] = ctx.timeout_s, ctx.page_timeout_s
                raise FileNotFoundError(errno.ENOENT, "recorded")

            return method

    monkeypatch.setattr(operations, "_filesystem", Recording())
    for attempt in (
        lambda: operations.getattr("/x"),
        lambda: operations.opendir("/x"),
        lambda: operations.open("/x", os.O_RDONLY, Validity()),
        lambda: operations.readlink("/x"),
        lambda: operations.unlink("/x"),
        lambda: operations.rmdir("/x"),
        lambda: operations.truncate("/x", 0),
    ):
        with pytest.raises(FileNotFoundError):
            attempt()
    assert bounds == {
        "stat": (5, None),
        "scandir": (30, 10),
        "readlink": (5, None),
        "open": (None, None),
        "unlink": (10, None),
        "rmdir": (10, None),
        "truncate": (30, None),
    }


def test_the_fusepy_codec_passes_every_byte():
    binding._register_codec()
    for data in (b"plain", "ü".encode(), b"\xff\xfe"):
        assert data.decode(binding._CODEC).encode(binding._CODEC) == data
    assert b"\xff".decode(binding._CODEC) == "\udcff"


def test_ctypes_can_hold_what_is_given(operations):
    # fusepy sets a value that is no function straight into its structure.
    assert ctypes.c_uint(operations.flag_nullpath_ok).value == 1
