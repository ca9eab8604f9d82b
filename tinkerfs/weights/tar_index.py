"""List the members of a tar from its headers, read from a file object (pure).

The standard library parses the headers: pax, GNU long names, sparse files of every kind. Headers
may claim anything, such as a pax header of 8 GB or an endless chain, so every read is bounded here.
Members are resolved as tar(1) would extract them (`ExtractedTree`). Devices, and names and links
that leave the directory, are skipped. A link within the directory is listed as its target file.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Protocol, Self

import msgspec

from tinkerfs.weights.extracted_tree import ExtractedTree, MemberRejected

#: Maximum number of members, and of header bytes, in one archive.
MAX_MEMBERS = 200_000
MAX_HEADER_BYTES = 256 << 20
#: Maximum size of an extended header (pax, long name); paths have at most 4 KiB on Linux.
MAX_ONE_READ_BYTES = 1 << 20
_MAX_SEGMENTS = 100_000
_MAX_SIZE_BYTES = 1 << 62

#: Maximum number of names in the tree: members, and the directories that their names imply.
MAX_NAMES = 2 * MAX_MEMBERS

#: Header types (GNU tar's manual, "Basic Tar Format").
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_DUMPDIR = b"D"
#: Volume labels, continuations of a file from another volume, and old long names.
_NON_FILE_TYPES = (b"V", b"M", b"N")
#: Headers that may appear between a pax header and its member.
_AUXILIARY_TYPES = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

#: Exceptions that tarfile raises for a corrupt header, depending on the version of Python.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, IndexError, KeyError)


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A run of bytes at `archive_offset` in the archive, at `offset` in the member."""

    offset: int
    length: int
    archive_offset: int

    @property
    def is_stored(self) -> bool:
        """Whether the archive has the bytes; those of a hole are zeros."""
        return self.archive_offset >= 0


class Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One file of an archive.

    Attributes:
        name: a relative path without `.`, `..` or empty parts. Non-UTF-8 bytes are surrogate
            escapes.
        mtime_ns: nanoseconds since 1970.
        segments: sorted by offset; bytes outside all segments are zeros.
    """

    name: str
    size_bytes: int
    mtime_ns: int
    segments: tuple[Segment, ...]

    @property
    def archive_range(self) -> tuple[int, int] | None:
        """The range [start, stop) of the archive with all bytes; None if they are not adjacent."""
        if len(self.segments) != 1 or self.segments[0].length != self.size_bytes:
            return None
        start = self.segments[0].archive_offset
        return (start, start + self.size_bytes) if start >= 0 else None


class HeaderFile(Protocol):
    """A file of headers that is read forward only, apart from one block backward."""

    def tell(self) -> int:
        """Return the offset of the next read."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Set the offset of the next read."""
        ...

    def read(self, size: int, /) -> bytes:
        """Return `size` bytes; fewer only at the end."""
        ...


def read_members(file: HeaderFile) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Return the files, unsorted, and a line with the reason per skipped member.

    Raises:
        ValueError: the tar is corrupt or truncated.
        ApiError, OSError: as raised by `file`.
    """
    return _Reader(_LimitedReader(file)).read()


class _LimitedReader:
    """Rejects reads that no genuine archive needs."""

    def __init__(self, file: HeaderFile) -> None:
        self._file = file
        self._left_bytes = MAX_HEADER_BYTES
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_ONE_READ_BYTES:
            raise ValueError(f"a header of {size} bytes is too large")
        self._left_bytes -= max(size, tarfile.BLOCKSIZE)
        if self._left_bytes < 0:
            raise ValueError(f"headers of more than {MAX_HEADER_BYTES >> 20} MiB")
        return self._file.read(size)


class _Header(tarfile.TarInfo):
    """A header, with the name that tar(1) reads in it."""

    #: Whether the previous header was a pax header of one member. Parser state of an archive.
    is_after_pax = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header block of 512 bytes.

        Only ustar has a name prefix after the name field. GNU tar's own format has times there, and
        v7 has nothing (GNU tar's manual, "Basic Tar Format").
        """
        header = super().frombuf(buf, encoding, errors)
        if buf[257:263] != b"ustar\0" and header.type not in tarfile.GNU_TYPES:
            name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
            header.name = name.rstrip("/") if header.isdir() else name
        is_pax = header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
        if is_pax and cls.is_after_pax:
            # tarfile uses the first one, tar(1) the last.
            raise ValueError("two pax headers of one member")
        if is_pax or header.type not in _AUXILIARY_TYPES:
            cls.is_after_pax = is_pax
        return header


def _new_header_type() -> type[_Header]:
    """Return a new header type for one archive, because the type holds parser state."""
    return type("_HeaderOfOneArchive", (_Header,), {})


@dataclass
class _Reader:
    file: _LimitedReader
    tree: ExtractedTree[Member] = field(default_factory=lambda: ExtractedTree(MAX_NAMES))
    skipped: list[str] = field(default_factory=list)
    #: End offset of the bytes of all members so far.
    end: int = 0

    def read(self) -> tuple[tuple[Member, ...], tuple[str, ...]]:
        try:
            for info in self._headers():
                self._add(info)
        except _TAR_ERRORS as error:
            raise ValueError(f"the archive is damaged: {error}") from None
        members = []
        for path, member in self.tree.files():
            if member is None:
                self.skipped.append(f"{path!r}: a link to no file of the archive")
            else:
                members.append(msgspec.structs.replace(member, name=path))
        return tuple(members), tuple(self.skipped)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        last_offset, count = -1, 0
        source: IO[bytes] = self.file  # type: ignore[assignment]
        with tarfile.open(
            fileobj=source,
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
            tarinfo=_new_header_type(),
        ) as tar:
            while (info := tar.next()) is not None:
                # tarfile accepts negative sizes, and would loop forever (CVE-2025-8194).
                if info.offset <= last_offset or not 0 <= info.size <= _MAX_SIZE_BYTES:
                    raise ValueError("a header has an impossible size")
                if "size" in tar.pax_headers:
                    # tarfile shows this size for all later members, but skips by their own size.
                    raise ValueError("a global pax header has a size")
                last_offset, count = info.offset, count + 1
                yield info
                # tarfile would keep all members with all of their headers.
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
        """Check the block where the next header would begin.

        tarfile takes an unreadable header for the end. A valid end is a block of zeros, or the end
        of a file that is not truncated; tar(1) accepts both.
        """
        self.file.seek(end)
        block = self.file.read(tarfile.BLOCKSIZE)
        is_complete = len(block) == tarfile.BLOCKSIZE
        if not block:
            self.file.seek(end - 1)
            is_complete = len(self.file.read(1)) == 1
        if not is_complete or block.strip(b"\0"):
            raise ValueError(f"it has neither a header nor its end at {end}")

    def _add(self, info: tarfile.TarInfo) -> None:
        if "\0" in info.name:
            raise ValueError("a name has a NUL in it")
        try:
            self._extract(info)
        except MemberRejected as rejected:
            self.skipped.append(f"{info.name!r}: {rejected}")

    def _extract(self, info: tarfile.TarInfo) -> None:
        name = sanitize_member_name(info.name)
        # tarfile removes the slash from a name in a pax header.
        given = info.pax_headers.get("path", info.name)
        has_slash = info.isreg() and given.endswith("/")
        is_directory = info.isdir() or info.type == _DUMPDIR or has_slash
        if name is None:
            if is_directory:  # SkyRL's archives contain a directory without a name
                return
            raise MemberRejected("its name leads out of the directory")
        if info.issym():
            self.tree.add_symlink(name, info.linkname)
        elif info.islnk():
            self.tree.add_hard_link(name, info.linkname)
        elif is_directory:
            self.tree.add_directory(name)
        elif info.type in _SPECIAL:
            self.tree.add_special(name)
            raise MemberRejected("a device or the like")
        elif info.type in _NON_FILE_TYPES:
            raise MemberRejected("not a file")
        else:  # also files of undefined types, as POSIX requires
            member = Member(name, info.size, _ns(info.mtime), self._segments(info))
            self.tree.add_file(name, member)

    def _segments(self, info: tarfile.TarInfo) -> tuple[Segment, ...]:
        sparse: list[tuple[int, int]] | None = info.sparse  # type: ignore[assignment]
        extents = [(0, info.size)] if sparse is None else sparse
        if len(extents) > _MAX_SEGMENTS:
            raise ValueError(f"{info.name!r}: more than {_MAX_SEGMENTS} extents")
        segments, archive_offset, end = [], info.offset_data, 0
        for offset, length in extents:
            if offset < end or length < 0 or offset + length > info.size:
                raise ValueError(f"{info.name!r}: its extents are not in order")
            if length:
                segments.append(Segment(offset, length, archive_offset))
            if archive_offset % tarfile.BLOCKSIZE and archive_offset > info.offset_data and length:
                # tar(1) begins each extent at a block; tarfile does not.
                raise ValueError(f"{info.name!r}: an extent begins within a block")
            archive_offset += length
            end = offset + length
        self.end = max(self.end, archive_offset)
        return tuple(segments)


def sanitize_member_name(name: str) -> str | None:
    """Return a name without empty and `.` parts, None if it leaves the directory."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or not parts:
        return None
    return "/".join(parts)


def _ns(mtime: float) -> int:
    """Return a time in nanoseconds, 0 if no file can have it."""
    try:
        seconds = int(mtime)
        ns = seconds * 1_000_000_000 + round((mtime - seconds) * 1e9)
    except (ValueError, OverflowError):
        return 0
    return ns if abs(ns) < 1 << 63 else 0
