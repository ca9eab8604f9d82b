"""`--trash` and `undelete` on real mounts: crashes at each step, later and concurrent mounts."""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.support.mount import force_unmount, run, tinkerfs, wait_until
from tinkerfs import name_encoding
from tinkerfs.fuse import mount_table

TTL = "PUT ttl"
LISTING = "GET training_runs/{run}/checkpoints"
DAY_S = 86_400
FORMER_S = 90 * DAY_S


@pytest.fixture(params=["mfusepy3"])
def binding(request):
    """Return one binding, which makes no difference."""
    return request.param


@pytest.fixture
def mount(tmp_path, env):
    """Return a function that mounts with a shared cache, as in `mount("a", "--trash=30d")`."""
    with ExitStack() as stack:

        def make(name, *options):
            directory = tmp_path / name
            directory.mkdir(exist_ok=True)
            stack.callback(force_unmount, str(directory))
            done = tinkerfs("mount", "--ttl=1h", *options, directory, env=env)
            assert (done.returncode, done.stderr) == (0, "")
            return directory

        yield make


@pytest.fixture
def run_id(server):
    """Return the id of a run with one checkpoint, which expires in 90 days."""
    server.account.add_run("kept:train:0")
    now_s = int(time.time())
    server.account.add_checkpoint("kept:train:0", "weights/1", expires_at_s=now_s + FORMER_S)
    return "kept:train:0"


def stored(server, run_id):
    return server.account.checkpoint(run_id, "weights/1")


def left_s(server, run_id):
    """Return how many seconds remain until a checkpoint expires at the server."""
    return stored(server, run_id).expires_at_s - time.time()


def checkpoint_of(mountpoint, run_id):
    return mountpoint / "runs" / run_id / "checkpoints/weights/1"


def trash(mountpoint):
    return os.listdir(mountpoint / ".tinkerfs/trash")


def link(mountpoint, run_id):
    return mountpoint / ".tinkerfs/trash" / name_encoding.encode_composite((run_id, "weights", "1"))


def kill(mountpoint):
    """Kill the process of a mount."""
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount_table.is_running(pid))


def undelete(env, *paths):
    return tinkerfs("undelete", *paths, env=env)


def assert_trashed(mountpoint, server, run_id):
    assert not checkpoint_of(mountpoint, run_id).exists()
    view = mountpoint / "checkpoints"
    assert link(mountpoint, run_id).name not in os.listdir(view)
    # The kernel caches names for a second after a lookup.
    wait_until(lambda: not os.path.lexists(view / link(mountpoint, run_id).name), 5)
    assert trash(mountpoint) == [link(mountpoint, run_id).name]
    assert 29 * DAY_S < left_s(server, run_id) < 31 * DAY_S


def assert_kept(mountpoint, server, run_id):
    assert checkpoint_of(mountpoint, run_id).is_dir()
    assert os.path.lexists(mountpoint / "checkpoints" / link(mountpoint, run_id).name)
    assert trash(mountpoint) == []
    assert left_s(server, run_id) == pytest.approx(FORMER_S, abs=120)


# --- rm -r and undelete ---------------------------------------------------------------------------


def test_rm_and_undelete_over_mounts_and_kill(mount, server, env, run_id):
    first = mount("a", "--trash=30d")
    assert run("rm", "-r", checkpoint_of(first, run_id)).returncode == 0
    assert_trashed(first, server, run_id)
    kill(first)
    again = mount("a")  # without --trash: the trash keeps its content
    assert_trashed(again, server, run_id)
    assert 29 * DAY_S < os.lstat(link(again, run_id)).st_mtime - time.time() < 31 * DAY_S
    done = undelete(env, checkpoint_of(again, run_id))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"tinker://{run_id}/weights/1\n"
    assert_kept(again, server, run_id)
    assert server.journal.count("DELETE checkpoint") == 0


def test_undelete_accepts_every_form_of_path(mount, server, env, run_id):
    root = mount("a", "--trash=30d")
    link_path = link(root, run_id)
    forms = [
        ("tinkerfs", "undelete", link_path),
        ("tinkerfs", "undelete", checkpoint_of(root, run_id)),
        ("tinkerfs", "undelete", root / "runs" / run_id / "checkpoints/1"),
        ("tinkerfs", "undelete", root / "checkpoints" / link_path.name),
        ("tinkerfs", "undelete", f"tinker://{run_id}/weights/1"),
        ("sh", "-c", f"echo never > '{link_path}/expires_at'"),
    ]
    for command, *arguments in forms:
        assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
        assert trash(root) == [link_path.name]
        execute = partial(tinkerfs, env=env) if command == "tinkerfs" else partial(run, command)
        done = execute(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert_kept(
            root, server, run_id
        )  # at once, regardless of the process that sent the request
        changes = (root / ".tinkerfs/changes").read_text().splitlines()
        assert "restore from the trash" in changes[-1]


def test_undelete_without_mount_is_visible_in_later_mount(mount, server, env, run_id):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
    assert tinkerfs("umount", root, env=env).returncode == 0
    assert stored(server, run_id) is not None
    done = undelete(env, f"tinker://{run_id}/weights/1", f"tinker://{run_id}/weights/2")
    assert done.returncode == 1
    assert done.stdout == f"tinker://{run_id}/weights/1\n"
    assert done.stderr == f"tinkerfs: tinker://{run_id}/weights/2: not in the trash\n"
    assert_kept(mount("b"), server, run_id)


def test_undelete_of_path_outside_trash_fails(mount, server, env, run_id, tmp_path):
    root = mount("a", "--trash=30d")
    for path in (
        checkpoint_of(root, run_id),
        link(root, run_id),
        root / "runs",
        root / "README.md",
        tmp_path,
    ):
        done = undelete(env, path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"tinkerfs: {path}: ")
        assert len(done.stderr.splitlines()) == 1
    assert server.journal.count(TTL) == 0


def test_get_and_url_accept_trash_path_and_not_former_path(mount, env, run_id, tmp_path):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
    done = tinkerfs("url", link(root, run_id), env=env)
    assert done.stdout == f"tinker://{run_id}/weights/1\n"
    assert tinkerfs("get", checkpoint_of(root, run_id), tmp_path / "none", env=env).returncode == 1
    assert tinkerfs("get", f"tinker://{run_id}/weights/1", tmp_path / "no", env=env).returncode == 1
    done = tinkerfs("get", link(root, run_id), tmp_path / "copy", env=env)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "copy")


# --- kill -9 at each step ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "effect", "is_removed"),
    [
        pytest.param(LISTING, {"hang": True}, False, id="before-record"),
        pytest.param(TTL, {"hang": True}, False, id="before-request"),
        pytest.param(TTL, {"stall_after_bytes": 0}, True, id="before-response"),
    ],
)
def test_kill_during_rm_neither_loses_nor_hides(
    mount, server, env, run_id, endpoint, effect, is_removed
):
    root = mount("a", "--trash=30d")
    assert len(os.listdir(checkpoint_of(root, run_id))) == 9
    fault = server.faults.add(endpoint, times=None, **effect)
    with run_in_background("rm", "-r", checkpoint_of(root, run_id)) as removing:
        fault.wait_for(1)
        kill(root)
        server.journal.wait_until_idle()  # the held requests are dropped
        fault.remove()
        assert removing.wait(10) != 0
    root = mount("a", "--trash=30d")
    if is_removed:
        assert_trashed(root, server, run_id)
        assert undelete(env, link(root, run_id)).returncode == 0
    assert_kept(root, server, run_id)
    assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
    assert_trashed(root, server, run_id)


@pytest.mark.parametrize(
    ("effect", "is_restored"),
    [
        pytest.param({"hang": True}, False, id="before-request"),
        pytest.param({"stall_after_bytes": 0}, True, id="before-response"),
    ],
)
def test_kill_during_undelete_neither_loses_nor_hides(
    mount, server, env, run_id, effect, is_restored
):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
    fault = server.faults.add(TTL, times=None, **effect)
    control = f"{link(root, run_id)}/expires_at"
    with run_in_background("sh", "-c", f"echo never > '{control}'") as restoring:
        fault.wait_for(1)
        kill(root)
        server.journal.wait_until_idle()
        fault.remove()
        assert restoring.wait(10) != 0
    root = mount("a")
    if not is_restored:
        assert_trashed(root, server, run_id)
        assert undelete(env, link(root, run_id)).returncode == 0
    assert_kept(root, server, run_id)


def run_in_background(*command):
    """Start a command in a session of its own; a context manager that ends it."""
    import subprocess

    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


# --- two mounts of one account -------------------------------------------------------------------


def test_two_mounts_agree_without_waiting_for_ttl(mount, server, env, run_id):
    one, other = mount("a", "--trash=30d"), mount("b")
    for root in (one, other):  # all of it is cached for an hour
        assert run("ls", "-lR", root / "runs" / run_id, root / "checkpoints").returncode == 0
        assert trash(root) == []
    assert run("rm", "-r", checkpoint_of(one, run_id)).returncode == 0
    wait_until(lambda: not checkpoint_of(other, run_id).exists(), 5)
    assert_trashed(other, server, run_id)
    assert run("rm", "-r", checkpoint_of(other, run_id)).returncode != 0
    assert undelete(env, checkpoint_of(other, run_id)).returncode == 0
    assert_kept(other, server, run_id)
    wait_until(lambda: checkpoint_of(one, run_id).is_dir(), 5)
    assert_kept(one, server, run_id)


def test_mount_with_another_key_hides_the_same(mount, server, env, run_id):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
    server.behaviour.api_keys.add("tml-another-0123456789")
    env["TINKER_API_KEY"] = "tml-another-0123456789"
    other = mount("b")
    assert_trashed(other, server, run_id)
    third = mount("c")
    assert link(third, run_id).name not in os.listdir(third / "checkpoints")
    assert undelete(env, link(other, run_id)).returncode == 0
    assert_kept(other, server, run_id)


# --- errors --------------------------------------------------------------------------------------


def test_rm_with_unwritable_record_removes_nothing(mount, server, env, run_id):
    root = mount("a", "--trash=30d")
    database = Path(env["HOME"]) / ".cache/tinkerfs/metadata.sqlite3"
    database.unlink()
    done = run("rm", "-r", checkpoint_of(root, run_id))
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    assert_kept(root, server, run_id)
    assert server.journal.count(TTL) == server.journal.count("DELETE checkpoint") == 0
    assert "removed or replaced (hint: mount again)" in (root / ".tinkerfs/errors").read_text()


def test_mount_with_trash_out_of_range_fails(tmp_path, env):
    for text in ("59m", "3651d", "soon"):
        done = tinkerfs("mount", f"--trash={text}", tmp_path, env=env)
        assert done.returncode == 2
        assert "--trash" in done.stderr


def test_trash_option_from_file_and_environment_applies(mount, server, env, run_id, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('trash = "60d"\n')
    root = mount("a", f"--config={file}")
    assert run("rm", "-r", checkpoint_of(root, run_id)).returncode == 0
    env["TINKERFS_TRASH"] = "7d"
    other = mount("b")
    server.account.add_checkpoint(run_id, "weights/2")
    (other / ".tinkerfs/refresh").write_text("1")
    assert run("rm", "-r", other / "runs" / run_id / "checkpoints/weights/2").returncode == 0
    ttls = [json.loads(entry.body)["ttl_seconds"] for entry in server.journal.entries(TTL)]
    assert ttls == [60 * DAY_S, 7 * DAY_S]


def test_python_rmtree_moves_to_trash(mount, server, run_id):
    root = mount("a", "--trash=30d")
    code = "import shutil, sys; shutil.rmtree(sys.argv[1])"
    assert run(sys.executable, "-c", code, checkpoint_of(root, run_id)).returncode == 0
    assert_trashed(root, server, run_id)
