"""A mount behind a proxy, and with private certificates, under one binding."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.hostile import HostileServer, tls_context
from tests.support.mount import run, tinkerfs
from tests.support.proxy import ProxyServer

SUPPORT = Path(__file__).parents[1] / "support"
LOGIN = "me:c0ffee"


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def secured(env):
    """Return a TLS server, with host names that only a proxy resolves, and its environment."""
    with HostileServer(runs=1, checkpoints=1, tls=tls_context(SUPPORT / "invalid.pem")) as server:
        server._store.base_url = server.store_url.replace("127.0.0.1", "store.invalid")
        url = server.base_url.replace("127.0.0.1", "tinker.invalid")
        yield server, {**env, **server.environment, "TINKER_BASE_URL": url}


@pytest.mark.parametrize("variable", [("HTTPS_PROXY", "http"), ("all_proxy", "socks")])
def test_mount_behind_a_proxy_serves_runs_and_weights(variable, secured, mountpoint, tmp_path):
    server, env = secured
    name, scheme = variable
    log = tmp_path / "log"
    with ProxyServer(LOGIN) as proxy:
        env |= {
            name: f"{scheme}://{LOGIN}@{proxy.address}",
            "REQUESTS_CA_BUNDLE": str(SUPPORT / "invalid.pem"),
        }
        arguments = ("--log-level=debug", f"--log-file={log}")
        done = tinkerfs("mount", *arguments, mountpoint, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        (files,) = mountpoint.glob("runs/*/checkpoints/weights/*/files")
        config = (files / "adapter_config.json").read_bytes()
        done = tinkerfs("umount", mountpoint, env=env)
        assert done.returncode == 0
    run_id, name = files.parts[-5], files.parts[-2]
    assert config == server.files(run_id, f"weights/{name}")["adapter_config.json"].read(0, 1 << 20)
    hosts = {target.rpartition(":")[0] for _, target in proxy.targets}
    assert hosts == {"tinker.invalid", "store.invalid"}
    assert "c0ffee" not in log.read_text()


def test_doctor_names_the_fault_of_a_certificate(secured, mountpoint):
    _, env = secured
    with ProxyServer() as proxy:
        env["ALL_PROXY"] = f"socks5://{proxy.address}"
        done = tinkerfs("doctor", env=env)
    (line,) = [line for line in done.stdout.splitlines() if " API " in line]
    assert done.returncode == 1
    assert "certificate of tinker.invalid is refused: self-signed" in line
    assert "SSL_CERT_FILE or REQUESTS_CA_BUNDLE" in line
    assert "the network" not in line


def test_errors_name_a_rejected_certificate(secured, mountpoint):
    _, env = secured
    with ProxyServer() as proxy:
        env["ALL_PROXY"] = f"socks5://{proxy.address}"
        done = tinkerfs("mount", mountpoint, env=env)
        assert done.returncode == 0
        assert "certificate of tinker.invalid is refused" in done.stderr
        listed = run("ls", mountpoint / "runs")
        assert "Protocol error" in listed.stderr
        messages = (mountpoint / ".tinkerfs/errors").read_text()
        assert re.search(
            r"EPROTO\t.*certificate of tinker\.invalid is refused: self-signed", messages
        )
        assert tinkerfs("umount", mountpoint, env=env).returncode == 0


def test_system_certificates_are_trusted(secured, needs_root):
    _, env = secured
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    script = (
        f"set -e; mount --bind {SUPPORT / 'invalid.pem'} {bundle};"
        f" mount -t tmpfs none /usr/lib/ssl; exec {sys.executable} -m tinkerfs doctor"
    )
    with ProxyServer() as proxy:
        env["ALL_PROXY"] = f"socks5://{proxy.address}"
        done = run("unshare", "-m", "sh", "-c", script, env=env)
    assert "accepts the key" in done.stdout, done


def test_demo_ignores_proxy_variables(mountpoint, env):
    for value in ("socks5://127.0.0.1:1", "nonsense://x"):
        env |= {"ALL_PROXY": value, "HTTP_PROXY": value, "https_proxy": value}
        done = tinkerfs("demo", "--detach", "--runs=2", mountpoint, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert next(mountpoint.glob("runs/*/checkpoints/weights/*/archive.tar")).read_bytes()
        assert tinkerfs("umount", mountpoint, env=env).returncode == 0
