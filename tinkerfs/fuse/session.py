"""The FUSE session of a mount, from its first request to its end.

The main thread handles signals and nothing else; libfuse runs in a thread of its own. So a signal
takes effect at once, even while every request hangs.

SIGHUP ends a mount that was started on a terminal, because it means that the terminal is gone.
Other mounts reload their configuration, as services do (systemd.service(5), `ExecReload=`).

An internal error never unmounts: with an empty directory in place of the mount, `rsync --delete`
would empty the other side. A dead mount fails with ENOTCONN, and the next mount removes it.
"""

import contextlib
import functools
import logging
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from tinkerfs import errors
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table, mounted_fd, preflight
from tinkerfs.fuse.binding import Binding
from tinkerfs.fuse.operations import LOOKUP_TIMEOUT_S, Operations, XattrOperations
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.operation_log import OperationLog

if TYPE_CHECKING:
    from tinkerfs.vfs.filesystem import FileSystem

log = logging.getLogger(__name__)

_STOP: Final = (signal.SIGTERM, signal.SIGINT)
_HANGUP: Final = signal.SIGHUP
#: Signal by which the other threads wake the main thread from sigwait.
_WAKE: Final = signal.SIGUSR1
#: Signal that switches debug logging on and off.
_TOGGLE_DEBUG: Final = signal.SIGUSR2

#: Maximum number of open files that a mount needs: blocks, connections, and downloads in flight.
_MAX_OPEN_FILES: Final = 8192

#: Readahead of the kernel, KiB.
_READAHEAD_KIB: Final = 1024

#: Time for a clean exit after a signal. The documented bound is 2 s.
SHUTDOWN_GRACE_S: Final = 1.5


def raise_fd_limit() -> None:
    """Raise the limit of open files towards the hard limit, as far as a mount needs it.

    The usual limit is 1024. Open blocks and connections may need most of that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the lower limit suffices for most mounts
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def block_signals() -> None:
    """Block the signals that end or reload a mount, so that `serve` can wait for them.

    Must be called before any thread starts. An earlier thread would not block them, and their
    default action would end the process.
    """
    signal.pthread_sigmask(
        signal.SIG_BLOCK, stop_signals() | _reload_signals() | {_WAKE, _TOGGLE_DEBUG}
    )


def stop_signals() -> frozenset[signal.Signals]:
    """Return the signals that end a mount, without those that the process ignores.

    nohup(1) ignores SIGHUP. A shell without job control ignores SIGINT for background commands. An
    ignored signal must not be blocked either, because sigwait(2) accepts a blocked signal anyway.
    """
    numbers = (*_STOP, _HANGUP) if _has_terminal() else _STOP
    return frozenset(number for number in numbers if signal.getsignal(number) != signal.SIG_IGN)


def _reload_signals() -> frozenset[signal.Signals]:
    is_used = not _has_terminal() and signal.getsignal(_HANGUP) != signal.SIG_IGN
    return frozenset((_HANGUP,)) if is_used else frozenset()


@functools.cache  # a process loses its terminal when the terminal is closed, before it gets SIGHUP
def _has_terminal() -> bool:
    """Return whether this process had a controlling terminal when it was started."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def is_stop_pending() -> bool:
    """Return whether a signal that ends a mount has arrived before `serve` was called."""
    return bool(signal.sigpending() & stop_signals())


def serve(
    filesystem: "FileSystem",
    binding: Binding,
    mountpoint: str,
    passthrough: Passthrough,
    *,
    operation_log: OperationLog,
    source: str = "tinkerfs",
    timeout_s: float,
    lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
    read_only: bool = False,
    allow_other: bool = False,
    xattr: bool = False,
    ready: Callable[[], None],
    reload: Callable[[], None] = lambda: None,
    toggle_debug: Callable[[], None] = lambda: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Mount, and serve until a signal or an unmount; the mount is gone on return.

    Must be called in the main thread, after `block_signals`. `mountpoint` is an absolute path
    without symbolic links, or `/dev/fd/N`. The mount of a descriptor is not gone on return: its
    requests fail with ENOTCONN when the process has exited, until the other process unmounts it.

    `source` is the device in /proc/mounts. `ready` is called when the mount is ready, `reload`
    after a SIGHUP, `toggle_debug` after a SIGUSR2, and `stopping` before the mount goes down. For
    the timeouts see `Operations`.

    Raises:
        StartupError: libfuse cannot mount, or the session failed.
    """
    fd = mounted_fd.parse_fd(mountpoint)
    session = _SessionThread()
    operations = (XattrOperations if xattr else Operations)(
        filesystem,
        binding.workers,
        passthrough,
        timeout_s=timeout_s,
        lookup_timeout_s=lookup_timeout_s,
        stopping=session.stopping,
        ready=session.on_first_request,
        operation_log=operation_log,
    )
    options = binding.mount_options(source=source, read_only=read_only, allow_other=allow_other)
    with _captured_stderr() as stderr:
        session.start(lambda: binding.run(operations, mountpoint, options))
        is_stopped = session.wait_until_ready()
        output = stderr()
    if session.has_ended:
        raise _mount_error(mountpoint, output, session.failure)
    if not is_stopped:
        if fd is None:
            status = os.stat(mountpoint)  # returns once the session serves requests
            device: str | None = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        else:
            device = mounted_fd.connection_device("/proc/self", fd)
        if device is not None:
            _raise_kernel_readahead(device)
        log.info("%s: mounted by %s", mountpoint, binding)
        ready()
        actions = {**dict.fromkeys(_reload_signals(), reload), _TOGGLE_DEBUG: toggle_debug}
        is_stopped = session.wait_until_ended(actions)
    stopping()
    if is_stopped:
        log.info("%s: received %s, unmounting", mountpoint, session.stop_signal)
        _exit_after_grace_period()
        session.stopping.set()
        if fd is None:
            _lazy_unmount(mountpoint)
            session.join(SHUTDOWN_GRACE_S / 2)
        else:
            binding.workers.request_exit()
    elif session.failure is not None:
        raise StartupError(f"{mountpoint}: the mount failed: {session.failure}")
    else:
        log.info("%s: unmounted", mountpoint)
        _exit_after_grace_period()
        session.stopping.set()


class _SessionThread:
    """The thread that runs libfuse, and its state as the main thread sees it."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.failure: BaseException | None = None
        self.stop_signal = ""
        self._is_ready = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, run: Callable[[], None]) -> None:
        def work() -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001  (reported by the main thread)
                self.failure = error
            self._ended.set()
            _wake_main_thread()

        self._thread = threading.Thread(target=work, name="fuse", daemon=True)
        self._thread.start()

    def on_first_request(self) -> None:
        """Record that the kernel's first request has arrived; called in libfuse's thread."""
        self._is_ready.set()
        _wake_main_thread()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait_until_ready(self) -> bool:
        """Wait until the mount is ready or has ended; return True if a signal arrived first."""
        return self._wait(lambda: self._is_ready.is_set() or self._ended.is_set(), {})

    def wait_until_ended(self, actions: Mapping[signal.Signals, Callable[[], None]]) -> bool:
        """Wait until the session has ended; return True if a stop signal arrived first.

        The actions are called for other signals meanwhile.
        """
        return self._wait(self._ended.is_set, actions)

    def _wait(
        self, is_over: Callable[[], bool], actions: Mapping[signal.Signals, Callable[[], None]]
    ) -> bool:
        while not is_over():
            number = signal.Signals(signal.sigwait({*stop_signals(), *actions, _WAKE}))
            if number in actions:
                actions[number]()
            elif number != _WAKE:
                self.stop_signal = number.name
                return True
        return False

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)


def _wake_main_thread() -> None:
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, _WAKE)


def _raise_kernel_readahead(device: str) -> None:
    """Raise the kernel's readahead, so that it sends fewer and larger reads; only root may."""
    path = f"/sys/class/bdi/{device}/read_ahead_kb"
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
        file.write(str(_READAHEAD_KIB))


def _lazy_unmount(mountpoint: str) -> None:
    """Detach the mount, even while processes use it; their requests fail with ENOTCONN."""
    try:
        mount_table.unmount(mountpoint, lazy=True)
    except OSError as error:
        if mount_table.find_mount(mountpoint) is not None:
            log.error("%s cannot be unmounted: %s", mountpoint, error)  # noqa: TRY400


def _exit_after_grace_period() -> None:
    """Exit with status 0 after the grace period, unless the process has ended by then.

    The interpreter joins all threads when it exits, and a thread may be blocked in a request to a
    server that hangs. By then the mount is gone, and the caches on disk are written in
    transactions. So an exit without waiting loses nothing.
    """

    def exit_now() -> None:
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(SHUTDOWN_GRACE_S, exit_now)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture what libfuse writes to stderr; yields a function that returns it so far."""
    sys.stderr.flush()
    saved = os.dup(2)
    # In memory, because a container may have no writable directory.
    with os.fdopen(os.memfd_create("stderr"), "w+b") as file:
        os.dup2(file.fileno(), 2)

        def read_output() -> str:
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        try:
            yield read_output
        finally:
            os.dup2(saved, 2)
            os.close(saved)


#: EACCES of mount(2). fusermount3 has checked the mountpoint by then, and without the privilege to
#: mount the error would be EPERM.
_APPARMOR_REFUSAL: Final = re.compile(r"fusermount3?: mount failed: Permission denied")


def _mount_error(mountpoint: str, output: str, failure: BaseException | None) -> StartupError:
    """Return an error with the output of libfuse, or else with the exception that ended it."""
    reason = "; ".join(dict.fromkeys(line.strip() for line in output.splitlines() if line.strip()))
    # The bindings raise an exception that contains only libfuse's status number.
    if not reason and failure is not None and not isinstance(next(iter(failure.args), None), int):
        reason = f"{type(failure).__name__}: {failure}"
    reason = errors.redact(reason) or "libfuse gave no reason"
    hint = "see tinkerfs doctor"
    if _APPARMOR_REFUSAL.search(reason) and preflight.may_be_apparmor():
        hint = (
            "AppArmor confines fusermount3 here: mount below your home directory, /mnt, /media or"
            " /tmp, or as root allow the path in /etc/apparmor.d/local/fusermount3 and run"
            " apparmor_parser -r /etc/apparmor.d/fusermount3; dmesg shows what was denied"
        )
    elif "not permitted" in reason.lower() or "permission denied" in reason.lower():
        hint = (
            "the privilege to mount is missing; start a container with"
            " --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined"
        )
    return StartupError(f"cannot mount on {mountpoint}: {reason} (hint: {hint})")
