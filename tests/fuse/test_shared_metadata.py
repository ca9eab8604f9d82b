"""Mounts of several hosts that share responses through a real Redis server."""

import contextlib
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.account import api_calls, mounted, new_run
from tests.support.faulty_server import FaultyServer
from tests.support.mount import BINDINGS, tinkerfs, wait_until
from tests.support.redis_server import RedisProcess

pytestmark = pytest.mark.kernel

LISTING = "GET training_runs/{run}/checkpoints"
#: Busy machines pause for longer than an operation of the server may take.
PATIENT = {"tinkerfs.api.shared_cache.SERVER_TIMEOUT_S": 10.0}


@pytest.fixture
def redis_server():
    with RedisProcess() as process:
        yield process


@pytest.fixture
def server():
    with FaultyServer(runs=3, checkpoints=4) as server:
        yield server


@pytest.fixture
def mount(server, redis_server, tmp_path):
    """Return a function that mounts as another host does."""
    with ExitStack() as stack:

        def mount(**settings):
            number = sum(1 for _ in tmp_path.iterdir())
            settings = {"shared_cache": redis_server.url, "constants": PATIENT, **settings}
            root = stack.enter_context(
                mounted(server, tmp_path / f"host{number}", BINDINGS[-1], **settings)
            )
            if settings["shared_cache"] is not None:
                wait_until(lambda: stats(root)["gauges"]["shared_metadata_up"] == 1)
            return root

        yield mount


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


def test_hosts_send_the_requests_of_one(server, mount):
    lone = mount(shared_cache=None)
    expected = use(lone)
    of_one = api_calls(server)
    server.journal.clear()
    hosts = [mount() for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(use, hosts))
    assert found == [expected] * 4
    assert api_calls(server) == of_one
    assert sum(stats(root)["counters"].get("shared_metadata_hits", 0) for root in hosts) > 3 * 10
    assert [errors(root) for root in hosts] == [[]] * 4


def test_change_is_seen_by_other_hosts_before_the_ttl(server, mount):
    run_id = new_run(server, "weights/one", "weights/two")
    one, other = mount(ttl_s=3600.0), mount(ttl_s=3600.0)
    path = f"runs/{run_id}/checkpoints/weights"
    for root in (one, other):
        assert (root / path / "one" / "published").read_text() == "0\n"
        assert len(os.listdir(root / "checkpoints")) == 14
    (one / path / "one" / "published").write_text("1")
    wait_until(lambda: (other / path / "one" / "published").read_text() == "1\n")
    wait_until(lambda: f"{run_id}@weights@one" in os.listdir(other / "published"))
    subprocess.run(["rm", "-r", other / path / "two"], check=True)
    wait_until(lambda: os.listdir(one / path) == ["one"])
    wait_until(lambda: f"{run_id}@weights@two" not in os.listdir(one / "checkpoints"))
    assert (one / path / "one" / "published").read_text() == "1\n"


def test_refresh_ignores_shared_responses(server, mount):
    one, other = mount(ttl_s=3600.0), mount(ttl_s=3600.0)
    before = len(os.listdir(one / "runs"))
    server.account.add_run()
    assert len(os.listdir(other / "runs")) == before
    (other / ".tinkerfs" / "refresh").write_text("1")
    assert len(os.listdir(other / "runs")) == before + 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_outage_fails_no_operation(server, mount, redis_server, number):
    roots = [mount(ttl_s=0.5, constants={}) for _ in range(2)]
    expected = [use(root) for root in roots]
    redis_server.send_signal(number)
    assert [use(root) for root in roots] == expected
    wait_until(lambda: all(not stats(root)["gauges"]["shared_metadata_up"] for root in roots))
    assert [use(root) for root in roots] == expected
    for root in roots:
        (line,) = errors(root)
        assert "shared cache" in line
        assert stats(root)["counters"].get("shared_metadata_failures", 0) <= 8  # those in flight
    if number == signal.SIGSTOP:
        redis_server.send_signal(signal.SIGCONT)
    else:
        redis_server.kill()
        redis_server.start()
    wait_until(lambda: all(stats(root)["gauges"]["shared_metadata_up"] for root in roots))
    assert [use(root) for root in roots] == expected


def test_killed_host_is_replaced(server, mount, redis_server, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    environ = {**os.environ, **server.environment, "HOME": str(tmp_path)}
    environ["TINKERFS_SHARED_CACHE"] = redis_server.url
    options = [f"--cache-dir={tmp_path / 'cache'}", f"--base-url={server.base_url}"]
    done = tinkerfs("mount", *options, victim, env=environ)
    assert done.returncode == 0, done.stderr
    try:
        wait_until(lambda: stats(victim)["gauges"]["shared_metadata_up"] == 1)
        other = mount()
        run_id = next(iter(server.account.runs())).id
        rule = server.faults.add(LISTING, hang=True)
        path = f"runs/{run_id}/checkpoints/weights"
        reader = subprocess.Popen(["ls", victim / path], stderr=subprocess.DEVNULL)
        rule.wait_for(1)
        with ThreadPoolExecutor() as pool:
            listing = pool.submit(os.listdir, other / path)
            wait_until(lambda: stats(other)["counters"].get("shared_metadata_waits") == 1)
            os.kill(stats(victim)["pid"], signal.SIGKILL)
            reader.wait(10)
            assert listing.result(30)
        assert server.journal.count(LISTING) == 2
    finally:
        tinkerfs("umount", victim, env=environ)


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
        with contextlib.ExitStack() as stack:
            stack.callback(tinkerfs, "umount", root, env=environ)
            wait_until(lambda: stats(root)["gauges"]["shared_metadata_up"] == 1)
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
