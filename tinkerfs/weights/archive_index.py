"""Index an archive or external weights: the members, and where their bytes are.

A plain tar needs two small range requests: one for its start, and one for the headers after the
weights. A gzip archive, and any archive of a store without range support, is downloaded completely.
That single pass reads the headers and stores the blocks. Its result is used only after the end has
been reached and the checksum is correct. The caller caches the index on disk.
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec
from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.blocks import Blocks, FileBlocks
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.concurrency import run_concurrently
from tinkerfs.name_encoding import compound_key
from tinkerfs.weights.block_download import block_digest
from tinkerfs.weights.etags import Sample, sample_of
from tinkerfs.weights.extracted_tree import ExtractedTree, MemberRejected
from tinkerfs.weights.gzip_stream import GZIP_MAGIC, inflated
from tinkerfs.weights.probe import empty_archive
from tinkerfs.weights.range_source import Connect, RangeSource
from tinkerfs.weights.tar_index import Member, Segment, read_members, sanitize_member_name
from tinkerfs.weights.transfer import OVERLAP_BYTES
from tinkerfs.weights.transfer_monitor import TransferInterrupted
from tinkerfs.weights.url_cache import UrlProvider
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

#: Size of the first request, which contains most headers, and minimum size of the others.
PROBE_BYTES = 256 << 10
WINDOW_BYTES = 64 << 10

#: Maximum numbers of concurrent requests for external weights, and of their files.
CONNECTIONS = 8
MAX_FILES = 10_000

#: Number of attempts to index an archive, because a corrupt one may have been altered in transit.
TRIES = 2


class Index(msgspec.Struct, frozen=True):
    """The members of one version of a checkpoint's weights.

    Attributes:
        form: "tar" and "gzip" are archives; "files" are external weights.
        version: of the archive; meaningless for external weights.
        uncompressed_bytes: length of the uncompressed archive.
        members: all readable files, sorted by name.
        skipped: a line for each member that is not readable, with the reason.
        digests: of all blocks of a gzip archive, and of a tar that was downloaded completely from a
            store whose validators do not distinguish all versions.
        versions: of each file of external weights, by name.
        sample: of the archive's bytes; None if they were not downloaded.
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
    """Serialize an index for `decode_index`."""
    stored = replace(
        index,
        members=tuple(replace(each, name=_encode_name(each.name)) for each in index.members),
        versions={_encode_name(name): version for name, version in index.versions.items()},
    )
    return msgspec.msgpack.encode(stored)


def decode_index(data: bytes) -> Index:
    """Deserialize an index.

    Raises:
        ValueError: the data is corrupt, or of another version of tinkerfs.
    """
    try:
        stored = msgspec.msgpack.decode(data, type=Index)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    return replace(
        stored,
        members=tuple(replace(each, name=_decode_name(each.name)) for each in stored.members),
        versions={_decode_name(name): version for name, version in stored.versions.items()},
    )


#: Prefix of stored names of non-UTF-8 bytes, which MessagePack rejects. No name contains it.
_ESCAPE = "\0"


def _encode_name(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        return _ESCAPE + name.encode("utf-8", "surrogatepass").decode("latin-1")
    return name


def _decode_name(stored: str) -> str:
    if not stored.startswith(_ESCAPE):
        return stored
    return stored.removeprefix(_ESCAPE).encode("latin-1").decode("utf-8", "surrogatepass")


def find_member(index: Index, name: str, path: str) -> Member:
    """Return the member with a name.

    Raises:
        OSError: ENOENT of `path`, if there is no such member.
    """
    position = bisect_left(index.members, name, key=lambda member: member.name)
    if position == len(index.members) or index.members[position].name != name:
        raise errors.not_found(path)
    return index.members[position]


def block_key(cache_key: str, version: Version, kind: str) -> str:
    """Return the block cache key of one version of a file.

    `cache_key` identifies the checkpoint version. `kind` is "archive", "unpacked", or a slash and
    the name of a file of external weights.
    """
    # An unstated length is left out, so that the key is the same before and after the download.
    size_bytes = version.size_bytes if version.has_length else None
    return compound_key(cache_key, size_bytes, version.etag, version.last_modified, kind)


def archive_index(
    connect: Connect,
    url_provider: UrlProvider,
    cache: Blocks,
    cache_key: str,
    description: str,
) -> Index:
    """Index an archive, and cache the blocks that are downloaded for that.

    `cache_key` identifies the checkpoint version; `description` names it in the block cache.

    Raises:
        ApiError: the download fails.
        OSError: EIO if the archive is corrupt.
    """
    retry_budget, number = connect().monitor.retry_budget(), 0
    while True:
        try:
            return _archive_index(connect, url_provider, cache, cache_key, description)
        except TransferInterrupted as interruption:
            interruption.wait_or_raise(retry_budget)
        except ValueError as error:
            number += 1
            if number == TRIES:
                raise errors.corrupt(url_provider.path, str(error)) from None
        except OSError as error:
            # The archive was replaced while it was indexed. Nothing of it has been used yet.
            number += 1
            if number == TRIES or not errors.is_stale(error):
                raise


def _archive_index(
    connect: Connect,
    url_provider: UrlProvider,
    cache: Blocks,
    cache_key: str,
    description: str,
) -> Index:
    with RangeSource(connect, url_provider, None).open(0, PROBE_BYTES) as transfer:
        version, sample = transfer.version, None
        if transfer.is_full_body:
            chunks = iter(transfer)
            first = next(chunks, b"")
            while len(first) < len(GZIP_MAGIC) and (more := next(chunks, b"")):
                first += more
            rest: Iterable[bytes] = itertools.chain([first], chunks)
        else:
            first = b"".join(transfer)
            sample = sample_of(0, first)
            source = RangeSource(connect, url_provider, version, sample)
            rest = _full_stream(first, source, version)
        if not first:
            raise empty_archive()
        if first.startswith(GZIP_MAGIC):
            key = block_key(cache_key, version, "unpacked")
            disk = cache.open(key, f"{description} unpacked")
            index = _index_full_stream("gzip", inflated(rest), version, disk)
            return replace(index, version=transfer.version, sample=sample)
        if transfer.is_full_body or version.size_bytes <= len(first):
            key = block_key(cache_key, version, "archive")
            size_bytes = version.size_bytes if version.has_length else None
            disk = cache.open(key, f"{description} archive", size_bytes)
            index = _index_full_stream("tar", rest, version, disk)
            return replace(index, version=transfer.version)
    members, skipped = read_members(_RangeReader(source, version, first))
    size_bytes = version.size_bytes
    return Index("tar", version, size_bytes, _sorted(members), skipped, sample=sample)


def external_index(
    connect: Connect,
    names: Iterable[str],
    url_provider_of: Callable[[str], UrlProvider],
    mtime_ns: int,
) -> Index:
    """Index external weights: get the length of each file by one small request.

    Raises:
        ApiError: a request fails.
        OSError: EIO if there are too many files.
    """
    valid, skipped = _split_valid_names(names, url_provider_of("").path)

    def prober(name: str) -> Callable[[], Version]:
        def probe_file() -> Version:
            with RangeSource(connect, url_provider_of(name), None).open(0, 1) as transfer:
                if not transfer.is_full_body or transfer.version.size_bytes == UNKNOWN_BYTES:
                    for _ in transfer:  # to the end, so that the connection can be reused
                        pass
                return transfer.version

        return probe_file

    futures = run_concurrently([prober(name) for name in valid], CONNECTIONS, "external weights")
    versions = {name: future.result() for name, future in zip(valid, futures, strict=True)}
    members = tuple(
        _one_segment_member(name, version.size_bytes, mtime_ns)
        for name, version in versions.items()
    )
    return Index("files", Version(0), 0, members, tuple(skipped), (), versions)


def _split_valid_names(names: Iterable[str], path: str) -> tuple[list[str], list[str]]:
    """Return the valid names, sorted, and a line with the reason for each other."""
    tree: ExtractedTree[str] = ExtractedTree(2 * MAX_FILES)
    valid, skipped = [], []
    try:
        for name in sorted(names):
            if sanitize_member_name(name) != name:
                skipped.append(f"{name!r}: not a file name within the directory")
                continue
            try:
                tree.add_file(name, name)
            except MemberRejected as rejected:
                skipped.append(f"{name!r}: {rejected}")
            else:
                valid.append(name)
    except ValueError as error:
        raise errors.corrupt(path, str(error)) from None
    if len(valid) > MAX_FILES:
        raise errors.corrupt(path, f"more than {MAX_FILES} files")
    return valid, skipped


def _one_segment_member(name: str, size_bytes: int, mtime_ns: int) -> Member:
    return Member(name, size_bytes, mtime_ns, (Segment(0, size_bytes, 0),) if size_bytes else ())


def _sorted(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda member: member.name))


def _full_stream(first: bytes, source: RangeSource, version: Version) -> Iterator[bytes]:
    """Yield the start of a file, and then the rest."""
    yield first
    if len(first) < version.size_bytes:
        before = b"" if version.is_exact else first[-OVERLAP_BYTES:]
        with source.open(len(first), version.size_bytes, before) as transfer:
            if transfer.is_full_body:
                raise ValueError("the store supports range requests only sometimes")
            yield from transfer


def _index_full_stream(
    form: Literal["tar", "gzip"], chunks: Iterable[bytes], version: Version, disk: FileBlocks
) -> Index:
    """Read the headers of a stream to its end, and store the stream by blocks.

    Raises:
        ValueError: the archive is corrupt; its blocks are then removed.
    """
    stream = _SpoolingReader(chunks, disk)
    try:
        members, skipped = read_members(stream)
        stream.drain()
    except BaseException:
        for index in range(len(stream.digests)):
            disk.drop(index)
        raise
    finally:
        disk.close()
    digests = () if form == "tar" and version.is_exact else tuple(stream.digests)
    return Index(form, version, stream.end, _sorted(members), skipped, digests)


class _RangeReader:
    """Reads the headers of a file by range requests. Not thread-safe.

    After two adjacent windows the next window is twice as large, because the members there are
    small.
    """

    def __init__(self, source: RangeSource, version: Version, first: bytes) -> None:
        self._source = source
        self._size_bytes = version.size_bytes
        self._start, self._window = 0, first
        self._window_bytes = WINDOW_BYTES
        self._offset = 0

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert whence == 0
        self._offset = offset
        return offset

    def read(self, size: int, /) -> bytes:
        stop = min(self._offset + size, self._size_bytes)
        if stop <= self._offset:
            return b""
        if not self._start <= self._offset <= stop <= self._start + len(self._window):
            self._fetch(stop)
        data = self._window[self._offset - self._start : stop - self._start]
        self._offset = stop
        return data

    def _fetch(self, stop: int) -> None:
        gap_bytes = self._offset - self._start - len(self._window)
        is_near = gap_bytes < 2 * self._window_bytes
        self._window_bytes = min(2 * self._window_bytes, BLOCK_BYTES) if is_near else WINDOW_BYTES
        end = min(max(stop, self._offset + self._window_bytes), self._size_bytes)
        follows = gap_bytes == 0 and not self._source.is_exact
        before = self._window[-OVERLAP_BYTES:] if follows else b""
        with self._source.open(self._offset, end, before) as transfer:
            if transfer.is_full_body:
                raise ValueError("the store supports range requests only sometimes")
            self._start, self._window = self._offset, b"".join(transfer)


class _SpoolingReader:
    """Reads a stream forward as a file, and stores it by blocks. Not thread-safe."""

    #: Number of bytes before the offset that remain readable.
    _LOOKBACK_BYTES = 4096

    def __init__(self, chunks: Iterable[bytes], disk: FileBlocks) -> None:
        self._chunks = iter(chunks)
        self._disk = disk
        self._start, self._window = 0, bytearray()
        self._block = bytearray()
        self._offset = 0
        #: Number of bytes received.
        self.end = 0
        #: Of each stored block; only the last one may be shorter than the others.
        self.digests: list[bytes] = []

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence or offset < self._start:
            raise ValueError("the headers of the archive point backwards")
        self._offset = offset
        return offset

    def read(self, size: int, /) -> bytes:
        stop = self._offset + size
        while self.end < stop and self._pull():
            pass
        data = bytes(self._window[self._offset - self._start : stop - self._start])
        self._offset += len(data)
        return data

    def drain(self) -> None:
        """Read the rest of the stream, and store the last block."""
        self._offset = 1 << 62
        while self._pull():
            pass
        if self._block:
            self._store_block()

    def _pull(self) -> bool:
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self.end += len(chunk)
        self._window += chunk
        surplus = min(self._offset - self._LOOKBACK_BYTES, self.end) - self._start
        if surplus > 0:
            del self._window[:surplus]
            self._start += surplus
        self._block += chunk
        while len(self._block) >= BLOCK_BYTES:
            self._store_block()
        return True

    def _store_block(self) -> None:
        block = bytes(self._block[:BLOCK_BYTES])
        del self._block[:BLOCK_BYTES]
        self._disk.put(len(self.digests), block)
        self.digests.append(block_digest(block))
