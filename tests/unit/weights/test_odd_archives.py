"""Archives that are odd but valid, read through store, index and blocks."""

import json
import os

import pytest

from tests.support.tar_variants import END, LARGE_BYTES, header, large, member
from tests.unit.weights.conftest import subject_of
from tests.unit.weights.test_reader import checkpoint_of, read
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.content import Data
from tinkerfs.weights.archive_index import Index, decode_index, encode_index
from tinkerfs.weights.tar_index import Member, Segment
from tinkerfs.weights.version import Version

SAFETENSORS = b"\x08\0\0\0\0\0\0\0{}      "


def served(server, weights_of, content):
    subject = subject_of(server)
    checkpoint_of(server, subject).archive = content
    return subject, weights_of(server)


@pytest.mark.parametrize(
    "name",
    ["plain", "ü", "caf\udce9", "\udcff", chr(0xD800), "x\udcffü" * 50, "ÿ"],
)
def test_index_with_any_name_survives_being_stored(name):
    members = tuple(Member(each, 1, 2, (Segment(0, 1, 0),)) for each in ("a", name))
    index = Index("files", Version(3), 0, members, versions={name: Version(1, "etag")})
    assert decode_index(encode_index(index)) == index


@pytest.mark.parametrize("data", [b"", b"\xc1", encode_index(Index("tar", Version(1), 1, ()))[:-3]])
def test_index_that_is_damaged_is_rejected(data):
    with pytest.raises(ValueError, match=r"."):
        decode_index(data)


def test_archive_with_non_utf8_name_is_read(demo_server, weights_of):
    archive = member(b"caf\xe9", b"data") + member(b"d\xff/x.safetensors", SAFETENSORS) + END
    server = demo_server(runs=1)
    subject, mount = served(server, weights_of, Data(archive))
    names = [os.fsdecode(name) for name in (b"caf\xe9", b"d\xff/x.safetensors")]
    for each in (mount, weights_of(server)):
        assert list(each.weights.files(subject, BACKGROUND_CONTEXT).members) == names
        assert read(each, subject, names[0]) == b"data"
        assert json.loads(each.weights.tensors(subject, BACKGROUND_CONTEXT))["files"] == names[1:]


def test_archive_that_ends_without_its_blocks_is_read(demo_server, weights_of):
    archive = member(b"a", b"x" * 600) + member(b"z", b"last one")
    subject, mount = served(demo_server(runs=1), weights_of, Data(archive))
    assert read(mount, subject, "z") == b"last one"


@pytest.mark.expect_warnings("damaged")
@pytest.mark.parametrize("lost_bytes", [1, 512, 600, 1024 + 200])
def test_archive_that_is_truncated_is_an_error(demo_server, weights_of, lost_bytes):
    archive = member(b"a", b"x" * 600) + member(b"z", b"x" * 600)
    subject, mount = served(demo_server(runs=1), weights_of, Data(archive[:-lost_bytes]))
    with pytest.raises(OSError, match="damaged"):
        mount.weights.files(subject, BACKGROUND_CONTEXT)


@pytest.mark.parametrize("form", ["pax", "base-256"])
def test_archive_of_9_gib_is_read_far_behind(demo_server, weights_of, form):
    content = large(form)
    subject, mount = served(demo_server(runs=1), weights_of, content)
    with mount.weights.open(subject, "large", BACKGROUND_CONTEXT) as file:
        assert file.size_bytes == LARGE_BYTES
        start = (
            mount.weights.files(subject, BACKGROUND_CONTEXT)
            .members["large"]
            .segments[0]
            .archive_offset
        )
        for at in (0, (1 << 32) - 7, (1 << 33) + 12_345, LARGE_BYTES - 100):
            assert file.read(1000, at, BACKGROUND_CONTEXT) == content.read(
                start + at, start + min(at + 1000, LARGE_BYTES)
            )
    assert read(mount, subject, "z") == b"last one"


def test_archive_with_hard_link_reads_as_tar(demo_server, weights_of):
    archive = (
        member(b"a", b"first")
        + header(b"s", 0, b"2", b"a")
        + header(b"h", 0, b"1", b"s")
        + member(b"s", b"new")
        + END
    )
    subject, mount = served(demo_server(runs=1), weights_of, Data(archive))
    assert {name: read(mount, subject, name) for name in "ahs"} == {
        "a": b"first",
        "h": b"first",
        "s": b"new",
    }
