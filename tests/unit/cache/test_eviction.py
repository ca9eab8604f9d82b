import os

import pytest

from tinkerfs.cache.eviction import free_bytes, scan_cache


@pytest.mark.parametrize("path", ["", "gone", "gone/too"])
def test_free_bytes_of_a_missing_directory_is_its_disks(tmp_path, path):
    status = os.statvfs(tmp_path)
    assert abs(free_bytes(tmp_path / path) - status.f_bavail * status.f_frsize) < 1 << 30


def test_scan_of_a_missing_directory_is_empty(tmp_path):
    assert scan_cache(tmp_path / "gone/too") == []
