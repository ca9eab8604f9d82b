"""FileSystem: the tree behind an interface like `os`, for every adapter.

Thread-safe. Every method raises `OSError` with an errno, a sentence and the path; failures that say
more than "no such name" also land in the mount's `errors`.
"""

from typing import Any

from tinkerfs.call import Call
from tinkerfs.tree.node import Attr, Entry, Handle, Space


class FileSystem:
    """SKELETON of the contract; being written."""

    def stat(self, path: str, call: Call) -> Attr:
        """Return attributes. ENOENT."""
        raise NotImplementedError

    def handle_stat(self, path: str, handle: Handle, call: Call) -> Attr: ...  # exact size

    def listdir(self, path: str, call: Call) -> tuple[Entry, ...]:
        """Snapshot of a folder, without . and .. ; may wait for the listing."""
        raise NotImplementedError

    def readlink(self, path: str, call: Call) -> str: ...
    def open(self, path: str, flags: int, call: Call) -> Handle: ...
    def truncate(self, path: str, size: int, call: Call) -> None: ...
    def set_attributes(self, path: str, call: Call) -> None:
        """chmod, chown, utimens: nothing on a control, else EPERM/EROFS."""

    def create(self, path: str, call: Call) -> None:
        """create, mknod, mkdir, symlink, link, rename: always raises EPERM (EROFS read-only)."""

    def unlink(self, path: str, call: Call) -> None: ...
    def rmdir(self, path: str, call: Call) -> None: ...
    def space(self) -> Space: ...
