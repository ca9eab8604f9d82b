"""The tar index: the same members as tarfile and tar(1) see, and bounded reads."""

import io
import os
import random
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinkerfs.weights import tar_index
from tinkerfs.weights.tar_index import read_members


def tar_of(*members, form=tarfile.PAX_FORMAT, **options):
    """Return a tar of (name, bytes) pairs, or of (TarInfo, bytes) pairs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form, **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return packed.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def bytes_of(packed, member):
    data = bytearray(member.size_bytes)
    for segment in member.segments:
        chunk = packed[segment.archive_offset : segment.archive_offset + segment.length]
        assert len(chunk) == segment.length
        data[segment.offset : segment.offset + segment.length] = chunk
    return bytes(data)


def read(packed):
    """Return the members' bytes by name, and the lines of the skipped members."""
    members, skipped = read_members(io.BytesIO(packed))
    return {member.name: bytes_of(packed, member) for member in members}, list(skipped)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=160)


@settings(max_examples=60)
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name not in (".", "..")),
        st.binary(max_size=2000) | st.sampled_from([b"", b"x" * 512, b"y" * 1024]),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_read_members_returns_what_was_packed(files, form):
    assert read(tar_of(*files.items(), form=form)) == (files, [])


def test_deep_and_non_utf8_names_and_times_are_preserved():
    deep = "/".join(["folder" * 20] * 30) + "/file"
    odd = b"caf\xe9".decode("utf-8", "surrogateescape")
    info = tarfile.TarInfo(odd)
    info.mtime = 1_234_567_890.25
    packed = tar_of((deep, b"1"), (info, b"22"), errors="surrogateescape")
    members, _ = read_members(io.BytesIO(packed))
    times_ns = {member.name: member.mtime_ns for member in members}
    assert times_ns == {deep: 0, odd: 1_234_567_890_250_000_000}


@pytest.mark.parametrize("form", ["gnu", "posix", "oldgnu"])
@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_files_have_their_holes(tmp_path, form, version):
    size, rng = 1 << 20, random.Random(0)
    data = bytearray(size)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
        for _ in range(40):
            at, chunk = rng.randrange(size - 5000), rng.randbytes(rng.randrange(1, 5000))
            file.seek(at)
            file.write(chunk)
            data[at : at + len(chunk)] = chunk
    (tmp_path / "after").write_bytes(b"after")
    options = [f"--format={form}"] + ([f"--sparse-version={version}"] if form == "posix" else [])
    command = ["tar", "--sparse", *options, "-C", tmp_path, "-c", "sparse", "after"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(packed) < size
    assert read(packed) == ({"sparse": bytes(data), "after": b"after"}, [])


def test_links_within_the_archive_are_resolved(tmp_path):
    (tmp_path / "a").write_bytes(b"first")
    os.link(tmp_path / "a", tmp_path / "hard")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "up").symlink_to("../a")
    (tmp_path / "b" / "again").symlink_to("./up")
    names = ["b/again", "b/up", "a", "hard"]  # the links precede their targets
    command = ["tar", "-C", tmp_path, "-c", *names]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    assert read(packed) == (dict.fromkeys(["a", "hard", "b/up", "b/again"], b"first"), [])


def test_last_member_of_a_name_wins_but_hard_links_keep_theirs():
    packed = tar_of(
        ("x", b"old"), (special("was", tarfile.LNKTYPE, "x"), None), ("x", b"new"), ("./x", b"last")
    )
    assert read(packed) == ({"was": b"old", "x": b"last"}, [])


def test_unsafe_members_are_skipped_with_a_reason():
    packed = tar_of(
        ("/etc/passwd", b"1"),
        ("../up", b"2"),
        ("a/../../up", b"3"),
        ("", b"4"),
        (special("out", tarfile.SYMTYPE, "../../etc/passwd"), None),
        (special("absolute", tarfile.SYMTYPE, "/etc/passwd"), None),
        (special("hard", tarfile.LNKTYPE, "/etc/passwd"), None),
        (special("lost", tarfile.SYMTYPE, "nothing"), None),
        (special("loop", tarfile.SYMTYPE, "loop"), None),
        (special("device", tarfile.CHRTYPE), None),
        (special("pipe", tarfile.FIFOTYPE), None),
        (special("folder", tarfile.DIRTYPE), None),
        (special("", tarfile.DIRTYPE), None),  # SkyRL packs the directory itself
        ("both", b"5"),
        ("both/inner", b"6"),
        ("good", b"7"),
    )
    files, skipped = read(packed)
    assert files == {"both": b"5", "good": b"7"}
    assert len(skipped) == 12


def test_tar_without_its_end_is_an_error():
    packed = tar_of(("a", b"x" * 700), ("b", b"y" * 700), form=tarfile.GNU_FORMAT)
    end = 2 * (512 + 1024)
    for length in (end, end + 512, end + 1024):
        assert read(packed[:length])[0].keys() == {"a", "b"}
    for length in (0, 100, 512, 1000, 512 + 1024 + 300, end - 512, end - 1, end + 100):
        with pytest.raises(ValueError, match=r"."):
            read(packed[:length])


def test_corrupt_header_is_not_taken_for_the_end():
    packed = bytearray(tar_of(("a", b"x"), ("b", b"y"), form=tarfile.GNU_FORMAT))
    packed[1024 + 10] ^= 1
    with pytest.raises(ValueError, match="neither a header nor its end"):
        read(bytes(packed))


@pytest.mark.parametrize("data", [b"", b"<html>no</html>" * 100, os.urandom(5000), bytes(10240)])
def test_other_data_than_a_tar_is_an_error(data):
    with pytest.raises(ValueError, match=r"."):
        read(data)


def header(name, size, kind=b"0", form=tarfile.GNU_FORMAT):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(form)


class Endless(io.RawIOBase):
    """A file that repeats one block endlessly and counts the bytes read."""

    def __init__(self, block):
        self.block, self.at, self.read_bytes = block, 0, 0

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset
        return offset

    def read(self, size):
        assert size < 2 << 20, "a read larger than any genuine header"
        self.read_bytes += size
        self.at += size
        return (self.block * (size // 512 + 2))[:size]


@pytest.mark.parametrize(
    "block",
    [
        header("./PaxHeader", 8 << 30, tarfile.XHDTYPE),
        header("././@LongLink", 8 << 30, tarfile.GNUTYPE_LONGNAME),
        header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME),
        header("./PaxHeader", 0, tarfile.XHDTYPE),
        header("file", -512),
        header("file", -1024),
        header("./PaxHeader", -512, tarfile.XHDTYPE),
        header("file", 0),
    ],
    ids=range(8),
)
def test_endless_headers_are_an_error(block, monkeypatch):
    monkeypatch.setattr(tar_index, "MAX_MEMBERS", 2000)
    monkeypatch.setattr(tar_index, "MAX_HEADER_BYTES", 4 << 20)
    endless = Endless(block)
    with pytest.raises(ValueError, match=r"."):
        read_members(endless)
    assert endless.read_bytes < 16 << 20


def test_size_beyond_the_archive_is_an_error():
    with pytest.raises(ValueError, match=r"damaged|end"):
        read(header("file", 1 << 40) + b"x" * 2048)


@pytest.mark.parametrize("extents", ["600,10,0,10", "0,10,5,10", "990,20", "0,-5"])
def test_invalid_sparse_extents_are_an_error(extents):
    info = tarfile.TarInfo("sparse")
    info.pax_headers = {"GNU.sparse.map": extents, "GNU.sparse.size": "1000"}
    with pytest.raises(ValueError, match=r"."):
        read(tar_of((info, b"x" * 20)))


def test_thousands_of_members_are_listed():
    files = {f"shard/{number:05}": str(number).encode() for number in range(5000)}
    assert read(tar_of(*files.items(), form=tarfile.GNU_FORMAT)) == (files, [])
