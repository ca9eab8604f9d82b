"""Drivers with one interface for the file system: in process, fsspec, WebDAV and the kernel.

Paths are relative to the root, without a slash in front; links are followed wherever `os` follows
them. Failures are `OSError`s everywhere.
"""

import itertools
import json
import os
import posixpath
import stat
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from tests.support.account import mounted
from tests.support.clocks import FakeTime
from tests.support.webdav import DavClient, served
from tinkerfs import errors
from tinkerfs.app import open_app
from tinkerfs.config import Settings
from tinkerfs.context import Caller, RequestContext
from tinkerfs.webdav.clients import WebDavClient

BINDINGS = ("fusepy", "mfusepy2", "mfusepy3")
KINDS = ("process", "fsspec", "webdav", *BINDINGS)

#: A shell shows an errno with the text of `os.strerror`.
OK = "OK"


@dataclass(frozen=True)
class Status:
    """The result of lstat; None for what the driver does not provide."""

    mode: int
    size: int
    mtime_ns: int
    ino: int
    nlink: int
    uid: int
    gid: int
    blocks: int | None

    @property
    def is_directory(self):
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self):
        return stat.S_ISLNK(self.mode)

    @property
    def permissions(self):
        return stat.S_IMODE(self.mode)


class Driver(Protocol):
    """Interface of every driver.

    Attributes:
        kind: one of KINDS.
        time: clock that the test advances; None for a mount, which uses the system clock.
    """

    kind: str
    time: FakeTime | None

    def stat(self, path: str) -> Status: ...
    def listdir(self, path: str) -> list[str]: ...
    def readlink(self, path: str) -> str: ...
    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str) -> None: ...
    def remove(self, *steps: str) -> list[str]:
        """Run steps as one new process group, and return OK or the errno name of each.

        A step is `unlink PATH`, `rmdir PATH`, `rmtree PATH`, `read PATH`, `readlink PATH` or
        `listdir PATH`, which returns the names separated by spaces. With a `time`, a step may also
        be `advance SECONDS`.
        """


def outcome_of(work):
    """Return the result of work if it is a string, otherwise OK or the errno name of its error."""
    try:
        result = work()
    except OSError as error:
        return errors.errno_name(error)
    return result if isinstance(result, str) else OK


class InProcess:
    """Calls the FileSystem directly."""

    kind = "process"

    def __init__(self, filesystem, time=None):
        self.filesystem = filesystem
        self.time = time
        self._groups = itertools.count(1_000_000)
        self.call = RequestContext(timeout_s=60.0)

    def _own(self, path):
        directory, name = posixpath.split(f"/{path}" if path else "/")
        return posixpath.join(self.filesystem.realpath(directory, self.call), name)

    def _follow(self, path):
        return self.filesystem.realpath(f"/{path}", self.call)

    def stat(self, path):
        attr = self.filesystem.stat(self._own(path), self.call)
        return Status(
            attr.mode,
            attr.size_bytes,
            attr.mtime_ns,
            attr.ino,
            attr.nlink,
            attr.uid,
            attr.gid,
            attr.blocks,
        )

    def listdir(self, path):
        return [e.name for e in self.filesystem.listdir(self._follow(path), self.call)]

    def readlink(self, path):
        return self.filesystem.readlink(self._own(path), self.call)

    def read(self, path):
        place = self._follow(path)
        handle = self.filesystem.open(place, os.O_RDONLY, self.call)
        parts = []
        while part := handle.read(4096, sum(map(len, parts)), self.call):
            parts.append(part)
        data = b"".join(parts)
        assert handle.size_bytes == len(data)
        assert self.filesystem.fstat(handle, self.call).size_bytes == len(data)
        handle.close()
        return data

    def write(self, path, data):
        flags = os.O_WRONLY | os.O_TRUNC
        handle = self.filesystem.open(self._follow(path), flags, self.call)
        assert handle.write(data, self.call) == len(data)

    def create(self, path):
        self.filesystem.create(self._own(path), self.call)

    def remove(self, *steps):
        group = next(self._groups)
        ctx = replace(self.call, caller=lambda: Caller(os.getpid(), os.getuid(), group))
        return [outcome_of(lambda step=step: self.remove_as(step, ctx)) for step in steps]

    def remove_as(self, step, call):
        verb, _, path = step.partition(" ")
        if verb == "advance":
            self.time.advance(float(path))
            return None
        place = self._own(path)
        if verb == "rmtree":
            self._rmtree(place, call)
        elif verb == "listdir":
            return " ".join(entry.name for entry in self.filesystem.listdir(place, call))
        elif verb == "read":
            self.filesystem.open(place, os.O_RDONLY, call).close()
        else:
            getattr(self.filesystem, verb)(place, call)
        return None

    def _rmtree(self, place, call):
        for entry in self.filesystem.listdir(place, call):
            below = posixpath.join(place, entry.name)
            if stat.S_ISDIR(entry.mode):
                self._rmtree(below, call)
            else:
                self.filesystem.unlink(below, call)
        self.filesystem.rmdir(place, call)


class Fsspec:
    """Calls the FileSystem through fsspec."""

    kind = "fsspec"

    def __init__(self, filesystem, time=None):
        from tinkerfs.fsspec import TinkerFileSystem

        self.fs = TinkerFileSystem(filesystem=filesystem, skip_instance_cache=True)
        self.filesystem = filesystem
        self.time = time
        self._process = InProcess(filesystem, time)

    def stat(self, path):
        info = self.fs.info(f"tinker://{path}")
        if info["islink"]:  # only a listing has the attributes of the link itself
            listed = self.fs.ls(f"tinker://{posixpath.dirname(path)}")
            info = next(i for i in listed if i["name"] == path)
        fields = ("mode", "size", "ino", "nlink", "uid", "gid")
        values = {name: info[name] for name in fields}
        return Status(mtime_ns=round(info["mtime"] * 1e9), blocks=None, **values)

    def listdir(self, path):
        names = self.fs.ls(f"tinker://{path}", detail=False)
        return [posixpath.basename(name) for name in names]

    def readlink(self, path):
        return self._process.readlink(path)

    def read(self, path):
        with self.fs.open(f"tinker://{path}", "rb") as file:
            data = file.read()
        assert self.fs.cat_file(f"tinker://{path}", 0, len(data)) == data
        return data

    def write(self, path, data):
        with self.fs.open(f"tinker://{path}", "wb") as file:
            file.write(data)

    def create(self, path):
        self.fs.mkdir(f"tinker://{path}")

    def remove(self, *steps):
        # The process group is that of the tests, so its earlier removals must be too old to count.
        self.time.advance(61)
        return [outcome_of(lambda step=step: self._remove(step)) for step in steps]

    def _remove(self, step):
        verb, _, path = step.partition(" ")
        if verb == "advance":
            self.time.advance(float(path))
        elif verb == "rmtree":
            self.fs.rm(f"tinker://{path}", recursive=True)
        elif verb == "rmdir":
            self.fs.rmdir(f"tinker://{path}")
        elif verb == "listdir":
            return " ".join(self.listdir(path))
        elif verb == "read":
            self.read(path)
        elif verb == "readlink":
            self.readlink(path)
        else:
            self.fs.rm_file(f"tinker://{path}")
        return None


class WebDav:
    """Sends HTTP requests to a server of the FileSystem.

    WebDAV has no links, modes and inode numbers. They come from the FileSystem, after the type, the
    length and the time in the response were compared.
    """

    kind = "webdav"

    def __init__(self, filesystem, url, time=None):
        self.time = time
        self.client = DavClient(url)
        self._process = InProcess(filesystem, time)
        self._groups = itertools.count(1)

    def stat(self, path):
        path = posixpath.normpath(path) if path else path  # HTTP clients resolve `..` themselves
        properties = self.client.properties(f"/{path}")
        status = self._process.stat(path)
        assert properties.is_directory or not status.is_directory
        if not status.is_link:
            assert properties.is_directory == status.is_directory
            assert status.is_directory or properties.size in (None, status.size)
        assert properties.mtime_s == status.mtime_ns // 1_000_000_000
        return status

    def listdir(self, path):
        return self.client.listdir(posixpath.normpath(f"/{path}"))

    def readlink(self, path):
        return self._process.readlink(path)

    def read(self, path):
        return self.client.get(f"/{path}")

    def write(self, path, data):
        self.client.send("PUT", f"/{path}", data)

    def create(self, path):
        self.client.send("MKCOL", f"/{path}")

    def remove(self, *steps):
        agent = f"remover/{next(self._groups)}"
        client = DavClient(self.client.url, agent=agent)
        environ = {
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_USER_AGENT": agent,
            "wsgidav.auth.user_name": "anonymous",
        }
        caller = WebDavClient.from_environ(environ)
        ctx = replace(self._process.call, caller=lambda: caller)
        try:
            return [outcome_of(lambda step=step: self._remove(step, client, ctx)) for step in steps]
        finally:
            client.close()

    def _remove(self, step, client, ctx):
        verb, _, path = step.partition(" ")
        if verb == "advance":
            self.time.advance(float(path))
        elif verb == "listdir":
            return " ".join(client.listdir(f"/{path}"))
        elif verb == "read":
            client.get(f"/{path}")
        elif verb == "rmtree":
            client.send("DELETE", f"/{path}")
        elif self._process.stat(path).is_directory:
            # DELETE removes a directory with its members, which these steps must not do. So they
            # run in process, as the same client.
            return self._process.remove_as(step, ctx)
        elif verb == "rmdir":
            raise errors.not_a_directory(path)
        else:
            client.send("DELETE", f"/{path}")
        return None


_REMOVER = """
import errno, json, os, shutil, sys
verbs = {
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "rmtree": shutil.rmtree,
    "read": lambda path: open(path).close(),
    "readlink": lambda path: os.readlink(path) and None,
    "listdir": lambda path: " ".join(os.listdir(path)),
}
for verb, path in json.load(sys.stdin):
    try:
        print(verbs[verb](path) or "OK")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


class KernelMount:
    """A mount, used through the kernel; each removal runs in a process with a new session."""

    time = None

    def __init__(self, kind, root):
        self.kind = kind
        self.root = str(root)

    def path(self, path=""):
        return os.path.join(self.root, path) if path else self.root

    def stat(self, path):
        s = os.lstat(self.path(path))
        return Status(
            s.st_mode,
            s.st_size,
            s.st_mtime_ns,
            s.st_ino,
            s.st_nlink,
            s.st_uid,
            s.st_gid,
            s.st_blocks,
        )

    def listdir(self, path):
        return os.listdir(self.path(path))

    def readlink(self, path):
        return os.readlink(self.path(path))

    def read(self, path):
        with open(self.path(path), "rb", buffering=0) as file:
            return file.readall()

    def write(self, path, data):
        fd = os.open(self.path(path), os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    def create(self, path):
        os.mkdir(self.path(path))

    def remove(self, *steps):
        parted = [step.partition(" ") for step in steps]
        asked = json.dumps([(verb, self.path(path)) for verb, _, path in parted])
        done = subprocess.run(
            [sys.executable, "-S", "-E", "-c", _REMOVER],
            input=asked,
            capture_output=True,
            text=True,
            check=True,
            start_new_session=True,
            timeout=60,
        )
        return done.stdout.splitlines()


@contextmanager
def opened(kind, server, directory, *, time=None, **settings):
    """Yield a driver for a server.

    Args:
        kind: one of KINDS.
        server: a FaultyServer.
        directory: parent of the cache and the mountpoint.
        time: clock for the drivers without a mount.
        settings: fields of Settings.
    """
    if kind in BINDINGS:
        with mounted(server, directory, binding=kind, **settings) as root:
            yield KernelMount(kind, root)
        return
    cache_dir = directory / "cache"
    cache_dir.mkdir(mode=0o700, exist_ok=True)
    time = time or FakeTime()
    all_settings = Settings(base_url=server.base_url, cache_dir=str(cache_dir), **settings)
    with ExitStack() as stack:
        before = os.environ.get("TINKER_API_KEY")
        os.environ["TINKER_API_KEY"] = server.api_key
        try:
            parts = stack.enter_context(open_app(all_settings, time.clock))
        finally:
            if before is None:
                del os.environ["TINKER_API_KEY"]
            else:
                os.environ["TINKER_API_KEY"] = before
        if kind != "webdav":
            make = InProcess if kind == "process" else Fsspec
            yield make(parts.filesystem, time)
            return
        is_read_only = all_settings.read_only
        with served(parts.filesystem, timeout_s=60.0, is_read_only=is_read_only) as server:
            driver = WebDav(parts.filesystem, server.url, time)
            stack.callback(driver.client.close)
            yield driver
