"""Run one mount in this process, from its checks to the unmount.

The commands `mount` and `demo` use this module.
"""

import os
from collections.abc import Callable

from tinkerfs.cli import logs
from tinkerfs.cli.key_check import verify_credentials
from tinkerfs.cli.reloader import Reload, SettingsReloader
from tinkerfs.cli.service import MountService, describe_mount
from tinkerfs.cli.service_notifier import ServiceNotifier
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError, TinkerfsError
from tinkerfs.fuse import binding as bindings
from tinkerfs.fuse import mounted_fd, preflight, session, stack_dump
from tinkerfs.fuse.binding import Binding
from tinkerfs.fuse.daemonize import ReadinessNotifier
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.operating_system import tune_malloc
from tinkerfs.prometheus import serve_metrics
from tinkerfs.tracing import export_traces


def run_foreground(
    settings: Settings,
    mountpoint: str,
    *,
    source: str = "tinkerfs",
    check_key: bool = True,
    ready: Callable[[str], None] | None = None,
    reload: Reload | None = None,
) -> None:
    """Mount and serve until a signal or an unmount.

    `mountpoint` is an empty directory, or has a dead mount of tinkerfs, or is `/dev/fd/N`. `source`
    is what /proc/mounts shows as the mounted device; mount(8) compares it with a line of fstab.
    `ready` is called with the mountpoint's path when the mount is ready. `reload` is
    `options.reload_settings`; without it, no option can change.

    Raises:
        StartupError: The mount is not possible; the message has a hint.
    """
    notifier = ReadinessNotifier()
    try:
        _serve(
            settings,
            mountpoint,
            notifier,
            source=source,
            check_key=check_key,
            ready=ready,
            reload=reload,
        )
    except TinkerfsError as error:
        if notifier.has_parent:  # the parent prints the message; do not print it twice
            notifier.failed(str(error))
            raise SystemExit(1) from None
        raise
    except Exception as error:
        notifier.failed(f"internal error: {type(error).__name__}: {error}")
        raise


def _serve(
    settings: Settings,
    mountpoint: str,
    notifier: ReadinessNotifier,
    *,
    source: str,
    check_key: bool,
    ready: Callable[[str], None] | None,
    reload: Reload | None,
) -> None:
    service_notifier = ServiceNotifier()
    if notifier.has_parent:  # a mount in the background belongs to no service
        service_notifier = ServiceNotifier({})
    # These calls precede the first thread. Signals stay blocked until the mount is served.
    session.block_signals()
    tune_malloc()
    session.raise_fd_limit()
    stack_dump.enable()
    _set_up_log(settings, to_stderr=True)
    fd = mounted_fd.parse_fd(mountpoint)
    if fd is None:
        binding, path = _prepare_mountpoint(mountpoint, settings)
    else:
        if service_notifier.watchdog_s is not None:
            raise StartupError(f"no watchdog can check {mountpoint} (hint: remove WatchdogSec=)")
        binding, path = _prepare_fd(fd), mountpoint

    from tinkerfs.app import open_app  # lazy: imports HTTP and SQLite, the checks need neither

    with (
        open_app(settings) as app,
        serve_metrics(settings.metrics, app.telemetry),
        export_traces(app.telemetry),
    ):
        if check_key:
            verify_credentials(app.client, session.is_stop_pending)
        if session.is_stop_pending():
            raise StartupError("interrupted before the mount was ready")

        service = MountService(service_notifier, path, lambda: describe_mount(app))

        def on_ready() -> None:
            if ready is not None:
                ready(path)
            if notifier.has_parent:
                # Warnings during startup are for the user at the terminal. After that, keeping
                # standard error open would block `tinkerfs mount X 2>&1 | tee`, which reads to EOF.
                _set_up_log(settings, to_stderr=False)
            notifier.ready()
            service.on_ready()

        reloader = SettingsReloader(app, settings, reload)
        session.serve(
            app.filesystem,
            binding,
            path,
            Passthrough(app.telemetry),
            operation_log=app.telemetry.operations,
            source=source,
            timeout_s=settings.timeout_s,
            read_only=settings.read_only,
            allow_other=settings.allow_other,
            xattr=settings.xattr,
            ready=on_ready,
            reload=lambda: service.on_reload(reloader.reload),
            toggle_debug=reloader.toggle_debug,
            stopping=service.on_stopping,
        )


def _set_up_log(settings: Settings, *, to_stderr: bool) -> None:
    logs.set_up(
        settings.log_level,
        settings.log_file,
        to_stderr=to_stderr,
        log_format=settings.log_format,
    )


def _prepare_mountpoint(mountpoint: str, settings: Settings) -> tuple[Binding, str]:
    """Return the binding, and the path of a directory that can be mounted on."""
    preflight.check_device()
    binding = bindings.load_binding()
    preflight.check_fusermount(binding.library.major)
    if settings.allow_other:
        preflight.check_allow_other()
    return binding, preflight.prepare_mountpoint(mountpoint)


def _prepare_fd(fd: int) -> Binding:
    """Return the binding for a descriptor that another process mounted."""
    mounted_fd.check_fd(fd)
    os.set_inheritable(fd, False)
    binding = bindings.load_binding()
    if binding.library.major == 2:
        raise StartupError(
            f"{binding.library} cannot serve a descriptor, libfuse 3 can (hint: apt install fuse3)"
        )
    return binding
