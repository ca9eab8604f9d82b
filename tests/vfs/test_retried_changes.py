"""Tests of changes with a failed or lost response, or that of a captive portal."""

import pytest

from tests.support.account import deletes
from tests.support.drivers import outcome_of

pytestmark = pytest.mark.expect_warnings("(rmdir|write|refresh) E")

AT_ONCE = {"Retry-After": "0"}

#: The endpoint of each change.
CHANGES = {
    "delete": "DELETE checkpoint",
    "publish": "POST publish",
    "unpublish": "DELETE publish",
    "ttl": "PUT ttl",
}

#: Each change, for the servers that support it.
EACH = [
    pytest.param(change, marks=() if change == "delete" else pytest.mark.served(endpoint))
    for change, endpoint in CHANGES.items()
]
#: For the servers that support all changes, and one form of ids.
served = pytest.mark.served(*(each for each in CHANGES.values() if each != "DELETE checkpoint"))

#: Failures of a request that the server has carried out.
LOSSES = {
    "503": {"status": 503, "headers": AT_ONCE},
    "reset": {"reset": True},
    "no response": {"refuse": True},
}


def new_checkpoint(world, change):
    run = world.new_run()
    run_id = run.partition("/")[2]
    fields = {"is_public": True} if change == "unpublish" else {}
    checkpoint = world.server.account.add_checkpoint(run_id, "weights/1", **fields)
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    world.refresh()
    world.driver.read(f"{checkpoint_dir}/published")
    world.server.journal.clear()
    return checkpoint_dir, checkpoint


def current(world, checkpoint_dir):
    return world.server.account.checkpoint(checkpoint_dir.split("/")[1], "weights/1")


def request_change(world, change, checkpoint_dir):
    """Request a change, and return OK or the name of the errno."""
    if change == "delete":
        return world.driver.remove(f"rmtree {checkpoint_dir}")[0]
    control, value = {
        "publish": ("published", b"1"),
        "unpublish": ("published", b"0"),
        "ttl": ("expires_at", b"30d"),
    }[change]
    return outcome_of(lambda: world.driver.write(f"{checkpoint_dir}/{control}", value))


def carry_out(world, change, checkpoint_dir):
    checkpoint = current(world, checkpoint_dir)
    if change == "delete":
        world.server.account.delete_checkpoint(checkpoint_dir.split("/")[1], "weights/1")
    elif change == "ttl":
        checkpoint.expires_at_s = checkpoint.time_s + 30 * 86400
    else:
        checkpoint.is_public = change == "publish"


def is_done(world, change, checkpoint_dir):
    checkpoint = current(world, checkpoint_dir)
    if change == "delete":
        return checkpoint is None
    if change == "ttl":
        return checkpoint.expires_at_s is not None
    return checkpoint.is_public is (change == "publish")


def save_again(world, change, checkpoint_dir, time_s):
    fields = {"is_public": True} if change == "unpublish" else {}
    world.server.account.add_checkpoint(
        checkpoint_dir.split("/")[1], "weights/1", time_s=time_s, **fields
    )


@pytest.mark.parametrize("change", EACH)
@pytest.mark.parametrize("loss", LOSSES)
def test_lost_response_does_not_change_a_newer_checkpoint(world, change, loss):
    checkpoint_dir, checkpoint = new_checkpoint(world, change)

    def replace():
        carry_out(world, change, checkpoint_dir)
        save_again(world, change, checkpoint_dir, checkpoint.time_s + 1)

    world.server.faults.add(CHANGES[change], call=replace, **LOSSES[loss])
    assert request_change(world, change, checkpoint_dir) == "EBUSY"
    assert current(world, checkpoint_dir) is not None
    assert not is_done(world, change, checkpoint_dir)
    assert world.server.journal.count(CHANGES[change]) == 1
    assert "saved again" in world.errors().splitlines()[-1]
    assert "failed: " in world.changes().splitlines()[-1]


@pytest.mark.parametrize("change", EACH)
@pytest.mark.parametrize("loss", LOSSES)
def test_lost_response_of_a_completed_change_succeeds(world, change, loss):
    checkpoint_dir, _ = new_checkpoint(world, change)
    world.server.faults.add(
        CHANGES[change], call=lambda: carry_out(world, change, checkpoint_dir), **LOSSES[loss]
    )
    assert request_change(world, change, checkpoint_dir) == "OK"
    assert is_done(world, change, checkpoint_dir)
    # The expiry that an earlier attempt set is unknown, so it is set again.
    assert world.server.journal.count(CHANGES[change]) == (2 if change == "ttl" else 1)
    assert world.changes().splitlines()[-1].endswith("done")


@served
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_refused_change_is_checked_before_each_retry(world, change, status):
    checkpoint_dir, _ = new_checkpoint(world, change)
    world.server.faults.add(CHANGES[change], times=2, status=status, headers=AT_ONCE)
    assert request_change(world, change, checkpoint_dir) == "OK"
    assert is_done(world, change, checkpoint_dir)
    order = [
        entry.endpoint
        for entry in world.server.journal.entries("api")
        if entry.endpoint in (CHANGES[change], "GET training_runs/{run}/checkpoints")
    ]
    listing = "GET training_runs/{run}/checkpoints"
    assert order[-6:] == [listing, CHANGES[change]] * 3


@served
def test_refused_ttl_in_conflict_is_checked_before_the_retry(world):
    checkpoint_dir, checkpoint = new_checkpoint(world, "ttl")
    world.server.faults.add(
        "PUT ttl",
        status=409,
        headers=AT_ONCE,
        call=lambda: save_again(world, "ttl", checkpoint_dir, checkpoint.time_s + 1),
    )
    assert request_change(world, "ttl", checkpoint_dir) == "EBUSY"
    assert current(world, checkpoint_dir).expires_at_s is None


@served
@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_without_time_is_not_changed_twice(world, change):
    checkpoint_dir, checkpoint = new_checkpoint(world, change)
    checkpoint.time_s = None
    world.refresh()
    world.server.faults.add(
        CHANGES[change],
        status=503,
        headers=AT_ONCE,
        times=None,
    )
    # A checkpoint that was saved again under the name would look the same.
    assert request_change(world, change, checkpoint_dir) == "EIO"
    assert world.server.journal.count(CHANGES[change]) == 1
    world.server.faults.clear()
    assert request_change(world, change, checkpoint_dir) == "OK"


@served
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "response",
    [
        {"status": 200, "html": True},
        {"status": 200, "body": "Please log in"},
        {"status": 200, "body": b'{"ok": tr'},
        {"status": 302, "redirect_to": "http://127.0.0.1:1/login"},
    ],
    ids=["html", "text", "half", "redirect"],
)
def test_portal_in_place_of_a_change_is_eproto(world, change, response):
    checkpoint_dir, _ = new_checkpoint(world, change)
    world.driver.listdir(world.kind_directory(checkpoint_dir.partition("/checkpoints")[0]))
    world.server.faults.add(CHANGES[change], **response)
    assert request_change(world, change, checkpoint_dir) == "EPROTO"
    assert not is_done(world, change, checkpoint_dir)
    assert world.server.journal.count(CHANGES[change]) == 1
    # The listing is requested again, although it was fresh.
    assert world.eventually(lambda: _is_listed_again(world, checkpoint_dir))
    assert request_change(world, change, checkpoint_dir) == "OK"
    assert is_done(world, change, checkpoint_dir)


def _is_listed_again(world, checkpoint_dir):
    before = world.server.journal.count("GET training_runs/{run}/checkpoints")
    world.driver.read(f"{checkpoint_dir}/published")
    return world.server.journal.count("GET training_runs/{run}/checkpoints") > before


@served
def test_portal_after_a_completed_delete_shows_it(world):
    checkpoint_dir, _ = new_checkpoint(world, "delete")
    world.server.faults.add(
        "DELETE checkpoint",
        call=lambda: carry_out(world, "delete", checkpoint_dir),
        status=200,
        html=True,
    )
    assert request_change(world, "delete", checkpoint_dir) == "EPROTO"
    assert world.eventually(
        lambda: outcome_of(lambda: world.driver.stat(checkpoint_dir)) == "ENOENT"
    )
    assert deletes(world.server) == 1


@served
@pytest.mark.parametrize(
    ("status", "body"),
    [(204, b""), (200, b""), (200, b"\n"), (200, b"{}"), (200, b"null"), (200, b'"ok"')],
)
def test_change_accepts_empty_and_json_responses(world, status, body):
    checkpoint_dir, _ = new_checkpoint(world, "publish")
    world.server.faults.add(
        "POST publish",
        call=lambda: carry_out(world, "publish", checkpoint_dir),
        status=status,
        body=body,
    )
    assert request_change(world, "publish", checkpoint_dir) == "OK"
