"""Mounts of another user: commands neither trust what they report, nor send a key there."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.account import needs
from tests.support.mount import run

OTHER_UID = 65534
#: The capability is needed only to read this Python, wherever it is installed.
OTHER_USER = (
    f"setpriv --reuid={OTHER_UID} --regid={OTHER_UID} --clear-groups"
    " --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search"
)
#: Key of the user that runs the commands; the other user's server must never receive it.
KEY = "tml-key-of-this-user"
UNUSED_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def directory():
    """Return a directory that both users can access, unlike those of pytest."""
    path = Path(tempfile.mkdtemp(prefix="tinkerfs-test-", dir="/tmp"))
    path.chmod(0o755)
    for name in ("mnt", "other", "mine"):
        (path / name).mkdir()
    for name in ("mnt", "other"):
        os.chown(path / name, OTHER_UID, OTHER_UID)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shell(directory, server, env, needs_root):
    """Return a function that runs a script in which the other user has made a mount for all."""
    needs(["unshare", "setpriv", "fusermount3"])
    (directory / "fuse.conf").write_text("user_allow_other\n")
    user_env = f"HOME={directory}/other TINKER_API_KEY={server.api_key} TINKERFS_TRASH=1d"

    def run_script(script, base_url=UNUSED_SERVER, key=KEY):
        setup = f"""
            set -e
            mount -t tmpfs -o mode=755 none /dev
            mknod -m 666 /dev/fuse c 10 229; mknod -m 666 /dev/null c 1 3
            mknod -m 666 /dev/urandom c 1 9
            touch /etc/fuse.conf; mount --bind {directory}/fuse.conf /etc/fuse.conf
            cd {directory}/mine
            tinkerfs() {{ {sys.executable} -m tinkerfs "$@"; }}
            other() {{ {OTHER_USER} "$@"; }}
            env {user_env} TINKER_BASE_URL={server.base_url} {OTHER_USER} \\
                {sys.executable} -m tinkerfs mount --allow-other {directory}/mnt
            set +e
            {script}
            code=$?
            other {sys.executable} -m tinkerfs umount {directory}/mnt
            exit $code
        """
        own = {"HOME": f"{directory}/mine", "TINKER_API_KEY": key, "TINKER_BASE_URL": base_url}
        return run("unshare", "-m", "sh", "-c", setup, env=env | own, timeout_s=120)

    return run_script


def received_keys(server):
    server.journal.wait_until_idle()
    return {entry.api_key for entry in server.journal.entries("api")}


def checkpoint_of(directory, server):
    return f"{directory}/mnt/runs/{server.account.run_ids[0]}/latest_sampler"


@pytest.mark.parametrize(
    "command",
    [
        "get {0} out",
        "prefetch {0}",
        "prefetch --check {0}",
        "undelete {0}",
        "cache info {0}",
        "cache verify {0}",
        "cache clear {0}",
        "cache clear {1}",
        "cache info {1}/published",
    ],
)
def test_mount_of_other_user_receives_no_key(command, shell, directory, server):
    arguments = command.format(checkpoint_of(directory, server), f"{directory}/mnt")
    done = shell(f"tinkerfs {arguments}")
    assert KEY not in received_keys(server)
    assert done.returncode == 1, done
    [line] = done.stderr.splitlines()
    assert f"the mount at {directory}/mnt belongs to uid {OTHER_UID}" in line
    assert "use a tinker path" in line
    assert ("--base-url" in line) is (not command.startswith("cache"))


def test_mount_of_other_user_at_own_server_is_a_path(shell, directory, server):
    """The server is this user's choice; the cache is this user's own all the same."""
    path = checkpoint_of(directory, server)
    script = f"tinkerfs prefetch {path} && tinkerfs cache info --json"
    done = shell(script, server.base_url, server.api_key)
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    assert report["cache_dir"] == f"{directory}/mine/.cache/tinkerfs"
    assert len(report["checkpoints"]) == 1


def test_flag_names_server_for_mount_of_other_user(shell, directory, server, demo_server):
    own = demo_server(api_key=KEY)
    path = checkpoint_of(directory, server)
    done = shell(f"tinkerfs prefetch --check --base-url {own.base_url} {path}")
    assert done.returncode == 1, done
    assert "not cached" in done.stdout
    assert KEY in received_keys(own)
    assert KEY not in received_keys(server)


def test_settings_of_mount_of_root_are_used(directory, env, server, shell):
    path = checkpoint_of(directory, server).replace("/mnt/", "/root/")
    (directory / "root").mkdir()
    done = shell(f"""
        TINKER_BASE_URL={server.base_url} TINKER_API_KEY={server.api_key} \
            tinkerfs mount --allow-other {directory}/root
        other env HOME={directory}/other {sys.executable} -m tinkerfs \
            prefetch --check --cache-dir {directory}/other/cache {path}
        code=$?
        tinkerfs umount {directory}/root
        (exit $code)
    """)
    assert "Invalid API key" in done.stderr, "the server of the mount has another key"
    assert KEY in received_keys(server)


def test_undelete_sends_no_request_to_other_users_mount(shell, directory, server):
    """Their mount could report a success although nothing was restored."""
    run_id = server.account.run_ids[0]
    done = shell(
        f"""
        cd {directory}/mnt/runs/{run_id}/checkpoints/sampler_weights
        name=$(ls | head -n 1)
        other rm -r "$name" || exit 9
        cd /
        tinkerfs undelete "tinker://{run_id}/sampler_weights/$name"
        code=$?
        ls {directory}/mnt/.tinkerfs/trash
        (exit $code)
        """,
        server.base_url,
        server.api_key,
    )
    assert done.returncode == 1, done
    assert "not in the trash" in done.stderr
    assert done.stdout.startswith(f"{run_id}@sampler_weights@"), "the mount restored it"


def test_path_names_other_users_mount_only_if_asked(shell, directory):
    arguments = "path tinker://run"
    done = shell(f"tinkerfs {arguments}; tinkerfs {arguments} --mount {directory}/mnt")
    assert done.stdout == f"{directory}/mnt/runs/run\n"
    [line] = done.stderr.splitlines()
    assert f"{directory}/mnt" not in line


def test_status_shows_mount_of_other_user(shell, directory, server):
    done = shell(f"tinkerfs status {directory}/mnt")
    assert done.returncode == 0, done
    assert server.base_url in done.stdout
