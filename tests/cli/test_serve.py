"""Tests of `tinkerfs serve` as a process."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from tests.support.mount import tinkerfs
from tests.support.server import demo_server, server

__all__ = ["demo_server", "server"]


@pytest.fixture
def environment(server, tmp_path):
    return os.environ | server.environment | {"HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}


def start(environment, *arguments):
    command = [sys.executable, "-m", "tinkerfs", "serve", "--listen", "127.0.0.1:0", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_its_url_and_ends_on_a_signal(environment, server, end):
    with start(environment) as process:
        url = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/) .*\n", process.stdout.readline())[1]
        with urllib.request.urlopen(f"{url}runs/", timeout=60) as response:
            assert server.account.run_ids[0] in response.read().decode().replace("%3A", ":")
        process.send_signal(end)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_secrets_are_in_no_log_and_no_process_list(environment, server, tmp_path):
    token, log = tmp_path / "token", tmp_path / "log"
    token.write_text("secret-token-42\nada:secret-password\n")
    token.chmod(0o600)
    options = ("--auth-file", token, "--log-file", log, "--log-level", "debug")
    with start(environment, *map(str, options)) as process:
        url = process.stdout.readline().split()[1]
        headers = {"Authorization": "Bearer secret-token-42"}
        run = server.account.runs()[0]
        path = f"runs/{run.id}/checkpoints/{run.checkpoints[0].id}/archive_url"
        request = urllib.request.Request(f"{url}{path}?password=secret-query", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            signed = response.read().decode().strip()
        for secret in ("secret-token-42", "secret-password"):  # also in a path, which is logged
            request = urllib.request.Request(f"{url}runs/{secret}", headers=headers)
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(request, timeout=60)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}runs/", timeout=60)
        with open(f"/proc/{process.pid}/cmdline") as cmdline:
            arguments = cmdline.read()
        process.terminate()
        process.communicate(timeout=60)
    text = log.read_text()
    assert "/archive_url: 200" in text
    assert text.count("/runs/[redacted key]") >= 2
    for secret in ("secret-token-42", "secret-password", "secret-query", server.api_key, signed):
        assert secret not in text
        assert secret not in arguments
    assert oct(log.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--listen", "0.0.0.0:0"), 1, "cannot listen on 0.0.0.0: other hosts could"),
        (("--listen", "nonsense"), 2, "not ADDRESS:PORT"),
        (("--auth-file", "/nonexistent"), 1, "No such file or directory"),
        (("--key", "/nonexistent"), 2, "--key needs --cert"),
        (("--cert", "/nonexistent"), 1, "cannot use the certificate"),
    ],
)
def test_wrong_option_is_reported_in_one_line(environment, arguments, code, message):
    done = tinkerfs("serve", "--listen", "127.0.0.1:0", *arguments, env=environment)
    assert done.returncode == code
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_missing_extra_is_reported_in_one_line(environment, tmp_path):
    (tmp_path / "wsgidav.py").write_text("raise ModuleNotFoundError('none', name='wsgidav')")
    done = tinkerfs("serve", env=environment | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "wsgidav is not installed (hint: pip install 'tinkerfs[serve]')" in done.stderr


def test_rejected_key_is_reported_in_one_line(environment):
    done = tinkerfs("serve", env=environment | {"TINKER_API_KEY": "tml-wrong"})
    assert done.returncode == 1
    assert "the API rejects the key" in done.stderr
