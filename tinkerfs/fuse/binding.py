"""Which FUSE binding drives which libfuse, and what each of them understands.

fusepy drives libfuse 2 alone; mfusepy has the same interface and drives 2 and 3. New distributions
install libfuse 3 only. Both bindings load libfuse when they are *imported*, and raise OSError where
there is none, so nothing here imports one before `load` is called.

`TINKERFS_FUSE_BINDING` forces a combination (`fusepy`, `mfusepy2`, `mfusepy3`), `FUSE_LIBRARY_PATH`
a library file.
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

#: What `TINKERFS_FUSE_BINDING` may say, in the order that `auto` tries them, and the libfuse each
#: drives. mfusepy with libfuse 2 comes last: it is there for systems where fusepy cannot be built.
BINDINGS: dict[str, int] = {"mfusepy3": 3, "fusepy": 2, "mfusepy2": 2}

#: By soname, as the dynamic linker finds them: `ctypes.util.find_library` forks ldconfig or gcc,
#: finds nothing on musl (cpython#87808) and takes 50 ms.
_SONAMES = {3: ("libfuse3.so.4", "libfuse3.so.3"), 2: ("libfuse.so.2",)}

_INSTALL = {
    3: "apt install fuse3 | dnf install fuse3 | apk add fuse3",
    2: "apt install fuse3 libfuse2 (libfuse2t64 on newer ones) | dnf install fuse fuse-libs"
    " | apk add fuse",
}

#: The kernel lets only 12 reads of page cache wait at a time: 64 waiting reads then held up `ls`
#: for 28 s. `loops.MAX_SPARES` must be more, or waiting reads would take every thread.
MAX_BACKGROUND = 200

#: `fuse_version()` of the first libfuse that takes no interruption unless it is told to (3.17):
#: without `intr` Ctrl-C ended no wait. It then also signals the serving thread, by SIGUSR1, which
#: `mounting.block_signals` keeps from all threads: only `fuse_interrupted` tells us.
_INTR_SINCE = 317

#: fusepy decodes paths strictly, so that a name that is no UTF-8 ended as EINVAL with a traceback.
#: It lets its caller name the codec, though not the error handler: hence a codec with one built in.
_CODEC = "tinkerfs_utf_8_surrogateescape"


@dataclass(frozen=True, slots=True)
class Library:
    """A libfuse that can be loaded.

    Attributes:
        path: what the dynamic linker takes: a soname or a file.
        version: as `fuse_version()` tells it: 29, 314, 317.
    """

    path: str
    version: int

    @property
    def major(self) -> int:
        """2 or 3."""
        return int(str(self.version)[0])

    def __str__(self) -> str:
        """Name it as people do: "libfuse 3.14 (libfuse3.so.3)"."""
        digits = str(self.version)
        return f"libfuse {digits[0]}.{digits[1:]} ({self.path})"


@dataclass(frozen=True, slots=True)
class Binding:
    """One binding, loaded with its library."""

    name: str
    library: Library
    module: Any
    loops: SessionWorkers

    def __str__(self) -> str:
        """Say what drives what."""
        return f"{self.name.rstrip('23')} with {self.library}"

    def interrupted(self) -> bool:
        """Tell whether the request that this thread serves was interrupted by its caller.

        To be called in the thread that libfuse calls us in; exported by libfuse 2 and 3.
        """
        return bool(self.module._libfuse.fuse_interrupted())

    def context(self) -> tuple[int, int, int]:
        """Return (uid, gid, pid) of who made the request that this thread serves."""
        uid, gid, pid = self.module.fuse_get_context()
        return uid, gid, pid

    def waiting(self) -> AbstractContextManager[None]:
        """Return what is entered while a request waits, so that others are served meanwhile."""
        return self.loops.blocking()

    def mount_options(self, *, read_only: bool, allow_other: bool) -> dict[str, str | bool]:
        """Return the options that this libfuse takes; it refuses to start over one it does not."""
        options: dict[str, str | bool] = {
            # /proc/mounts then says fuse.tinkerfs, which `tinkerfs status` and updatedb look for.
            "fsname": "tinkerfs",
            "subtype": "tinkerfs",
            "default_permissions": True,
            "nosuid": True,
            "nodev": True,
            "use_ino": True,
            # Without it, unlinking an open file renames it to .fuse_hidden*: a name to create.
            "hard_remove": True,
            "entry_timeout": "1",
            "attr_timeout": "1",
            # What is absent is remembered by us, who also know when it comes to be.
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
        """Mount and serve until unmounted; returns then.

        Always in the foreground: libfuse would fork, and the threads that exist by then are dead
        after.

        Raises:
            RuntimeError: libfuse could not mount; it has written why to standard error.
        """
        # The bindings log every failed operation with a traceback at DEBUG; ours says it in a line.
        logging.getLogger("fuse").setLevel(logging.WARNING)
        callbacks = build_callbacks(operations, self.module, self.library.major)
        main_of = self.module if self.name != "fusepy" else self.module._libfuse
        theirs = self.module.fuse_operations, main_of.fuse_main_real
        self.module.fuse_operations = override_callbacks(theirs[0], callbacks)
        main_of.fuse_main_real = self.loops.main
        try:
            self._run(operations, mountpoint, options)
        finally:
            self.module.fuse_operations, main_of.fuse_main_real = theirs

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
    """Return mfusepy's FUSE class for libfuse 3 with room for many reads that wait.

    libfuse 3 dropped the mount options for it; the fields read 0 until they are set here.
    """

    class WideFUSE(module.FUSE):  # type: ignore[misc]
        def init_fuse_3(self, conn: Any, config: Any) -> None:
            conn.contents.max_background = MAX_BACKGROUND
            conn.contents.congestion_threshold = MAX_BACKGROUND
            super().init_fuse_3(conn, config)

    return WideFUSE


class _FusepyDispatcher:
    """The operations as fusepy calls them: by name, through `__call__`, which mfusepy refuses."""

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
    """Return the libfuse of this major version that can be loaded, if any.

    A library named by `FUSE_LIBRARY_PATH` is the only candidate.
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
    """Import the binding that fits this system.

    Raises:
        SetupError: there is none; the message names what to install.
    """
    wanted = os.environ.get("TINKERFS_FUSE_BINDING") or "auto"
    if wanted != "auto" and wanted not in BINDINGS:
        raise StartupError(
            f"TINKERFS_FUSE_BINDING is {wanted!r}; it takes auto, {', '.join(sorted(BINDINGS))}"
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
            f"FUSE_LIBRARY_PATH={forced} cannot be used ({'; '.join(failures)}): unset it, or name"
            " a libfuse 3, or a libfuse 2"
        )
    major = BINDINGS.get(wanted, 3)
    raise StartupError(
        f"libfuse cannot be used ({'; '.join(dict.fromkeys(failures))}): {_INSTALL[major]}"
    )


def _call_without_releasing_gil(module: Any) -> None:
    """Let a binding ask libfuse for the caller without letting go of the interpreter meanwhile.

    That takes it nothing. To let go and take hold again costs a switch of threads each time when
    several processes ask.
    """
    libfuse = module._libfuse
    context = ctypes.PyDLL(libfuse._name, handle=libfuse._handle).fuse_get_context
    context.restype = libfuse.fuse_get_context.restype
    libfuse.fuse_get_context = context


_import_lock = threading.Lock()


def _import(name: str, library: Library) -> Any:
    """Import a binding so that it loads just this library."""
    # Debian names fusepy's module `fusepy`; the package fuse-python also calls its own `fuse`.
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
                    # A binding that was imported before keeps the library it has. fusepy would lay
                    # its libfuse 2 structures over libfuse 3 without a word.
                    loaded = int(module._libfuse.fuse_version())
                    if loaded != library.version:
                        raise ImportError(f"{candidate} is loaded with libfuse {loaded} already")
                    _call_without_releasing_gil(module)
                    return module
                error = error or ImportError(f"{candidate} is another package of that name")
            raise error or ImportError(name)
        finally:
            if before is None:
                del os.environ["FUSE_LIBRARY_PATH"]
            else:
                os.environ["FUSE_LIBRARY_PATH"] = before
