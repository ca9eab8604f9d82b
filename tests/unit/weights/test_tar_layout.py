"""The layout of a tar over separate files, compared with the tar of the standard library."""

import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.weights.tar_index import Member, read_members
from tinkerfs.weights.tar_layout import tar_layout

#: Names that may occur in `files/`, of which some need an extended header.
NAMES = st.one_of(
    st.text(st.sampled_from("ab/ü\udcff\n "), min_size=1, max_size=12),
    st.text(st.sampled_from("abü"), min_size=95, max_size=300),
)
FILES = st.dictionaries(NAMES, st.binary(max_size=1200), max_size=6)
TIME_S = 1_767_268_800


def members_of(files, mtime_ns=TIME_S * 10**9 + 666_666_667):
    return tuple(Member(name, len(data), mtime_ns, ()) for name, data in files.items())


def read(extents, source, offset, size):
    def read_source(view, start):
        view[:] = source[start : start + len(view)]

    buffer = bytearray(size)
    return bytes(buffer[: extents.read_into(memoryview(buffer), offset, read_source)])


def tar_of(files):
    """Return the tar that the standard library writes."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), TIME_S
            tar.addfile(info, io.BytesIO(data))
    return written.getvalue()


@given(FILES, st.integers(0, 12_000), st.integers(0, 12_000))
def test_tar_equals_that_of_the_standard_library(files, offset, size):
    expected = tar_of(files)
    extents = tar_layout(members_of(files)).extents
    assert extents.size_bytes == len(expected)
    assert read(extents, b"".join(files.values()), offset, size) == expected[offset : offset + size]


def test_plain_name_has_a_header_of_one_block():
    extents = tar_layout(members_of({"adapter_config.json": b"x" * 512})).extents
    assert extents.size_bytes == tarfile.RECORDSIZE
    header = read(extents, b"x" * 512, 0, 512)
    info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    assert (info.name, info.size, info.mtime) == ("adapter_config.json", 512, TIME_S)
    assert (info.mode, info.uid, info.gid, info.uname, info.gname) == (0o644, 0, 0, "", "")
    assert info.isreg()


def test_size_of_8_gib_has_an_extended_header():
    members = (Member("large", 8 << 30, 0, ()), Member("next", 5, 0, ()))
    extents = tar_layout(members).extents

    class Headers:
        """The tar with zeros in place of the members."""

        offset = 0

        def tell(self):
            return self.offset

        def seek(self, offset, whence=0, /):
            assert whence == 0
            self.offset = offset
            return offset

        def read(self, size, /):
            buffer = bytearray(size)
            count = extents.read_into(memoryview(buffer), self.offset, lambda _view, _start: None)
            self.offset += count
            return bytes(buffer[:count])

    found, skipped = read_members(Headers())
    assert {each.name: each.size_bytes for each in found} == {"large": 8 << 30, "next": 5}
    assert not skipped


def test_lone_surrogate_in_a_name_becomes_its_bytes():
    extents = tar_layout(members_of({"\ud800": b""})).extents
    with tarfile.open(fileobj=io.BytesIO(read(extents, b"", 0, extents.size_bytes))) as tar:
        (name,) = tar.getnames()
    assert name.encode("utf-8", "surrogateescape") == b"\xed\xa0\x80"


def test_layouts_of_other_names_or_times_have_other_keys():
    first = tar_layout(members_of({"a": b"1"}))
    assert first.key == tar_layout(members_of({"a": b"2"})).key
    assert first.key != tar_layout(members_of({"b": b"1"})).key
    assert first.key != tar_layout(members_of({"a": b"1"}, mtime_ns=0)).key
