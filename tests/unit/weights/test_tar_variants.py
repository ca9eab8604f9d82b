"""Unusual tars: the index lists what tar(1) extracts."""

import os
import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tar_variants import (
    DAMAGED,
    END,
    LARGE_BYTES,
    REFUSED,
    VARIANTS,
    directory,
    header,
    large,
    link,
    member,
    pax,
    symlink,
)
from tests.unit.weights.test_tar_index import read
from tinkerfs.demo.content import Concat, Data, Noise
from tinkerfs.weights import tar_index
from tinkerfs.weights.tar_index import read_members


def extracted(packed, target):
    """Extract with tar(1); return the bytes by path, with links followed in the directory."""
    command = ["tar", "--extract", "--file=-", "--no-same-owner", "-C", target]
    subprocess.run(command, input=packed, capture_output=True, check=False)
    found = {}
    for parent, _, names in os.walk(os.fsencode(target)):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, os.fsencode(target))] = file.read()
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_tar_variant_is_read_as_by_tar(tmp_path, name):
    packed = VARIANTS[name]
    files = {os.fsencode(path): data for path, data in read(packed)[0].items()}
    assert files == extracted(packed, tmp_path)
    assert files[b"z"] == b"last one"


@pytest.mark.parametrize("name", [*DAMAGED, *REFUSED])
def test_tar_damaged_is_rejected(name):
    with pytest.raises(ValueError, match=r"."):
        read({**DAMAGED, **REFUSED}[name])


NAMES = (b"a", b"b", b"c", b"a/b", b"a/c", b"b/a", b"b/c/a", b"c/", b"a/", b"./b", b"d", b"d/e")
TARGETS = (b"a", b"b", b"c", b"a/b", b"b/a", b"./c/a", b".", b"d/e", b"d")
STEPS = st.one_of(
    st.builds(member, st.sampled_from(NAMES), st.sampled_from([b"", b"1", b"22", b"333"])),
    st.builds(symlink, st.sampled_from(NAMES), st.sampled_from(TARGETS)),
    st.builds(link, st.sampled_from(NAMES), st.sampled_from(TARGETS)),
    st.builds(directory, st.sampled_from(NAMES)),
    st.builds(lambda name: header(name, 0, b"6"), st.sampled_from(NAMES)),
)


@settings(max_examples=100)
@given(st.lists(STEPS, min_size=2, max_size=7))
def test_tar_of_any_members_is_read_as_by_tar(steps):
    packed = b"".join(steps) + END
    with tempfile.TemporaryDirectory() as directory:
        found = extracted(packed, directory)
    assert {os.fsencode(path): data for path, data in read(packed)[0].items()} == found


def test_tar_times_are_those_of_headers():
    packed = VARIANTS["pax mtime"]
    times_ns = {each.name: each.mtime_ns for each in read_members(_ContentFile(Data(packed)))[0]}
    assert times_ns["a"] == 1_234_567_890_250_000_000


class _ContentFile:
    """A content as an open file that counts the bytes read."""

    def __init__(self, content):
        self.content, self.at, self.read_bytes = content, 0, 0

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        assert whence == 0
        self.at = offset
        return offset

    def read(self, size):
        stop = min(self.at + size, self.content.size_bytes)
        data = self.content.read(min(self.at, stop), stop)
        self.at += len(data)
        self.read_bytes += len(data)
        return data


@pytest.mark.parametrize("form", ["base-256", "pax"])
@pytest.mark.parametrize("has_end", [True, False], ids=["with its end", "without"])
def test_tar_of_9_gib_is_read_by_headers(form, has_end):
    content = large(form, has_end=has_end)
    file = _ContentFile(content)
    members = {each.name: each for each in read_members(file)[0]}
    assert {name: each.size_bytes for name, each in members.items()} == {
        "large": LARGE_BYTES,
        "z": 8,
    }
    [segment] = members["z"].segments
    assert content.read(segment.archive_offset, segment.archive_offset + 8) == b"last one"
    assert file.read_bytes < 16_384


def test_tar_of_9_gib_truncated_is_rejected():
    content = large("pax")
    half = Concat([Noise(LARGE_BYTES // 2, 1)])
    assert half.size_bytes < content.size_bytes
    with pytest.raises(ValueError, match="damaged"):
        read_members(_ContentFile(Concat([Data(content.read(0, 1536)), half])))


def test_tar_names_are_bounded_with_what_they_imply(monkeypatch):
    deep = [pax((b"path", b"/".join([b"%d" % n] * 500))) + member(b"x") for n in range(5)]
    packed = b"".join(deep) + END
    assert len(read(packed)[0]) == 5
    monkeypatch.setattr(tar_index, "MAX_NAMES", 2000)
    with pytest.raises(ValueError, match="more than 2000 names"):
        read(packed)


def test_tar_name_longer_than_a_path_is_skipped():
    packed = pax((b"path", b"d/" * 2500 + b"x")) + member(b"x") + member(b"z", b"1") + END
    files, skipped = read(packed)
    assert files == {"z": b"1"}
    assert "too long" in skipped[0]


def test_tar_links_out_are_skipped_and_hold_nothing():
    packed = (
        header(b"d", 0, b"2", b"../elsewhere")
        + member(b"d/f", b"caught")
        + header(b"e", 0, b"2", b"/etc")
        + member(b"e/passwd", b"caught")
        + header(b"h", 0, b"1", b"../../etc/passwd")
        + member(b"z", b"1")
        + END
    )
    files, skipped = read(packed)
    assert files == {"z": b"1"}
    assert len(skipped) == 5
