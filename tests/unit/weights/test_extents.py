from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.weights.extents import ExtentMap, OwnBytes, Range, Rows, Zeros

SOURCE = bytes(range(256)) * 20

EXTENTS = st.lists(
    st.one_of(
        st.binary(max_size=9).map(OwnBytes),
        st.builds(Range, st.integers(0, 1000), st.integers(0, 50)),
        st.builds(Zeros, st.integers(0, 9)),
        st.builds(
            Rows,
            st.integers(0, 1000),
            st.integers(0, 9),
            st.integers(1, 9),
            st.integers(0, 5),
            st.integers(0, 5),
        ),
    ),
    max_size=12,
)


def expected_bytes(extent):
    if isinstance(extent, OwnBytes):
        return extent.data
    if isinstance(extent, Zeros):
        return bytes(extent.length)
    if isinstance(extent, Range):
        return SOURCE[extent.start : extent.start + extent.length]
    rows = [
        SOURCE[extent.start + at * extent.row_bytes :][: extent.row_bytes]
        for at in range(extent.count)
    ]
    return b"".join(bytes(extent.before) + row + bytes(extent.after) for row in rows)


def read(extents, offset, size, ranges=None):
    buffer = bytearray(b"\xee" * size)

    def read_source(view, start):
        if ranges is not None:
            ranges.append((start, start + len(view)))
        view[:] = SOURCE[start : start + len(view)]

    count = extents.read_into(memoryview(buffer), offset, read_source)
    return bytes(buffer[:count])


@given(EXTENTS, st.integers(0, 600), st.integers(0, 600))
def test_read_equals_the_joined_extents(extents, offset, size):
    data = b"".join(map(expected_bytes, extents))
    mapped = ExtentMap(extents)
    assert mapped.size_bytes == len(data)
    ranges = []
    assert read(mapped, offset, size, ranges) == data[offset : offset + size]
    stop = min(offset + size, len(data))
    assert list(mapped.source_ranges(offset, stop)) == ranges if offset < stop else not ranges


def test_adjacent_ranges_and_zeros_are_merged():
    extents = [Range(0, 5), Range(5, 5), Zeros(0), Range(10, 1), Zeros(2), Zeros(3), Range(0, 5)]
    assert len(ExtentMap(extents)) == 3


def test_read_of_a_row_reads_that_row_alone():
    ranges = []
    rows = ExtentMap([Rows(100, 1000, 4, 8, 4)])
    assert read(rows, 16 * 500 + 8, 4, ranges) == SOURCE[2100 % 256 :][:4]
    assert ranges == [(2100, 2104)]
