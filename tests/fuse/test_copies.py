"""Copies onto real mounts of file systems with missing features."""

import os

import pytest

from tests.support.faulty_server import FaultyServer
from tests.support.limited_fs import LIMITS, limited_mount
from tests.support.mount import tinkerfs
from tests.unit.transfer.test_target_file import DATA, copy, partial, target
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.transfer.destination import Destination


@pytest.fixture(params=LIMITS)
def limited(request, tmp_path):
    """Return the mountpoint of each limited file system, and its limits."""
    limits = LIMITS[request.param]
    with limited_mount(tmp_path, limits) as mountpoint:
        yield mountpoint, limits


def test_copy_onto_limited_file_system_is_complete(limited):
    directory, limits = limited
    partial_path = partial(directory)
    copy(directory)
    assert not partial_path.exists()
    for name in ("sub/other", "file"):  # including an existing file
        copy(directory, name)
        assert (directory / name).read_bytes() == DATA
    if "uid" not in limits:
        assert target(directory).is_complete()
        assert copy(directory, "new", key="version 2") == len(DATA)


def test_copy_resumes_on_file_system_without_modes(tmp_path):
    with limited_mount(tmp_path, LIMITS["without modes at all"]) as directory:
        partial(directory)
        assert copy(directory) == len(DATA) - (1 << 20)


def test_copy_of_names_that_differ_by_case_raises_error(tmp_path):
    with limited_mount(tmp_path, {"caseless": True}) as directory:
        destination = Destination(str(directory))
        first = target(directory, "file", destination)
        second = target(directory, "FILE", destination, data=DATA[::-1])
        for _ in first.copy(0o644, BACKGROUND_CONTEXT):
            pass
        with pytest.raises(FileExistsError, match="for that of another file"):
            list(second.copy(0o644, BACKGROUND_CONTEXT))
        assert (directory / "file").read_bytes() == DATA
        assert first.is_complete()
        assert not second.is_complete()


def test_get_onto_limited_file_system_exits_0(tmp_path):
    limits = LIMITS["with nothing of these"]
    with (
        FaultyServer(runs=1, checkpoints=1) as server,
        limited_mount(tmp_path, limits) as directory,
    ):
        [run] = server.account.runs()
        [checkpoint] = run.checkpoints
        env = {**server.environment, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        path = f"tinker://{run.id}/{checkpoint.id}"
        for force in ((), (), ("--force",)):
            done = tinkerfs("get", *force, path, directory / "out", env=env)
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
        files = server.files(run.id, checkpoint.id)
        for name, content in files.items():
            assert (directory / "out" / name).read_bytes() == content.read(0, content.size_bytes)
