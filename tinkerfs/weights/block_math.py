"""A file as blocks: which of them hold what (pure)."""

from collections.abc import Iterable, Iterator

#: What is fetched, checked and kept at a time: at 100 MB/s and 50 ms to the store 16 of them at a
#: time hide the latency, and one is soon there.
BLOCK_BYTES = 4 << 20


def block_range(start: int, stop: int) -> range:
    """Return the blocks that hold the bytes [start, stop)."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES) if stop > start else 0)


def group_consecutive(blocks: Iterable[int], most: int) -> Iterator[range]:
    """Yield some blocks again, those that follow one another together, up to `most`."""
    run = range(0)
    for index in blocks:
        if run and (index != run.stop or len(run) == most):
            yield run
            run = range(0)
        run = range(run.start if run else index, index + 1)
    if run:
        yield run


def split_by_block(buffer: memoryview, start: int) -> Iterator[tuple[memoryview, int, int]]:
    """Yield the parts of a buffer for what is at `start`: of which block, and where in that."""
    index, first = divmod(start, BLOCK_BYTES)
    while buffer:
        part = buffer[: BLOCK_BYTES - first]
        yield part, index, first
        buffer, index, first = buffer[len(part) :], index + 1, 0
