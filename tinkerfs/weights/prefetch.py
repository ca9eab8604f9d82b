"""Weights into the block cache: several requests at a time, over any number of files, each once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.weights.block_math import BLOCK_BYTES, group_consecutive
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.readahead import MAX_READAHEAD_BYTES, READAHEAD_CONCURRENCY

#: Requests under way at a time, of all files together, and the most blocks of one: as many as for a
#: reader who reads on and on.
_REQUESTS = READAHEAD_CONCURRENCY
_BLOCKS_OF_ONE = MAX_READAHEAD_BYTES // READAHEAD_CONCURRENCY // BLOCK_BYTES

#: What a block takes on disk beyond its bytes, at most: its checksum, in a page of its own.
_BESIDE_BYTES = 4096

_REFUSED = "the block cache does not take it: its disk is full, or it is full of open files"


@dataclass(frozen=True, slots=True)
class Landed:
    """What came of a block.

    Attributes:
        number: of which file.
        size_bytes: how many more of the file's bytes are on disk now.
        error: why they are not; nothing more of that file is fetched then.
    """

    number: int
    size_bytes: int
    error: Exception | None = None


def required_cache_bytes(files: Sequence[WeightsFile]) -> int:
    """Return what some files take in the cache, at most, once all of them are in it."""
    blocks = {
        (file.key, block): file.block_bytes(block) for file in files for block in file.blocks()
    }
    return sum(size_bytes + _BESIDE_BYTES for size_bytes in blocks.values())


def prefetch(files: Sequence[WeightsFile], ctx: RequestContext) -> Iterator[Landed]:
    """Fetch what is not on disk, and tell of each block that was not when it is.

    For one thread, whose wait for a block nothing ends but the block; to be left alone, it is run
    on a thread of its own. What was begun when the iterator is dropped goes on.

    Args:
        files: open, in the order in which they are fetched.
        ctx: waits where an archive must be built first.
    """
    # Who waits for a block: which file, which block, how many bytes of the file, by which request.
    flying: dict[Future[bytes | None], list[tuple[int, int, int, int]]] = {}
    failed: set[int] = set()

    def landed() -> Iterator[Landed]:
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        for flight in done:
            for number, block, size_bytes, _request in flying.pop(flight):
                error = flight.exception()
                if error is None and not files[number].is_cached(block):
                    error = errors.no_space("", _REFUSED)
                if error is None:
                    yield Landed(number, size_bytes)
                elif number not in failed:
                    failed.add(number)
                    assert isinstance(error, Exception)
                    yield Landed(number, 0, error)

    missing = [
        {block: held for block, held in file.blocks().items() if not file.is_cached(block)}
        for file in files
    ]
    # Of few blocks each has a request of its own.
    several = min(max(sum(map(len, missing)) // _REQUESTS, 1), _BLOCKS_OF_ONE)
    requests = [
        (number, run)
        for number, blocks in enumerate(missing)
        for run in group_consecutive(blocks, several)
    ]
    for request, (number, run) in enumerate(requests):
        while len({each[-1] for waiting in flying.values() for each in waiting}) >= _REQUESTS:
            yield from landed()
        for block in run:
            file, size_bytes = files[number], missing[number][block]
            if number in failed:
                break
            if file.is_cached(block):  # it came with another file, or to another process
                yield Landed(number, size_bytes)
                continue
            try:
                flight = file.fetch(block, ctx, run.stop - block)
            except (errors.ApiError, OSError) as error:
                failed.add(number)
                yield Landed(number, 0, error)
                break
            flying.setdefault(flight, []).append((number, block, size_bytes, request))
    while flying:
        yield from landed()
