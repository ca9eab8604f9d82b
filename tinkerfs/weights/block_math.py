"""Map byte ranges of a file to blocks (pure)."""

from collections.abc import Iterable, Iterator

from tinkerfs.cache.data_layout import BLOCK_BYTES


def block_range(start: int, stop: int) -> range:
    """Return the indexes of the blocks that contain the bytes [start, stop)."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES) if stop > start else 0)


def group_consecutive(blocks: Iterable[int], max_blocks: int) -> Iterator[range]:
    """Yield runs of consecutive blocks, each at most `max_blocks` long."""
    run = range(0)
    for index in blocks:
        if run and (index != run.stop or len(run) == max_blocks):
            yield run
            run = range(0)
        run = range(run.start if run else index, index + 1)
    if run:
        yield run


def split_by_block(buffer: memoryview, start: int) -> Iterator[tuple[memoryview, int, int]]:
    """Yield (view, block index, offset in the block) for a buffer at `start`."""
    index, first = divmod(start, BLOCK_BYTES)
    while buffer:
        view = buffer[: BLOCK_BYTES - first]
        yield view, index, first
        buffer, index, first = buffer[len(view) :], index + 1, 0
