"""Download files of weights into the block cache by concurrent requests."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES, OVERHEAD_BYTES
from tinkerfs.context import RequestContext
from tinkerfs.weights.block_math import group_consecutive
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.readahead import MAX_READAHEAD_BYTES, READAHEAD_CONCURRENCY

if TYPE_CHECKING:
    from tinkerfs.weights.flights import PieceFuture

#: Maximum number of concurrent requests, and of blocks per request: as for sequential readahead.
_MAX_REQUESTS = READAHEAD_CONCURRENCY
_MAX_BLOCKS_PER_REQUEST = MAX_READAHEAD_BYTES // READAHEAD_CONCURRENCY // BLOCK_BYTES

_CACHE_REJECTED = "the block cache cannot take it: its disk is full, or it is full of open files"


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The result of one block.

    Attributes:
        number: index of the file in the sequence given to `prefetch`.
        size_bytes: number of the file's bytes that are newly on disk.
        error: why the block is not on disk; the rest of that file is then skipped.
    """

    number: int
    size_bytes: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Waiter:
    """A block that is in flight, and of which a file lacks `size_bytes`."""

    request: int
    number: int
    block: int
    size_bytes: int


def required_cache_bytes(files: Sequence[WeightsFile]) -> int:
    """Return the maximum disk usage of some files once all of them are cached."""
    blocks = {
        file.block_key(block): file.block_bytes(block) for file in files for block in file.blocks()
    }
    return sum(size_bytes + OVERHEAD_BYTES for size_bytes in blocks.values())


def prefetch(files: Sequence[WeightsFile], ctx: RequestContext) -> Iterator[BlockResult]:
    """Download all blocks that are not on disk; yield the result of each one.

    The files are downloaded in the given order. `ctx` bounds only the waits for archive builds. The
    waits for blocks cannot be interrupted, so callers that may be cancelled run it on a thread of
    its own. Downloads in flight continue after the iterator is closed.
    """
    in_flight: dict[PieceFuture, list[_Waiter]] = {}
    #: The number of waiters of each request that has any.
    waiting: Counter[int] = Counter()
    failed: set[int] = set()

    def completed() -> Iterator[BlockResult]:
        done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
        for future in done:
            for waiter in in_flight.pop(future):
                waiting[waiter.request] -= 1
                if not waiting[waiter.request]:
                    del waiting[waiter.request]
                error = future.exception()
                if error is None and not files[waiter.number].is_cached(waiter.block):
                    error = errors.no_space("", _CACHE_REJECTED)
                if error is None:
                    yield BlockResult(waiter.number, waiter.size_bytes)
                elif waiter.number not in failed:
                    failed.add(waiter.number)
                    assert isinstance(error, Exception)
                    yield BlockResult(waiter.number, 0, error)

    missing = [file.missing_blocks() for file in files]
    # A small number of blocks is spread over all requests.
    count = sum(map(len, missing))
    blocks_per_request = min(max(count // _MAX_REQUESTS, 1), _MAX_BLOCKS_PER_REQUEST)
    requests = [
        (number, run)
        for number, blocks in enumerate(missing)
        for run in group_consecutive(blocks, blocks_per_request)
    ]
    for request, (number, run) in enumerate(requests):
        while len(waiting) >= _MAX_REQUESTS:
            yield from completed()
        for block in run:
            file, size_bytes = files[number], missing[number][block]
            if number in failed:
                break
            if file.is_cached(block):  # another file or another process has stored it
                yield BlockResult(number, size_bytes)
                continue
            try:
                future = file.fetch(block, ctx, run.stop - block)
            except (errors.ApiError, OSError) as error:
                failed.add(number)
                yield BlockResult(number, 0, error)
                break
            waiter = _Waiter(request, number, block, size_bytes)
            in_flight.setdefault(future, []).append(waiter)
            waiting[request] += 1
    while in_flight:
        yield from completed()
