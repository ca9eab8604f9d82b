"""One mount in this process, from its checks to its end: what `mount` and `demo` have in common."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from tinkerfs.config import Settings
from tinkerfs.errors import StartupError, TinkerfsError, Unauthorized

if TYPE_CHECKING:
    from tinkerfs.api.client import Client
    from tinkerfs.fuse.daemonize import ReadinessNotifier

log = logging.getLogger(__name__)

#: How long a mount waits to hear that the key is right, before it comes up without knowing.
KEY_CHECK_TIMEOUT_S: Final = 3.0

FOREGROUND: Final = "--foreground"


def start_in_background(command: str, mountpoint: str, arguments: Sequence[str]) -> None:
    """Run `tinkerfs COMMAND --foreground MOUNTPOINT` in another process until the mount answers.

    Raises:
        SetupError: it will not, and why.
    """
    from tinkerfs.cli.daemon import daemon_command, daemon_environment
    from tinkerfs.fuse.daemonize import start_in_background as start

    # The absolute path: the process leaves our folder, and others find it by this argument. Links
    # are followed only by the checks there: following one to a dead mount would fail here.
    path = os.path.abspath(mountpoint)
    full_command = daemon_command([command, FOREGROUND, *arguments, "--", path])
    start(full_command, daemon_environment(os.environ))


def run_foreground(
    settings: Settings,
    mountpoint: str,
    *,
    check_key: bool = True,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Mount, serve until a signal or an unmount, and return.

    Args:
        settings: of the mount.
        mountpoint: where; an empty folder, or one that a dead mount has left.
        check_key: make sure first that the API takes the key.
        ready: called with the mountpoint's path once the mount answers.

    Raises:
        SetupError: it will not be, in one line with its cure.
    """
    from tinkerfs.fuse.daemonize import ReadinessNotifier

    announcer = ReadinessNotifier()
    try:
        _serve(settings, mountpoint, announcer, check_key=check_key, ready=ready)
    except TinkerfsError as error:
        if announcer.has_parent:  # the process that waits says it, once
            announcer.failed(str(error))
            raise SystemExit(1) from None
        raise
    except Exception as error:
        announcer.failed(f"internal error: {type(error).__name__}: {error}")
        raise


def _serve(
    settings: Settings,
    mountpoint: str,
    announcer: "ReadinessNotifier",
    *,
    check_key: bool,
    ready: Callable[[str], None] | None,
) -> None:
    from tinkerfs.cli import logs
    from tinkerfs.fuse import binding as bindings
    from tinkerfs.fuse import preflight, session
    from tinkerfs.fuse.malloc import tune_malloc

    # All before any thread starts; signals that end a mount wait for it to be served.
    session.block_signals()
    tune_malloc()
    session.raise_fd_limit()
    logs.set_up(settings.log_level, settings.log_file, to_stderr=True)
    preflight.check_device()
    binding = bindings.load_binding()
    preflight.check_fusermount(binding.library.major)
    if settings.allow_other:
        preflight.check_allow_other()
    path = preflight.prepare_mountpoint(mountpoint)

    from tinkerfs.app import open_app

    with open_app(settings) as parts:
        if check_key:
            _verify_credentials(parts.client)
        if session.is_stop_pending():
            raise StartupError("asked to end before the mount was made")

        def answered() -> None:
            if ready is not None:
                ready(path)
            if announcer.has_parent:
                # Warnings so far were for who mounts. From now on nobody reads standard error, and
                # `tinkerfs mount X 2>&1 | tee` would wait for its end.
                logs.set_up(settings.log_level, settings.log_file, to_stderr=False)
            announcer.ready()

        session.serve(
            parts.filesystem,
            binding,
            path,
            timeout_s=settings.timeout_s,
            read_only=settings.read_only,
            allow_other=settings.allow_other,
            xattr=settings.xattr,
            ready=answered,
        )


def _verify_credentials(client: "Client") -> None:
    """Refuse a mount that could only answer "Permission denied"; let one without a network be.

    Raises:
        SetupError: there is no key, or the API does not take it.
    """
    from tinkerfs.concurrency import run_in_thread
    from tinkerfs.fuse import session

    answer = run_in_thread(lambda: client.list_training_runs(limit=1), "first look at the server")
    waited_s, step_s = 0.0, 0.05
    while waited_s < KEY_CHECK_TIMEOUT_S and not session.is_stop_pending():
        try:
            answer.result(step_s)
        except TimeoutError:
            waited_s += step_s
            continue
        except Unauthorized as error:
            if error.status is None:  # there is no key to send: the message has the cure
                raise StartupError(error.message) from None
            raise StartupError(
                f"the API does not take the key: {error.message}: set TINKER_API_KEY to one that is"
                " valid, or run `tinker auth login`"
            ) from None
        except StartupError:
            raise
        except TinkerfsError as error:
            log.warning("mounting without an answer from the server: %s", error)
        return
    log.warning("mounting without an answer from the server in %g s", KEY_CHECK_TIMEOUT_S)
