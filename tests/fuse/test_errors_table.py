"""The rows of docs/troubleshooting.md: the message in a shell, and the line in `errors`."""

import os
import signal
import time

import pytest

from tests.support.account import account, every_binding, make_account

__all__ = ["account", "make_account"]

pytestmark = every_binding

BODY = {"detail": "the server's own words"}
NO_RETRY = {"x-should-retry": "false"}

#: Rows of faults that last until the timeout; the others are errors after one request.
TIMEOUT_ROWS = ("no response in time", "the connection is closed")

#: Endpoint, effects of the server's fault, script, message in the shell, message in `errors`.
ROWS = {
    "403 of a listing": (
        "GET training_runs/{run}/checkpoints",
        {"status": 403, "body": BODY},
        "ls $RUN/checkpoints",
        "Permission denied",
        "403: the server's own words",
    ),
    "404 of a run": (
        "GET training_runs/{run}",
        {"status": 404, "body": {"detail": "Run not found, says the server"}},
        "ls runs/unknown-404",
        "No such file or directory",
        "404: Run not found, says the server",
    ),
    "410 of a run": (
        "GET training_runs/{run}",
        {"status": 410, "body": BODY},
        "cat runs/unknown-410/info.json",
        "No such file or directory",
        "410: the server's own words",
    ),
    "400 of a lookup": (
        "GET training_runs/{run}",
        {"status": 400, "body": BODY},
        "stat runs/unknown-400",
        "No such file or directory",
        "400: the server's own words",
    ),
    "422 of a lookup": (
        "GET training_runs/{run}",
        {"status": 422, "body": {"detail": [{"loc": ["path"], "msg": "no such id can be"}]}},
        "stat runs/unknown-422",
        "No such file or directory",
        "no such id can be",
    ),
    "400 of a listing": (
        "GET training_runs/{run}/checkpoints",
        {"status": 400, "body": BODY},
        "ls $RUN/checkpoints",
        "Invalid argument",
        "400: the server's own words",
    ),
    "418 of a listing": (
        "GET training_runs/{run}/checkpoints",
        {"status": 418, "body": BODY},
        "ls $RUN/checkpoints",
        "Input/output error",
        "418: the server's own words",
    ),
    "404 of the archive's endpoint": (
        "GET archive",
        {"status": 404, "body": {"detail": "Not Found"}},
        "cat $RUN/latest/archive_url",
        "Operation not supported",
        "this server has no such endpoint",
    ),
    "405 of the archive's endpoint": (
        "GET archive",
        {"status": 405, "body": {"detail": "Method Not Allowed"}},
        "cat $RUN/latest/archive_url",
        "Operation not supported",
        "this server has no such endpoint",
    ),
    "501 of the archive's endpoint": (
        "GET archive",
        {"status": 501},
        "cat $RUN/latest/archive_url",
        "Operation not supported",
        "this server has no such endpoint",
    ),
    "404 of the archive of a listed checkpoint": (
        "GET archive",
        {"status": 404, "body": {"detail": "Checkpoint not found: no archive"}},
        "cat $RUN/latest/archive_url",
        "Operation not supported",
        "404: Checkpoint not found: no archive (but it is listed)",
    ),
    "405 of publishing": (
        "POST publish",
        {"status": 405, "body": {"detail": "Method Not Allowed"}},
        "echo 1 > $RUN/latest/published",
        "Operation not supported",
        "this server has no such endpoint",
    ),
    "409 of another change": (
        "PUT ttl",
        {"status": 409, "body": BODY},
        "echo 30d > $RUN/latest/expires_at",
        "Device or resource busy",
        "409: the server's own words",
    ),
    "425 of a deletion": (
        "DELETE checkpoint",
        {"status": 425, "body": BODY},
        "rm -r $RUN/checkpoints/weights/1",
        "Device or resource busy",
        "425: the server's own words",
    ),
    "400 of a change": (
        "PUT ttl",
        {"status": 400, "body": BODY},
        "echo 30d > $RUN/latest/expires_at",
        "Invalid argument",
        "400: the server's own words",
    ),
    "429": (
        "GET training_runs/{run}/checkpoints",
        {"status": 429, "body": BODY},
        "ls $RUN/checkpoints",
        "Device or resource busy",
        "429: the server's own words",
    ),
    "500": (
        "GET training_runs/{run}/checkpoints",
        {"status": 500, "body": BODY},
        "ls $RUN/checkpoints",
        "Input/output error",
        "500: the server's own words",
    ),
    "502 of a proxy": (
        "GET training_runs/{run}/checkpoints",
        {"html": True},
        "ls $RUN/checkpoints",
        "Input/output error",
        "502",
    ),
    "no response in time": (
        "GET training_runs/{run}/checkpoints",
        {"hang": True},
        "ls $RUN/checkpoints",
        "Connection timed out",
        "no response",
    ),
    "the connection is closed": (
        "GET training_runs/{run}/checkpoints",
        {"refuse": True},
        "ls $RUN/checkpoints",
        "No route to host",
        "",
    ),
    "not JSON": (
        "GET training_runs/{run}/checkpoints",
        {"status": 200, "html": True},
        "ls $RUN/checkpoints",
        "Protocol error",
        "",
    ),
    "truncated JSON": (
        "GET training_runs/{run}/checkpoints",
        {"half_json": True},
        "ls $RUN/checkpoints",
        "Protocol error",
        "",
    ),
    "a redirect": (
        "GET training_runs/{run}/checkpoints",
        {"redirect_to": "http://127.0.0.1:9/login?token=secret"},
        "ls $RUN/checkpoints",
        "Protocol error",
        "",
    ),
}

NAMES = {
    "Permission denied": "EACCES",
    "No such file or directory": "ENOENT",
    "Operation not supported": "EOPNOTSUPP",
    "Device or resource busy": "EBUSY",
    "Invalid argument": "EINVAL",
    "Input/output error": "EIO",
    "Connection timed out": "ETIMEDOUT",
    "No route to host": "EHOSTUNREACH",
    "Protocol error": "EPROTO",
}


@pytest.fixture(scope="module")
def patient(make_account):
    return make_account(runs=1, checkpoints=1, settings={"archive_build_limit": 0})


@pytest.fixture(scope="module")
def impatient(make_account):
    return make_account(runs=1, checkpoints=1, settings={"timeout_s": 2.0})


@pytest.mark.parametrize("row", ROWS)
def test_row_has_errno_for_shell_and_message_in_errors(patient, impatient, row):
    endpoint, effects, script, expected, message = ROWS[row]
    account = impatient if row in TIMEOUT_ROWS else patient
    run = account.new_run("weights/1")
    # A busy machine may exceed the short timeout.
    assert account.eventually(lambda: account.sh(f"ls {run}").returncode == 0, 60)
    headers = NO_RETRY if "status" in effects or "html" in effects else {}
    fault = account.server.faults.add(endpoint, **effects, headers=headers, times=None)
    before = account.errors().count("\n")
    try:
        done = account.sh(f"RUN={run}\n{script}")
    finally:
        fault.remove()
    assert done.returncode != 0
    assert expected in done.stderr, done
    lines = account.errors().splitlines()[before:]
    assert any(f"\t{NAMES[expected]}\t" in line and message in line for line in lines), lines
    assert not any("secret" in line or account.server.api_key in line for line in lines)
    assert account.eventually(lambda: account.sh(f"ls {run}").returncode == 0, 60)


@pytest.mark.parametrize("status", [409])
def test_publish_with_409_succeeds(account, status):
    run = account.new_run("weights/1")
    account.server.faults.add("POST publish", status=status, body={"detail": "already public"})
    done = account.sh(f"echo 1 > {run}/latest/published")
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_key_is_permission_denied(make_account):
    account = make_account(runs=2, checkpoints=1)
    account.server.behaviour.api_keys.clear()
    done = account.sh("ls runs; ls runs; stat runs/unknown; cat .tinkerfs/errors")
    assert "ls: cannot open directory 'runs': Permission denied" in done.stderr
    assert "stat: cannot statx 'runs/unknown': Permission denied" in done.stderr
    assert "Invalid API key" in done.stdout
    assert account.server.journal.count("api") <= 2


def test_unreachable_server_is_no_route_to_host(make_account):
    account = make_account(runs=2, checkpoints=2)
    run, other = (f"runs/{run_id}" for run_id in account.server.account.run_ids)
    known = account.sh(f"ls -R {run}").stdout
    account.server.stop_listening("api")
    done = account.sh(f"ls {other}/checkpoints; stat runs/unknown; echo 1 > {run}/latest/published")
    assert done.stderr.count("No route to host") == 3, done
    assert account.sh(f"ls -R {run}").stdout == known  # the last known good value
    account.server.resume_listening()
    assert account.eventually(lambda: account.sh(f"ls {other}/checkpoints").returncode == 0)
    assert account.sh(f"echo 1 > {run}/latest/published").returncode == 0


def test_read_error_raises_os_error_in_python(patient):
    run = patient.new_run("weights/1")
    fault = patient.server.faults.add(
        "GET archive", status=500, times=None, headers=NO_RETRY, body=BODY
    )
    done = patient.python(f"print(repr(open('{run}/latest/archive_url').read()))")
    fault.remove()
    assert "OSError: [Errno 5]" in done.stderr


def test_ctrl_c_interrupts_cat_that_waits_for_archive(account):
    run = account.new_run("weights/1")
    fault = account.server.faults.add("GET archive", hang=True)
    process = account.start("cat", f"{run}/latest/archive_url")
    fault.wait_for(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 5.0
    fault.release()
    # The build continued, and serves the next reader.
    assert account.sh(f"cat {run}/latest/archive_url").stdout.startswith("http")
    assert account.server.journal.count("GET archive") == 1


def test_errors_and_changes_are_readable_only_by_owner(account):
    for name in ("errors", "changes"):
        assert os.stat(account.path(f".tinkerfs/{name}")).st_mode & 0o777 == 0o600
