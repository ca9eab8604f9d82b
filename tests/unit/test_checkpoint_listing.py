import tracemalloc

import pytest

from tinkerfs.api import models, parsing
from tinkerfs.catalog.listings import (
    AccountListing,
    Checkpoint,
    CheckpointListing,
    reuse_known_record,
)


def record(checkpoint_id, type_="training", path=None):
    return models.Checkpoint.of(checkpoint_id, checkpoint_type=type_, tinker_path=path, raw=b"{}")


def shown(listing):
    return sorted(f"{kind}/{c.name}" for kind in listing.kinds for c in listing.of_kind(kind))


def test_ids_of_the_official_form_are_grouped_by_their_kind():
    listing = CheckpointListing.of("r", [record("weights/1"), record("new_kind/a/b")])
    assert shown(listing) == ["new_kind/a/b", "weights/1"]
    assert listing.get("new_kind", "a/b").ref.path_id == "new_kind/a/b"


def test_bare_ids_are_grouped_by_path_else_by_type():
    records = [
        record("1"),
        record("2", "sampler"),
        record("3", "training", path="tinker://r/external_weights/3"),
        record("4", "sampler", path="tinker://r/checkpoints/4"),
        record("5", "odd", path="tinker://r/5"),
    ]
    listing = CheckpointListing.of("r", records)
    expected = ["external_weights/3", "odd/5", "sampler_weights/2", "sampler_weights/4"]
    assert shown(listing) == [*expected, "weights/1"]
    assert list(listing.bare) == ["1", "2", "3", "4", "5"]
    assert {kind: list(listing.of_path(kind)) for kind in ("checkpoints", "weights", "")} == {
        "checkpoints": ["4"],
        "weights": [],
        "": ["1", "2", "5"],
    }
    ref = listing.get("sampler_weights", "2").ref
    assert (ref.path_id, ref.listed_id, ref.has_ambiguous_id) == ("sampler_weights/2", "2", False)


def test_a_bare_id_and_one_with_a_kind_may_have_the_same_name():
    listing = CheckpointListing.of("r", [record("1"), record("sampler_weights/1")])
    assert shown(listing) == ["sampler_weights/1", "weights/1"]
    assert [listing.get(c.kind, c.name) for c in listing.all] == list(listing.all)
    assert listing.get("external_weights", "1") is None


def test_bare_ids_that_collide_name_neither():
    listing = CheckpointListing.of("r", [record("1"), record("1", "sampler"), record("2")])
    assert shown(listing) == ["sampler_weights/1", "weights/1", "weights/2"]
    assert list(listing.bare) == ["2"]
    refs = [checkpoint.ref for checkpoint in listing.all]
    assert [ref.has_ambiguous_id for ref in refs] == [True, True, False]


def test_a_bare_id_that_is_a_kinds_name_is_shown_by_kind():
    assert shown(CheckpointListing.of("r", [record("weights")])) == ["weights/weights"]


def test_of_two_records_that_are_the_same_checkpoint_the_first_counts():
    first, second = record("weights/1"), record("1", path="tinker://r/weights/1")
    listing = CheckpointListing.of("r", [first, second])
    assert [c.record for c in listing.all] == [first]


def test_a_kind_whose_last_checkpoint_went_stays_known_and_is_no_longer_shown():
    listing = CheckpointListing.of("r", [record("odd/1"), record("weights/1")])
    after = listing.with_record(listing.get("odd", "1"), None)
    assert shown(after) == ["weights/1"]
    assert "odd" in after.kinds


def of_run(run_id, *names, time_ns=None, **fields):
    """Records as the official service lists them, newer and newer."""
    return [
        models.Checkpoint.of(
            name,
            tinker_path=f"tinker://{run_id}/{name}",
            time_ns=None if time_ns is None else time_ns + number,
            raw=f'{{"checkpoint_id":"{name}"}}'.encode(),
            **fields,
        )
        for number, name in enumerate(names)
    ]


def test_the_newest_of_each_kind_is_told():
    records = of_run("r", "weights/1", "weights/2", time_ns=5) + of_run("r", "odd/1")
    assert CheckpointListing.of("r", records).newest_ns == {"weights": 6, "odd": None}


def test_what_both_kinds_of_listing_tell_is_kept_once():
    names = ("weights/1", "sampler_weights/1")
    listings = {"r": CheckpointListing.of("r", of_run("r", *names))}
    records = of_run("r", *names) + of_run("other", *names) + [record("1")]
    kept = [reuse_known_record(each, listings.get) for each in records]
    assert kept == records
    for each, checkpoint in zip(kept, listings["r"].all, strict=False):
        assert each is checkpoint.record
    user = AccountListing.of_records(kept)
    assert user.without_run_count == 1
    again = CheckpointListing.of("r", of_run("r", *names), known=user)
    assert again == listings["r"]
    for checkpoint in again.all:
        assert checkpoint.record is user.by_key[checkpoint.key].record


def test_what_one_listing_tells_newer_is_not_taken_from_the_other():
    user = AccountListing.of_records(of_run("r", "weights/1"))
    listing = CheckpointListing.of("r", of_run("r", "weights/1", is_public=True), known=user)
    assert listing.get("weights", "1").record.is_public
    (older,) = of_run("r", "weights/1")
    assert reuse_known_record(older, {"r": listing}.get) is older


def test_bare_ids_that_collide_share_their_records_alone():
    records = [record("1", path="tinker://r/weights/1")]
    records.append(record("1", "sampler", path="tinker://r/sampler_weights/1"))
    user = AccountListing.of_records(records)
    listing = CheckpointListing.of("r", records, known=user)
    for checkpoint in listing.all:
        assert checkpoint.shares_id
        assert checkpoint.record is user.by_key[checkpoint.key].record


def test_a_change_leaves_the_users_listing_in_its_order():
    before = AccountListing.of_records(
        of_run("r", "weights/1", "weights/2", "weights/3", time_ns=5)
    )
    second = before.by_key["r", "weights", "2"]
    changed = before.with_record(
        second, models.Checkpoint.of("weights/2", is_public=True, raw=b"{}")
    )
    assert list(changed.by_key) == list(before.by_key)
    assert changed.by_key[second.key].record.is_public
    assert not before.by_key[second.key].record.is_public
    assert list(before.with_record(second, None).by_key) == [
        ("r", "weights", "3"),
        ("r", "weights", "1"),
    ]
    assert changed.with_record(Checkpoint.from_record("gone", second.record), None) == changed


@pytest.mark.parametrize("size_bytes", [0, 10**9])
def test_a_checkpoint_of_a_listing_takes_little_memory(size_bytes):
    count = 10_000
    body = b'{"checkpoints":[%s]}' % b",".join(
        b'{"checkpoint_id":"weights/%06d","checkpoint_type":"training","size_bytes":%d,'
        b'"time":"2026-11-23T14:20:30.%06dZ","tinker_path":"tinker://r:train:0/weights/%06d",'
        b'"public":false,"expires_at":null}' % (number, size_bytes + number % 10, number, number)
        for number in range(count)
    )
    tracemalloc.start()
    try:
        listing = CheckpointListing.of("r", parsing.parse_checkpoints(body).items)
        kept_bytes, _most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing.all) == count
    assert kept_bytes / count < 400
