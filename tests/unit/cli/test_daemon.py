"""Command line and environment of a daemon, without the caller's directory."""

import os
import sys

import pytest

from tinkerfs.cli.daemon import daemon_command, daemon_environment


def test_daemon_command_imports_nothing_from_directory():
    assert daemon_command(["mount"]) == [sys.executable, "-P", "-m", "tinkerfs", "mount"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SSL_CERT_FILE", "c", "{}/c"),
        ("XDG_CACHE_HOME", "~/l", "{home}/l"),
        ("SSL_CERT_DIR", "a:/b", "{}/a:/b"),
        ("PYTHONPATH", ":lib::/b", "{}/lib:/b"),
        ("FUSE_LIBRARY_PATH", "./lib.so", "{}/lib.so"),
        ("FUSE_LIBRARY_PATH", "libfuse3.so.3", "libfuse3.so.3"),
        ("TINKERFS_CACHE_DIR", "c", "c"),
    ],
)
def test_daemon_environment_has_absolute_paths(name, value, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = expected.format(tmp_path, home=os.path.expanduser("~"))
    assert daemon_environment({name: value}) == {name: expected}
