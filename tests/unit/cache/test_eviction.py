import os

import pytest

from tinkerfs.cache.eviction import free_bytes, kept_files


@pytest.mark.parametrize("path", ["", "gone", "gone/too", "file", "file/below"])
def test_free_bytes_of_a_missing_directory_is_its_disks(tmp_path, path):
    (tmp_path / "file").write_bytes(b"in the way")
    status = os.statvfs(tmp_path)
    assert abs(free_bytes(tmp_path / path) - status.f_bavail * status.f_frsize) < 1 << 30


def test_kept_files_of_a_path_that_is_a_file_are_none(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    assert kept_files(tmp_path / "file") == kept_files(tmp_path / "file/below") == []
