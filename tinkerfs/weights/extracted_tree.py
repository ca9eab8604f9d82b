"""Compute what tar(1) leaves on disk after it has extracted some members (pure).

A tar is a program rather than a table: each member acts on the result of those before it. A hard
link refers to the file that its target names at that moment, even if that name is reused later.
A member below a symbolic link is extracted into the directory that the link leads to. The reference
is GNU tar 1.34 (https://www.gnu.org/software/tar/manual/). It creates a symbolic link with `..` or
an absolute target last, so that no member is extracted through it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

#: Longest path in bytes, and longest chain of links, on Linux (path_resolution(7)).
MAX_PATH_BYTES = 4095
MAX_LINK_STEPS = 40


class MemberRejected(Exception):
    """The reason why one member is skipped; it does not affect the others."""


class _Directory:
    """A directory: its entries by name, and its parent; the root is its own parent."""

    __slots__ = ("entries", "parent")

    def __init__(self, parent: "_Directory | None") -> None:
        self.parent = parent or self
        self.entries: dict[str, object] = {}


class _Link(NamedTuple):
    """A symbolic link, with its target as stored in the archive."""

    target: str

    @property
    def is_made_last(self) -> bool:
        """Whether tar(1) creates the link only after all members are extracted."""
        return self.target.startswith("/") or ".." in self.target.split("/")


class _Special:
    """A device, a pipe or a similar file."""

    __slots__ = ()


class ExtractedTree(Generic[T]):
    """Files, directories and links that members leave on disk. Not thread-safe.

    Names are relative paths without `..`. A file is any object of the caller.

    Args:
        max_names: maximum number of names, including directories that members imply.
    """

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._count = 0
        self._root = _Directory(None)

    def add_file(self, name: str, file: T) -> None:
        """Extract a file.

        Raises:
            MemberRejected: tar(1) cannot create it.
            ValueError: there are too many names.
        """
        self._insert(*self._resolve_parent(name), file)

    def add_directory(self, name: str) -> None:
        """Extract a directory; see `add_file`."""
        parent, last = self._resolve_parent(name)
        if not isinstance(parent.entries.get(last), _Directory):
            self._insert(parent, last, _Directory(parent))

    def add_symlink(self, name: str, target: str) -> None:
        """Extract a symbolic link; see `add_file`."""
        self._insert(*self._resolve_parent(name), _Link(target))

    def add_special(self, name: str) -> None:
        """Extract a device, a pipe or a similar file; see `add_file`."""
        self._insert(*self._resolve_parent(name), _Special())

    def add_hard_link(self, name: str, target: str) -> None:
        """Extract another name of the file that `target` names now; see `add_file`.

        As in tar(1), an existing entry with that name is removed even if the target is a directory.
        """
        parent, last = self._resolve_parent(name)
        node = self._find(self._root, target, follows_last=False, is_complete=False)
        if node is None:
            raise MemberRejected("a link to a file that does not precede it in the archive")
        if parent.entries.get(last) is not node:
            self._insert(parent, last, node)
            if isinstance(node, _Directory):
                del parent.entries[last]
                self._count -= 1
        if isinstance(node, _Directory | _Special):
            raise MemberRejected("a link to something other than a file")

    def files(self) -> Iterator[tuple[str, T | None]]:
        """Yield the final path of each file and link, with the file that it leads to.

        A link that leads to no file of the tree has None instead.
        """
        pending: list[tuple[str, _Directory]] = [("", self._root)]
        while pending:
            prefix, directory = pending.pop()
            for name, node in directory.entries.items():
                if isinstance(node, _Directory):
                    pending.append((f"{prefix}{name}/", node))
                elif isinstance(node, _Link):
                    found = self._find(directory, node.target, follows_last=True, is_complete=True)
                    is_file = not isinstance(found, _Directory | _Special)
                    yield f"{prefix}{name}", found if is_file else None  # type: ignore[misc]
                elif not isinstance(node, _Special):
                    yield f"{prefix}{name}", node  # type: ignore[misc]

    def _insert(self, parent: _Directory, name: str, node: object) -> None:
        """Put a node into a directory; it replaces an entry of the same name."""
        previous = parent.entries.pop(name, None)
        if isinstance(previous, _Directory) and previous.entries:
            parent.entries[name] = previous
            raise MemberRejected("a file and a directory at once")
        self._count += previous is None
        if self._count > self._max_names:
            raise ValueError(f"more than {self._max_names} names")
        parent.entries[name] = node

    def _resolve_parent(self, name: str) -> tuple[_Directory, str]:
        """Return the directory of a member, created if missing, and its last name."""
        if len(name.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
            raise MemberRejected("its name is too long")
        *parents, last = name.split("/")
        directory = self._root
        for part in parents:
            node = directory.entries.get(part)
            if node is None:
                node = _Directory(directory)
                self._insert(directory, part, node)
            elif isinstance(node, _Link):
                node = self._find(directory, part, follows_last=True, is_complete=False)
            if not isinstance(node, _Directory):
                raise MemberRejected("its parent is not a directory")
            directory = node
        return directory, last

    @staticmethod
    def _find(
        directory: _Directory, path: str, *, follows_last: bool, is_complete: bool
    ) -> object | None:
        """Resolve a path from a directory; return None if it does not exist.

        With `follows_last`, a link at the end is followed too. With `is_complete`, all members are
        extracted, including the links that tar(1) creates last. An absolute path leads nowhere.
        """
        node: object = directory
        if path.startswith("/"):
            return None
        rest, steps = deque(path.split("/")), 0
        while rest:
            part = rest.popleft()
            if not isinstance(node, _Directory):
                return None
            if part in ("", "."):
                continue
            if part == "..":
                if node.parent is node:
                    return None
                node = node.parent
                continue
            child = node.entries.get(part)
            if child is None:
                return None
            if not isinstance(child, _Link) or not (rest or follows_last):
                node = child
                continue
            steps += 1
            target = child.target
            if steps > MAX_LINK_STEPS or target.startswith("/"):
                return None
            if child.is_made_last and not is_complete:
                return None
            rest.extendleft(reversed(target.split("/")))
        return node
