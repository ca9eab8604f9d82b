"""`tinkerfs mount --metrics`: a scrape of a mount that works, and of one that hangs."""

import json
import os
import socket
import subprocess

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.mount import run, tinkerfs
from tests.unit.test_prometheus import free_port

RUN = "GET training_runs/{run}"


@pytest.fixture
def binding():
    return "auto"


def scrape(port, host="127.0.0.1"):
    response = httpx.get(f"http://{host}:{port}/metrics", trust_env=False, timeout=20)
    response.raise_for_status()
    return response.text


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_scrape_agrees_with_stats_of_the_mount(mountpoint, env, server):
    port = free_port()
    done = tinkerfs("mount", mountpoint, "--metrics", str(port), env=env)
    assert done.returncode == 0, done.stderr
    for _ in range(3):
        assert run("ls", "-lR", mountpoint / "runs").returncode == 0
    weights = next((mountpoint / "runs").glob("*/checkpoints/weights/*/files"))
    [first, *_others] = sorted(weights.iterdir())
    content = first.read_bytes()
    with pytest.raises(FileNotFoundError):
        (mountpoint / "runs" / "none").stat()
    requests = len(server.journal)
    text = scrape(port)
    assert len(server.journal) == requests, "a scrape sends no request"
    found = samples(text)
    stats = json.loads((mountpoint / ".tinkerfs/stats.json").read_text())
    for endpoint, outcomes in stats["api_requests"].items():
        for outcome, count in outcomes.items():
            assert found["tinkerfs_api_requests_total", *sorted((endpoint, outcome))] == count
    for name in ("opendir", "readlink"):
        count = found["tinkerfs_fuse_operation_duration_seconds_count", name]
        assert count == stats["operations"][name]["count"] > 0
    assert found["tinkerfs_fuse_operation_errors_total", "ENOENT", "getattr"] >= 1
    assert sum(stats["cached_replies"].values()) > 0
    assert found["tinkerfs_store_received_bytes_total",] >= len(content)
    assert found["tinkerfs_fuse_read_bytes_total",] >= len(content)
    assert found["tinkerfs_key_state", "usable"] == 1
    for secret in (server.api_key, "sig=", "X-Amz", "run-", weights.parts[-5]):
        assert secret not in text
    with pytest.raises(httpx.ConnectError):
        scrape(port, "127.0.0.2")
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    with pytest.raises(httpx.ConnectError):
        scrape(port)


def test_scrape_of_a_hanging_mount_responds(mountpoint, env, server):
    port = free_port()
    assert tinkerfs("mount", mountpoint, "--metrics", f":{port}", env=env).returncode == 0
    rule = server.faults.add("api", times=None, hang=True)
    reader = subprocess.Popen(["ls", mountpoint / "runs"], stdout=subprocess.DEVNULL)
    try:
        rule.wait_for(1)
        found = samples(scrape(port))
        assert found["tinkerfs_api_permits_used",] >= 1
    finally:
        rule.release()
        reader.wait(30)


@pytest.mark.parametrize("address", ["{port}", "127.0.0.1:{port}"])
def test_mount_with_port_in_use_prints_one_line(mountpoint, env, address):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address.format(port=listener.getsockname()[1])
        done = tinkerfs("mount", mountpoint, env=env | {"TINKERFS_METRICS": address})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"metrics cannot be served at {address}: Address already in use (hint: " in line
    assert not os.path.ismount(mountpoint)


def test_mount_with_invalid_metrics_address_names_its_source(mountpoint, env, tmp_path):
    (tmp_path / "config.toml").write_text("metrics = 99999\n")
    done = tinkerfs("mount", mountpoint, "--config", tmp_path / "config.toml", env=env)
    assert done.returncode == 2
    assert "config.toml: metrics: not an address: '99999' (hint: 9464, " in done.stderr
