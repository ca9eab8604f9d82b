"""The packed listing of the account."""

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.api import models, parsing
from tinkerfs.catalog.account_listing import AccountListing, AccountRecords
from tinkerfs.catalog.checkpoint_table import CheckpointTable
from tinkerfs.catalog.listings import ListedCheckpoint

#: More than two blocks of a table.
COUNT = 2_500


def record(name, run_id="r", **fields):
    fields = {"raw": b'{"checkpoint_id":"%s"}' % name.encode(), **fields}
    return models.Checkpoint.from_fields(name, tinker_path=f"tinker://{run_id}/{name}", **fields)


def listing_of(*records):
    return AccountListing.from_records(AccountRecords(records))


def table_of(checkpoints):
    table = CheckpointTable()
    for checkpoint in checkpoints:
        table.add(checkpoint)
    return table


def numbered(count):
    """Return checkpoints, the newest first."""
    return [
        ListedCheckpoint.from_record(f"r{n % 7}", record(f"weights/{n}", f"r{n % 7}", time_ns=-n))
        for n in range(count)
    ]


# --- the table -----------------------------------------------------------------------------------

TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(["\udcff", "a/b", "", "\1"])
TIMES = st.none() | st.integers(-(2**63), 2**63 - 1)
RECORDS = st.builds(
    models.Checkpoint,
    kind=st.none() | TEXTS,
    name=TEXTS,
    checkpoint_type=st.none() | TEXTS,
    time_ns=TIMES,
    tinker_path=st.none() | TEXTS,
    size_bytes=st.none() | st.integers(0, 2**63 - 1),
    is_public=st.booleans(),
    expires_at_ns=TIMES,
    json_template=st.binary(max_size=5) | TEXTS,
)
CHECKPOINTS = st.builds(
    lambda run_id, kind, record, is_ambiguous: ListedCheckpoint(
        run_id, kind, record.name, record, is_ambiguous
    ),
    TEXTS,
    TEXTS,
    RECORDS,
    st.booleans(),
)


@given(st.lists(CHECKPOINTS, max_size=20))
def test_table_returns_what_was_added(checkpoints):
    table = table_of(checkpoints)
    first = {}
    for checkpoint in checkpoints:
        first.setdefault(checkpoint.key, checkpoint)
    assert list(table) == list(first.values())
    assert [table.get(key) for key in first] == list(first.values())
    assert table == table_of(first.values())
    assert list(table.newest_first()) == sorted(
        first.values(), key=lambda c: c.record.time_ns or 0, reverse=True
    )


def test_long_table_returns_what_was_added():
    checkpoints = numbered(COUNT)
    table = table_of(checkpoints)
    assert list(table) == checkpoints
    assert [table[number] for number in range(COUNT)] == checkpoints
    assert [table.get(each.key) for each in checkpoints] == checkpoints
    assert table.get(("r0", "weights", "1")) is None
    assert not table.add(checkpoints[2000])
    assert len(table) == COUNT
    assert table.newest_first() is table
    assert table_of(checkpoints[::-1]).newest_first() == table


@pytest.mark.parametrize("position", [0, 1500, COUNT - 1])
def test_tables_with_a_different_checkpoint_differ(position):
    checkpoints = numbered(COUNT)
    table = table_of(checkpoints)
    assert table == table_of(checkpoints)
    changed = checkpoints[position]
    public = record(f"{changed.kind}/{changed.name}", changed.run_id, is_public=True)
    checkpoints[position] = ListedCheckpoint.from_record(changed.run_id, public)
    assert table != table_of(checkpoints)


def test_table_keeps_different_json_of_each_record():
    checkpoints = [
        ListedCheckpoint.from_record("r", record(f"weights/{n}", raw=b'{"loss":%d}' % n))
        for n in range(6_000)
    ]
    table = table_of(checkpoints)
    assert [each.record.raw for each in table] == [b'{"loss":%d}' % n for n in range(6_000)]
    assert table.get(checkpoints[-1].key) == checkpoints[-1]


def test_table_may_be_read_while_it_grows():
    checkpoints = numbered(3 * COUNT)
    table, is_complete = CheckpointTable(), threading.Event()

    def read():
        while not is_complete.is_set():
            length = len(table)
            for number in {0, length // 2, length - 1} if length else ():
                assert table[number] == checkpoints[number]
                assert table.get(checkpoints[number].key) == checkpoints[number]
            assert table.get(("absent", "weights", "1")) is None

    with ThreadPoolExecutor() as threads:
        readers = [threads.submit(read) for _ in range(3)]
        for checkpoint in checkpoints:
            table.add(checkpoint)
        is_complete.set()
        for reader in readers:
            reader.result(30)


# --- the records ---------------------------------------------------------------------------------


def test_records_count_each_identity_once():
    first = record("weights/1")
    same_key = models.Checkpoint.from_fields("weights/1", tinker_path="tinker://r/x/1", raw=b"{}")
    without_run = models.Checkpoint.from_fields("weights/2", raw=b"{}")
    records = AccountRecords([first, first, same_key, same_key, without_run, without_run])
    assert len(records) == 3
    assert list(records) == [first]
    assert records.without_run_count == 1
    assert AccountListing.from_records(records).without_run_count == 1


# --- the listing ---------------------------------------------------------------------------------


def three():
    return listing_of(*(record(f"weights/{n}", time_ns=n) for n in (1, 3, 2)))


def names(listing):
    return [checkpoint.name for checkpoint in listing]


def test_listing_is_sorted_newest_first():
    assert names(three()) == ["3", "2", "1"]


def test_change_keeps_the_order_of_the_listing():
    before = three()
    second = before.get(("r", "weights", "2"))
    changed = before.with_record(second, record("weights/2", time_ns=9, is_public=True))
    assert names(changed) == names(before)
    assert changed.get(second.key).record.is_public
    assert not before.get(second.key).record.is_public
    assert [each.record.is_public for each in changed] == [False, True, False]
    assert names(changed.with_record(second, None)) == ["3", "1"]
    assert changed.with_record(second, None).get(second.key) is None
    absent = ListedCheckpoint.from_record("gone", second.record)
    assert changed.with_record(absent, None) is changed
    assert changed.with_record(absent, second.record) is changed


def test_newest_match_is_searched_once():
    asked = []

    def is_old(checkpoint):
        asked.append(checkpoint.name)
        return checkpoint.record.time_ns < 3

    listing = three()
    assert listing.newest_ns(is_old) == listing.newest_ns(is_old) == 2
    assert asked == ["3", "2"]
    assert listing.newest_ns(lambda _each: True) == 3
    assert listing.newest_ns(lambda _each: False) is None


def test_excluded_checkpoints_are_in_no_listing():
    before = three()
    assert before.without(()) is before
    excluded = before.without([before.get(("r", "weights", "2"))])
    assert names(excluded) == ["3", "1"]
    assert excluded.get(("r", "weights", "2")) is None


def test_changed_listing_equals_a_new_one_of_the_same_state():
    before, second = three(), three().get(("r", "weights", "2"))
    removed = before.with_record(second, None)
    assert before == three()
    assert before != removed
    assert removed == listing_of(record("weights/3", time_ns=3), record("weights/1", time_ns=1))
    public = record("weights/2", time_ns=2, is_public=True)
    changed = listing_of(record("weights/3", time_ns=3), public, record("weights/1", time_ns=1))
    assert before.with_record(second, public) == changed
    assert before.with_record(second, public) != before


@pytest.mark.parametrize(("metadata", "limit"), [("{}", 130), ('{"loss":%d}', 450)])
def test_checkpoint_of_the_account_uses_little_memory(metadata, limit):
    count = 20_000
    template = (
        '{"checkpoint_id":"weights/%06d","checkpoint_type":"training","size_bytes":%d,'
        '"time":"2026-11-23T14:20:30.%06dZ","tinker_path":"tinker://%s/weights/%06d",'
        '"public":false,"user_metadata":' + metadata.replace("%d", "%%d") + ',"expires_at":null}'
    )

    def page(first):
        listed = []
        for n in range(first, first + 1000):
            run_id = f"0001ca37-dcd0-586d-a0df-{n // 10:012d}:train:0"
            text = template % (n, 10**9 + n, 999_999 - n, run_id, n)
            listed.append(text % n if "%d" in text else text)
        return b'{"checkpoints":[%s]}' % ",".join(listed).encode()

    pages = [page(first) for first in range(0, count, 1000)]
    tracemalloc.start()
    try:
        records = AccountRecords()
        for body in pages:
            for each in parsing.parse_checkpoints(body).items:
                records.add(each)
        listing = AccountListing.from_records(records)
        del records, each
        kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in listing) == count
    assert kept_bytes / count < limit
    assert most_bytes / count < 1.5 * limit
