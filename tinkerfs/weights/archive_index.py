"""What is in a checkpoint's archive, or among its external weights: found out once, kept on disk.

A plain tar takes two small range requests: one for its start, one for what follows the weights.
What has to come whole, because it is packed or its store heeds no ranges, is unpacked, read and
kept by blocks in one pass. Nothing of it is used before the end is reached and the checksum agrees.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec
from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockCache, BlockFile
from tinkerfs.concurrency import run_concurrently
from tinkerfs.name_encoding import compound_key
from tinkerfs.weights.block_download import block_digest
from tinkerfs.weights.block_math import BLOCK_BYTES
from tinkerfs.weights.connections import ObjectStoreClient
from tinkerfs.weights.etags import Sample, sample_of
from tinkerfs.weights.extracted_tree import ExtractedTree, Refused
from tinkerfs.weights.gzip_stream import GZIP_MAGIC, inflated
from tinkerfs.weights.probe import empty_archive
from tinkerfs.weights.range_source import RangeSource, UrlProvider
from tinkerfs.weights.retry import RetryBudget, TransferInterrupted
from tinkerfs.weights.tar_index import Member, Segment, read_members, sanitize_member_name
from tinkerfs.weights.transfer import OVERLAP_BYTES
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

#: The first request, and the least of those after it: most headers of an archive come with it.
PROBE_BYTES = 256 << 10
WINDOW_BYTES = 64 << 10

#: Files of external weights that are asked about at a time, and at most.
CONNECTIONS = 8
MAX_FILES = 10_000

#: A damaged archive is looked at once more: it may have been altered on the way.
TRIES = 2


class Index(msgspec.Struct, frozen=True):
    """What one version of a checkpoint's weights holds.

    Attributes:
        form: a plain tar, a packed one, or a file each.
        version: of the archive; of files nothing.
        plain_bytes: of the archive, unpacked.
        members: every file that is shown, sorted by name.
        left_out: what is not shown, and why.
        digests: of each block of a packed archive, unpacked, and of one that has to come whole from
            a store whose validators do not tell versions apart.
        versions: of each file by name, where there is no archive.
        sample: of the archive's bytes; None if they were not seen.
    """

    form: Literal["tar", "gzip", "files"]
    version: Version
    uncompressed_bytes: int
    members: tuple[Member, ...]
    skipped: tuple[str, ...] = ()
    digests: tuple[bytes, ...] = ()
    versions: dict[str, Version] = {}
    sample: Sample | None = None


def encode_index(index: Index) -> bytes:
    """Return an index as `decode_index` reads it."""
    stored = replace(
        index,
        members=tuple(replace(each, name=_stored_name(each.name)) for each in index.members),
        versions={_stored_name(name): version for name, version in index.versions.items()},
    )
    return msgspec.msgpack.encode(stored)


def decode_index(data: bytes) -> Index:
    """Return the index that was encoded.

    Raises:
        ValueError: it is damaged, or of another version of tinkerfs.
    """
    try:
        stored = msgspec.msgpack.decode(data, type=Index)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    return replace(
        stored,
        members=tuple(replace(each, name=_given_name(each.name)) for each in stored.members),
        versions={_given_name(name): version for name, version in stored.versions.items()},
    )


#: Begins a stored name of non-UTF-8 bytes, which MessagePack refuses in a string. No name has it.
_ESCAPE = "\0"


def _stored_name(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        return _ESCAPE + name.encode("utf-8", "surrogatepass").decode("latin-1")
    return name


def _given_name(stored: str) -> str:
    if not stored.startswith(_ESCAPE):
        return stored
    return stored.removeprefix(_ESCAPE).encode("latin-1").decode("utf-8", "surrogatepass")


def find_member(index: Index, name: str, path: str) -> Member:
    """Return a member by its name.

    Raises:
        OSError: ENOENT, of `path`.
    """
    at = bisect_left(index.members, name, key=lambda member: member.name)
    if at == len(index.members) or index.members[at].name != name:
        raise errors.not_found(path)
    return index.members[at]


def block_key(identity: str, version: Version, what: str) -> str:
    """Return what the blocks of one version of one file are kept under.

    Args:
        identity: the checkpoint and its version, on its server.
        version: what the store says.
        what: "archive", "unpacked", or the name of a file after a slash.
    """
    # The same before all of a file was received and after, where its store states no length.
    size_bytes = version.size_bytes if version.has_length else None
    return compound_key(identity, size_bytes, version.etag, version.last_modified, what)


def archive_index(
    client: ObjectStoreClient, address: UrlProvider, cache: BlockCache, identity: str, about: str
) -> Index:
    """Find out what an archive holds.

    Args:
        client: the connections.
        address: where the archive is.
        cache: takes what comes by the way.
        identity: the checkpoint and its version, on its server.
        about: what people are told that the checkpoint is.

    Raises:
        ApiError: it cannot be had.
        OSError: EIO when it is no sound archive.
    """
    patience, number = RetryBudget(client.timeout_s), 0
    while True:
        try:
            return _archive_index(client, address, cache, identity, about)
        except TransferInterrupted as lost:
            patience.backoff_or_raise(lost)
        except ValueError as error:
            number += 1
            if number == TRIES:
                raise errors.corrupt(address.path, str(error)) from None
        except OSError as error:
            # It was replaced while its headers were read: nothing of it was given out yet.
            number += 1
            if number == TRIES or not errors.is_stale(error):
                raise


def _archive_index(
    client: ObjectStoreClient, address: UrlProvider, cache: BlockCache, identity: str, about: str
) -> Index:
    with RangeSource(client, address, None).open(0, PROBE_BYTES) as transfer:
        version, sample = transfer.version, None
        if transfer.is_full_body:
            pieces = iter(transfer)
            first = next(pieces, b"")
            while len(first) < len(GZIP_MAGIC) and (more := next(pieces, b"")):
                first += more
            rest: Iterable[bytes] = itertools.chain([first], pieces)
        else:
            first = b"".join(transfer)
            sample = sample_of(0, first)
            source = RangeSource(client, address, version, sample)
            rest = _on(first, source, version)
        if not first:
            raise empty_archive()
        if first.startswith(GZIP_MAGIC):
            key = block_key(identity, version, "unpacked")
            disk = cache.open(key, f"{about} unpacked")
            index = _in_one_pass("gzip", inflated(rest), version, disk)
            return replace(index, version=transfer.version, sample=sample)
        if transfer.is_full_body or version.size_bytes <= len(first):
            key = block_key(identity, version, "archive")
            size_bytes = version.size_bytes if version.has_length else None
            disk = cache.open(key, f"{about} archive", size_bytes)
            index = _in_one_pass("tar", rest, version, disk)
            return replace(index, version=transfer.version)
    members, left_out = read_members(_RangeReader(source, version, first))
    size_bytes = version.size_bytes
    return Index("tar", version, size_bytes, _sorted(members), left_out, sample=sample)


def external_index(
    client: ObjectStoreClient,
    names: Iterable[str],
    address_of: Callable[[str], UrlProvider],
    mtime_ns: int,
) -> Index:
    """Find out how long each file of external weights is: one small request each, side by side.

    Args:
        client: the connections.
        names: as the server tells them.
        address_of: where one of them is.
        mtime_ns: of all of them, nanoseconds since 1970.

    Raises:
        ApiError: one of them cannot be had.
        OSError: EIO when there are too many.
    """
    good, left_out = _shown(names, address_of("").path)

    def look_at(name: str) -> Callable[[], Version]:
        def look() -> Version:
            with RangeSource(client, address_of(name), None).open(0, 1) as transfer:
                if not transfer.is_full_body or transfer.version.size_bytes == UNKNOWN_BYTES:
                    for _ in transfer:  # to the end, so that the connection serves again
                        pass
                return transfer.version

        return look

    flights = run_concurrently([look_at(name) for name in good], CONNECTIONS, "external weights")
    versions = {name: flight.result() for name, flight in zip(good, flights, strict=True)}
    members = tuple(
        _whole(name, version.size_bytes, mtime_ns) for name, version in versions.items()
    )
    return Index("files", Version(0), 0, members, tuple(left_out), (), versions)


def _shown(names: Iterable[str], path: str) -> tuple[list[str], list[str]]:
    """Return the names that can be files of one directory, sorted, and the others with reasons."""
    tree: ExtractedTree[str] = ExtractedTree(2 * MAX_FILES)
    good, left_out = [], []
    try:
        for name in sorted(names):
            if sanitize_member_name(name) != name:
                left_out.append(f"{name!r}: not a file name within the directory")
                continue
            try:
                tree.add_file(name, name)
            except Refused as refused:
                left_out.append(f"{name!r}: {refused}")
            else:
                good.append(name)
    except ValueError as error:
        raise errors.corrupt(path, str(error)) from None
    if len(good) > MAX_FILES:
        raise errors.corrupt(path, f"more than {MAX_FILES} files")
    return good, left_out


def _whole(name: str, size_bytes: int, mtime_ns: int) -> Member:
    return Member(name, size_bytes, mtime_ns, (Segment(0, size_bytes, 0),) if size_bytes else ())


def _sorted(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda member: member.name))


def _on(first: bytes, source: RangeSource, version: Version) -> Iterator[bytes]:
    """Yield the start of a file, and all that follows."""
    yield first
    if len(first) < version.size_bytes:
        before = b"" if version.is_exact else first[-OVERLAP_BYTES:]
        with source.open(len(first), version.size_bytes, before) as transfer:
            if transfer.is_full_body:
                raise ValueError("the store heeds ranges now and then")
            yield from transfer


def _in_one_pass(
    form: Literal["tar", "gzip"], pieces: Iterable[bytes], version: Version, disk: BlockFile
) -> Index:
    """Read the headers of what comes, to its end, and keep it by blocks.

    Raises:
        ValueError: it is no sound archive; then nothing of it is kept.
    """
    stream = _SpoolingReader(pieces, disk)
    try:
        members, left_out = read_members(stream)
        stream.drain()
    except BaseException:
        for index in range(len(stream.digests)):
            disk.drop(index)
        raise
    finally:
        disk.close()
    digests = () if form == "tar" and version.is_exact else tuple(stream.digests)
    return Index(form, version, stream.end, _sorted(members), left_out, digests)


class _RangeReader:
    """The headers of a file by range requests. One thread's.

    Where one window follows the last the next one is twice as large: members are small there.
    """

    def __init__(self, source: RangeSource, version: Version, first: bytes) -> None:
        self._source = source
        self._size_bytes = version.size_bytes
        self._start, self._window = 0, first
        self._window_bytes = WINDOW_BYTES
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert whence == 0
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        stop = min(self._at + size, self._size_bytes)
        if stop <= self._at:
            return b""
        if not self._start <= self._at <= stop <= self._start + len(self._window):
            self._fetch(stop)
        data = self._window[self._at - self._start : stop - self._start]
        self._at = stop
        return data

    def _fetch(self, stop: int) -> None:
        gap_bytes = self._at - self._start - len(self._window)
        is_near = gap_bytes < 2 * self._window_bytes
        self._window_bytes = min(2 * self._window_bytes, BLOCK_BYTES) if is_near else WINDOW_BYTES
        end = min(max(stop, self._at + self._window_bytes), self._size_bytes)
        follows = gap_bytes == 0 and not self._source.is_exact
        before = self._window[-OVERLAP_BYTES:] if follows else b""
        with self._source.open(self._at, end, before) as transfer:
            if transfer.is_full_body:
                raise ValueError("the store heeds ranges now and then")
            self._start, self._window = self._at, b"".join(transfer)


class _SpoolingReader:
    """What comes by, as a file that is read forward, and kept by blocks. One thread's."""

    #: What stays behind the place that is read.
    _BEHIND_BYTES = 4096

    def __init__(self, pieces: Iterable[bytes], disk: BlockFile) -> None:
        self._pieces = iter(pieces)
        self._disk = disk
        self._start, self._window = 0, bytearray()
        self._block = bytearray()
        self._at = 0
        #: How much came.
        self.end = 0
        #: Of each block that came whole, or last.
        self.digests: list[bytes] = []

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence or offset < self._start:
            raise ValueError("the headers of the archive lead backwards")
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        stop = self._at + size
        while self.end < stop and self._pull():
            pass
        data = bytes(self._window[self._at - self._start : stop - self._start])
        self._at += len(data)
        return data

    def drain(self) -> None:
        """Take all that is left."""
        self._at = 1 << 62
        while self._pull():
            pass
        if self._block:
            self._keep()

    def _pull(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self.end += len(piece)
        self._window += piece
        surplus = min(self._at - self._BEHIND_BYTES, self.end) - self._start
        if surplus > 0:
            del self._window[:surplus]
            self._start += surplus
        self._block += piece
        while len(self._block) >= BLOCK_BYTES:
            self._keep()
        return True

    def _keep(self) -> None:
        block = bytes(self._block[:BLOCK_BYTES])
        del self._block[:BLOCK_BYTES]
        self._disk.put(len(self.digests), block)
        self.digests.append(block_digest(block))
