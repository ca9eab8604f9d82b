"""The table "An export fails" of docs/troubleshooting.md, row by row on a real mount."""

import dataclasses
from pathlib import Path

import pytest

from tests.support.account import make_account
from tinkerfs.demo.exports import ExportOptions

__all__ = ["make_account"]

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
BODY = {"detail": "the words of the service"}


def table():
    """Return the cells of each row, without backquotes."""
    section = PAGE.read_text().partition("\n## An export fails\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


ROWS = {row[0]: row for row in table()}


def refuse(endpoint, status):
    return lambda account, _run_id: account.server.faults.add(
        endpoint, status=status, body=BODY, times=None
    )


def wait(**options):
    """Return a function that makes a step of the server endless."""

    def prepare(account, _run_id):
        for name, value in options.items():
            setattr(account.server.behaviour.exports, name, value)

    return prepare


def retire(account, run_id):
    base_model = account.server.account.run(run_id).base_model
    account.server.behaviour.exports.retired_models = frozenset({base_model})


def take_name(account, _run_id):
    wait(failure=("A checkpoint named tinkerfs exists", "user"))(account, _run_id)


def lose_session(account, run_id):
    wait(load_s=600.0)(account, run_id)
    refuse("POST session_heartbeat", 410)(account, run_id)


def save_again(account, run_id):
    def save():
        account.server.account.add_checkpoint(run_id, "weights/1", time_s=1.9e9)

    account.server.faults.add("POST load_weights", call=save)


#: What the server does, by the text in `errors`.
CAUSES = {
    "402": refuse("POST create_session", 402),
    "403": refuse("POST create_session", 403),
    "last state: loading weights, waiting for capacity": wait(
        load_s=600.0, queue_state="paused_capacity"
    ),
    "last state: loading weights, waiting because of a rate limit": wait(
        load_s=600.0, queue_state="paused_rate_limit"
    ),
    "last state: saving weights": wait(save_s=600.0),
    "was retired": retire,
    "A checkpoint named tinkerfs exists": take_name,
    "the server has ended the session": lose_session,
    "saved again": save_again,
    "so it exports no checkpoints": wait(),
    "nothing can be created": wait(),
}


@pytest.fixture(scope="module")
def account(make_account):
    """An account with exports that time out after 2 s, and with frequent heartbeats."""
    settings = {
        "archive_timeout_s": 2.0,
        "constants": {"tinkerfs.api.exports.HEARTBEAT_S": 0.1},
    }
    return make_account(settings, runs=1, profile="official-0.36", exports=ExportOptions())


@pytest.fixture(scope="module")
def other_server(make_account):
    """An account at a server without exports."""
    return make_account(runs=1, profile="twinkle")


def test_table_has_every_cause():
    assert set(ROWS) == set(CAUSES)


@pytest.mark.parametrize("text", CAUSES)
def test_row_has_the_message_of_a_mount(account, other_server, text):
    is_possible = text not in {"so it exports no checkpoints", "nothing can be created"}
    account = account if text != "so it exports no checkpoints" else other_server
    kind = "sampler_weights" if text == "nothing can be created" else "weights"
    run = account.new_run("weights/1", "sampler_weights/1")
    run_id = run.partition("/")[2]
    directory = f"{run}/checkpoints/{kind}/1"
    account.sh(f"ls {directory}")
    CAUSES[text](account, run_id)
    before = len(account.errors().splitlines())
    try:
        done = account.sh(f"echo 1h > {directory}/export")
    finally:
        account.server.faults.clear()
        wait(**dataclasses.asdict(ExportOptions()))(account, run_id)
    assert done.returncode == 1
    assert ROWS[text][1] in done.stderr
    assert text in "\n".join(account.errors().splitlines()[before:])
    if text not in {"402", "403", "saved again", "nothing can be created"}:
        assert text in account.sh(f"cat {directory}/export").stdout
    if is_possible:
        sessions = [account.server.account.session(i) for i in account.server.account.session_ids()]
        assert all(each.status != {"type": "active"} for each in sessions)
        account.refresh()
        done = account.sh(f"echo 1h > {directory}/export && ls {directory}/files/")
        assert done.returncode == 0, "the fix works"
