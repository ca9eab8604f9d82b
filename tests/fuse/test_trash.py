"""`--trash` and `undelete` on real mounts: crashes at each point, later mounts, several mounts."""

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
    """One binding: none of them has a part in what is shown here."""
    return request.param


@pytest.fixture
def mount(tmp_path, env):
    """Mounts the account, all mounts over one cache: `mount("a", "--trash=30d")`."""
    with ExitStack() as stack:

        def make(name, *options):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            stack.callback(force_unmount, str(folder))
            done = tinkerfs("mount", "--ttl=1h", *options, folder, env=env)
            assert (done.returncode, done.stderr) == (0, "")
            return folder

        yield make


@pytest.fixture
def kept(server):
    """A run with one checkpoint, which expires in 90 days: the run's id."""
    server.account.add_run("kept:train:0")
    now_s = int(time.time())
    server.account.add_checkpoint("kept:train:0", "weights/1", expires_at_s=now_s + FORMER_S)
    return "kept:train:0"


def stored(server, run_id):
    return server.account.checkpoint(run_id, "weights/1")


def left_s(server, run_id):
    """How many seconds a checkpoint has left at the server."""
    return stored(server, run_id).expires_at_s - time.time()


def place(mountpoint, run_id):
    return mountpoint / "runs" / run_id / "checkpoints/weights/1"


def trash(mountpoint):
    return os.listdir(mountpoint / ".tinkerfs/trash")


def link(mountpoint, run_id):
    return mountpoint / ".tinkerfs/trash" / name_encoding.encode_composite((run_id, "weights", "1"))


def kill(mountpoint):
    """End the process of a mount as a crash does."""
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount_table.is_running(pid))


def undelete(env, *paths):
    return tinkerfs("undelete", *paths, env=env)


def assert_trashed(mountpoint, server, run_id):
    assert not place(mountpoint, run_id).exists()
    view = mountpoint / "checkpoints"
    assert link(mountpoint, run_id).name not in os.listdir(view)
    # The kernel keeps for a second which names it has just looked up.
    wait_until(lambda: not os.path.lexists(view / link(mountpoint, run_id).name), 5)
    assert trash(mountpoint) == [link(mountpoint, run_id).name]
    assert 29 * DAY_S < left_s(server, run_id) < 31 * DAY_S


def assert_kept(mountpoint, server, run_id):
    assert place(mountpoint, run_id).is_dir()
    assert os.path.lexists(mountpoint / "checkpoints" / link(mountpoint, run_id).name)
    assert trash(mountpoint) == []
    assert left_s(server, run_id) == pytest.approx(FORMER_S, abs=120)


# --- rm -r, and back -----------------------------------------------------------------------------


def test_rm_and_undelete_over_mounts_and_kill(mount, server, env, kept):
    first = mount("a", "--trash=30d")
    assert run("rm", "-r", place(first, kept)).returncode == 0
    assert_trashed(first, server, kept)
    kill(first)
    again = mount("a")  # without --trash: what is in it stays there
    assert_trashed(again, server, kept)
    assert 29 * DAY_S < os.lstat(link(again, kept)).st_mtime - time.time() < 31 * DAY_S
    done = undelete(env, place(again, kept))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"tinker://{kept}/weights/1\n"
    assert_kept(again, server, kept)
    assert server.journal.count("DELETE checkpoint") == 0


def test_undelete_takes_every_form_of_path(mount, server, env, kept):
    root = mount("a", "--trash=30d")
    link_path = link(root, kept)
    forms = [
        ("tinkerfs", "undelete", link_path),
        ("tinkerfs", "undelete", place(root, kept)),
        ("tinkerfs", "undelete", root / "runs" / kept / "checkpoints/1"),
        ("tinkerfs", "undelete", root / "checkpoints" / link_path.name),
        ("tinkerfs", "undelete", f"tinker://{kept}/weights/1"),
        ("sh", "-c", f"echo never > '{link_path}/expires_at'"),
    ]
    for command, *arguments in forms:
        assert run("rm", "-r", place(root, kept)).returncode == 0
        assert trash(root) == [link_path.name]
        execute = partial(tinkerfs, env=env) if command == "tinkerfs" else partial(run, command)
        done = execute(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert_kept(root, server, kept)  # at once, whichever process made the request
        changes = (root / ".tinkerfs/changes").read_text().splitlines()
        assert "restore from the trash" in changes[-1]


def test_undelete_without_a_mount_works_and_shows_in_one(mount, server, env, kept):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", place(root, kept)).returncode == 0
    assert tinkerfs("umount", root, env=env).returncode == 0
    assert stored(server, kept) is not None
    done = undelete(env, f"tinker://{kept}/weights/1", f"tinker://{kept}/weights/2")
    assert done.returncode == 1
    assert done.stdout == f"tinker://{kept}/weights/1\n"
    assert done.stderr == f"tinkerfs: tinker://{kept}/weights/2: not in the trash\n"
    assert_kept(mount("b"), server, kept)


def test_undelete_of_what_is_not_in_trash_fails(mount, server, env, kept, tmp_path):
    root = mount("a", "--trash=30d")
    for path in (place(root, kept), link(root, kept), root / "runs", root / "README.md", tmp_path):
        done = undelete(env, path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"tinkerfs: {path}: ")
        assert len(done.stderr.splitlines()) == 1
    assert server.journal.count(TTL) == 0


def test_get_and_url_of_trash_work_and_of_the_former_path_do_not(mount, env, kept, tmp_path):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", place(root, kept)).returncode == 0
    done = tinkerfs("url", link(root, kept), env=env)
    assert done.stdout == f"tinker://{kept}/weights/1\n"
    assert tinkerfs("get", place(root, kept), tmp_path / "none", env=env).returncode == 1
    assert tinkerfs("get", f"tinker://{kept}/weights/1", tmp_path / "no", env=env).returncode == 1
    done = tinkerfs("get", link(root, kept), tmp_path / "copy", env=env)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "copy")


# --- kill -9 at each point -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "effect", "is_removed"),
    [
        pytest.param(LISTING, {"hang": True}, False, id="before-record"),
        pytest.param(TTL, {"hang": True}, False, id="before-request"),
        pytest.param(TTL, {"stall_after_bytes": 0}, True, id="before-response"),
    ],
)
def test_kill_during_rm_loses_and_hides_nothing(
    mount, server, env, kept, endpoint, effect, is_removed
):
    root = mount("a", "--trash=30d")
    assert len(os.listdir(place(root, kept))) == 8
    fault = server.faults.add(endpoint, times=None, **effect)
    with run_in_background("rm", "-r", place(root, kept)) as removing:
        fault.wait_for(1)
        kill(root)
        server.journal.wait_until_idle()  # what was held is dropped, not done
        fault.remove()
        assert removing.wait(10) != 0
    root = mount("a", "--trash=30d")
    if is_removed:
        assert_trashed(root, server, kept)
        assert undelete(env, link(root, kept)).returncode == 0
    assert_kept(root, server, kept)
    assert run("rm", "-r", place(root, kept)).returncode == 0
    assert_trashed(root, server, kept)


@pytest.mark.parametrize(
    ("effect", "is_restored"),
    [
        pytest.param({"hang": True}, False, id="before-request"),
        pytest.param({"stall_after_bytes": 0}, True, id="before-response"),
    ],
)
def test_kill_during_undelete_loses_and_hides_nothing(
    mount, server, env, kept, effect, is_restored
):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", place(root, kept)).returncode == 0
    fault = server.faults.add(TTL, times=None, **effect)
    control = f"{link(root, kept)}/expires_at"
    with run_in_background("sh", "-c", f"echo never > '{control}'") as restoring:
        fault.wait_for(1)
        kill(root)
        server.journal.wait_until_idle()
        fault.remove()
        assert restoring.wait(10) != 0
    root = mount("a")
    if not is_restored:
        assert_trashed(root, server, kept)
        assert undelete(env, link(root, kept)).returncode == 0
    assert_kept(root, server, kept)


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


def test_two_mounts_show_the_same_without_waiting_for_ttl(mount, server, env, kept):
    one, other = mount("a", "--trash=30d"), mount("b")
    for root in (one, other):  # all of it is cached for an hour
        assert run("ls", "-lR", root / "runs" / kept, root / "checkpoints").returncode == 0
        assert trash(root) == []
    assert run("rm", "-r", place(one, kept)).returncode == 0
    wait_until(lambda: not place(other, kept).exists(), 5)
    assert_trashed(other, server, kept)
    assert run("rm", "-r", place(other, kept)).returncode != 0
    assert undelete(env, place(other, kept)).returncode == 0
    assert_kept(other, server, kept)
    wait_until(lambda: place(one, kept).is_dir(), 5)
    assert_kept(one, server, kept)


def test_mount_with_another_key_of_the_account_hides_the_same(mount, server, env, kept):
    root = mount("a", "--trash=30d")
    assert run("rm", "-r", place(root, kept)).returncode == 0
    server.behaviour.api_keys.add("tml-another-0123456789")
    env["TINKER_API_KEY"] = "tml-another-0123456789"
    other = mount("b")
    assert_trashed(other, server, kept)
    third = mount("c")
    assert link(third, kept).name not in os.listdir(third / "checkpoints")
    assert undelete(env, link(other, kept)).returncode == 0
    assert_kept(other, server, kept)


# --- what cannot be done -------------------------------------------------------------------------


def test_rm_with_an_unwritable_record_removes_nothing(mount, server, env, kept):
    root = mount("a", "--trash=30d")
    database = Path(env["HOME"]) / ".cache/tinkerfs/metadata.sqlite3"
    database.unlink()
    done = run("rm", "-r", place(root, kept))
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    assert_kept(root, server, kept)
    assert server.journal.count(TTL) == server.journal.count("DELETE checkpoint") == 0
    assert "removed or replaced (hint: mount again)" in (root / ".tinkerfs/errors").read_text()


def test_mount_with_a_trash_out_of_range_is_refused(tmp_path, env):
    for text in ("59m", "3651d", "soon"):
        done = tinkerfs("mount", f"--trash={text}", tmp_path, env=env)
        assert done.returncode == 1
        assert "--trash" in done.stderr


def test_trash_in_file_and_environment_counts(mount, server, env, kept, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('trash = "60d"\n')
    root = mount("a", f"--config={file}")
    assert run("rm", "-r", place(root, kept)).returncode == 0
    env["TINKERFS_TRASH"] = "7d"
    other = mount("b")
    server.account.add_checkpoint(kept, "weights/2")
    (other / ".tinkerfs/refresh").write_text("1")
    assert run("rm", "-r", other / "runs" / kept / "checkpoints/weights/2").returncode == 0
    asked = [json.loads(entry.body)["ttl_seconds"] for entry in server.journal.entries(TTL)]
    assert asked == [60 * DAY_S, 7 * DAY_S]


def test_python_rmtree_with_trash_goes_there(mount, server, kept):
    root = mount("a", "--trash=30d")
    code = "import shutil, sys; shutil.rmtree(sys.argv[1])"
    assert run(sys.executable, "-c", code, place(root, kept)).returncode == 0
    assert_trashed(root, server, kept)
