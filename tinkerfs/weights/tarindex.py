"""The members of a tar, from its headers alone (pure: the bytes come from a file object).

The standard library reads the headers: pax, GNU long names, sparse files of every kind. What it may
read is bounded here, since a header can claim anything (a pax header of 8 GB, a chain that never
ends), and what it found is judged: names that lead out of the folder, links out of it and devices
are left out; links within it are the file they lead to; of two members with one name the last one
counts, as for tar(1).
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Protocol

import msgspec

__all__ = ["HeaderFile", "Member", "Segment", "clean_name", "read_members"]

#: Bounds on what the headers of one archive may be.
MAX_MEMBERS = 200_000
MAX_HEADER_BYTES = 256 << 20
#: The largest extended header (pax, long name): names are 4 KiB at most on Linux.
MAX_ONE_READ_BYTES = 1 << 20
_MAX_SEGMENTS = 100_000
_MAX_LINK_STEPS = 40
_MAX_SIZE_BYTES = 1 << 62

#: tarfile's way of telling a damaged header is one of these, by the version of Python.
_DAMAGES = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError, KeyError)


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bytes of a member: `length` from `place` of the archive, at `offset` of the member."""

    offset: int
    length: int
    place: int


class Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One file.

    Attributes:
        name: relative, with `/` between folders; no `.`, `..` or empty part. Bytes that are no
            UTF-8 as surrogate escapes.
        size_bytes: its length.
        mtime_ns: nanoseconds since 1970.
        segments: where its bytes are, in order; what no segment covers is zeros.
    """

    name: str
    size_bytes: int
    mtime_ns: int
    segments: tuple[Segment, ...]


class HeaderFile(Protocol):
    """What headers are read from: a file that is only read forward, one block back at most."""

    def tell(self) -> int:
        """Return where the next read begins."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to an offset from the start."""
        ...

    def read(self, size: int, /) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        ...


def read_members(file: HeaderFile) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Return the members in the order of the archive, and what was left out and why.

    Args:
        file: the archive.

    Raises:
        ValueError: it is no whole, sound tar.
        ApiError, OSError: what `file` raises.
    """
    return _Reader(_Bounded(file)).read()


class _Bounded:
    """Refuses to read what no sane archive has."""

    def __init__(self, file: HeaderFile) -> None:
        self._file = file
        self._left_bytes = MAX_HEADER_BYTES
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_ONE_READ_BYTES:
            raise ValueError(f"a header of {size} bytes is larger than is read")
        self._left_bytes -= max(size, tarfile.BLOCKSIZE)
        if self._left_bytes < 0:
            raise ValueError(f"headers of more than {MAX_HEADER_BYTES >> 20} MiB")
        return self._file.read(size)


@dataclass
class _Reader:
    file: _Bounded
    #: By name, in the order they came; a later one takes the place of an earlier.
    files: dict[str, Member] = field(default_factory=dict)
    #: Links whose target had not come: where they are, and what they lead to.
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    #: Where the bytes of all members so far end.
    end: int = 0

    def read(self) -> tuple[tuple[Member, ...], tuple[str, ...]]:
        try:
            for info in self._headers():
                self._take(info)
        except _DAMAGES as error:
            raise ValueError(f"the archive is damaged: {error}") from None
        for name in list(self.links):
            self._follow(name)
        self._remove_folders()
        return tuple(self.files.values()), tuple(self.left_out)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        at = -1
        source: IO[bytes] = self.file  # type: ignore[assignment]
        with tarfile.open(
            fileobj=source, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (info := tar.next()) is not None:
                # tarfile takes negative sizes, and would read for ever (CVE-2025-8194).
                if info.offset <= at or not 0 <= info.size <= _MAX_SIZE_BYTES:
                    raise ValueError("a header has a size that cannot be")
                at = info.offset
                yield info
                # It keeps all members, with all of their headers.
                tar.members.clear()  # type: ignore[attr-defined]
                if len(self.files) + len(self.left_out) > MAX_MEMBERS:
                    raise ValueError(f"more than {MAX_MEMBERS} members")
            end = tar.offset
        # `next` takes what it cannot read for the end, unless it is the first header; the true end
        # is a block of zeros.
        self.file.seek(end)
        block = self.file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
            raise ValueError(f"it has neither a header nor its end at {end}")
        if self.end > end:
            raise ValueError("a member ends after the archive")
        if end == 0:
            raise ValueError("it has no members")

    def _take(self, info: tarfile.TarInfo) -> None:
        if info.isdir():  # of which SkyRL's archives have one without a name
            return
        name = clean_name(info.name)
        if name is None:
            self.left_out.append(f"{info.name!r}: its name leads out of the folder")
        elif info.islnk() or info.issym():
            self._take_link(name, info)
        elif not (info.isreg() or info.sparse is not None):
            self.left_out.append(f"{info.name!r}: a device or the like")
        else:
            self.files.pop(name, None)
            self.links.pop(name, None)
            self.files[name] = Member(name, info.size, _ns(info.mtime), self._segments(info))

    def _take_link(self, name: str, info: tarfile.TarInfo) -> None:
        folder = name.rpartition("/")[0] if info.issym() else ""
        is_absolute = info.linkname.startswith("/")
        target = None if is_absolute else clean_name(_resolved(folder, info.linkname))
        if target is None:
            self.left_out.append(f"{info.name!r}: a link out of the folder")
            return
        known = self.files.pop(name, None)
        self.links.pop(name, None)
        if info.islnk() and target == name and known is not None:
            self.files[name] = known
        elif info.islnk() and target in self.files:  # the one before, whatever comes after
            self.files[name] = msgspec.structs.replace(self.files[target], name=name)
        else:
            self.links[name] = (target, _ns(info.mtime))

    def _follow(self, name: str) -> None:
        """Turn a link into the file that it leads to in the end."""
        target = name
        for _ in range(_MAX_LINK_STEPS):
            if target not in self.links:
                break
            target = self.links[target][0]
        member = self.files.get(target)
        if member is None:
            self.left_out.append(f"{name!r}: a link to what is no file of the archive")
        else:
            self.files[name] = msgspec.structs.replace(member, name=name)

    def _remove_folders(self) -> None:
        """Leave out files whose name is that of a folder of others."""
        folders = set()
        for name in self.files:
            folder = name.rpartition("/")[0]
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        for name in folders & self.files.keys():
            self.left_out.append(f"{name!r}: a file and a folder at once")
            del self.files[name]

    def _segments(self, info: tarfile.TarInfo) -> tuple[Segment, ...]:
        sparse: list[tuple[int, int]] | None = info.sparse  # type: ignore[assignment]
        pieces = [(0, info.size)] if sparse is None else sparse
        if len(pieces) > _MAX_SEGMENTS:
            raise ValueError(f"{info.name!r}: more than {_MAX_SEGMENTS} pieces")
        segments, place, end = [], info.offset_data, 0
        for offset, length in pieces:
            if offset < end or length < 0 or offset + length > info.size:
                raise ValueError(f"{info.name!r}: its pieces are not in order")
            if length:
                segments.append(Segment(offset, length, place))
            place += length
            end = offset + length
        self.end = max(self.end, place)
        return tuple(segments)


def _resolved(folder: str, target: str) -> str:
    """Return where a relative link leads, `..` at its start taken as the folder above."""
    parts = folder.split("/") if folder else []
    for part in target.split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def clean_name(name: str) -> str | None:
    """Return a name without empty and `.` parts, None where it is not one within the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or not parts:
        return None
    return "/".join(parts)


def _ns(mtime: float) -> int:
    """Return a time in ns; one that no file can have is none."""
    try:
        seconds = int(mtime)
        ns = seconds * 1_000_000_000 + round((mtime - seconds) * 1e9)
    except (ValueError, OverflowError):
        return 0
    return ns if abs(ns) < 1 << 63 else 0
