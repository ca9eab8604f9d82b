"""What tar(1) leaves on disk once it has extracted some members, without a disk (pure).

A tar is a program rather than a table: each member acts on what the members before it left. A hard
link names what its target is at that moment, and keeps it when that name is used again. A member
below a symbolic link lands in the directory that the link leads to. GNU tar 1.34 is the reference
(https://www.gnu.org/software/tar/manual/), with its rule that a symbolic link with `..` or an
absolute target is made last, so that no member lands behind it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

#: The longest path and the longest chain of links that Linux follows (path_resolution(7)), bytes.
MAX_PATH_BYTES = 4095
MAX_LINK_STEPS = 40


class Refused(Exception):
    """Why one member is not extracted; the others are."""


class _Directory:
    """A directory: its entries by name, and the one above, which is itself for the root."""

    __slots__ = ("above", "entries")

    def __init__(self, above: "_Directory | None") -> None:
        self.above = above or self
        self.entries: dict[str, object] = {}


class _Link(NamedTuple):
    """A symbolic link, and its target as the archive has it."""

    target: str

    @property
    def is_made_last(self) -> bool:
        """Whether tar(1) holds it back until every member is extracted."""
        return self.target.startswith("/") or ".." in self.target.split("/")


class _Special:
    """A device, a pipe or the like."""

    __slots__ = ()


class ExtractedTree(Generic[T]):
    """Files, directories and links by path, as members are added in order. Not thread-safe.

    Names are relative paths without `..`; a file is whatever stands for it.

    Args:
        max_names: bound on names, the directories that members imply among them.
    """

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._count = 0
        self._root = _Directory(None)

    def add_file(self, name: str, file: T) -> None:
        """Extract a file.

        Raises:
            Refused: tar(1) cannot make it.
            ValueError: there are too many names.
        """
        self._put(*self._place(name), file)

    def add_directory(self, name: str) -> None:
        """Extract a directory; as `add_file`."""
        above, last = self._place(name)
        if not isinstance(above.entries.get(last), _Directory):
            self._put(above, last, _Directory(above))

    def add_symlink(self, name: str, target: str) -> None:
        """Extract a symbolic link; as `add_file`."""
        self._put(*self._place(name), _Link(target))

    def add_special(self, name: str) -> None:
        """Extract a device, a pipe or the like; as `add_file`."""
        self._put(*self._place(name), _Special())

    def add_hard_link(self, name: str, target: str) -> None:
        """Extract another name for what a path names now; as `add_file`.

        What has the name goes, as with tar(1), also where the target turns out to be a directory.
        """
        above, last = self._place(name)
        node = self._find(self._root, target, follows_last=False, is_final=False)
        if node is None:
            raise Refused("a link to what the archive did not have before it")
        if above.entries.get(last) is not node:
            self._put(above, last, node)
            if isinstance(node, _Directory):
                del above.entries[last]
                self._count -= 1
        if isinstance(node, _Directory | _Special):
            raise Refused("a link to what is not a file")

    def files(self) -> Iterator[tuple[str, T | None]]:
        """Yield the path of each file and link in the end, and the file that it leads to.

        None stands for a link that leads to no file of the tree.
        """
        pending: list[tuple[str, _Directory]] = [("", self._root)]
        while pending:
            prefix, directory = pending.pop()
            for name, node in directory.entries.items():
                if isinstance(node, _Directory):
                    pending.append((f"{prefix}{name}/", node))
                elif isinstance(node, _Link):
                    found = self._find(directory, node.target, follows_last=True, is_final=True)
                    is_file = not isinstance(found, _Directory | _Special)
                    yield f"{prefix}{name}", found if is_file else None  # type: ignore[misc]
                elif not isinstance(node, _Special):
                    yield f"{prefix}{name}", node  # type: ignore[misc]

    def _put(self, above: _Directory, name: str, node: object) -> None:
        """Put a node into a directory, in place of what has its name there."""
        before = above.entries.pop(name, None)
        if isinstance(before, _Directory) and before.entries:
            above.entries[name] = before
            raise Refused("a file and a directory at once")
        self._count += before is None
        if self._count > self._max_names:
            raise ValueError(f"more than {self._max_names} names")
        above.entries[name] = node

    def _place(self, name: str) -> tuple[_Directory, str]:
        """Return where a member's name leads; the directories above it are made."""
        if len(name.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
            raise Refused("its name is too long")
        *above, last = name.split("/")
        directory = self._root
        for part in above:
            node = directory.entries.get(part)
            if node is None:
                node = _Directory(directory)
                self._put(directory, part, node)
            elif isinstance(node, _Link):
                node = self._find(directory, part, follows_last=True, is_final=False)
            if not isinstance(node, _Directory):
                raise Refused("below what is not a directory")
            directory = node
        return directory, last

    @staticmethod
    def _find(
        directory: _Directory, path: str, *, follows_last: bool, is_final: bool
    ) -> object | None:
        """Return what a path leads to from a directory, None where there is nothing.

        Args:
            directory: where the path begins.
            path: as a link has it; an absolute one leads nowhere.
            follows_last: whether a link at the end is followed too.
            is_final: whether every member is extracted, and so the links that tar(1) makes last.
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
                if node.above is node:
                    return None
                node = node.above
                continue
            below = node.entries.get(part)
            if below is None:
                return None
            if not isinstance(below, _Link) or not (rest or follows_last):
                node = below
                continue
            steps += 1
            target = below.target
            if steps > MAX_LINK_STEPS or target.startswith("/"):
                return None
            if below.is_made_last and not is_final:
                return None
            rest.extendleft(reversed(target.split("/")))
        return node
