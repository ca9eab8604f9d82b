"""The parts of a debug bundle. Each is bounded in time and size, and redacted."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import click

from tinkerfs import __version__
from tinkerfs.cli.daemon import daemon_command
from tinkerfs.cli.known_secrets import environment_of, find_secrets, key_files_of
from tinkerfs.cli.options import config_file_of, settings_of, source_of
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table, stack_dump
from tinkerfs.fuse.mount_table import Mount
from tinkerfs.printable import hide_secret, redacted_lines
from tinkerfs.safe_open import read_regular

#: Time for `doctor`, which may run a credential command and send two requests.
_DOCTOR_S: Final = 60.0
#: Time for a command that reads the cache.
_CACHE_S: Final = 20.0
#: Length of the end of a log file that is included.
_LOG_BYTES: Final = 256 << 10
_MAX_LINE_CHARS: Final = 4000

#: Names of the environment variables that change what tinkerfs does, or how Python runs it.
_PREFIXES: Final = ("TINKER", "PYTHON", "SSL_CERT", "XDG_", "FUSE_", "MALLOC_")
_SUFFIXES: Final = ("_PROXY", "_CA_BUNDLE")

Part = tuple[str, str]


def collect(
    mountpoint: str | None, log_file: str | None, ctx: click.Context
) -> tuple[dict[str, str], list[Part]]:
    """Return the known secrets, and the redacted parts as (name, text).

    Args:
        mountpoint: the mount to include; None for all mounts of this user and root.
        log_file: log to include for a mount that does not report its own.
        ctx: the context of the command, with the settings.

    Raises:
        StartupError: the mountpoint is not a mount of tinkerfs.
    """
    mounts = _select(mountpoint)
    pids = {mount.mountpoint: _daemon_of(mount) for mount in mounts}
    daemons = [pid for pid in pids.values() if pid]
    key_files = [path for pid in daemons for path in key_files_of(pid)]
    if own := ctx.params.get("api_key_file"):
        key_files.append(own)
    environments: list[Mapping[str, str]] = [os.environ, *map(environment_of, daemons)]
    if url := ctx.params.get("shared_cache"):  # perhaps of a file
        environments.append({"shared-cache": url})
    secrets = find_secrets(environments, dict.fromkeys(key_files))
    for secret in secrets:
        hide_secret(secret, "bundle")
    environ = {**os.environ, "TINKERFS_CONFIG": config_file_of(ctx) or ""}
    with ThreadPoolExecutor(max_workers=8) as pool:
        of_mounts = [
            pool.submit(_mount_parts, mount, pids[mount.mountpoint], log_file) for mount in mounts
        ]
        commands = {
            "doctor.txt": pool.submit(_run, ["doctor"], _DOCTOR_S, environ),
            "cache.json": pool.submit(_run, ["cache", "info", "--json"], _CACHE_S, environ),
        }
        parts = [
            ("versions.txt", _versions()),
            ("settings.txt", _settings(ctx)),
            ("environment.txt", _environment(os.environ)),
            ("mounts.txt", _mount_lines()),
            *((name, output.result()) for name, output in commands.items()),
        ]
        for number, future in enumerate(of_mounts, 1):
            parts += [(f"mount-{number}/{name}", text) for name, text in future.result()]
    if not mounts and log_file is not None:
        parts.append(("log.txt", _log(log_file)))
    return secrets, [(name, redacted_lines(text, limit=_MAX_LINE_CHARS)) for name, text in parts]


def _select(mountpoint: str | None) -> list[Mount]:
    found = mount_table.tinkerfs_mounts()
    if mountpoint is None:
        return [mount for mount in found if mount.is_trusted]
    path = mount_table.canonical_mountpoint(mountpoint)
    found = [mount for mount in found if mount.mountpoint == path]
    if not found:
        raise StartupError(
            f"{mountpoint} is not a tinkerfs mount (hint: without it, the bundle is of all mounts)"
        )
    return found[-1:]


def _daemon_of(mount: Mount) -> int:
    return next(iter(mount_table.find_daemon_pids(mount)), 0)


def _versions() -> str:
    requirements = importlib.metadata.requires("tinkerfs") or []
    names = sorted({_distribution(each) for each in requirements})
    lines = [
        f"tinkerfs {__version__} in {os.path.dirname(os.path.dirname(__file__))}",
        f"python {sys.version.replace(chr(10), ' ')} at {sys.executable}",
        f"kernel {platform.release()} {platform.version()} {platform.machine()}",
        f"system {_system()}",
        f"libc {' '.join(platform.libc_ver())}",
        *(f"{name} {_version_of(name)}" for name in names),
    ]
    return "\n".join([*lines, *_libfuses(), ""])


def _libfuses() -> Iterator[str]:
    from tinkerfs.fuse import binding

    for major in (3, 2):
        library = binding.find_library(major)
        yield f"libfuse {major}: {library or 'not found'}"


def _distribution(requirement: str) -> str:
    end = next((at for at, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), None)
    return requirement[:end]


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "?")
    except OSError:
        return "?"


def _settings(ctx: click.Context) -> str:
    """Return the settings of a mount that would start now, with their sources."""
    rows = [
        f"{key} = {ctx.params.get(str(option.name))!r}  ({source_of(option, ctx)})"
        for key, option in sorted(settings_of(ctx.command).items())
    ]
    return "\n".join([*rows, ""])


def _environment(environ: Mapping[str, str]) -> str:
    """Return the names of variables that matter; their values may be secrets."""
    names = [
        name
        for name in sorted(environ)
        if name.startswith(_PREFIXES) or name.upper().endswith(_SUFFIXES)
    ]
    return "\n".join(["set (values are not shown):", *names, ""])


def _mount_lines() -> str:
    lines = read_regular("/proc/self/mountinfo", 1 << 20).decode("utf-8", "backslashreplace")
    return "".join(f"{line}\n" for line in lines.split("\n") if " - fuse" in line)


def _run(arguments: list[str], timeout_s: float, environ: Mapping[str, str]) -> str:
    """Return the output of a command of tinkerfs."""
    result = mount_table.run_bounded(
        ["sh", "-c", 'exec "$@" 2>&1', "sh", *daemon_command(arguments)],
        timeout_s,
        env=environ,
    )
    if result is None:
        return f"tinkerfs {' '.join(arguments)} did not end within {timeout_s:g} s\n"
    status, output = result
    return f"{output.decode('utf-8', 'backslashreplace')}{f'exit status {status}' * (status > 0)}"


def _mount_parts(mount: Mount, pid: int, log_file: str | None) -> list[Part]:
    health = mount_table.check_health(mount.mountpoint)
    parts = [("state.txt", _state(mount, pid, health))]
    if pid:
        stacks = stack_dump.read_stacks(pid)
        parts.append(("stacks.txt", stacks or "the stacks of the daemon are unavailable\n"))
    stats: dict[str, Any] = {}
    if health == "responsive":
        for name in ("stats.json", "errors", "changes"):
            path = f"{mount.mountpoint}/.tinkerfs/{name}"
            text = _bounded(partial(mount_table.read_file, path))
            parts.append((name, text))
            if name == "stats.json":
                stats = _parsed(text)
    log_path = stats.get("log_file") or log_file
    log = _log(log_path) if isinstance(log_path, str) else "no log file is known\n"
    parts.append(("log.txt", log))
    return parts


def _state(mount: Mount, pid: int, health: str) -> str:
    lines = [
        f"mountpoint {mount.mountpoint}",
        f"state {health}",
        f"source {mount.source}",
        f"daemon {pid or 'not found'}",
    ]
    if pid:
        command = _proc(pid, "cmdline").replace("\0", " ")
        wanted = ("Name", "State", "Uid", "FDSize", "VmRSS", "VmHWM", "Threads", "SigBlk", "SigCgt")
        status = [line for line in _proc(pid, "status").split("\n") if line.startswith(wanted)]
        lines += [f"command {command}", *status, _environment(environment_of(pid))]
    return "\n".join([*lines, ""])


def _proc(pid: int, name: str) -> str:
    try:
        content = read_regular(f"/proc/{pid}/{name}", 1 << 16)
    except OSError as error:
        return f"{name}: {error.strerror}"
    return content.decode("utf-8", "backslashreplace")


def _log(path: str) -> str:
    return _bounded(partial(mount_table.read_tail, os.path.abspath(path), _LOG_BYTES))


def _bounded(read: Callable[[], bytes | None]) -> str:
    try:
        content = read()
    except TimeoutError:
        return "no reply in time\n"
    return "cannot be read\n" if content is None else content.decode("utf-8", "backslashreplace")


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
