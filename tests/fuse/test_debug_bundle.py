"""`tinkerfs debug bundle` of mounts in every state, and the secrets that are not in it."""

import base64
import json
import os
import re
import resource
import signal
import stat
import subprocess
import tarfile
from urllib.parse import quote

import pytest

from tests.support.mount import running, tinkerfs, wait_until
from tinkerfs.cli import debug
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table, stack_dump

#: A key of no known form, and other secrets.
KEY = "opaque+key/0123456789=="
STORED_KEY = "tml-stored-login-0123456789"
PASSWORD = "pr0xy-passw0rd"
OTHER_PASSWORD = "s0cks%23passw0rd"
SIGNATURE = "c0ffeec0ffee0123"
TOKEN = "hf_0123456789abcdefghij"
COMMAND_SECRET = "vault-pin-4711-0815"
HEADER_SECRET = "c0llector-t0ken"
URL_PASSWORD = "c0llector-passw0rd"
SECRETS = (KEY, STORED_KEY, PASSWORD, OTHER_PASSWORD, SIGNATURE, TOKEN, COMMAND_SECRET)
SECRETS += (HEADER_SECRET, URL_PASSWORD)


@pytest.fixture
def binding():
    return "auto"


@pytest.fixture
def server(demo_server):
    return demo_server(runs=2, checkpoints=2, api_key=KEY)


@pytest.fixture
def planted(env, tmp_path):
    """Return an environment with a secret wherever tinkerfs reads one."""
    credentials = tmp_path / "home/.tinker/credentials.json"
    credentials.parent.mkdir()
    credentials.write_text(json.dumps({"default": "d", "keys": {"d": {"key": STORED_KEY}}}))
    config = tmp_path / "home/.config/tinkerfs/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f"# {TOKEN}\nttl = 45\n")
    (tmp_path / "key").write_text(KEY)
    planted = {
        **env,
        "TINKER_CREDENTIAL_CMD": f"PIN={COMMAND_SECRET} cat {tmp_path}/key",
        "HTTPS_PROXY": f"http://me:{quote(PASSWORD)}@127.0.0.1:9",
        "ALL_PROXY": f"socks5://me:{OTHER_PASSWORD}@127.0.0.1:9",
        "HF_TOKEN": TOKEN,
        "OTEL_EXPORTER_OTLP_HEADERS": f"x-a=1,authorization=Bearer%20{HEADER_SECRET}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://me:{URL_PASSWORD}@127.0.0.1:9",
        "OTEL_TRACES_EXPORTER": "none",
        "TINKERFS_LOG_LEVEL": "debug",
    }
    del planted["TINKER_API_KEY"]
    return planted


def members(path):
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix("tinkerfs-debug/"): archive.extractfile(member).read()
            for member in archive
        }


def bundle(tmp_path, env, *arguments):
    """Write a bundle; return its members, all their bytes, and what the command printed."""
    path = tmp_path / "bundle.tar.gz"
    done = tinkerfs("debug", "bundle", *arguments, "-o", path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = members(path)
    return found, b"\n".join([*found.values(), *map(str.encode, found)]), done.stdout


def daemon_of(mountpoint):
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    return pid


def test_bundle_of_mount_has_its_state_and_no_secret(mountpoint, planted, server, tmp_path):
    log = tmp_path / "log"
    done = tinkerfs("mount", mountpoint, "--log-file", log, env=planted)
    assert done.returncode == 0, done.stderr
    # The server repeats the key and a signed URL, as some proxies do.
    url = f"https://store.example/b/k?X-Amz-Signature={SIGNATURE}&b=1"
    for number, form in enumerate((KEY, quote(KEY, safe=""))):
        body = {"detail": f"key '{form}' is bad for {url}"}
        server.faults.add("GET training_runs/{run}", status=403, body=body)
        with pytest.raises(PermissionError):
            (mountpoint / f"runs/none-{number}/info.json").read_bytes()
    with log.open("a") as file:
        file.write(f"2026-11-29 GET {url} X-API-Key: {KEY} {STORED_KEY} {TOKEN} {PASSWORD}\n")
        file.write(f"collector: {HEADER_SECRET} {URL_PASSWORD}\n")
        file.write(f"Authorization: Basic {base64.b64encode(KEY.encode()).decode()}\n")
    hang = server.faults.add("POST sessions/search", hang=True, times=None)
    with running([["ls", mountpoint / "sessions"]]):
        wait_until(lambda: server.journal.count("POST sessions/search"))
        found, content, output = bundle(tmp_path, planted, mountpoint)
    hang.release()
    for secret in SECRETS:
        for form in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode()):
            assert form.encode() not in content, form
    assert "searched every byte for secrets, and found none" in output
    assert "the key of TINKER_CREDENTIAL_CMD" in output
    assert "the password of ALL_PROXY" in output
    assert sorted(found) == sorted(
        ["versions.txt", "settings.txt", "environment.txt", "mounts.txt", "doctor.txt"]
        + ["cache.json", *(f"mount-1/{name}" for name in ("state.txt", "stacks.txt"))]
        + [f"mount-1/{name}" for name in ("stats.json", "errors", "changes", "log.txt")]
    )
    assert re.search(rb"tinkerfs 0.*python 3\..*kernel .*httpx \d", found["versions.txt"], re.S)
    assert (
        f"ttl = 45.0  ({tmp_path}/home/.config/tinkerfs/config.toml)"
        in found["settings.txt"].decode()
    )
    assert b"log-level = 'debug'  (TINKERFS_LOG_LEVEL)" in found["settings.txt"]
    assert b"xattr = False  (default)" in found["settings.txt"]
    assert b"\nTINKER_CREDENTIAL_CMD\n" in found["environment.txt"]
    assert str(mountpoint).encode() in found["mounts.txt"]
    assert b"ok    libfuse" in found["doctor.txt"]
    assert b"cache_dir" in found["cache.json"]
    assert b"state responsive\n" in found["mount-1/state.txt"]
    assert json.loads(found["mount-1/stats.json"])["log_file"] == str(log)
    assert b"\tEACCES\t" in found["mount-1/errors"]
    assert b"https://store.example/b/k?[redacted]" in found["mount-1/errors"]
    assert b"[redacted key]" in found["mount-1/log.txt"]
    assert b"Thread 0x" in found["mount-1/stacks.txt"]
    assert b"in wait_for" in found["mount-1/stacks.txt"]
    # The daemon itself never shows the key, in any of its files.
    for name in ("errors", "changes", "stats.json"):
        assert KEY not in (mountpoint / ".tinkerfs" / name).read_text()


def test_bundle_of_hanging_and_dead_mount_is_complete(mountpoint, env, tmp_path):
    log = tmp_path / "log"
    assert tinkerfs("mount", mountpoint, "--log-file", log, env=env).returncode == 0
    log.write_text("a line of the log\n")
    pid = daemon_of(mountpoint)
    os.kill(pid, signal.SIGSTOP)
    found, _, _ = bundle(tmp_path, env, "--log", log)
    number = next(
        name for name, text in found.items() if f"mountpoint {mountpoint}\n".encode() in text
    ).partition("/")[0]
    assert b"state unresponsive\n" in found[f"{number}/state.txt"]
    assert b"State:\tT" in found[f"{number}/state.txt"]
    assert found[f"{number}/log.txt"] == b"a line of the log\n"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount_table.is_running(pid))
    (tmp_path / "bundle.tar.gz").unlink()
    found, _, _ = bundle(tmp_path, env, mountpoint, "--log", log)
    assert b"state dead\n" in found["mount-1/state.txt"]
    assert found["mount-1/log.txt"] == b"a line of the log\n"


def test_bundle_without_mount_and_key_never_overwrites(env, tmp_path):
    del env["TINKER_API_KEY"]
    found, _, output = bundle(tmp_path, env)
    assert b"FAIL  key" in found["doctor.txt"]
    assert "searched every byte for secrets, and found none: " in output
    before = (tmp_path / "bundle.tar.gz").read_bytes()
    done = tinkerfs("debug", "bundle", "-o", tmp_path / "bundle.tar.gz", env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "bundle.tar.gz cannot be written: File exists (hint: " in line
    assert (tmp_path / "bundle.tar.gz").read_bytes() == before
    done = tinkerfs("debug", "bundle", tmp_path, env=env)
    assert done.returncode == 1
    assert "is not a tinkerfs mount" in done.stderr


def test_bundle_hides_the_keys_of_key_files(mountpoint, env, tmp_path):
    keys = {name: f"opaque/{name}/0123456789" for name in ("daemon", "own")}
    for name, key in keys.items():
        (tmp_path / name).write_text(key)
        (tmp_path / name).chmod(0o600)
    log = tmp_path / "log"
    log.write_text(" ".join(keys.values()))
    config = tmp_path / "other.toml"
    config.write_text(f"ttl = 77\napi-key-file = '{tmp_path}/own'\n")
    options = f"api_key_file={tmp_path}/daemon,log_file={log},ttl=3"
    server_key = env.pop("TINKER_API_KEY")
    (tmp_path / "daemon").write_text(server_key)
    assert tinkerfs("mount", mountpoint, "-o", options, env=env).returncode == 0
    (tmp_path / "daemon").write_text(keys["daemon"])
    found, content, output = bundle(tmp_path, env, mountpoint, "--config", config)
    assert found["mount-1/log.txt"] == b"[redacted key] [redacted key]"
    for name, key in keys.items():
        assert key.encode() not in content
        assert f"the key of {tmp_path}/{name}" in output
    assert f"ttl = 77.0  ({config})".encode() in found["settings.txt"]
    assert f"found: {tmp_path}/own".encode() in found["doctor.txt"]


def test_archive_with_secret_is_refused():
    for text in (KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode()):
        archive = debug.make_archive([("a", "harmless"), ("b", f"before {text} after")])
        with pytest.raises(StartupError, match=r"b would contain the key; no file was written"):
            debug.check_archive(archive, {KEY: "the key"})


def test_archive_that_cannot_be_written_leaves_no_file(tmp_path):
    path = str(tmp_path / "b.tar.gz")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StartupError, match=r"cannot be written: File too large"):
            debug.write_archive(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.path.exists(path)


def test_stacks_are_those_of_the_latest_request(mountpoint, env):
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    pid = daemon_of(mountpoint)
    first, second = stack_dump.read_stacks(pid), stack_dump.read_stacks(pid)
    for stacks in (first, second):
        assert 2 <= stacks.count("(most recent call first)") <= 20
        assert "session.py" in stacks
    assert (mountpoint / "README.md").read_bytes(), "the mount is unaffected"
    assert stack_dump.read_stacks(os.getpid()) is None


def test_stacks_are_written_while_threads_work(mountpoint, env):
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    pid = daemon_of(mountpoint)
    walk = ["sh", "-c", "while :; do ls -lR . >/dev/null; cat runs/*/info.json >/dev/null; done"]
    walkers = [subprocess.Popen(walk, cwd=mountpoint, process_group=0) for _ in range(3)]
    try:
        for _ in range(1000):
            os.kill(pid, signal.SIGRTMIN)
            os.sched_yield()
            (mountpoint / "README.md").stat()
        assert stack_dump.read_stacks(pid)
    finally:
        for walker in walkers:
            os.killpg(walker.pid, signal.SIGKILL)
            walker.wait()
    assert (mountpoint / "README.md").read_bytes(), "the daemon lives"
