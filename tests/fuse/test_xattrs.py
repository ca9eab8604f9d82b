"""Extended attributes on real mounts, by the tools that ask for them."""

import errno
import os

import pytest

from tests.support.account import account, api_calls, make_account
from tinkerfs.demo.sample_data import Session

__all__ = ["account", "make_account"]


@pytest.fixture(scope="module")
def told(make_account):
    """An account mounted with --xattr."""
    return make_account(runs=2, checkpoints=4, settings={"xattr": True})


def attributes(path):
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}


def test_a_checkpoint_a_run_and_a_session_tell_what_their_listings_told(told):
    run = told.server.account.runs()[0]
    checkpoint = run.checkpoints[0]
    folder = told.path(f"runs/{run.id}/checkpoints/{checkpoint.id}")
    named = Session(id="named", created_at_s=1.7e9, run_ids=[], samplers={}, display_name="tüne")
    told.server.account.add_session(named)
    told.refresh()
    os.listdir(told.path("sessions"))
    os.listdir(folder)
    os.listdir(told.path("runs"))
    told.server.journal.clear()
    shown = attributes(folder)
    assert shown.pop("user.tinker.time").endswith("Z")
    assert shown == {
        "user.tinker.path": f"tinker://{run.id}/{checkpoint.id}",
        "user.tinker.base_model": run.base_model,
        "user.tinker.lora_rank": str(run.lora_rank),
        "user.tinker.public": str(int(checkpoint.is_public)),
        "user.tinker.size_bytes": str(checkpoint.size_bytes),
        "user.tinker.expires_at": (folder / "expires_at").read_text().strip(),
    }
    assert attributes(folder.parents[2]).keys() == {
        "user.tinker.base_model",
        "user.tinker.lora_rank",
        "user.tinker.time",
    }
    assert attributes(told.path("sessions/named")) == {"user.tinker.display_name": "tüne"}
    assert attributes(folder / "published") == {}
    assert attributes(told.root) == {}
    assert api_calls(told.server) == {}


def test_getfattr_and_a_script_with_find(told):
    run = told.server.account.run_ids[0]
    done = told.sh(f"getfattr -d runs/{run}/checkpoints/weights/*")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count('user.tinker.path="tinker://') == len(
        os.listdir(told.path(f"runs/{run}/checkpoints/weights"))
    )
    done = told.sh(
        "find runs -mindepth 4 -maxdepth 4 -type d"
        " -exec getfattr --only-values -n user.tinker.size_bytes {} \\; -exec echo \\;"
    )
    sizes = {int(line) for line in done.stdout.split()}
    assert sizes == {c.size_bytes for r in told.server.account.runs() for c in r.checkpoints}


def test_copies_take_them_along_or_say_nothing(told, tmp_path):
    run = told.server.account.run_ids[0]
    source = f"runs/{run}/checkpoints/weights"
    for command in (f"cp -a {source} {tmp_path}/cp", f"rsync -aX ./{source}/ {tmp_path}/rsync/"):
        done = told.sh(command)
        assert (done.returncode, done.stderr) == (0, ""), command
    for copy in ("cp", "rsync"):
        for name in os.listdir(tmp_path / copy):
            shown = attributes(tmp_path / copy / name)
            assert shown["user.tinker.path"] == f"tinker://{run}/weights/{name}"


def test_nothing_can_be_set_and_the_kernel_s_own_names_cost_nothing(told):
    run = told.server.account.run_ids[0]
    folder = told.path(f"runs/{run}/checkpoints/weights/0001")
    os.listdir(folder)
    told.refresh()
    told.server.journal.clear()
    before = told.errors()
    for name, expected in (
        ("security.capability", {errno.ENODATA, errno.EOPNOTSUPP}),
        ("security.selinux", {errno.ENODATA, errno.EOPNOTSUPP}),
        ("system.posix_acl_access", {errno.ENODATA, errno.EOPNOTSUPP}),
        ("trusted.anything", {errno.ENODATA, errno.EOPNOTSUPP}),
    ):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            os.getxattr(told.root, name)
        assert failure.value.errno in expected
    assert told.errors() == before
    assert api_calls(told.server) == {}
    for change in (
        lambda: os.setxattr(folder, "user.tinker.path", b"other"),
        lambda: os.setxattr(folder, "user.mine", b"x"),
        lambda: os.removexattr(folder, "user.tinker.path"),
    ):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(OSError) as failure:  # noqa: PT011
        os.getxattr(folder, "user.mine")
    assert failure.value.errno == errno.ENODATA
