"""Templates restore the JSON for any values."""

from hypothesis import example, given
from hypothesis import strategies as st

from tinkerfs.api.json_templates import fill_template, to_template

texts = st.none() | st.text("ab1\1\2é\udcff", max_size=3)
raws = st.text("ab1é", max_size=12).map(str.encode) | st.binary(max_size=12)


@given(raws, st.lists(texts, max_size=5))
@example(b"ab", ["a", "\1b", None, "\2"])
@example(b"a\1", ["a"])
def test_fill_template_restores_json(raw, values):
    assert fill_template(to_template(raw, *values), *values) == raw


def test_to_template_shares_template_of_similar_records():
    first = to_template(b'{"id":"x","path":"r/x","size":17}', "r/", "x", None, "17")
    second = to_template(b'{"id":"y","path":"s/y","size":18}', "s/", "y", None, "18")
    assert first is second
