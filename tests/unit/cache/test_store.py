import contextlib
import os
import sqlite3
import stat

import pytest

from tinkerfs import errors
from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import run_in_thread


def test_put_value_is_found_by_the_next_mount(tmp_path):
    with MetadataStore(tmp_path) as store:
        store.put("space", "key\udcff", b"\0bytes")
        store.put("space", "key\udcff", b"newer")
        assert store.get("other", "key\udcff") is None
    with MetadataStore(tmp_path) as store:
        assert store.get("space", "key\udcff") == b"newer"
        assert store.get("space", "key") is None


def test_two_mounts_share_the_store(tmp_path):
    with MetadataStore(tmp_path) as one, MetadataStore(tmp_path) as other:
        one.put("s", "k", b"v")
        assert other.get("s", "k") == b"v"
        other.put("s", "k2", b"v2")
        assert one.get("s", "k2") == b"v2"


def test_delete_matching_selects_by_prefix_and_key(tmp_path):
    with MetadataStore(tmp_path) as store:
        for namespace in ("weights a", "weights b", "weights_c", "other"):
            for key in ("k", "l\udcff"):
                store.put(namespace, key, b"v")
        store.put_durable("weights a", "k", b"v")
        store.delete_matching("weights ", lambda key: key == "k")
        assert [store.get(f"weights {each}", "k") for each in "ab"] == [None, None]
        assert [store.get(each, "k") for each in ("weights_c", "other")] == [b"v", b"v"]
        assert store.get("weights a", "l\udcff") == b"v"
        store.delete_matching("weights ", lambda _key: True)
        assert store.get("weights a", "l\udcff") is None
        assert store.durable("weights a") == {"k": b"v"}


def test_database_file_is_private(tmp_path):
    with MetadataStore(tmp_path):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}


@pytest.mark.expect_warnings("created again|goes on without")
@pytest.mark.parametrize(
    "garbage", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x" * 4096]
)
def test_corrupt_database_is_created_again_and_logged(tmp_path, garbage, caplog):
    (tmp_path / "metadata.sqlite3").write_bytes(garbage)
    with MetadataStore(tmp_path) as store:
        store.put("s", "k", b"v")
        assert store.get("s", "k") == b"v"
    assert "created again" in caplog.text


@pytest.mark.expect_warnings("created again|goes on without")
def test_store_that_cannot_be_opened_stores_nothing(tmp_path, caplog):
    (tmp_path / "metadata.sqlite3").mkdir()
    with MetadataStore(tmp_path) as store:
        store.put("s", "k", b"v")
        assert store.get("s", "k") is None
    assert caplog.text.count("goes on without") == 1


# --- durable records -----------------------------------------------------------------------------


def test_durable_record_is_shared_and_can_be_deleted(tmp_path):
    with MetadataStore(tmp_path) as one, MetadataStore(tmp_path) as other:
        version = other.data_version()
        assert other.data_version() == version
        one.put_durable("s", "key\udcff\n", b"v")
        assert other.data_version() != version
        assert other.durable("s") == {"key\udcff\n": b"v"}
        assert other.durable("t") == {}
        other.delete_durable("s", "key\udcff\n")
        other.delete_durable("s", "nothing")
        assert one.durable("s") == {}


def test_durable_record_outlives_another_schema_version(tmp_path):
    with MetadataStore(tmp_path) as store:
        store.put("s", "k", b"lost")
        store.put_durable("s", "k", b"kept")
    with contextlib.closing(sqlite3.connect(tmp_path / "metadata.sqlite3")) as connection:
        connection.execute("PRAGMA user_version=99")
    with MetadataStore(tmp_path) as store:
        assert store.get("s", "k") is None
        assert store.durable("s") == {"k": b"kept"}


def test_durable_record_that_cannot_be_written_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("tinkerfs.cache.store._BUSY_TIMEOUT_S", 0.01)
    path = tmp_path / "metadata.sqlite3"
    with MetadataStore(tmp_path) as store, contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="locked") as raised:
            store.put_durable("s", "k", b"v")
        assert errors.errno_name(raised.value) == "EIO"
        other.rollback()
        store.put_durable("s", "k", b"v")
        path.rename(tmp_path / "elsewhere")
        for change in (
            lambda: store.put_durable("s", "l", b"v"),
            lambda: store.delete_durable("s", "k"),
        ):
            with pytest.raises(OSError, match="removed or replaced"):
                change()
    with pytest.raises(OSError, match="not open"):
        store.put_durable("s", "k", b"v")
    assert (store.durable("s"), store.data_version()) == ({}, None)
    with (
        MetadataStore(None) as store,
        pytest.raises(OSError, match=r"in memory \(hint: set --cache-dir\)"),
    ):
        store.put_durable("s", "k", b"v")


@pytest.mark.expect_warnings("created again|goes on without")
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_store_with_a_fifo_is_made_again(tmp_path, suffix):
    with MetadataStore(tmp_path) as store:
        store.put("s", "k", b"v")
    (tmp_path / f"metadata.sqlite3{suffix}").unlink(missing_ok=True)
    os.mkfifo(tmp_path / f"metadata.sqlite3{suffix}")

    def use():
        with MetadataStore(tmp_path) as store:
            store.put("s", "k", b"v")
            return store.get("s", "k")

    assert run_in_thread(use, "store").result(20) == b"v"
