"""Map byte ranges of a file to blocks and units (pure)."""

from collections.abc import Iterable, Iterator

from tinkerfs.cache.data_layout import BLOCK_BYTES, UNITS_PER_BLOCK


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


def join_consecutive(runs: Iterable[range], max_length: int) -> Iterator[range]:
    """Yield runs with those joined that follow each other, up to a length; drop empty ones."""
    joined = range(0)
    for run in runs:
        if joined and (run.start != joined.stop or run.stop - joined.start > max_length):
            yield joined
            joined = range(0)
        if run:
            joined = range(joined.start if joined else run.start, run.stop)
    if joined:
        yield joined


def split_by_block(buffer: memoryview, start: int) -> Iterator[tuple[memoryview, int]]:
    """Yield (view, offset) for the part in each block of a buffer at `start`."""
    while buffer:
        view = buffer[: BLOCK_BYTES - start % BLOCK_BYTES]
        yield view, start
        buffer, start = buffer[len(view) :], start + len(view)


def split_units(units: range) -> Iterator[range]:
    """Yield the part in each block of a run of units."""
    start = units.start
    while start < units.stop:
        stop = min((start // UNITS_PER_BLOCK + 1) * UNITS_PER_BLOCK, units.stop)
        yield range(start, stop)
        start = stop


def hull(units: Iterable[int], empty_at: int = 0) -> range:
    """Return the run from the first to the last of some ascending units."""
    found = list(units)
    return range(found[0], found[-1] + 1) if found else range(empty_at, empty_at)
