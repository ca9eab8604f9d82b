"""Extended attributes on real mounts, read by common tools."""

import errno
import os

import pytest

from tests.support.account import account, api_calls, every_binding, make_account
from tinkerfs.demo.sample_data import Session

__all__ = ["account", "make_account"]

pytestmark = every_binding


@pytest.fixture(scope="module")
def xattr_account(make_account):
    """Return an account mounted with --xattr."""
    return make_account(runs=2, checkpoints=4, settings={"xattr": True})


def attributes(path):
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}


def test_xattrs_contain_fields_of_the_listings(xattr_account):
    run = xattr_account.server.account.runs()[0]
    checkpoint = run.checkpoints[0]
    checkpoint_dir = xattr_account.path(f"runs/{run.id}/checkpoints/{checkpoint.id}")
    named = Session(id="named", created_at_s=1.7e9, run_ids=[], samplers={}, display_name="tüne")
    xattr_account.server.account.add_session(named)
    xattr_account.refresh()
    os.listdir(xattr_account.path("sessions"))
    os.listdir(checkpoint_dir)
    os.listdir(xattr_account.path("runs"))
    xattr_account.server.journal.clear()
    found = attributes(checkpoint_dir)
    assert found.pop("user.tinker.time").endswith("Z")
    assert found == {
        "user.tinker.path": f"tinker://{run.id}/{checkpoint.id}",
        "user.tinker.base_model": run.base_model,
        "user.tinker.lora_rank": str(run.lora_rank),
        "user.tinker.public": str(int(checkpoint.is_public)),
        "user.tinker.size_bytes": str(checkpoint.size_bytes),
        "user.tinker.expires_at": (checkpoint_dir / "expires_at").read_text().strip(),
    }
    assert attributes(checkpoint_dir.parents[2]).keys() == {
        "user.tinker.base_model",
        "user.tinker.lora_rank",
        "user.tinker.time",
    }
    assert attributes(xattr_account.path("sessions/named")) == {"user.tinker.display_name": "tüne"}
    assert attributes(checkpoint_dir / "published") == {}
    assert attributes(xattr_account.root) == {}
    assert api_calls(xattr_account.server) == {}


def test_getfattr_and_find_script_read_xattrs(xattr_account):
    run = xattr_account.server.account.run_ids[0]
    done = xattr_account.sh(f"getfattr -d runs/{run}/checkpoints/weights/*")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count('user.tinker.path="tinker://') == len(
        os.listdir(xattr_account.path(f"runs/{run}/checkpoints/weights"))
    )
    done = xattr_account.sh(
        "find runs -mindepth 4 -maxdepth 4 -type d"
        " -exec getfattr --only-values -n user.tinker.size_bytes {} \\; -exec echo \\;"
    )
    sizes = {int(line) for line in done.stdout.split()}
    assert sizes == {
        c.size_bytes for r in xattr_account.server.account.runs() for c in r.checkpoints
    }


def test_copies_preserve_xattrs_or_succeed_silently(xattr_account, tmp_path):
    run = xattr_account.server.account.run_ids[0]
    source = f"runs/{run}/checkpoints/weights"
    for command in (f"cp -a {source} {tmp_path}/cp", f"rsync -aX ./{source}/ {tmp_path}/rsync/"):
        done = xattr_account.sh(command)
        assert (done.returncode, done.stderr) == (0, ""), command
    for copy in ("cp", "rsync"):
        for name in os.listdir(tmp_path / copy):
            found = attributes(tmp_path / copy / name)
            assert found["user.tinker.path"] == f"tinker://{run}/weights/{name}"


def test_setxattr_fails_and_system_names_send_no_request(xattr_account):
    run = xattr_account.server.account.run_ids[0]
    checkpoint_dir = xattr_account.path(f"runs/{run}/checkpoints/weights/0001")
    os.listdir(checkpoint_dir)
    xattr_account.refresh()
    xattr_account.server.journal.clear()
    before = xattr_account.errors()
    for name, expected in (
        ("security.capability", {errno.ENODATA, errno.EOPNOTSUPP}),
        ("security.selinux", {errno.ENODATA, errno.EOPNOTSUPP}),
        ("system.posix_acl_access", {errno.ENODATA, errno.EOPNOTSUPP}),
        ("trusted.anything", {errno.ENODATA, errno.EOPNOTSUPP}),
    ):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            os.getxattr(xattr_account.root, name)
        assert failure.value.errno in expected
    assert xattr_account.errors() == before
    assert api_calls(xattr_account.server) == {}
    for change in (
        lambda: os.setxattr(checkpoint_dir, "user.tinker.path", b"other"),
        lambda: os.setxattr(checkpoint_dir, "user.mine", b"x"),
        lambda: os.removexattr(checkpoint_dir, "user.tinker.path"),
    ):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(OSError) as failure:  # noqa: PT011
        os.getxattr(checkpoint_dir, "user.mine")
    assert failure.value.errno == errno.ENODATA
