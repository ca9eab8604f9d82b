"""libfuse's loops: a few threads that take the kernel's requests, and one more for each that waits.

libfuse's own loop starts a thread whenever all others have a request, and the kernel wakes the one
that has been idle for longest. Where the reply to a program makes the scheduler stop the thread
that sent it, that thread counts as busy still: one program that read 4 KiB at a time had 250
threads started, each read was served by the coldest of them, and took 44 us where with two it
takes 29. libfuse 2 ends all but ten again, and making them anew cost as much.

What waits says so (`Call.wait`, `Call.pause`, reads that the disk is needed for): a request that
waits holds up nobody.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Threads that always take requests. They take turns, and each time come back to a processor that
#: has done other work: `ls -lR` took 0.73 s with one, 0.77, 0.85 with three. But not all that takes
#: time says so, and two copy at a time.
CORE_WORKERS = 2
#: And so many more at the most, while as many requests wait.
MAX_EXTRA_WORKERS = 500

#: Room for libfuse's `struct fuse_buf` and `struct fuse_cmdline_opts`, which newer ones lengthen.
_STRUCTURE_BYTES = 256
#: Where in them memory and mountpoint are (fuse_common.h, fuse_lowlevel.h).
_MEM_OFFSET, _MOUNTPOINT_OFFSET = 16, 16

#: What libfuse 3's `fuse_main_real` returns (fuse.h).
_BAD_ARGUMENTS, _NOT_MADE, _NOT_MOUNTED = 1, 3, 4


class _Arguments(ctypes.Structure):
    """`struct fuse_args` (fuse_opt.h)."""

    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.c_void_p),
        ("allocated", ctypes.c_int),
    )


class SessionWorkers:
    """The threads of one mount.

    Args:
        path: of libfuse, as it is loaded.
        major: its version, 2 or 3.
    """

    def __init__(self, path: str, major: int) -> None:
        self._libfuse = _declared(ctypes.CDLL(path), major)
        self._major = major
        self._changed = threading.Condition()
        # All guarded by _changed.
        self._session: int | None = None
        self._waiting = 0
        self._spares = 0

    def main(self, argc: int, argv: Any, operations: Any, size: int, data: Any) -> int:
        """Mount, serve until unmounted, and clean up, as libfuse's `fuse_main_real` does.

        Returns:
            0, or not where it could not be mounted; libfuse has written why to standard error.
        """
        return (self._main_2 if self._major == 2 else self._main_3)(
            argc, argv, ctypes.cast(operations, ctypes.c_void_p), size, data
        )

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Have another thread take requests while the body waits."""
        with self._changed:
            self._waiting += 1
            is_short = (
                self._session is not None
                and self._spares < self._waiting
                and self._spares < MAX_EXTRA_WORKERS
            )
            self._spares += is_short
        if is_short:
            try:
                threading.Thread(target=self._run_extra_worker, name="spare", daemon=True).start()
            except RuntimeError:  # there can be no more threads: it holds up others then
                with self._changed:
                    self._retire_worker()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def _main_2(self, argc: int, argv: Any, operations: Any, size: int, data: Any) -> int:
        place, is_threaded = ctypes.c_void_p(), ctypes.c_int()
        fuse = self._libfuse.fuse_setup(
            argc, argv, operations, size, ctypes.byref(place), ctypes.byref(is_threaded), data
        )
        if not fuse:
            return _NOT_MOUNTED
        self._serve(fuse)
        self._libfuse.fuse_teardown(fuse, place)
        return 0

    def _main_3(self, argc: int, argv: Any, operations: Any, size: int, data: Any) -> int:
        arguments = _Arguments(argc, ctypes.cast(argv, ctypes.c_void_p), 0)
        options = ctypes.create_string_buffer(_STRUCTURE_BYTES)
        if self._libfuse.fuse_parse_cmdline(ctypes.byref(arguments), options):
            return _BAD_ARGUMENTS
        place = ctypes.c_char_p.from_buffer(options, _MOUNTPOINT_OFFSET)
        fuse = self._libfuse.fuse_new(ctypes.byref(arguments), operations, size, data)
        if not fuse:
            return _NOT_MADE
        if self._libfuse.fuse_mount(fuse, place):
            self._libfuse.fuse_destroy(fuse)
            return _NOT_MOUNTED
        os.chdir("/")  # as libfuse does: a mount holds no folder
        self._serve(fuse)
        self._libfuse.fuse_unmount(fuse)
        self._libfuse.fuse_destroy(fuse)
        return 0

    def _serve(self, fuse: int) -> None:
        """Take requests until the mount is gone and each has been answered."""
        session = self._libfuse.fuse_get_session(fuse)
        with self._changed:
            self._session = session
        loop = self._libfuse.fuse_session_loop
        threads = [
            threading.Thread(target=loop, args=(session,), name="requests", daemon=True)
            for _ in range(CORE_WORKERS - 1)
        ]
        for thread in threads:
            thread.start()
        loop(session)
        for thread in threads:
            thread.join()
        with self._changed:
            self._session = None
            self._changed.wait_for(lambda: not self._spares)

    def _run_extra_worker(self) -> None:
        """Take requests while there are no more of these threads than requests that wait."""
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
                came = libfuse.fuse_session_receive_buf(session, buffer, ctypes.byref(channel))
            else:
                came = libfuse.fuse_session_receive_buf(session, buffer)
            if came > 0:  # else the mount is gone; signals are blocked here
                libfuse.fuse_session_process_buf(session, buffer, channel)
            with self._changed:
                if came <= 0 or self._spares > self._waiting:
                    self._retire_worker()
                    break
        libfuse.free(memory)

    def _retire_worker(self) -> None:
        """Count one less; the caller holds the lock."""
        self._spares -= 1
        self._changed.notify_all()


def _declared(libfuse: Any, major: int) -> Any:
    """Return libfuse with the types of what is called here; C's own functions are found in it."""
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "fuse_get_session": (address, (address,)),
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
            "fuse_session_receive_buf": (number, (address, address)),
        }
        # Newer ones have two of the plain name, neither the default (fuse_versionscript).
        if hasattr(libfuse, "fuse_new_31"):
            libfuse.fuse_new = libfuse.fuse_new_31
    for name, (result, arguments) in types.items():
        function = getattr(libfuse, name)
        function.restype, function.argtypes = result, arguments
    return libfuse
