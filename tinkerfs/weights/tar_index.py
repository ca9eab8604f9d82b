"""The members of a tar, from its headers alone (pure: the bytes come from a file object).

The standard library reads the headers: pax, GNU long names, sparse files of every kind. What it may
read is bounded here, since a header can claim anything (a pax header of 8 GB, a chain that never
ends). What it found is extracted as tar(1) does (`ExtractedTree`). Names that lead out of the
directory, links out of it and devices are left out; links within it are the file they lead to.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Protocol, Self

import msgspec

from tinkerfs.weights.extracted_tree import ExtractedTree, Refused

#: Bounds on what the headers of one archive may be.
MAX_MEMBERS = 200_000
MAX_HEADER_BYTES = 256 << 20
#: The largest extended header (pax, long name): names are 4 KiB at most on Linux.
MAX_ONE_READ_BYTES = 1 << 20
_MAX_SEGMENTS = 100_000
_MAX_SIZE_BYTES = 1 << 62

#: Names of a tree: members, and the directories that their names imply.
MAX_NAMES = 2 * MAX_MEMBERS

#: Types of headers (GNU tar's manual, "Basic Tar Format").
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_DUMPDIR = b"D"
#: Volume labels, parts of a file that began in another volume, and old long names.
_NO_FILES = (b"V", b"M", b"N")
#: What stands between a pax header and the member that it is of.
_AUXILIARY_TYPES = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

#: tarfile's way of telling a damaged header is one of these, by the version of Python.
_DAMAGES = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError, KeyError)


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bytes of a member: `length` from `place` of the archive, at `offset` of the member."""

    offset: int
    length: int
    archive_offset: int


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
    """Return the files in any order, and what was left out and why.

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


class _Header(tarfile.TarInfo):
    """A header with the name that tar(1) reads in it."""

    #: Whether the header before was a pax header of one member; reset by `_new_header_type`.
    is_after_pax = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the header in a block of 512 bytes.

        Only ustar has a prefix of the name behind the name's field: GNU tar's own format has times
        there, and v7 nothing (GNU tar's manual, "Basic Tar Format").
        """
        header = super().frombuf(buf, encoding, errors)
        if buf[257:263] != b"ustar\0" and header.type not in tarfile.GNU_TYPES:
            name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
            header.name = name.rstrip("/") if header.isdir() else name
        is_pax = header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
        if is_pax and cls.is_after_pax:
            # tarfile lets the first one count, tar(1) the last.
            raise ValueError("two pax headers of one member")
        if is_pax or header.type not in _AUXILIARY_TYPES:
            cls.is_after_pax = is_pax
        return header


def _new_header_type() -> type[_Header]:
    """Return a type for the headers of one archive: what came before is remembered in it."""
    return type("_HeaderOfOneArchive", (_Header,), {})


@dataclass
class _Reader:
    file: _Bounded
    tree: ExtractedTree[Member] = field(default_factory=lambda: ExtractedTree(MAX_NAMES))
    skipped: list[str] = field(default_factory=list)
    #: Where the bytes of all members so far end.
    end: int = 0

    def read(self) -> tuple[tuple[Member, ...], tuple[str, ...]]:
        try:
            for info in self._headers():
                self._take(info)
        except _DAMAGES as error:
            raise ValueError(f"the archive is damaged: {error}") from None
        members = []
        for path, member in self.tree.files():
            if member is None:
                self.skipped.append(f"{path!r}: a link to no file of the archive")
            else:
                members.append(msgspec.structs.replace(member, name=path))
        return tuple(members), tuple(self.skipped)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        at, count = -1, 0
        source: IO[bytes] = self.file  # type: ignore[assignment]
        with tarfile.open(
            fileobj=source,
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
            tarinfo=_new_header_type(),
        ) as tar:
            while (info := tar.next()) is not None:
                # tarfile takes negative sizes, and would read for ever (CVE-2025-8194).
                if info.offset <= at or not 0 <= info.size <= _MAX_SIZE_BYTES:
                    raise ValueError("a header has a size that cannot be")
                if "size" in tar.pax_headers:
                    # Of every member that follows: tarfile shows it and goes on by the other one.
                    raise ValueError("a global pax header has a size")
                at, count = info.offset, count + 1
                yield info
                # It keeps all members, with all of their headers.
                tar.members.clear()  # type: ignore[attr-defined]
                if count > MAX_MEMBERS:
                    raise ValueError(f"more than {MAX_MEMBERS} members")
            end = tar.offset
        if end == 0:
            raise ValueError("it has no members")
        self._check_end(end)
        if self.end > end:
            raise ValueError("a member ends after the archive")

    def _check_end(self, end: int) -> None:
        """Check what is where the next header would begin.

        `tarfile` takes what it cannot read for the end. The true end is a block of zeros, or that
        of the file itself, which is then whole: tar(1) takes both.
        """
        self.file.seek(end)
        block = self.file.read(tarfile.BLOCKSIZE)
        is_whole = len(block) == tarfile.BLOCKSIZE
        if not block:
            self.file.seek(end - 1)
            is_whole = len(self.file.read(1)) == 1
        if not is_whole or block.strip(b"\0"):
            raise ValueError(f"it has neither a header nor its end at {end}")

    def _take(self, info: tarfile.TarInfo) -> None:
        if "\0" in info.name:
            raise ValueError("a name has a NUL in it")
        try:
            self._extract(info)
        except Refused as refused:
            self.skipped.append(f"{info.name!r}: {refused}")

    def _extract(self, info: tarfile.TarInfo) -> None:
        name = sanitize_member_name(info.name)
        # tarfile removes the slash from a name in a pax header.
        given = info.pax_headers.get("path", info.name)
        has_slash = info.isreg() and given.endswith("/")
        is_directory = info.isdir() or info.type == _DUMPDIR or has_slash
        if name is None:
            if is_directory:  # SkyRL's archives have one without a name
                return
            raise Refused("its name leads out of the directory")
        if info.issym():
            self.tree.add_symlink(name, info.linkname)
        elif info.islnk():
            self.tree.add_hard_link(name, info.linkname)
        elif is_directory:
            self.tree.add_directory(name)
        elif info.type in _SPECIAL:
            self.tree.add_special(name)
            raise Refused("a device or the like")
        elif info.type in _NO_FILES:
            raise Refused("not a file")
        else:  # also what has a type that nothing defines, as POSIX asks for
            member = Member(name, info.size, _ns(info.mtime), self._segments(info))
            self.tree.add_file(name, member)

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
            if place % tarfile.BLOCKSIZE and place > info.offset_data and length:
                # tar(1) begins each piece at a block, tarfile does not.
                raise ValueError(f"{info.name!r}: a piece begins within a block")
            place += length
            end = offset + length
        self.end = max(self.end, place)
        return tuple(segments)


def sanitize_member_name(name: str) -> str | None:
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
