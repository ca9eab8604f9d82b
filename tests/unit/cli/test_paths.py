"""`tinkerfs url` of a path below a mount of another user."""

import os

import pytest
from click.testing import CliRunner

from tinkerfs.cli.paths import url
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import Mount

OTHER_UID = 12345


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Return a directory that appears to be a checkpoint of a mount of another user."""
    mount = Mount(str(tmp_path.resolve()), "fuse.tinkerfs", "x", "0:1", OTHER_UID)
    monkeypatch.setattr(mount_table, "list_mounts", lambda: [mount])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    directory = tmp_path.resolve() / "runs/r/checkpoints/weights/c"
    directory.mkdir(parents=True)
    return directory


def test_url_escapes_control_characters_of_other_user(checkpoint):
    (checkpoint / "tinker_path").write_text("tinker://r/weights/c\x1b[31m\n")
    assert CliRunner().invoke(url, [str(checkpoint)]).stdout == "tinker://r/weights/c\\x1b[31m\n"


@pytest.mark.parametrize("content", ["--base-url=http://thief\n", ""])
def test_url_prints_nothing_but_a_tinker_path(checkpoint, content):
    (checkpoint / "tinker_path").write_text(content)
    done = CliRunner().invoke(url, [str(checkpoint)])
    assert done.stdout == ""
    assert isinstance(done.exception, StartupError)
