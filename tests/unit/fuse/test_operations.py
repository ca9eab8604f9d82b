"""FUSE operations, without a kernel."""

import errno
import logging
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tests.support.memoryfs import MemoryFileSystem
from tinkerfs.context import RequestContext
from tinkerfs.fuse import operations as operations_module
from tinkerfs.fuse.operations import Operations, XattrOperations
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.fuse.stat_callers import StatCallers
from tinkerfs.operation_log import OperationLog, log_operation
from tinkerfs.telemetry import Telemetry


class Requests:
    was_interrupted = False

    def is_interrupted(self):
        return self.was_interrupted

    def context(self):
        return os.getuid(), os.getgid(), os.getpid()

    blocking = staticmethod(nullcontext)


@pytest.fixture
def requests():
    return Requests()


@pytest.fixture
def stopping():
    return threading.Event()


def make_operations(requests, stopping, operation_log=None):
    return Operations(
        MemoryFileSystem(),
        requests,
        Passthrough(Telemetry()),
        timeout_s=30,
        stopping=stopping,
        ready=lambda: None,
        operation_log=operation_log or OperationLog(),
    )


@pytest.fixture
def operations(requests, stopping):
    return make_operations(requests, stopping)


def public_names(operations=Operations):
    return {name for name in dir(operations) if not name.startswith("_")}


def test_xattr_operations_exist_only_in_their_subclass():
    assert not {name for name in public_names() if "xattr" in name}
    assert public_names(XattrOperations) - public_names() == {
        "getxattr",
        "listxattr",
        "removexattr",
        "setxattr",
    }


def test_interrupted_operation_raises_eintr(operations, requests):
    requests.was_interrupted = True
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.opendir("/slow/list-1")
    assert failure.value.errno == errno.EINTR


def test_operation_of_stopping_mount_raises_enotconn(operations, stopping):
    stopping.set()
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.getattr("/slow/stat-1")
    assert failure.value.errno == errno.ENOTCONN


def test_file_operations_need_only_the_handle_number(operations):
    file = operations.open("/hello", os.O_RDONLY)
    assert (file.direct_io, file.keep_cache) == (True, False)
    fh, other = operations.register_handle(file), operations.register_handle(file)
    operations.release(other)
    buffer = bytearray(9)
    assert operations.read(fh, memoryview(buffer)[:3], 1) == 3
    assert operations.read(fh, memoryview(buffer)[3:], 4) == 2
    assert bytes(buffer) == b"ello\n\0\0\0\0"
    assert operations.getattr(None, fh).size_bytes == 6
    operations.release(fh)
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.read(fh, memoryview(buffer), 1)
    assert failure.value.errno == errno.EBADF


def test_operation_without_path_raises_enoent(operations):
    for attempt in (
        lambda: operations.getattr(None),
        lambda: operations.chmod(None),
        lambda: operations.truncate(None, 0),
    ):
        with pytest.raises(FileNotFoundError):
            attempt()


def test_cacheable_file_opens_with_page_cache(operations):
    file = operations.open("/cached-1048576", os.O_RDONLY)
    assert (file.direct_io, file.keep_cache) == (False, True)


def test_readdir_starts_at_any_index(operations):
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


def test_stat_of_file_marks_caller_as_wanting_attributes(operations):
    assert not operations.wants_attributes()
    operations.getattr("/folder")
    assert not operations.wants_attributes(), "a caller may stat only directories"
    operations.getattr("/hello")
    assert operations.wants_attributes()


def test_stat_callers_evict_the_oldest():
    callers = StatCallers()
    for pid in range(100):
        callers.add(pid)
        callers.add(pid)
    assert [pid for pid in range(100) if pid in callers] == [*range(36, 100)]


def test_operations_have_no_flush(operations):
    # Without it the kernel sends no FLUSH, which saves a request per close.
    assert not hasattr(operations, "flush")


@pytest.mark.expect_warnings("read 1 failed", "without an errno")
def test_unexpected_error_becomes_eio(operations, monkeypatch):
    fh = operations.register_handle(operations.open("/broken", os.O_RDONLY))
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.read(fh, memoryview(bytearray(1)), 0)
    assert failure.value.errno == errno.EIO

    def nameless(*_args):
        raise OSError("no number")

    monkeypatch.setattr(operations, "_filesystem", SimpleNamespace(stat=nameless))
    with pytest.raises(OSError) as failure:  # noqa: PT011
        operations.getattr("/hello")
    assert failure.value.errno == errno.EIO


def test_subscriber_receives_every_operation(requests, stopping):
    operation_log, records = OperationLog(), []
    operations = make_operations(requests, stopping, operation_log)
    fh = operations.register_handle(operations.open("/hello", os.O_RDONLY))
    unsubscribe = operation_log.subscribe(records.append)
    operations.getattr("/folder")
    operations.getattr(None, fh)
    operations.read(fh, memoryview(bytearray(9)), 0)
    operations.release(fh)
    directory = operations.opendir("/folder")
    operations.readdir(directory, 0)
    operations.releasedir(directory)
    with pytest.raises(PermissionError):
        operations.mkdir("/new")
    control = operations.register_handle(operations.open("/control", os.O_WRONLY))
    operations.write(None, b"12", control)
    operations.truncate(None, 7, control)
    operations.fsync(None)
    with pytest.raises(OSError, match="no such open file"):
        operations.read(99, memoryview(bytearray(9)), 0)
    unsubscribe()
    operations.getattr("/hello")
    assert [(record.operation, record.path, record.errno_name) for record in records] == [
        ("getattr", "/folder", ""),
        ("getattr", "/hello", ""),
        ("read", "/hello", ""),
        ("release", "/hello", ""),
        ("opendir", "/folder", ""),
        ("readdir", "/folder", ""),
        ("releasedir", "/folder", ""),
        ("mkdir", "/new", "EPERM"),
        ("open", "/control", ""),
        ("write", "/control", ""),
        ("truncate", "/control", ""),
        ("fsync", "", ""),
        ("read", "", "EBADF"),
    ]
    assert [record.read_bytes for record in records if record.operation == "read"] == [6, 0]
    assert [record.written_bytes for record in records if record.written_bytes] == [2]
    assert {record.caller.pid for record in records} == {os.getpid()}


def test_operation_logs_one_line(requests, stopping, caplog):
    with caplog.at_level(logging.DEBUG, logger="tinkerfs.operation_log"):
        operation_log = OperationLog()
        operation_log.subscribe(log_operation)
        operations = make_operations(requests, stopping, operation_log)
        operations.getattr("/hello")
        with pytest.raises(FileNotFoundError):
            operations.getattr("/none")
    assert caplog.messages == ["getattr /hello", "getattr /none: ENOENT"]


@pytest.mark.parametrize(
    ("reported_ago_s", "duration_s", "pause_s"),
    [
        (None, 0.0, None),
        (0.0, 0.0, 1.05),
        (0.3, 0.0, 1.05),  # the caller may have received the reply just before it sent the open
        (0.3, 0.5, 0.55),
        (1.0, 0.0, 1.05),
        (1.5, 0.0, 0.55),
        (3.0, 0.0, -0.95),
        (-2.5, 3.0, 0.55),  # reported to another process while this open was waiting
    ],
)
def test_open_waits_until_kernel_drops_size_bound(
    operations, monkeypatch, reported_ago_s, duration_s, pause_s
):
    started, pauses = 1000.0, []
    reported_at = None if reported_ago_s is None else started - reported_ago_s
    now = iter([started, started + duration_s])
    monkeypatch.setattr(operations_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    handle = SimpleNamespace(
        size_hint_reported_at=reported_at, direct_io=True, keep_cache=False, backing_fd=None
    )
    monkeypatch.setattr(RequestContext, "sleep", lambda _ctx, seconds: pauses.append(seconds))
    opening = SimpleNamespace(open=lambda _path, _flags, _ctx: handle)
    monkeypatch.setattr(operations, "_filesystem", opening)
    operations.open("/x", os.O_RDONLY)
    assert pauses == ([] if pause_s is None else [pytest.approx(pause_s)])


def test_operations_have_documented_deadlines(operations, monkeypatch):
    bounds = {}

    class Recording:
        def cached_directory(self, _path):
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
        lambda: operations.open("/x", os.O_RDONLY),
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
