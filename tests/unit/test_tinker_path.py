import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.tinker_path import TinkerPath

part = st.text(st.characters(exclude_characters="/"), min_size=1)


@given(part, part, st.text(min_size=1))
def test_tinker_path_round_trips(run_id, kind, name):
    path = TinkerPath(run_id, kind, name)
    assert TinkerPath.parse(str(path)) == path


@given(part, part)
def test_two_part_tinker_path_round_trips(run_id, name):
    assert TinkerPath.parse(f"tinker://{run_id}/{name}") == TinkerPath(run_id, "", name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tinker:/a/b/c",
        "http://a/b/c",
        "tinker://",
        "tinker://a",
        "tinker:///b/c",
        "tinker://a//c",
    ],
)
def test_parse_of_an_invalid_path_raises(text):
    with pytest.raises(ValueError, match="tinker://"):
        TinkerPath.parse(text)
