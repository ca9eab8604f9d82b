from tinkerfs.api import models
from tinkerfs.catalogue.listings import CheckpointListing


def record(checkpoint_id, type_="training", path=None):
    return models.Checkpoint.of(checkpoint_id, checkpoint_type=type_, tinker_path=path, raw=b"{}")


def shown(listing):
    names = [f"{kind}/{c.name}" for kind in listing.kinds for c in listing.of_kind(kind)]
    return sorted([*names, *listing.bare])


def test_ids_of_the_official_form_are_grouped_by_their_kind():
    listing = CheckpointListing.of("r", [record("weights/1"), record("new_kind/a/b")])
    assert shown(listing) == ["new_kind/a/b", "weights/1"]
    assert listing.by_name["new_kind", "a/b"].ref.path_id == "new_kind/a/b"


def test_bare_ids_are_shown_bare_and_resolve_by_kind_too():
    listing = CheckpointListing.of("r", [record("1"), record("2", "sampler")])
    assert shown(listing) == ["1", "2"]
    ref = listing.by_name["sampler_weights", "2"].ref
    assert (ref.path_id, ref.listed_id, ref.is_shared) == ("sampler_weights/2", "2", False)


def test_bare_ids_that_collide_are_shown_by_kind_and_never_asked_for_by_the_shared_id():
    listing = CheckpointListing.of("r", [record("1"), record("1", "sampler"), record("2")])
    assert shown(listing) == ["2", "sampler_weights/1", "weights/1"]
    refs = [checkpoint.ref for checkpoint in listing.by_name.values()]
    assert [ref.is_shared for ref in refs] == [True, True, False]


def test_a_bare_id_that_is_a_kinds_name_is_shown_by_kind():
    assert shown(CheckpointListing.of("r", [record("weights")])) == ["weights/weights"]


def test_of_two_records_that_are_the_same_checkpoint_the_first_counts():
    first, second = record("weights/1"), record("1", path="tinker://r/weights/1")
    listing = CheckpointListing.of("r", [first, second])
    assert [c.record for c in listing.by_name.values()] == [first]


def test_a_kind_whose_last_checkpoint_went_stays_known_and_is_no_longer_shown():
    listing = CheckpointListing.of("r", [record("odd/1"), record("weights/1")])
    after = listing.changed(listing.by_name["odd", "1"], None)
    assert shown(after) == ["weights/1"]
    assert "odd" in after.kinds
