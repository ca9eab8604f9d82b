"""A null filesystem that replies from dicts: the minimal cost of FUSE in Python.

`python -m scripts.benchmarks.null_filesystem SOURCE MOUNTPOINT` serves a copy of the tree SOURCE
until it is unmounted. It uses the binding that TINKERFS_FUSE_BINDING names, without the options
and the readdirplus replies of tinkerfs.
"""

import errno
import os
import stat
import sys
from typing import Any

from tinkerfs.fuse import binding as bindings

#: Attributes of os.stat_result that the bindings use under the same names.
FIELDS = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")


class Null:
    """The operations for reading metadata and files."""

    use_ns = True

    def __init__(self, source: str) -> None:
        self.attributes: dict[str, dict[str, int]] = {}
        self.listings: dict[str, list[tuple[str, dict[str, int], int]]] = {}
        self.targets: dict[str, str] = {}
        self.bytes: dict[str, bytes] = {}
        self._load("/", source)

    def _load(self, path: str, source: str) -> None:
        found = os.lstat(source)
        self.attributes[path] = {name: getattr(found, name) for name in FIELDS} | {
            "st_mtime": found.st_mtime_ns,
            "st_atime": found.st_mtime_ns,
            "st_ctime": found.st_mtime_ns,
        }
        if stat.S_ISLNK(found.st_mode):
            self.targets[path] = os.readlink(source)
        elif stat.S_ISREG(found.st_mode):
            with open(source, "rb") as file:
                self.bytes[path] = file.read()
        else:
            names = os.listdir(source)
            for name in names:
                self._load(os.path.join(path, name), os.path.join(source, name))
            self.listings[path] = [
                (name, self.attributes[os.path.join(path, name)], 0) for name in names
            ]

    def getattr(self, path: str, _fh: Any = None) -> dict[str, int]:
        try:
            return self.attributes[path]
        except KeyError:
            raise OSError(errno.ENOENT, path) from None

    def readdir(self, path: str, _fh: int) -> list[tuple[str, dict[str, int], int]]:
        return self.listings[path]

    def readlink(self, path: str) -> str:
        return self.targets[path]

    def open(self, _path: str, _flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, _fh: int) -> bytes:
        return self.bytes[path][offset : offset + size]


class NullForFusepy(Null):
    """Adapter for fusepy, which calls one object with the name of the operation."""

    def __call__(self, operation: str, *args: Any) -> Any:
        return getattr(self, operation)(*args)


def main() -> None:
    source, mountpoint = sys.argv[1:]
    binding = bindings.load_binding()
    kind = NullForFusepy if binding.name == "fusepy" else Null
    binding.module.FUSE(
        kind(source), mountpoint, foreground=True, fsname="tinkerfs-bench-null", use_ino=True
    )


if __name__ == "__main__":
    main()
