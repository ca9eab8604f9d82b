import tracemalloc

import pytest

from tinkerfs.api import models, parsing
from tinkerfs.catalog.listings import CheckpointListing


def record(checkpoint_id, type_="training", path=None):
    return models.Checkpoint.from_fields(
        checkpoint_id, checkpoint_type=type_, tinker_path=path, raw=b"{}"
    )


def names_of(listing):
    return sorted(f"{kind}/{c.name}" for kind in listing.kinds for c in listing.of_kind(kind))


def test_ids_with_a_kind_are_grouped_by_kind():
    listing = CheckpointListing.from_records("r", [record("weights/1"), record("new_kind/a/b")])
    assert names_of(listing) == ["new_kind/a/b", "weights/1"]
    assert listing.get("new_kind", "a/b").ref.path_id == "new_kind/a/b"


def test_bare_ids_are_grouped_by_path_else_by_type():
    records = [
        record("1"),
        record("2", "sampler"),
        record("3", "training", path="tinker://r/external_weights/3"),
        record("4", "sampler", path="tinker://r/checkpoints/4"),
        record("5", "odd", path="tinker://r/5"),
    ]
    listing = CheckpointListing.from_records("r", records)
    expected = ["external_weights/3", "odd/5", "sampler_weights/2", "sampler_weights/4"]
    assert names_of(listing) == [*expected, "weights/1"]
    assert list(listing.bare) == ["1", "2", "3", "4", "5"]
    assert {kind: list(listing.of_path(kind)) for kind in ("checkpoints", "weights", "")} == {
        "checkpoints": ["4"],
        "weights": [],
        "": ["1", "2", "5"],
    }
    ref = listing.get("sampler_weights", "2").ref
    assert (ref.path_id, ref.listed_id, ref.has_ambiguous_id) == ("sampler_weights/2", "2", False)


def test_bare_id_and_id_with_kind_can_share_a_name():
    listing = CheckpointListing.from_records("r", [record("1"), record("sampler_weights/1")])
    assert names_of(listing) == ["sampler_weights/1", "weights/1"]
    assert [listing.get(c.kind, c.name) for c in listing.all] == list(listing.all)
    assert listing.get("external_weights", "1") is None


def test_colliding_bare_ids_identify_neither():
    listing = CheckpointListing.from_records(
        "r", [record("1"), record("1", "sampler"), record("2")]
    )
    assert names_of(listing) == ["sampler_weights/1", "weights/1", "weights/2"]
    assert list(listing.bare) == ["2"]
    refs = [checkpoint.ref for checkpoint in listing.all]
    assert [ref.has_ambiguous_id for ref in refs] == [True, True, False]


def test_bare_id_equal_to_a_kind_is_listed_by_kind():
    assert names_of(CheckpointListing.from_records("r", [record("weights")])) == ["weights/weights"]


def test_first_of_two_records_of_a_checkpoint_counts():
    first, second = record("weights/1"), record("1", path="tinker://r/weights/1")
    listing = CheckpointListing.from_records("r", [first, second])
    assert [c.record for c in listing.all] == [first]


def test_empty_kind_stays_known_and_is_not_listed():
    listing = CheckpointListing.from_records("r", [record("odd/1"), record("weights/1")])
    after = listing.with_record(listing.get("odd", "1"), None)
    assert names_of(after) == ["weights/1"]
    assert "odd" in after.kinds


def of_run(run_id, *names, time_ns=None, **fields):
    """Return records in the form of the official service, each newer than the one before."""
    return [
        models.Checkpoint.from_fields(
            name,
            tinker_path=f"tinker://{run_id}/{name}",
            time_ns=None if time_ns is None else time_ns + number,
            raw=f'{{"checkpoint_id":"{name}"}}'.encode(),
            **fields,
        )
        for number, name in enumerate(names)
    ]


def test_newest_of_each_kind_is_returned():
    records = of_run("r", "weights/1", "weights/2", time_ns=5) + of_run("r", "odd/1")
    assert CheckpointListing.from_records("r", records).newest_ns == {"weights": 6, "odd": None}


@pytest.mark.parametrize("size_bytes", [0, 10**9])
def test_checkpoint_in_a_listing_uses_little_memory(size_bytes):
    count = 10_000
    body = b'{"checkpoints":[%s]}' % b",".join(
        b'{"checkpoint_id":"weights/%06d","checkpoint_type":"training","size_bytes":%d,'
        b'"time":"2026-11-23T14:20:30.%06dZ","tinker_path":"tinker://r:train:0/weights/%06d",'
        b'"public":false,"expires_at":null}' % (number, size_bytes + number % 10, number, number)
        for number in range(count)
    )
    tracemalloc.start()
    try:
        listing = CheckpointListing.from_records("r", parsing.parse_checkpoints(body).items)
        kept_bytes, _most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing.all) == count
    assert kept_bytes / count < 400
