"""One mount, from its first request to its end.

The main thread owns the signals and nothing else; libfuse's loop runs in a thread of its own. So a
signal is acted upon at once, however many requests hang.

A mount is never unmounted because something went wrong inside: an empty folder in its place makes
`rsync --delete` empty the other side. A dead one says ENOTCONN, and the next mount cleans it up.
"""

import contextlib
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from tinkerfs import errors
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table, preflight
from tinkerfs.fuse.binding import Binding
from tinkerfs.fuse.operations import LOOKUP_TIMEOUT_S, Operations, XattrOperations

if TYPE_CHECKING:
    from tinkerfs.vfs.filesystem import FileSystem

log = logging.getLogger(__name__)

_STOP: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: By it the other threads wake the main thread from sigwait.
_WAKE: Final = signal.SIGUSR1

#: The most files that a mount can want open: blocks, connections, and what is on its way.
_OPEN_FILES: Final = 8192

#: How far the kernel reads ahead of a program, KiB.
_READ_AHEAD_KIB: Final = 1024

#: After a signal: how long the process may take to end tidily. The promise is 2 s.
SHUTDOWN_GRACE_S: Final = 1.5


def raise_fd_limit() -> None:
    """Let the process have as many files open as it may, up to what a mount can want.

    Usual are 1024, of which blocks that are kept open and connections may take most.
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        with contextlib.suppress(OSError, ValueError):  # it does with what it has
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def block_signals() -> None:
    """Keep the signals that end a mount for `serve` to take; call before any thread starts.

    A thread that started earlier would take them with their default action, which is to die.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals() | {_WAKE})


def stop_signals() -> frozenset[signal.Signals]:
    """Return the signals that end a mount: not those that were ignored when the process started.

    nohup(1) ignores SIGHUP, and a shell without job control SIGINT of what runs in the background.
    One that is ignored must not be blocked either: sigwait(2) takes a blocked signal all the same.
    """
    return frozenset(number for number in _STOP if signal.getsignal(number) != signal.SIG_IGN)


def is_stop_pending() -> bool:
    """Tell whether a signal has come that `serve` has not been there to take."""
    return bool(signal.sigpending() & stop_signals())


def serve(
    filesystem: "FileSystem",
    binding: Binding,
    mountpoint: str,
    *,
    timeout_s: float,
    lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
    read_only: bool = False,
    allow_other: bool = False,
    xattr: bool = False,
    ready: Callable[[], None],
) -> None:
    """Mount, serve until a signal or an unmount, and return; the mount is gone then.

    To be called in the main thread, after `block_signals`.

    Args:
        filesystem: what is served.
        binding: who talks to the kernel.
        mountpoint: an absolute path without links.
        timeout_s: bound on waits.
        lookup_timeout_s: bound on the wait for a name that no listing has.
        read_only: the kernel refuses changes.
        allow_other: the kernel lets other users in.
        xattr: the operations of extended attributes exist.
        ready: called once the mount answers.

    Raises:
        SetupError: libfuse cannot mount.
    """
    loop = _SessionThread()
    operations = (XattrOperations if xattr else Operations)(
        filesystem,
        binding,
        timeout_s=timeout_s,
        lookup_timeout_s=lookup_timeout_s,
        stopping=loop.stopping,
        ready=loop.answered,
    )
    options = binding.mount_options(read_only=read_only, allow_other=allow_other)
    with _captured_stderr() as words:
        loop.start(lambda: binding.run(operations, mountpoint, options))
        asked = loop.wait_for_the_kernel()
        reason = words()
    if loop.has_ended:
        raise _refusal(mountpoint, reason, loop.failure)
    if not asked:
        # The first answer: everybody else waits for the same.
        _raise_kernel_readahead(os.stat(mountpoint).st_dev)
        log.info("%s: mounted by %s", mountpoint, binding)
        ready()
        asked = loop.wait_for_the_end()
    if asked:
        log.info("%s: asked to end by %s", mountpoint, loop.stop_signal)
        _exit_after_grace_period()
        loop.stopping.set()
        _lazy_unmount(mountpoint)
        loop.join(SHUTDOWN_GRACE_S / 2)
    elif loop.failure is not None:
        raise StartupError(f"{mountpoint}: the mount ended: {loop.failure}")
    else:
        log.info("%s: unmounted", mountpoint)
        _exit_after_grace_period()
        loop.stopping.set()


class _SessionThread:
    """libfuse's loop in its thread, and how the main thread learns what becomes of it."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.failure: BaseException | None = None
        self.stop_signal = ""
        self._answered = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, run: Callable[[], None]) -> None:
        def work() -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001  (told by the main thread)
                self.failure = error
            self._ended.set()
            _wake_the_main_thread()

        self._thread = threading.Thread(target=work, name="fuse", daemon=True)
        self._thread.start()

    def answered(self) -> None:
        """Say that the kernel's first request has come; called by libfuse's thread."""
        self._answered.set()
        _wake_the_main_thread()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait_for_the_kernel(self) -> bool:
        """Wait until the mount answers or the loop has ended; True when a signal came first."""
        return self._wait(lambda: self._answered.is_set() or self._ended.is_set())

    def wait_for_the_end(self) -> bool:
        """Wait until the loop has ended; True when a signal came first."""
        return self._wait(self._ended.is_set)

    def _wait(self, is_over: Callable[[], bool]) -> bool:
        while not is_over():
            number = signal.sigwait(stop_signals() | {_WAKE})
            if number != _WAKE:
                self.stop_signal = signal.Signals(number).name
                return True
        return False

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)


def _wake_the_main_thread() -> None:
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, _WAKE)


def _raise_kernel_readahead(device: int) -> None:
    """Let the kernel ask for more at a time, where we may: root alone can.

    Each of its reads costs a turn through Python. With 1 MiB ahead instead of its 128 KiB, 1 GB was
    read from blocks on disk in 0.95 s instead of 1.8 s, and cold in 3.5 s instead of 4.3 s.
    """
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
        file.write(str(_READ_AHEAD_KIB))


def _lazy_unmount(mountpoint: str) -> None:
    """Take the mount out of the tree, whoever holds it: they are told ENOTCONN."""
    try:
        mount_table.unmount(mountpoint, lazy=True)
    except OSError as error:
        if mount_table.find_mount(mountpoint) is not None:
            log.error("%s cannot be unmounted: %s", mountpoint, error)  # noqa: TRY400


def _exit_after_grace_period() -> None:
    """End the process with status 0 soon, if it has not ended itself by then.

    The interpreter joins all worker threads when it exits, and one of them may sit in a call to a
    server that does not answer. The mount is gone from the tree by then, and what is kept on disk
    is written in transactions, so nothing is lost by not waiting for it.
    """

    def end() -> None:
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(SHUTDOWN_GRACE_S, end)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Collect what libfuse writes to descriptor 2, for the one line that a failure becomes."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as words:
        os.dup2(words.fileno(), 2)

        def so_far() -> str:
            words.seek(0)
            return words.read().decode("utf-8", "replace")

        try:
            yield so_far
        finally:
            os.dup2(saved, 2)
            os.close(saved)


#: EACCES of mount(2): fusermount3 has checked the mountpoint, and lacks a right with EPERM.
_APPARMOR_REFUSAL: Final = re.compile(r"fusermount3?: mount failed: Permission denied")


def _refusal(mountpoint: str, words: str, failure: BaseException | None) -> StartupError:
    """Return why there is no mount: what libfuse wrote, or else what ended its loop."""
    reason = "; ".join(dict.fromkeys(line.strip() for line in words.splitlines() if line.strip()))
    # The bindings raise libfuse's mere number.
    if not reason and failure is not None and not isinstance(next(iter(failure.args), None), int):
        reason = f"{type(failure).__name__}: {failure}"
    reason = errors.redact(reason) or "libfuse gave no reason"
    cure = "see `tinkerfs doctor`"
    if _APPARMOR_REFUSAL.search(reason) and preflight.may_be_apparmor():
        cure = (
            "AppArmor confines fusermount3 here: mount below your home directory, /mnt, /media or"
            " /tmp, or have root allow the place in /etc/apparmor.d/local/fusermount3 and run"
            " apparmor_parser -r /etc/apparmor.d/fusermount3; dmesg names what was denied"
        )
    elif "not permitted" in reason.lower() or "permission denied" in reason.lower():
        cure = (
            "mounting needs a right that is missing here; in a container, start it with"
            " --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined"
        )
    return StartupError(f"cannot mount on {mountpoint}: {reason}: {cure}")
