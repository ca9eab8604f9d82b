import pytest

from tinkerfs.api import endpoints
from tinkerfs.api.checkpoint_ids import CheckpointRef, IdForm, candidate_ids, id_path, quote_segment

PATH, LISTED = IdForm.PATH, IdForm.LISTED


def ref(path_id="weights/0001", listed_id="0001", *, is_ambiguous=False):
    return CheckpointRef("r", path_id, listed_id, exists=True, has_ambiguous_id=is_ambiguous)


@pytest.mark.parametrize(
    ("one", "endpoint", "last_accepted", "forms"),
    [
        (ref(), endpoints.ARCHIVE, None, [PATH, LISTED]),
        (ref(), endpoints.DELETE, None, [PATH, LISTED]),
        (ref(), endpoints.ARCHIVE, LISTED, [LISTED, PATH]),
        (ref(), endpoints.DELETE, LISTED, [LISTED, PATH]),
        (ref(), endpoints.ARCHIVE, PATH, [PATH, LISTED]),
        (ref(), endpoints.DELETE, PATH, [PATH]),
        (ref(listed_id="weights/0001"), endpoints.DELETE, LISTED, [PATH]),
        (ref(is_ambiguous=True), endpoints.DELETE, LISTED, [PATH]),
        (ref(is_ambiguous=True), endpoints.ARCHIVE, LISTED, [PATH]),
        (ref("sampler_weights/1", "1", is_ambiguous=True), endpoints.ARCHIVE, None, [PATH, LISTED]),
        (ref("sampler_weights/1", "1", is_ambiguous=True), endpoints.DELETE, None, [PATH]),
        (ref(path_id=""), endpoints.DELETE, PATH, [LISTED]),
        (ref(listed_id=""), endpoints.DELETE, None, [PATH]),
        (ref("", ""), endpoints.DELETE, None, []),
    ],
)
def test_candidate_ids_returns_forms_in_order(one, endpoint, last_accepted, forms):
    assert [form for form, _ in candidate_ids(one, endpoint, last_accepted)] == forms


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("79db:train:0", "79db:train:0"),
        ("a b/c", "a%20b%2Fc"),
        ("..", "%2E%2E"),
        (".", "%2E"),
        ("...", "..."),
        ("é?#%", "%C3%A9%3F%23%25"),
        ("\udcff", "%FF"),
        ("\ud800", "%ED%A0%80"),
        ("\n", "%0A"),
    ],
)
def test_quote_segment_encodes_text(text, encoded):
    assert quote_segment(text) == encoded


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("weights/0001", "weights/0001"),
        ("0001", "0001"),
        ("weights/a/b", "weights/a%2Fb"),
        ("weights/..", "weights/%2E%2E"),
        ("../..", "%2E%2E/%2E%2E"),
    ],
)
def test_id_path_keeps_first_slash(text, encoded):
    assert id_path(text) == encoded
