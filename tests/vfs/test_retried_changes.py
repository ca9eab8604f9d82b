"""A change whose response was a failure, was lost, or came from elsewhere than the API."""

import pytest

from tests.support.account import deletes
from tests.support.drivers import outcome_of

pytestmark = pytest.mark.expect_warnings("(rmdir|write|refresh) E")

AT_ONCE = {"Retry-After": "0"}

#: By the change: its endpoint, and what asks for it.
CHANGES = {
    "delete": "DELETE checkpoint",
    "publish": "POST publish",
    "unpublish": "DELETE publish",
    "ttl": "PUT ttl",
}

#: Each change, about the servers that know it.
EACH = [
    pytest.param(what, marks=() if what == "delete" else pytest.mark.served(endpoint))
    for what, endpoint in CHANGES.items()
]
#: Each change, about the servers that know all of them, and one form of ids.
served = pytest.mark.served(*(each for each in CHANGES.values() if each != "DELETE checkpoint"))

#: How a request can end that was carried out.
LOSSES = {
    "503": {"status": 503, "headers": AT_ONCE},
    "reset": {"reset": True},
    "no response": {"refuse": True},
}


def place_of(world, what):
    run = world.new_run()
    run_id = run.partition("/")[2]
    fields = {"is_public": True} if what == "unpublish" else {}
    checkpoint = world.server.account.add_checkpoint(run_id, "weights/1", **fields)
    place = f"{run}/checkpoints/weights/1"
    world.refresh()
    world.driver.read(f"{place}/published")
    world.server.journal.clear()
    return place, checkpoint


def now(world, place):
    return world.server.account.checkpoint(place.split("/")[1], "weights/1")


def ask(world, what, place):
    """Ask for a change; return OK or the errno's name."""
    if what == "delete":
        return world.driver.remove(f"rmtree {place}")[0]
    control, word = {
        "publish": ("published", b"1"),
        "unpublish": ("published", b"0"),
        "ttl": ("expires_at", b"30d"),
    }[what]
    return outcome_of(lambda: world.driver.write(f"{place}/{control}", word))


def carry_out(world, what, place):
    checkpoint = now(world, place)
    if what == "delete":
        world.server.account.delete_checkpoint(place.split("/")[1], "weights/1")
    elif what == "ttl":
        checkpoint.expires_at_s = checkpoint.time_s + 30 * 86400
    else:
        checkpoint.is_public = what == "publish"


def is_made(world, what, place):
    checkpoint = now(world, place)
    if what == "delete":
        return checkpoint is None
    if what == "ttl":
        return checkpoint.expires_at_s is not None
    return checkpoint.is_public is (what == "publish")


def save_again(world, what, place, time_s):
    fields = {"is_public": True} if what == "unpublish" else {}
    world.server.account.add_checkpoint(place.split("/")[1], "weights/1", time_s=time_s, **fields)


@pytest.mark.parametrize("what", EACH)
@pytest.mark.parametrize("loss", LOSSES)
def test_change_done_but_lost_spares_what_was_saved_since(world, what, loss):
    place, checkpoint = place_of(world, what)

    def replace():
        carry_out(world, what, place)
        save_again(world, what, place, checkpoint.time_s + 1)

    world.server.faults.add(CHANGES[what], call=replace, **LOSSES[loss])
    assert ask(world, what, place) == "EBUSY"
    assert now(world, place) is not None
    assert not is_made(world, what, place)
    assert world.server.journal.count(CHANGES[what]) == 1
    assert "saved again" in world.errors().splitlines()[-1]
    assert "failed: " in world.changes().splitlines()[-1]


@pytest.mark.parametrize("what", EACH)
@pytest.mark.parametrize("loss", LOSSES)
def test_change_done_but_lost_counts_as_done(world, what, loss):
    place, _ = place_of(world, what)
    world.server.faults.add(
        CHANGES[what], call=lambda: carry_out(world, what, place), **LOSSES[loss]
    )
    assert ask(world, what, place) == "OK"
    assert is_made(world, what, place)
    # Which expiry an earlier try set is not known, so that it is set again.
    assert world.server.journal.count(CHANGES[what]) == (2 if what == "ttl" else 1)
    assert world.changes().splitlines()[-1].endswith("done")


@served
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_refused_change_is_looked_at_before_each_retry(world, what, status):
    place, _ = place_of(world, what)
    world.server.faults.add(CHANGES[what], times=2, status=status, headers=AT_ONCE)
    assert ask(world, what, place) == "OK"
    assert is_made(world, what, place)
    order = [
        entry.endpoint
        for entry in world.server.journal.entries("api")
        if entry.endpoint in (CHANGES[what], "GET training_runs/{run}/checkpoints")
    ]
    look = "GET training_runs/{run}/checkpoints"
    assert order[-6:] == [look, CHANGES[what]] * 3


@served
def test_refused_ttl_in_conflict_is_looked_at_before_the_retry(world):
    place, checkpoint = place_of(world, "ttl")
    world.server.faults.add(
        "PUT ttl",
        status=409,
        headers=AT_ONCE,
        call=lambda: save_again(world, "ttl", place, checkpoint.time_s + 1),
    )
    assert ask(world, "ttl", place) == "EBUSY"
    assert now(world, place).expires_at_s is None


@served
@pytest.mark.parametrize("what", CHANGES)
def test_undated_checkpoint_is_not_changed_twice(world, what):
    place, checkpoint = place_of(world, what)
    checkpoint.time_s = None
    world.refresh()
    world.server.faults.add(
        CHANGES[what],
        status=503,
        headers=AT_ONCE,
        times=None,
    )
    # What was saved under the name since would look the same.
    assert ask(world, what, place) == "EIO"
    assert world.server.journal.count(CHANGES[what]) == 1
    world.server.faults.clear()
    assert ask(world, what, place) == "OK"


@served
@pytest.mark.parametrize("what", CHANGES)
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
def test_portal_in_place_of_a_change_is_eproto(world, what, response):
    place, _ = place_of(world, what)
    world.driver.listdir(world.group(place.partition("/checkpoints")[0]))
    world.server.faults.add(CHANGES[what], **response)
    assert ask(world, what, place) == "EPROTO"
    assert not is_made(world, what, place)
    assert world.server.journal.count(CHANGES[what]) == 1
    # The listing is asked again, whatever was fresh.
    assert world.eventually(lambda: _looks_again(world, place))
    assert ask(world, what, place) == "OK"
    assert is_made(world, what, place)


def _looks_again(world, place):
    before = world.server.journal.count("GET training_runs/{run}/checkpoints")
    world.driver.read(f"{place}/published")
    return world.server.journal.count("GET training_runs/{run}/checkpoints") > before


@served
def test_portal_of_a_delete_that_was_done_shows_it_gone(world):
    place, _ = place_of(world, "delete")
    world.server.faults.add(
        "DELETE checkpoint",
        call=lambda: carry_out(world, "delete", place),
        status=200,
        html=True,
    )
    assert ask(world, "delete", place) == "EPROTO"
    assert world.eventually(lambda: outcome_of(lambda: world.driver.stat(place)) == "ENOENT")
    assert deletes(world.server) == 1


@served
@pytest.mark.parametrize(
    ("status", "body"),
    [(204, b""), (200, b""), (200, b"\n"), (200, b"{}"), (200, b"null"), (200, b'"ok"')],
)
def test_empty_or_json_response_is_a_change(world, status, body):
    place, _ = place_of(world, "publish")
    world.server.faults.add(
        "POST publish", call=lambda: carry_out(world, "publish", place), status=status, body=body
    )
    assert ask(world, "publish", place) == "OK"
