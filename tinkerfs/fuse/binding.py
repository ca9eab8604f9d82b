"""FUSE bindings: choose and load a Python binding and a libfuse that work together.

fusepy supports only libfuse 2; mfusepy has the same interface and supports 2 and 3. New
distributions install only libfuse 3. Both bindings load libfuse when they are *imported*, and raise
OSError if there is none. So this module imports a binding only in `load_binding`.

`TINKERFS_FUSE_BINDING` forces a combination (`fusepy`, `mfusepy2`, `mfusepy3`), and
`FUSE_LIBRARY_PATH` forces a library file.
"""

import codecs
import ctypes
import ctypes.util
import importlib
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinkerfs.errors import StartupError
from tinkerfs.fuse.callbacks import build_callbacks, override_callbacks
from tinkerfs.fuse.worker_pool import SessionWorkers

if TYPE_CHECKING:
    from tinkerfs.fuse.operations import Operations

log = logging.getLogger(__name__)

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

#: fusepy decodes paths strictly, so a non-UTF-8 name would fail with EINVAL and a traceback. Its
#: caller can choose the codec but not the error handler, hence a codec that includes one.
_CODEC = "tinkerfs_utf_8_surrogateescape"


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

    def is_interrupted(self) -> bool:
        """Return whether the caller of the request that this thread serves was interrupted.

        Must be called in the thread that serves the request.
        """
        return bool(self.module._libfuse.fuse_interrupted())

    def context(self) -> tuple[int, int, int]:
        """Return (uid, gid, pid) of the caller of the request that this thread serves."""
        uid, gid, pid = self.module.fuse_get_context()
        return uid, gid, pid

    def blocking(self) -> AbstractContextManager[None]:
        """Return a context manager for a blocking section, which frees the worker thread."""
        return self.workers.blocking()

    def mount_options(self, *, read_only: bool, allow_other: bool) -> dict[str, str | bool]:
        """Return the mount options; libfuse rejects options that its version does not know."""
        options: dict[str, str | bool] = {
            # The type in /proc/mounts is then fuse.tinkerfs, which `tinkerfs status` looks for.
            "fsname": "tinkerfs",
            "subtype": "tinkerfs",
            "default_permissions": True,
            "nosuid": True,
            "nodev": True,
            "use_ino": True,
            # Otherwise libfuse renames an open file to .fuse_hidden* instead of unlinking it.
            "hard_remove": True,
            "entry_timeout": "1",
            "attr_timeout": "1",
            # The metadata cache has negative entries, and invalidates them when a name appears.
            "negative_timeout": "0",
        }
        if self.library.major == 2:
            options["max_background"] = str(MAX_BACKGROUND)
            options["congestion_threshold"] = str(MAX_BACKGROUND)
        if self.library.version >= _INTR_SINCE:
            options["intr"] = True
        if read_only:
            options["ro"] = True
        if allow_other:
            options["allow_other"] = True
        return options

    def run(
        self, operations: "Operations", mountpoint: str, options: Mapping[str, str | bool]
    ) -> None:
        """Mount, and serve until unmounted.

        Always in the foreground, because threads do not survive the fork of libfuse.

        Raises:
            RuntimeError: libfuse could not mount; it has written the reason to stderr.
        """
        # At DEBUG the bindings log failed operations with a traceback; `operations` logs one line.
        logging.getLogger("fuse").setLevel(logging.WARNING)
        callbacks = build_callbacks(operations, self.module, self.library.major)
        main_owner = self.module if self.name != "fusepy" else self.module._libfuse
        originals = self.module.fuse_operations, main_owner.fuse_main_real
        self.module.fuse_operations = override_callbacks(originals[0], callbacks)
        main_owner.fuse_main_real = self.workers.main
        try:
            self._run(operations, mountpoint, options)
        finally:
            self.module.fuse_operations, main_owner.fuse_main_real = originals

    def _run(
        self, operations: "Operations", mountpoint: str, options: Mapping[str, str | bool]
    ) -> None:
        if self.name == "fusepy":
            _register_codec()
            self.module.FUSE(
                _FusepyDispatcher(operations),
                mountpoint,
                raw_fi=True,
                encoding=_CODEC,
                foreground=True,
                **options,
            )
            return
        factory = self.module.FUSE
        if self.library.major == 3:
            factory = _raise_background_limits(self.module)
        factory(operations, mountpoint, raw_fi=True, foreground=True, **options)


def _raise_background_limits(module: Any) -> Any:
    """Return a subclass of mfusepy's FUSE class that raises the limits of background reads.

    libfuse 3 has no mount options for them. The fields are 0 until they are set here.
    """

    class FUSE(module.FUSE):  # type: ignore[misc]
        def init_fuse_3(self, conn: Any, config: Any) -> None:
            conn.contents.max_background = MAX_BACKGROUND
            conn.contents.congestion_threshold = MAX_BACKGROUND
            super().init_fuse_3(conn, config)

    return FUSE


class _FusepyDispatcher:
    """Adapter for fusepy, which calls operations through `__call__`; mfusepy rejects that."""

    def __init__(self, operations: "Operations") -> None:
        self._operations = operations

    def __call__(self, operation: str, *args: object) -> object:
        return getattr(self._operations, operation)(*args)

    def __getattr__(self, name: str) -> object:
        return getattr(self._operations, name)


def _register_codec() -> None:
    def search(name: str) -> codecs.CodecInfo | None:
        if name != _CODEC:
            return None
        return codecs.CodecInfo(
            name=_CODEC,
            encode=lambda text, _errors="strict": codecs.utf_8_encode(text, "surrogateescape"),
            decode=lambda data, _errors="strict": codecs.utf_8_decode(
                data, "surrogateescape", True
            ),
        )

    try:
        codecs.lookup(_CODEC)
    except LookupError:
        codecs.register(search)


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


def _call_without_releasing_gil(module: Any) -> None:
    """Make a binding call `fuse_get_context` without releasing the GIL.

    The call takes next to no time. Releasing the GIL would cause a thread switch for each request
    while several processes send requests.
    """
    libfuse = module._libfuse
    context = ctypes.PyDLL(libfuse._name, handle=libfuse._handle).fuse_get_context
    context.restype = libfuse.fuse_get_context.restype
    libfuse.fuse_get_context = context


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
                if hasattr(module, "FUSE") and hasattr(module, "Operations"):
                    # A binding that was imported earlier has its own library, and fusepy would use
                    # its structures of libfuse 2 with libfuse 3.
                    loaded = int(module._libfuse.fuse_version())
                    if loaded != library.version:
                        raise ImportError(f"{candidate} is already loaded with libfuse {loaded}")
                    _call_without_releasing_gil(module)
                    return module
                error = error or ImportError(f"{candidate} is another package of that name")
            raise error or ImportError(name)
        finally:
            if before is None:
                del os.environ["FUSE_LIBRARY_PATH"]
            else:
                os.environ["FUSE_LIBRARY_PATH"] = before
