import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinkerfs import name_encoding

any_text = st.text(
    st.one_of(
        st.characters(exclude_categories=()),
        st.sampled_from("%~/.\0\n 2Ff5\udc80\udcff\udcc3\udca9é"),
    ),
    max_size=300,
)


@given(any_text)
@example("")
@example(".")
@example("..")
@example("%")
@example("%~")
@example("%2F")
@example("a%2fb")
@example("\udcc3\udca9")
@example("\ud800")
@example("é" * 200)
def test_encoded_name_round_trips_and_is_a_file_name(name):
    encoded = name_encoding.encode(name)
    raw = encoded.encode("utf-8", "surrogateescape")
    assert 0 < len(raw) <= 255
    assert not {b"/", b"\0"} & {bytes([byte]) for byte in raw}
    assert raw not in (b".", b"..")
    assert raw.decode("utf-8", "surrogateescape") == encoded
    if name_encoding.is_truncated(encoded):
        assert len(raw) >= 250
        with pytest.raises(ValueError, match="not the file name"):
            name_encoding.decode(encoded)
    else:
        assert name_encoding.decode(encoded) == name


@given(any_text, any_text)
@example("é", "\udcc3\udca9")
@example("", "%~")
@example("a/b", "a%2Fb")
@example("x" * 300, "x" * 301)
def test_encoded_names_are_unique(one, other):
    same = one == other
    assert (name_encoding.encode(one) == name_encoding.encode(other)) is same


@given(st.lists(any_text, min_size=1, max_size=4))
@example([""])
@example(["", ""])
@example(["a@b", "c"])
@example(["a", "b@c"])
@example(["..", ".git", "%40"])
@example(["run", "weights", "x" * 300])
def test_composite_name_round_trips(parts):
    joined = name_encoding.encode_composite(parts)
    raw = joined.encode("utf-8", "surrogateescape")
    assert 0 < len(raw) <= 255
    assert not {b"/", b"\0"} & {bytes([byte]) for byte in raw}
    assert raw not in (b".", b"..")
    if name_encoding.is_truncated(joined):
        with pytest.raises(ValueError, match="not a composite"):
            name_encoding.decode_composite(joined)
    else:
        assert name_encoding.decode_composite(joined) == tuple(parts)


@given(st.lists(any_text, min_size=3, max_size=3), st.lists(any_text, min_size=3, max_size=3))
@example(["a@b", "", "c"], ["a", "b", "c"])
@example(["x" * 300, "a", "b"], ["x" * 300, "a", "c"])
def test_composite_names_are_unique(one, other):
    assert (name_encoding.encode_composite(one) == name_encoding.encode_composite(other)) is (
        one == other
    )


def test_plain_composite_name_is_unchanged():
    assert (
        name_encoding.encode_composite(["79db:train:0", "weights", "0001"])
        == "79db:train:0@weights@0001"
    )


@given(
    st.text(
        st.characters(exclude_characters="%/\0", exclude_categories=("Cs",)),
        min_size=1,
        max_size=60,
    )
)
def test_valid_file_name_is_unchanged(name):
    if name not in (".", "..") and not name_encoding.is_probe_name(name):
        assert name_encoding.encode(name) == name


@pytest.mark.parametrize("name", ["100%", "5% off", "%zz", "a:b@c", "-rf", "new\nline", "\udcff"])
def test_unusual_valid_names_are_unchanged(name):
    assert name_encoding.encode(name) == name


@pytest.mark.parametrize("file_name", ["%2f", "%41", "a%2Fb%", "%2E%2E%2E", "x%ED%A0"])
def test_decode_of_an_impossible_name_raises(file_name):
    try:
        name = name_encoding.decode(file_name)
    except ValueError:
        return
    assert name_encoding.encode(name) == file_name


def test_is_probe_name_matches_software_probes():
    for name in [".git", ".Trash-1000", "._x", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden"]:
        assert name_encoding.is_probe_name(name)
    for name in [
        "HEAD",
        ".gitignore",
        ".gitattributes",
        ".ignore",
        ".rgignore",
        ".fdignore",
        "index.html",
    ]:
        assert name_encoding.is_probe_name(name)
    for name in ["git", "info.json", ".tinkerfs", ".content", "latest"]:
        assert not name_encoding.is_probe_name(name)


@pytest.mark.parametrize("name", [".git", "._a/b", "._%41", "Thumbs.db", ".Trash-1"])
def test_probe_name_of_a_server_is_encoded(name):
    encoded = name_encoding.encode(name)
    assert not name_encoding.is_probe_name(encoded)
    assert name_encoding.decode(encoded) == name
    with pytest.raises(ValueError, match="not the file name"):
        name_encoding.decode(name)
