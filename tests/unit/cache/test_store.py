import os
import stat

import pytest

from tinkerfs.cache.flight import in_thread
from tinkerfs.cache.store import Store


def test_what_is_put_is_there_in_the_next_mount(tmp_path):
    with Store(tmp_path) as store:
        store.put("space", "key\udcff", b"\0bytes")
        store.put("space", "key\udcff", b"newer")
        assert store.get("other", "key\udcff") is None
    with Store(tmp_path) as store:
        assert store.get("space", "key\udcff") == b"newer"
        assert store.get("space", "key") is None


def test_two_mounts_share_it(tmp_path):
    with Store(tmp_path) as one, Store(tmp_path) as other:
        one.put("s", "k", b"v")
        assert other.get("s", "k") == b"v"
        other.put("s", "k2", b"v2")
        assert one.get("s", "k2") == b"v2"


def test_its_file_is_private(tmp_path):
    with Store(tmp_path):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}


@pytest.mark.expect_warnings("made anew|goes on without")
@pytest.mark.parametrize(
    "garbage", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x" * 4096]
)
def test_a_broken_file_is_made_anew_and_told(tmp_path, garbage, caplog):
    (tmp_path / "metadata.sqlite3").write_bytes(garbage)
    with Store(tmp_path) as store:
        store.put("s", "k", b"v")
        assert store.get("s", "k") == b"v"
    assert "made anew" in caplog.text


@pytest.mark.expect_warnings("made anew|goes on without")
def test_a_store_that_cannot_be_opened_keeps_nothing_and_fails_nobody(tmp_path, caplog):
    (tmp_path / "metadata.sqlite3").mkdir()
    with Store(tmp_path) as store:
        store.put("s", "k", b"v")
        assert store.get("s", "k") is None
    assert caplog.text.count("goes on without") == 1


@pytest.mark.expect_warnings("made anew|goes on without")
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_store_with_a_fifo_is_made_again(tmp_path, suffix):
    with Store(tmp_path) as store:
        store.put("s", "k", b"v")
    (tmp_path / f"metadata.sqlite3{suffix}").unlink(missing_ok=True)
    os.mkfifo(tmp_path / f"metadata.sqlite3{suffix}")

    def use():
        with Store(tmp_path) as store:
            store.put("s", "k", b"v")
            return store.get("s", "k")

    assert in_thread(use, "store").result(20) == b"v"
