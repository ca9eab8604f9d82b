"""A directory with more entries than a stream keeps, on a real mount."""

import ctypes
import os
import stat

import pytest

from tests.support.account import account, api_calls, make_account
from tinkerfs.vfs.directory_stream import MAX_KEPT_ENTRIES

__all__ = ["account", "make_account"]

RUNS, CHECKPOINTS = 3_000, 10
#: Offset of the name in `struct dirent` of 64-bit Linux (readdir(3)).
NAME_OFFSET = 19

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
for function in (libc.readdir, libc.rewinddir, libc.telldir, libc.closedir):
    function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


def read_names(stream, count=None):
    """Return the next names of a stream of opendir(3), without `.` and `..`."""
    names = []
    while count is None or len(names) < count:
        entry = libc.readdir(stream)
        if entry is None:
            break
        name = os.fsdecode(ctypes.string_at(entry + NAME_OFFSET))
        if name not in (".", ".."):
            names.append(name)
    return names


@pytest.fixture
def large(make_account):
    assert RUNS * CHECKPOINTS > MAX_KEPT_ENTRIES
    return make_account(runs=RUNS, checkpoints=CHECKPOINTS)


def test_long_directory_can_be_read_again_from_any_position(large):
    path = os.fsencode(large.path("checkpoints"))
    expected = sorted(
        f"{run.id}@{checkpoint.kind}@{checkpoint.name}"
        for run, checkpoint in large.server.account.checkpoints()
    )
    stream = libc.opendir(path)
    try:
        names = read_names(stream, 500)
        position = libc.telldir(stream)
        names += read_names(stream)
        assert sorted(names) == expected
        libc.seekdir(stream, position)
        assert read_names(stream, 100) == names[500:600]
        libc.rewinddir(stream)
        assert read_names(stream) == names
    finally:
        libc.closedir(stream)
    last = large.path("checkpoints") / names[-1]
    assert stat.S_ISLNK(last.lstat().st_mode)
    assert (last / "tinker_path").read_text().startswith("tinker://")
    calls = api_calls(large.server)
    assert calls["GET checkpoints"] == RUNS * CHECKPOINTS // 1000
