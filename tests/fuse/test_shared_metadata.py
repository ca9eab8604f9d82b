"""Mounts of several hosts that share responses through a real Redis server."""

import json
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.account import api_calls, mounted, new_run
from tests.support.faulty_server import FaultyServer
from tests.support.mount import BINDINGS, tinkerfs, wait_until
from tests.support.redis_server import RedisProcess

pytestmark = pytest.mark.kernel

LISTING = "GET training_runs/{run}/checkpoints"
#: Busy machines pause for longer than an operation of the server may take.
PATIENT = {"tinkerfs.api.shared_cache.SERVER_TIMEOUT_S": 10.0}
LESS_PATIENT = {"tinkerfs.api.shared_cache.SERVER_TIMEOUT_S": 2.0}


@pytest.fixture
def redis_server():
    with RedisProcess() as process:
        yield process


@pytest.fixture
def server():
    with FaultyServer(runs=3, checkpoints=4) as server:
        yield server


@contextmanager
def host(server, redis_server, directory, **settings):
    """Mount as another host does."""
    settings = {"shared_cache": redis_server.url, "constants": PATIENT, **settings}
    with mounted(server, directory, BINDINGS[-1], **settings) as root:
        wait_until(lambda: is_sharing(root), 60)
        yield root


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A server, a Redis server, and the mounts of two hosts with a long TTL."""
    directory = tmp_path_factory.mktemp("pair")
    with (
        FaultyServer(runs=3, checkpoints=4) as server,
        RedisProcess() as redis_server,
        host(server, redis_server, directory / "1", ttl_s=3600.0, constants=LESS_PATIENT) as one,
        host(server, redis_server, directory / "2", ttl_s=3600.0, constants=LESS_PATIENT) as two,
    ):
        yield server, redis_server, one, two


def refresh(root):
    (root / ".tinkerfs" / "refresh").write_text("1")


def is_sharing(root):
    return stats(root)["gauges"]["shared_metadata_up"] == 1


def stats(root):
    return json.loads((root / ".tinkerfs" / "stats.json").read_bytes())


def errors(root):
    return (root / ".tinkerfs" / "errors").read_text().splitlines()


def use(root):
    """List everything, read every small file, and read an archive's URL and the start of a file."""
    names = []
    for directory, directories, files in os.walk(root / "runs"):
        names += sorted(directories + files)
        for name in {"info.json", "published", "expires_at"}.intersection(files):
            (root / directory / name).read_bytes()
    names += sorted(os.listdir(root / "checkpoints")) + sorted(os.listdir(root / "sessions"))
    checkpoint = root / "checkpoints" / min(os.listdir(root / "checkpoints"))
    (checkpoint / "archive_url").read_text()
    for name in sorted(os.listdir(checkpoint / "files/")):
        names.append(name)
        with (checkpoint / "files" / name).open("rb") as file:
            file.read(4096)
    return names


def test_hosts_send_the_requests_of_one(server, redis_server, tmp_path):
    with mounted(server, tmp_path / "lone", BINDINGS[-1]) as lone:
        expected = use(lone)
    of_one = api_calls(server)
    server.journal.clear()
    with (
        host(server, redis_server, tmp_path / "1") as one,
        host(server, redis_server, tmp_path / "2") as two,
        ThreadPoolExecutor() as pool,
    ):
        assert list(pool.map(use, (one, two))) == [expected] * 2
        assert api_calls(server) == of_one
        hits = [stats(root)["counters"].get("shared_metadata_hits", 0) for root in (one, two)]
        assert sum(hits) >= 10
        assert errors(one) == errors(two) == []


def test_change_is_seen_by_other_hosts_before_the_ttl(pair):
    server, _, one, other = pair
    run_id = new_run(server, "weights/one", "weights/two")
    path = f"runs/{run_id}/checkpoints/weights"
    for root in (one, other):
        refresh(root)
        assert (root / path / "one" / "published").read_text() == "0\n"
        assert f"{run_id}@weights@two" in os.listdir(root / "checkpoints")
    (one / path / "one" / "published").write_text("1")
    wait_until(lambda: (other / path / "one" / "published").read_text() == "1\n")
    wait_until(lambda: f"{run_id}@weights@one" in os.listdir(other / "published"))
    subprocess.run(["rm", "-r", other / path / "two"], check=True)
    wait_until(lambda: os.listdir(one / path) == ["one"])
    wait_until(lambda: f"{run_id}@weights@two" not in os.listdir(one / "checkpoints"))
    assert (one / path / "one" / "published").read_text() == "1\n"


def test_refresh_ignores_shared_responses(pair):
    server, _, one, other = pair
    refresh(one)
    before = len(os.listdir(one / "runs"))
    server.account.add_run()
    refresh(other)
    assert len(os.listdir(other / "runs")) == before + 1
    assert len(os.listdir(one / "runs")) == before


def test_outage_fails_no_operation(pair):
    _, redis_server, *roots = pair
    for root in roots:
        refresh(root)
    expected = [use(root) for root in roots]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        redis_server.send_signal(number)
        for _ in range(2):
            for root in roots:
                refresh(root)
            assert [use(root) for root in roots] == expected
        wait_until(lambda: not any(map(is_sharing, roots)))
        wait_until(lambda: all(map(errors, roots)))
        if number == signal.SIGSTOP:
            redis_server.send_signal(signal.SIGCONT)
        else:
            redis_server.kill()
            redis_server.start()
        wait_until(lambda: all(map(is_sharing, roots)), 30)
    for root in roots:  # a failure soon after the end of an outage belongs to it
        (line,) = errors(root)
        assert re.search(r"\tshared cache \S+: failed, responses are requested", line)
    assert [use(root) for root in roots] == expected


def test_killed_host_is_replaced(server, redis_server, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    environ = {**os.environ, **server.environment, "HOME": str(tmp_path)}
    environ["TINKERFS_SHARED_CACHE"] = redis_server.url
    options = [f"--cache-dir={tmp_path / 'cache'}", f"--base-url={server.base_url}"]
    done = tinkerfs("mount", *options, victim, env=environ)
    assert done.returncode == 0, done.stderr
    path = f"runs/{next(iter(server.account.runs())).id}/checkpoints/weights"
    with ExitStack() as stack:
        stack.callback(tinkerfs, "umount", victim, env=environ)
        wait_until(lambda: is_sharing(victim))
        other = stack.enter_context(host(server, redis_server, tmp_path / "other"))
        rule = server.faults.add(LISTING, hang=True)
        reader = subprocess.Popen(["ls", victim / path], stderr=subprocess.DEVNULL)
        rule.wait_for(1)
        with ThreadPoolExecutor() as pool:
            listing = pool.submit(os.listdir, other / path)
            wait_until(lambda: stats(other)["counters"].get("shared_metadata_waits") == 1)
            os.kill(stats(victim)["pid"], signal.SIGKILL)
            reader.wait(10)
            assert listing.result(30)
        assert server.journal.count(LISTING) == 2


def test_password_is_shown_nowhere(server, tmp_path):
    secret = "s3cret-Word-of-Redis"
    root, config = tmp_path / "mnt", tmp_path / "config.toml"
    root.mkdir()
    with RedisProcess("--requirepass", secret) as process:
        url = process.url.replace("unix://", f"unix://:{secret}@")
        config.write_text(f'shared-cache = "{url}"\n')
        environ = {**os.environ, **server.environment, "HOME": str(tmp_path)}
        options = [f"--cache-dir={tmp_path / 'cache'}", f"--base-url={server.base_url}"]
        options += [f"--log-file={tmp_path / 'log'}", "--log-level=debug", f"--config={config}"]
        done = tinkerfs("mount", *options, root, env=environ)
        assert done.returncode == 0, done.stderr
        with ExitStack() as stack:
            stack.callback(tinkerfs, "umount", root, env=environ)
            wait_until(lambda: is_sharing(root))
            pid = stats(root)["pid"]
            process.kill()
            use(root)
            wait_until(lambda: len(errors(root)) == 1)
            shown = [(root / ".tinkerfs" / name).read_text() for name in ("stats.json", "errors")]
            commands = (["status", root], ["status", "--json", root], ["doctor"])
            shown += [str(tinkerfs(*command, env=environ)) for command in commands]
            with open(f"/proc/{pid}/cmdline") as file:
                shown.append(file.read())
            bundle = tmp_path / "bundle.tar.gz"
            made = tinkerfs(
                "debug", "bundle", f"--config={config}", "-o", bundle, root, env=environ
            )
            assert made.returncode == 0, made.stderr
            unpacked = subprocess.run(["tar", "xzOf", bundle], capture_output=True, check=True)
            shown += [made.stdout, unpacked.stdout.decode(errors="replace")]
            assert "shared-cache" in shown[-1]
        shown.append((tmp_path / "log").read_text())
    assert "shared cache" in shown[-1]
    assert not [text for text in shown if secret in text]
