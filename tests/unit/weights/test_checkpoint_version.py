"""Cache keys of checkpoint versions and of their blocks."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinkerfs import name_encoding
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.weights.archive_index import block_key
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.version import Version

texts = st.text(st.sampled_from('\n "\\,[]/ab1\ud800\udcffé'), max_size=6)
keys = st.lists(texts, min_size=4, max_size=4).map(tuple)
REF = CheckpointRef("", "", "")


def cache_key_of(server, key):
    return CheckpointVersion(server, key, REF, "", 0).cache_key


@given(texts, keys, texts, keys)
@example("s", ("a\nweights\nb", "weights", "c", "1"), "s", ("a", "weights", "b\nweights\nc", "1"))
@example("s", ("a", "b", "c", "1\n2"), "s", ("a", "b", "c\n1", "2"))
@example("s\na", ("b", "c", "d", "e"), "s", ("a\nb", "c", "d", "e"))
def test_cache_key_is_shared_only_by_equal_versions(server, key, other_server, other_key):
    is_same = (server, key) == (other_server, other_key)
    assert (cache_key_of(server, key) == cache_key_of(other_server, other_key)) is is_same
    assert cache_key_of(server, key) == cache_key_of(server, key)


versions = st.builds(Version, st.integers(0, 12), texts, texts)


@given(texts, versions, texts, texts, versions, texts)
@example("i", Version(1, "a b", ""), "x", "i", Version(1, "a", "b"), "x")
@example("i", Version(1, "a", "b\nc"), "x", "i", Version(1, "a", "b"), "c\nx")
def test_block_key_is_shared_only_by_equal_arguments(
    one, version, kind, other, other_version, other_kind
):
    is_same = (one, version, kind) == (other, other_version, other_kind)
    assert (block_key(one, version, kind) == block_key(other, other_version, other_kind)) is is_same


part = st.one_of(texts, st.integers(-2, 99), st.none())


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
@example(["1"], [1])
@example([None], ["null"])
@example(["a", "b"], ["a\nb"])
def test_compound_key_is_shared_only_by_equal_parts(parts, others):
    assert (name_encoding.compound_key(*parts) == name_encoding.compound_key(*others)) is (
        parts == others
    )


@pytest.mark.parametrize("text", ["\udcff", "a\0b", "é" * 300])
def test_compound_key_of_any_text_can_be_stored(text):
    assert name_encoding.compound_key(text).isascii()
