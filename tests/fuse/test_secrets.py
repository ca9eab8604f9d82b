"""A key and a signed URL that a server repeats, in every output of a mount."""

import os
from urllib.parse import quote

import pytest

from tests.fuse.test_metrics import scrape
from tests.fuse.test_tracing import collector
from tests.support.mount import run, tinkerfs
from tests.unit.test_prometheus import free_port
from tinkerfs.fuse import mount_table

__all__ = ["collector"]

KEY = "opaque+key/0123456789=="
SIGNATURE = "c0ffeec0ffee0123"
HEADER = "c0llector-t0ken"


@pytest.fixture
def binding():
    return "auto"


@pytest.fixture
def server(demo_server):
    return demo_server(runs=2, checkpoints=2, api_key=KEY)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_secrets_are_in_no_output(mountpoint, env, server, tmp_path, collector, log_format):
    log, audit, port = tmp_path / "log", tmp_path / "audit", free_port()
    options = f"log_file={log},audit={audit},log_format={log_format},log_level=debug,metrics={port}"
    traces = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={HEADER}",
    }
    outputs = [tinkerfs("mount", mountpoint, "-o", options, env=env | traces)]
    url = f"https://store.example/b/k?X-Amz-Signature={SIGNATURE}&b=1"
    body = {"detail": f"key '{KEY}' or {quote(KEY, safe='')} is bad for {url}"}
    server.faults.add("GET training_runs/{run}", status=403, body=body)
    with pytest.raises(PermissionError):
        (mountpoint / "runs/none/info.json").read_bytes()
    checkpoint = next((mountpoint / "runs").glob("*/checkpoints/*/*"))
    (checkpoint / "archive_url").read_bytes()
    server.faults.add("POST publish", status=403, times=None, body=body)
    outputs.append(run("sh", "-c", f"echo 1 > '{checkpoint}/published'"))
    assert outputs[-1].returncode != 0
    outputs.append(tinkerfs("status", mountpoint, env=env))
    texts = [scrape(port), str(outputs)]
    texts += [(mountpoint / f".tinkerfs/{name}").read_text() for name in ("errors", "changes")]
    texts += [(mountpoint / ".tinkerfs/stats.json").read_text()]
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    with open(f"/proc/{pid}/cmdline") as arguments:
        texts.append(arguments.read())
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    texts += [log.read_text(), audit.read_text(), b"".join(collector.bodies).decode("latin-1")]
    assert "redacted" in log.read_text()
    assert 'outcome="failed: ' in audit.read_text()
    assert collector.bodies
    for text in texts:
        for secret in (KEY, quote(KEY, safe=""), SIGNATURE, HEADER, "sig=", "signature="):
            assert secret not in text
    assert {os.stat(path).st_mode & 0o777 for path in (log, audit)} == {0o600}
