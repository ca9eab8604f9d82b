"""FUSE bindings: choose and load a Python binding and a libfuse that work together.

A binding defines libfuse's structures for the version and the platform. Its `FUSE` class is not
used: `callbacks` fills `struct fuse_operations`, and `worker_pool` mounts and serves.

fusepy supports only libfuse 2; mfusepy has the same structures and supports 2 and 3. New
distributions install only libfuse 3. Both bindings load libfuse when they are *imported*, and raise
OSError if there is none. So this module imports a binding only in `load_binding`.

`TINKERFS_FUSE_BINDING` forces a combination (`fusepy`, `mfusepy2`, `mfusepy3`), and
`FUSE_LIBRARY_PATH` forces a library file.
"""

import ctypes
import ctypes.util
import importlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinkerfs.errors import StartupError
from tinkerfs.fuse.callbacks import build_operations
from tinkerfs.fuse.operations import Operations
from tinkerfs.fuse.worker_pool import SessionWorkers

#: Values of `TINKERFS_FUSE_BINDING`, in the order in which `auto` tries them, and their libfuse.
#: mfusepy with libfuse 2 is last: it is for systems where fusepy cannot be built.
BINDINGS: dict[str, int] = {"mfusepy3": 3, "fusepy": 2, "mfusepy2": 2}

#: Sonames for the dynamic linker. `ctypes.util.find_library` is slow, because it runs ldconfig or
#: gcc, and it finds nothing on musl (cpython#87808).
_SONAMES = {3: ("libfuse3.so.4", "libfuse3.so.3"), 2: ("libfuse.so.2",)}

_INSTALL = {
    3: "apt install fuse3 | dnf install fuse3 | apk add fuse3",
    2: "apt install fuse3 libfuse2 (newer: libfuse2t64) | dnf install fuse fuse-libs"
    " | apk add fuse",
}

#: Maximum number of page cache reads in flight. With the kernel's default of 12, slow reads block
#: all other reads. It must be less than `worker_pool.MAX_EXTRA_WORKERS`, or reads could occupy all
#: workers.
MAX_BACKGROUND = 200

#: `fuse_version()` of the first libfuse that ignores interrupts without the option `intr` (3.17).
#: With `intr` it also sends SIGUSR1 to the serving thread. `session.block_signals` blocks that
#: signal in all threads, so only `fuse_interrupted` reports an interrupt.
_INTR_SINCE = 317


@dataclass(frozen=True, slots=True)
class Library:
    """A libfuse that can be loaded.

    Attributes:
        path: a soname, or the path of a file.
        version: the result of `fuse_version()`, for example 29, 314 or 317.
    """

    path: str
    version: int

    @property
    def major(self) -> int:
        """The major version, 2 or 3."""
        return int(str(self.version)[0])

    def __str__(self) -> str:
        """Return a name for messages, such as "libfuse 3.14 (libfuse3.so.3)"."""
        digits = str(self.version)
        return f"libfuse {digits[0]}.{digits[1:]} ({self.path})"


@dataclass(frozen=True, slots=True)
class Binding:
    """A binding that is loaded with its library."""

    name: str
    library: Library
    module: Any
    workers: SessionWorkers

    def __str__(self) -> str:
        """Return a name for messages, such as "mfusepy with libfuse 3.14 (libfuse3.so.3)"."""
        return f"{self.name.rstrip('23')} with {self.library}"

    def mount_options(
        self, *, source: str = "tinkerfs", read_only: bool, allow_other: bool
    ) -> dict[str, str | bool]:
        """Return the mount options; libfuse rejects options that its version does not know."""
        options: dict[str, str | bool] = {
            # The type in /proc/mounts is then fuse.tinkerfs, which `tinkerfs status` looks for.
            # libfuse splits options at commas that have no backslash before them (fuse_opt.h).
            "fsname": source.replace("\\", "\\\\").replace(",", "\\,"),
            "subtype": "tinkerfs",
            "default_permissions": True,
            "nosuid": True,
            "nodev": True,
            "entry_timeout": "1",
            "attr_timeout": "1",
            # The metadata cache has negative entries, and invalidates them when a name appears.
            "negative_timeout": "0",
        }
        if self.library.major == 2:  # for libfuse 3 see `configure`
            options["use_ino"] = options["hard_remove"] = True
            options["max_background"] = str(MAX_BACKGROUND)
            options["congestion_threshold"] = str(MAX_BACKGROUND)
        if read_only:
            options["ro"] = True
        if allow_other:
            options["allow_other"] = True
        return options

    def configure(self, connection: Any, config: Any) -> None:
        """Set what libfuse 3 has no mount options for; libfuse calls it with its defaults.

        Args:
            connection: pointer to a `struct fuse_conn_info`.
            config: pointer to a `struct fuse_config`.
        """
        connection.contents.max_background = MAX_BACKGROUND
        connection.contents.congestion_threshold = MAX_BACKGROUND
        config.contents.use_ino = 1
        # Otherwise libfuse renames an open file to .fuse_hidden* instead of unlinking it.
        config.contents.hard_remove = 1
        config.contents.intr = self.library.version >= _INTR_SINCE

    def run(
        self, operations: Operations, mountpoint: str, options: Mapping[str, str | bool]
    ) -> None:
        """Mount, and serve until unmounted.

        Always in the foreground, because threads do not survive the fork of libfuse.

        Raises:
            RuntimeError: libfuse could not mount; it has written the reason to stderr.
        """
        texts = [
            name if value is True else f"{name}={value}"
            for name, value in options.items()
            if value is not False
        ]

        def configure(connection: Any, config: Any) -> None:
            self.configure(connection, config)
            operations.passthrough.negotiate(
                connection, self.library.version, self.workers.session_fd()
            )

        arguments = ["fuse", "-f", "-o", ",".join(texts), mountpoint]
        status = self.workers.main(
            [os.fsencode(argument) for argument in arguments],
            build_operations(operations, self.module, self.library.major, configure),
        )
        if status:
            raise RuntimeError(status)


def find_library(major: int) -> Library | None:
    """Return a loadable libfuse of a major version, None if there is none.

    If `FUSE_LIBRARY_PATH` is set, its library is the only candidate.
    """
    forced = os.environ.get("FUSE_LIBRARY_PATH")
    if forced:
        library = _probe(forced)
        return library if library and library.major == major else None
    for soname in _SONAMES[major]:
        library = _probe(soname)
        if library:
            return library
    name = ctypes.util.find_library("fuse3" if major == 3 else "fuse")
    library = _probe(name) if name else None
    return library if library and library.major == major else None


def _probe(path: str) -> Library | None:
    try:
        version = int(ctypes.CDLL(path).fuse_version())
    except (OSError, AttributeError):
        return None
    return Library(path, version)


def load_binding() -> Binding:
    """Import the first binding that works on this system, or the one that is configured.

    Raises:
        StartupError: no binding works; the hint names the packages to install.
    """
    wanted = os.environ.get("TINKERFS_FUSE_BINDING") or "auto"
    if wanted != "auto" and wanted not in BINDINGS:
        raise StartupError(
            f"unknown TINKERFS_FUSE_BINDING {wanted!r}"
            f" (choose from auto, {', '.join(sorted(BINDINGS))})"
        )
    failures = []
    for name, major in BINDINGS.items():
        if wanted not in ("auto", name):
            continue
        library = find_library(major)
        if library is None:
            failures.append(f"no libfuse {major}")
            continue
        try:
            return Binding(
                name, library, _import(name, library), SessionWorkers(library.path, library.major)
            )
        except (ImportError, OSError, AttributeError, NotImplementedError) as error:
            failures.append(f"{name}: {error}")
    forced = os.environ.get("FUSE_LIBRARY_PATH")
    if forced:
        raise StartupError(
            f"FUSE_LIBRARY_PATH={forced} cannot be used: {'; '.join(failures)}"
            " (hint: unset it, or set it to a libfuse 3 or libfuse 2)"
        )
    major = BINDINGS.get(wanted, 3)
    raise StartupError(
        f"libfuse cannot be used: {'; '.join(dict.fromkeys(failures))} (hint: {_INSTALL[major]})"
    )


_import_lock = threading.Lock()


def _import(name: str, library: Library) -> Any:
    """Import a binding with this library."""
    # fusepy's module is named `fusepy` on Debian. The module of fuse-python is named `fuse`, too.
    names = ("fuse", "fusepy") if name == "fusepy" else ("mfusepy",)
    with _import_lock:
        before = os.environ.get("FUSE_LIBRARY_PATH")
        os.environ["FUSE_LIBRARY_PATH"] = library.path
        try:
            error: ImportError | None = None
            for candidate in names:
                try:
                    module = importlib.import_module(candidate)
                except ImportError as missing:
                    error = error or missing
                    continue
                if hasattr(module, "fuse_operations"):
                    # A binding that was imported earlier has its own library, and fusepy would use
                    # its structures of libfuse 2 with libfuse 3.
                    loaded = _probe(module._libfuse._name)
                    if loaded is None or loaded.version != library.version:
                        raise ImportError(f"{candidate} is already loaded with {loaded}")
                    return module
                error = error or ImportError(f"{candidate} is another package of that name")
            raise error or ImportError(name)
        finally:
            if before is None:
                del os.environ["FUSE_LIBRARY_PATH"]
            else:
                os.environ["FUSE_LIBRARY_PATH"] = before
