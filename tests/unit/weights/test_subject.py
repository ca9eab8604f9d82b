"""What the weights of one version of a checkpoint are cached under."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinkerfs import name_encoding
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.weights.archive_index import block_key
from tinkerfs.weights.subject import CheckpointVersion
from tinkerfs.weights.version import Version

texts = st.text(st.sampled_from('\n "\\,[]/ab1\ud800\udcffé'), max_size=6)
keys = st.lists(texts, min_size=4, max_size=4).map(tuple)
REF = CheckpointRef("", "", "")


def identity(server, key):
    return CheckpointVersion(server, key, REF, "", 0).cache_key


@given(texts, keys, texts, keys)
@example("s", ("a\nweights\nb", "weights", "c", "1"), "s", ("a", "weights", "b\nweights\nc", "1"))
@example("s", ("a", "b", "c", "1\n2"), "s", ("a", "b", "c\n1", "2"))
@example("s\na", ("b", "c", "d", "e"), "s", ("a\nb", "c", "d", "e"))
def test_identity_of_two_subjects_is_shared_only_by_equals(server, key, other_server, other_key):
    is_same = (server, key) == (other_server, other_key)
    assert (identity(server, key) == identity(other_server, other_key)) is is_same
    assert identity(server, key) == identity(server, key)


versions = st.builds(Version, st.integers(0, 12), texts, texts)


@given(texts, versions, texts, texts, versions, texts)
@example("i", Version(1, "a b", ""), "x", "i", Version(1, "a", "b"), "x")
@example("i", Version(1, "a", "b\nc"), "x", "i", Version(1, "a", "b"), "c\nx")
def test_block_key_is_shared_only_by_equals(one, version, what, other, other_version, other_what):
    is_same = (one, version, what) == (other, other_version, other_what)
    assert (block_key(one, version, what) == block_key(other, other_version, other_what)) is is_same


part = st.one_of(texts, st.integers(-2, 99), st.none())


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
@example(["1"], [1])
@example([None], ["null"])
@example(["a", "b"], ["a\nb"])
def test_compound_key_is_shared_only_by_equals(parts, others):
    assert (name_encoding.compound_key(*parts) == name_encoding.compound_key(*others)) is (
        parts == others
    )


@pytest.mark.parametrize("text", ["\udcff", "a\0b", "é" * 300])
def test_compound_key_of_any_text_can_be_stored(text):
    assert name_encoding.compound_key(text).isascii()
