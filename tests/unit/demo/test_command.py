import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from tinkerfs.cli.demo_server import demo_server
from tinkerfs.demo.profiles import PROFILES

COMMAND = [
    sys.executable,
    "-c",
    "from tinkerfs.cli.demo_server import demo_server; demo_server()",
]


def start(*args):
    return subprocess.Popen(
        [*COMMAND, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_demo_server_prints_two_lines_for_eval(end):
    with start("--runs", "3", "--checkpoints", "2", "--prefix", "/p") as process:
        lines = [process.stdout.readline(), process.stdout.readline()]
        url = re.fullmatch(r"export TINKER_BASE_URL=(http://127\.0\.0\.1:\d+/p)\n", lines[0])[1]
        key = re.fullmatch(r"export TINKER_API_KEY=(tml-\S+)\n", lines[1])[1]
        response = httpx.get(
            f"{url}/api/v1/checkpoints", headers={"X-API-Key": key}, trust_env=False
        )
        assert len(response.json()["checkpoints"]) == 6
        process.send_signal(end)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "")
    assert "Ctrl-C" in err


def test_demo_server_may_require_tokens():
    with start("--require-token") as process:
        url, key = (process.stdout.readline().partition("=")[2].strip() for _ in range(2))

        def status(credential):
            headers = {"X-API-Key": credential}
            return httpx.get(f"{url}/api/v1/checkpoints", headers=headers, trust_env=False)

        assert status(key).status_code == 401
        exchange = httpx.post(
            f"{url}/api/v1/auth/token", headers={"X-API-Key": key}, trust_env=False
        )
        assert status(exchange.json()["jwt"]).status_code == 200
        process.terminate()
        process.communicate(timeout=10)


def test_ports_and_size_of_checkpoints_are_options():
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        store_port = reserved.getsockname()[1]
    with start("--runs=1", "--size-mb=0.5", f"--store-port={store_port}") as process:
        url, key = (process.stdout.readline().partition("=")[2].strip() for _ in range(2))
        headers = {"X-API-Key": key}
        with httpx.Client(headers=headers, trust_env=False) as client:
            found = client.get(f"{url}/api/v1/checkpoints").json()["checkpoints"]
            assert all(4e5 < each["size_bytes"] < 6e5 for each in found)
            run_id = found[0]["tinker_path"].removeprefix("tinker://").partition("/")[0]
            place = f"training_runs/{run_id}/checkpoints/{found[0]['checkpoint_id']}/archive"
            target = client.get(f"{url}/api/v1/{place}").headers["location"]
        assert target.startswith(f"http://127.0.0.1:{store_port}/")
        process.terminate()
        process.communicate(timeout=10)


def test_demo_server_with_sigint_ignored_continues():
    with subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
    bit = 1 << (signal.SIGINT - 1)
    masks = {name: int(value, 16) for name, value in re.findall(r"(Sig\w+):\t(\w+)", status)}
    assert masks["SigIgn"] & bit
    assert not masks["SigBlk"] & bit, "sigwait would take it"


def test_demo_server_on_a_used_port_fails():
    with start() as first:
        url = first.stdout.readline().partition("=")[2].strip()
        with start("--port", url.rpartition(":")[2]) as second:
            out, err = second.communicate(timeout=10)
        first.terminate()
        first.communicate(timeout=10)
    assert (second.returncode, out) == (1, "")
    assert err.startswith("Error: cannot listen on 127.0.0.1 port ")
    assert len(err.splitlines()) == 1


def test_profile_option_accepts_every_profile():
    option = next(option for option in demo_server.params if option.name == "profile")
    assert list(option.type.choices) == list(PROFILES)


def test_help_is_laid_out():
    text = CliRunner().invoke(demo_server, ["--help"]).output
    assert "\n      tinkerfs demo-server > demo.env &\n" in text


def test_import_of_the_command_imports_no_server():
    code = "import sys, tinkerfs.cli.demo_server; assert 'http.server' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
