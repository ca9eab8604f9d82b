"""Tests of `archive.tar` for separate files: external weights and exports."""

import errno
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.mount import wait_until
from tests.unit.weights.conftest import subject_of
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.content import Data, Noise
from tinkerfs.demo.exports import ExportOptions
from tinkerfs.weights.joined_file import MAX_OPEN_FILES
from tinkerfs.weights.prefetch import prefetch, required_cache_bytes

MIB = 1 << 20
ARCHIVE, URLS = "GET archive", "GET external_weights_urls"
FILES = {
    "adapter_config.json": Data(b'{"r": 8}'),
    "adapter_model.safetensors": Noise(9 * MIB + 77, 1),
    "empty": Data(b""),
    "folder/second.bin": Noise(BLOCK_BYTES, 2),
    "ü" * 60 + "/last": Data(b"last"),
}


@pytest.fixture
def server(demo_server):
    server = demo_server(runs=1, profile="official-0.36", exports=ExportOptions())
    server.account.add_checkpoint(server.account.run_ids[0], "external_weights/x", files=FILES)
    return server


@pytest.fixture
def subject(server):
    return subject_of(server, "external_weights", number=-1)


@pytest.fixture
def mount(server, weights_of):
    return weights_of(server)


def bytes_of(content):
    return content.read(0, content.size_bytes)


def tar_of(files, mtime=0):
    """Return the tar of some files by the standard library."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = files[name].size_bytes, mtime
            tar.addfile(info, io.BytesIO(bytes_of(files[name])))
    return written.getvalue()


def open_tar(mount, subject):
    return mount.weights.open_archive(subject, BACKGROUND_CONTEXT)


def read_tar(mount, subject):
    with open_tar(mount, subject) as file:
        return file.read(1 << 40, 0, BACKGROUND_CONTEXT)


def read_files(mount, subject):
    for name in mount.weights.files(subject, BACKGROUND_CONTEXT).members:
        with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
            file.read(1 << 40, 0, BACKGROUND_CONTEXT)


def test_tar_of_external_weights_has_every_file(server, mount, subject):
    assert read_tar(mount, subject) == tar_of(FILES)
    assert server.journal.count(ARCHIVE) == 0
    assert server.journal.count(URLS) == 1


def test_tar_has_the_blocks_of_the_files(server, mount, weights_of, subject):
    read_files(mount, subject)
    server.journal.clear()
    assert read_tar(mount, subject) == tar_of(FILES)
    assert read_tar(weights_of(server), subject) == tar_of(FILES)
    assert server.journal.count() == 0


def test_files_have_the_blocks_of_the_tar(server, mount, subject):
    read_tar(mount, subject)
    server.journal.clear()
    read_files(mount, subject)
    assert server.journal.count() == 0


def test_size_of_the_tar_is_known_from_the_index(server, mount, subject):
    assert mount.weights.archive_bytes(subject) is None
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    assert mount.weights.archive_bytes(subject) == len(tar_of(FILES))
    with open_tar(mount, subject) as file:
        assert file.size_bytes == len(tar_of(FILES))
        assert file.mtime_ns == subject.mtime_ns
    assert server.journal.count() == 0


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_at_random_equals_the_tar(mount, subject, data):
    expected = tar_of(FILES)
    with open_tar(mount, subject) as file:
        for _ in range(5):
            offset = data.draw(st.integers(0, len(expected) + 5))
            size = data.draw(st.sampled_from([1, 511, 513, 5000, 5 * MIB]))
            found = file.read(size, offset, BACKGROUND_CONTEXT)
            assert found == expected[offset : offset + size]


def test_tar_of_an_export_equals_its_files(server, mount, weights_of):
    subject = subject_of(server)
    expected = tar_of(server.files(subject.ref.run_id, subject.ref.path_id))
    mount.exports.export(subject, 3600, "/export", BACKGROUND_CONTEXT)
    server.journal.clear()
    assert read_tar(mount, subject) == expected
    assert server.journal.count(ARCHIVE) == 1
    assert server.journal.count(URLS) == 1
    server.journal.clear()
    assert read_tar(weights_of(server), subject) == expected
    assert server.journal.count() == 0


def test_tar_without_an_export_is_refused_with_advice(server, mount):
    subject = subject_of(server)
    with pytest.raises(OSError, match="`echo 1h > export`") as caught:
        open_tar(mount, subject)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert server.journal.endpoints() == {ARCHIVE: 1}


def test_archives_are_preferred_to_tars_of_files(demo_server, weights_of):
    server = demo_server(runs=1, exports=ExportOptions())
    subject, mount = subject_of(server), weights_of(server)
    mount.exports.export(subject, 3600, "/export", BACKGROUND_CONTEXT)
    content = server.archive(subject.ref.run_id, subject.ref.path_id)
    assert read_tar(mount, subject) == bytes_of(content)
    assert server.journal.count(URLS) == 0


def test_changed_file_of_checkpoint_without_time_changes_the_tar(server, mount):
    run_id = server.account.run_ids[0]
    stored = server.account.add_checkpoint(
        run_id, "external_weights/undated", files=dict(FILES), time_s=None
    )
    found = subject_of(server, "external_weights", number=-1)
    subject = type(found)(found.server, found.key, found.ref, found.path, 0, has_time=False)
    with open_tar(mount, subject) as file:
        first_key = file.key
        assert file.read(1 << 40, 0, BACKGROUND_CONTEXT) == tar_of(FILES)
    stored.files = {**FILES, "adapter_config.json": Data(b'{"r": 16}')}
    with open_tar(mount, subject) as file:
        assert file.key != first_key
        assert file.read(1 << 40, 0, BACKGROUND_CONTEXT) == tar_of(stored.files)


def test_file_that_is_saved_again_makes_the_open_tar_stale(server, mount, subject):
    stored = server.account.checkpoint(subject.ref.run_id, subject.ref.path_id)
    with open_tar(mount, subject) as file:
        stored.generation, stored.time_s = 1, stored.time_s + 9.0
        with pytest.raises(OSError, match="another version") as caught:
            file.read(BLOCK_BYTES, BLOCK_BYTES, BACKGROUND_CONTEXT)
        assert caught.value.errno == errno.ESTALE


def test_prefetch_of_the_tar_downloads_each_block_once(server, mount, subject):
    with open_tar(mount, subject) as file:
        server.journal.clear()
        results = list(prefetch([file], BACKGROUND_CONTEXT))
        assert [each.error for each in results] == [None] * len(results)
        assert sum(each.size_bytes for each in results) == sum(
            content.size_bytes for content in FILES.values()
        )
        assert file.cached_bytes() == file.size_bytes
        blocks = sum(-(-content.size_bytes // BLOCK_BYTES) for content in FILES.values())
        assert server.journal.count("GET store/file") <= blocks
        server.journal.clear()
        assert file.read(1 << 40, 0, BACKGROUND_CONTEXT) == tar_of(FILES)
    assert server.journal.count() == 0


def test_blocks_of_the_tar_and_of_the_files_count_once(mount, subject):
    names = mount.weights.files(subject, BACKGROUND_CONTEXT).members
    tar = open_tar(mount, subject)
    files = [mount.weights.open(subject, name, BACKGROUND_CONTEXT) for name in names]
    assert required_cache_bytes([tar, *files]) == required_cache_bytes([tar])
    for file in (tar, *files):
        file.close()


def test_tar_of_many_files_keeps_few_of_them_open(server, mount, tmp_path):
    files = {f"{number:03}": Data(f"file {number}".encode()) for number in range(100)}
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "external_weights/many", files=files)
    subject = subject_of(server, "external_weights", number=-1)
    descriptors = Path("/proc/self/fd")
    with open_tar(mount, subject) as file:
        assert file.read(1 << 40, 0, BACKGROUND_CONTEXT) == tar_of(files)
        server.journal.wait_until_idle()
        with ThreadPoolExecutor(8) as pool:
            reads = [
                pool.submit(file.read, 5000, offset, BACKGROUND_CONTEXT)
                for offset in range(0, file.size_bytes, 3000)
            ]
            for offset, found in zip(range(0, file.size_bytes, 3000), reads, strict=True):
                assert found.result(10) == tar_of(files)[offset : offset + 5000]

        def locks():
            paths = [os.path.realpath(fd) for fd in descriptors.iterdir()]
            # Other tests of this process may not have closed their files yet.
            return [
                path
                for path in paths
                if Path(path).is_relative_to(tmp_path) and path.endswith("/lock")
            ]

        # A download that is ending keeps its file open.
        wait_until(lambda: len(locks()) <= MAX_OPEN_FILES)
