"""Worker threads of a FUSE session: two workers, and an extra one per blocked request.

A handler marks its wait as a blocking section (`RequestContext.wait_for`, `sleep`, and reads that
need the disk). An extra worker then takes requests in its place, so that a blocked request never
delays other requests.

The thread pool of libfuse starts a thread whenever all others are busy, and the kernel wakes the
thread that has been idle longest. That makes small reads much slower. libfuse 2 also ends all but
ten of its threads, and starts them again.
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: Number of workers that always run. One would be faster for a single process, because workers
#: displace each other's data from the CPU caches. A second one serves requests while the first one
#: works outside a blocking section, for example copies data.
CORE_WORKERS = 2
#: Maximum number of extra workers.
MAX_EXTRA_WORKERS = 500

#: Large enough for `struct fuse_buf` and `struct fuse_cmdline_opts` of current and later libfuses.
_STRUCTURE_BYTES = 256
#: Offsets of the buffer and of the mountpoint in these structures (fuse_common.h, fuse_lowlevel.h).
_MEM_OFFSET, _MOUNTPOINT_OFFSET = 16, 16

#: Return values of libfuse 3's `fuse_main_real` (fuse.h).
_INVALID_ARGUMENTS, _SETUP_FAILED, _MOUNT_FAILED = 1, 3, 4


class _Arguments(ctypes.Structure):
    """`struct fuse_args` (fuse_opt.h)."""

    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.c_void_p),
        ("allocated", ctypes.c_int),
    )


class _Context(ctypes.Structure):
    """The first fields of `struct fuse_context` (fuse.h)."""

    _fields_ = (
        ("fuse", ctypes.c_void_p),
        ("uid", ctypes.c_uint),
        ("gid", ctypes.c_uint),
        ("pid", ctypes.c_int),
    )


class SessionWorkers:
    """The worker threads of one mount, and information about the requests that they serve.

    Args:
        path: path of the loaded libfuse.
        major: its major version, 2 or 3.
    """

    def __init__(self, path: str, major: int) -> None:
        self._libfuse = _declared(ctypes.CDLL(path), major)
        self._get_context = _context_function(path)
        self._major = major
        self._changed = threading.Condition()
        # All guarded by _changed. Core workers are not counted.
        self._session: int | None = None
        self._blocked = 0
        self._extra_workers = 0

    def main(self, arguments: Sequence[bytes], operations: ctypes.Structure) -> int:
        """Mount, serve until unmounted, and clean up, as libfuse's `fuse_main_real` does.

        Args:
            arguments: the command line, beginning with a program name.
            operations: a `struct fuse_operations`.

        Returns:
            0, or another number if mounting failed; libfuse has written the reason to stderr.
        """
        argv = (ctypes.c_char_p * len(arguments))(*arguments)
        mount_and_serve = self._main_2 if self._major == 2 else self._main_3
        return mount_and_serve(
            len(arguments), argv, ctypes.addressof(operations), ctypes.sizeof(operations)
        )

    def is_interrupted(self) -> bool:
        """Return whether the caller of the request that this thread serves was interrupted."""
        return bool(self._libfuse.fuse_interrupted())

    def context(self) -> tuple[int, int, int]:
        """Return (uid, gid, pid) of the caller of the request that this thread serves."""
        context = self._get_context().contents
        return context.uid, context.gid, context.pid

    def session_fd(self) -> int:
        """Return the descriptor of /dev/fuse; libfuse 3 only, while the session is served."""
        return int(self._libfuse.fuse_session_fd(self._session))

    def request_exit(self) -> None:
        """Let each worker end after its next request; for a mount that stays mounted."""
        with self._changed:
            if self._session is not None:
                self._libfuse.fuse_session_exit(self._session)

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Mark a blocking section; an extra worker takes requests meanwhile."""
        with self._changed:
            self._blocked += 1
            is_needed = (
                self._session is not None
                and self._extra_workers < self._blocked
                and self._extra_workers < MAX_EXTRA_WORKERS
            )
            self._extra_workers += is_needed
        if is_needed:
            try:
                threading.Thread(
                    target=self._run_extra_worker, name="fuse-extra", daemon=True
                ).start()
            except RuntimeError:  # no more threads can be started; other requests are delayed
                with self._changed:
                    self._retire_worker()
        try:
            yield
        finally:
            with self._changed:
                self._blocked -= 1

    def _main_2(self, argc: int, argv: Any, operations: int, size: int) -> int:
        mountpoint, is_threaded = ctypes.c_void_p(), ctypes.c_int()
        fuse = self._libfuse.fuse_setup(
            argc, argv, operations, size, ctypes.byref(mountpoint), ctypes.byref(is_threaded), None
        )
        if not fuse:
            return _MOUNT_FAILED
        self._serve(fuse)
        self._libfuse.fuse_teardown(fuse, mountpoint)
        return 0

    def _main_3(self, argc: int, argv: Any, operations: int, size: int) -> int:
        arguments = _Arguments(argc, ctypes.cast(argv, ctypes.c_void_p), 0)
        options = ctypes.create_string_buffer(_STRUCTURE_BYTES)
        if self._libfuse.fuse_parse_cmdline(ctypes.byref(arguments), options):
            return _INVALID_ARGUMENTS
        mountpoint = ctypes.c_char_p.from_buffer(options, _MOUNTPOINT_OFFSET)
        fuse = self._libfuse.fuse_new(ctypes.byref(arguments), operations, size, None)
        if not fuse:
            return _SETUP_FAILED
        if self._libfuse.fuse_mount(fuse, mountpoint):
            self._libfuse.fuse_destroy(fuse)
            return _MOUNT_FAILED
        os.chdir("/")  # as libfuse does, so that the mount keeps no directory busy
        self._serve(fuse)
        self._libfuse.fuse_unmount(fuse)
        self._libfuse.fuse_destroy(fuse)
        return 0

    def _serve(self, fuse: int) -> None:
        """Run the core workers until the mount is gone and every request has been served."""
        session = self._libfuse.fuse_get_session(fuse)
        with self._changed:
            self._session = session
        loop = self._libfuse.fuse_session_loop
        threads = [
            threading.Thread(target=loop, args=(session,), name="fuse-worker", daemon=True)
            for _ in range(CORE_WORKERS - 1)
        ]
        for thread in threads:
            thread.start()
        loop(session)
        for thread in threads:
            thread.join()
        with self._changed:
            self._session = None
            self._changed.wait_for(lambda: not self._extra_workers)

    def _run_extra_worker(self) -> None:
        """Serve requests until there are more extra workers than blocked requests."""
        libfuse, session = self._libfuse, self._session
        buffer = ctypes.create_string_buffer(_STRUCTURE_BYTES)
        memory = ctypes.c_void_p.from_buffer(buffer, _MEM_OFFSET)
        channel = ctypes.c_void_p()
        if self._major == 2:
            channel.value = libfuse.fuse_session_next_chan(session, None)
            size = libfuse.fuse_chan_bufsize(channel)
            memory.value = libfuse.malloc(size)
        while True:
            if self._major == 2:
                ctypes.c_size_t.from_buffer(buffer).value = size
                received = libfuse.fuse_session_receive_buf(session, buffer, ctypes.byref(channel))
            else:
                received = libfuse.fuse_session_receive_buf(session, buffer)
            if received > 0:  # otherwise the mount is gone; signals are blocked here
                libfuse.fuse_session_process_buf(session, buffer, channel)
            with self._changed:
                if received <= 0 or self._extra_workers > self._blocked:
                    self._retire_worker()
                    break
        libfuse.free(memory)

    def _retire_worker(self) -> None:
        """Decrement the number of extra workers; the caller holds the lock."""
        self._extra_workers -= 1
        self._changed.notify_all()


def _context_function(path: str) -> Any:
    """Return libfuse's `fuse_get_context`, without releasing the GIL.

    The call takes next to no time. Releasing the GIL would cause a thread switch for each request
    while several processes send requests.
    """
    function = ctypes.PyDLL(path).fuse_get_context
    function.restype = ctypes.POINTER(_Context)
    return function


def _declared(libfuse: Any, major: int) -> Any:
    """Declare the types of the called functions of libfuse, and of malloc and free; return it."""
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "fuse_get_session": (address, (address,)),
        "fuse_interrupted": (number, ()),
        "fuse_session_exit": (None, (address,)),
        "fuse_session_loop": (number, (address,)),
        "fuse_session_process_buf": (None, (address, address, address)),
        "malloc": (address, (size,)),
        "free": (None, (address,)),
    }
    if major == 2:
        types |= {
            "fuse_setup": (address, (number, address, address, size, address, address, address)),
            "fuse_teardown": (None, (address, address)),
            "fuse_session_next_chan": (address, (address, address)),
            "fuse_chan_bufsize": (size, (address,)),
            "fuse_session_receive_buf": (number, (address, address, address)),
        }
    else:
        types |= {
            "fuse_parse_cmdline": (number, (address, address)),
            "fuse_new": (address, (address, address, size, address)),
            "fuse_mount": (number, (address, address)),
            "fuse_unmount": (None, (address,)),
            "fuse_destroy": (None, (address,)),
            "fuse_session_fd": (number, (address,)),
            "fuse_session_receive_buf": (number, (address, address)),
        }
        # Newer versions have two symbols named fuse_new and no default (fuse_versionscript).
        if hasattr(libfuse, "fuse_new_31"):
            libfuse.fuse_new = libfuse.fuse_new_31
    for name, (result, arguments) in types.items():
        function = getattr(libfuse, name)
        function.restype, function.argtypes = result, arguments
    return libfuse
