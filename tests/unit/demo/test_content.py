import gzip

from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.demo.content import Concat, Data, GzipStored, Noise, iter_chunks

leaves = st.one_of(
    st.binary(max_size=40).map(Data),
    st.builds(Noise, st.integers(0, 300), st.integers(0, 2**64)),
)
contents = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(Concat),
        inner.map(GzipStored),
    ),
    max_leaves=6,
)


def whole(content):
    return content.read(0, content.size_bytes)


@given(contents, st.data())
def test_read_range_is_a_slice_of_the_whole(content, data):
    start = data.draw(st.integers(0, content.size_bytes))
    stop = data.draw(st.integers(start, content.size_bytes))
    assert len(whole(content)) == content.size_bytes
    assert content.read(start, stop) == whole(content)[start:stop]


@given(st.lists(st.binary(max_size=20)))
def test_concat_reads_its_parts_in_order(parts):
    assert whole(Concat([Data(part) for part in parts])) == b"".join(parts)


@given(st.integers(0, 3), st.integers(-2, 2))
def test_gzip_stored_decompresses_to_the_content(blocks, more):
    content = Noise(max(0, blocks * 0xFFFF + more), phase=1)
    assert gzip.decompress(whole(GzipStored(content))) == whole(content)


@given(st.integers(0, 200_000), st.integers(0, 140_000))
def test_gzip_stored_reads_ranges_across_blocks(start, length):
    content = GzipStored(Noise(200_000, phase=5))
    assert (
        content.read(start, min(start + length, content.size_bytes))
        == (whole(content)[start : start + length])
    )


def test_noise_continues_past_its_period():
    noise = Noise(5_000_000, phase=17)
    everything = whole(noise)
    assert len(everything) == 5_000_000
    assert noise.read(4_000_000, 4_000_100) == everything[4_000_000:4_000_100]


def test_noise_blocks_of_a_file_are_distinct():
    noise = Noise(64 << 20, phase=3)
    starts = {noise.read(block << 20, (block << 20) + 64) for block in range(64)}
    assert len(starts) == 64


def test_noise_of_another_phase_differs():
    assert Noise(64, 1).read(0, 64) != Noise(64, 2).read(0, 64)


def test_iter_chunks_covers_the_range():
    content = Noise(700_000, phase=0)
    chunks = list(iter_chunks(content, 5, 699_999))
    assert b"".join(chunks) == whole(content)[5:699_999]
    assert max(map(len, chunks)) <= 256 * 1024
