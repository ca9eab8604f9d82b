"""Tests of API failures and their errno, as in docs/troubleshooting.md."""

import pytest

from tests.support.drivers import outcome_of

pytestmark = pytest.mark.expect_warnings(".")

DETAIL = {"detail": "the message of the server"}
NO_RETRY = {"x-should-retry": "false"}

#: (behaviour of the server, errno of a listing).
LISTING = [
    ({"status": 403, "body": DETAIL}, "EACCES"),
    ({"status": 404, "body": {"detail": "Run not found"}}, "ENOENT"),
    ({"status": 410, "body": {"detail": "Run is gone"}}, "ENOENT"),
    ({"status": 400, "body": DETAIL}, "EINVAL"),
    ({"status": 422, "body": DETAIL}, "EINVAL"),
    ({"status": 418, "body": DETAIL}, "EIO"),
    ({"status": 429, "body": DETAIL}, "EBUSY"),
    ({"status": 500, "body": DETAIL}, "EIO"),
    ({"status": 502, "html": True}, "EIO"),
    ({"status": 503, "body": DETAIL}, "EIO"),
    ({"html": True, "status": 200}, "EPROTO"),
    ({"half_json": True}, "EPROTO"),
    ({"body": b"[]", "status": 200}, "EPROTO"),
    ({"body": b"", "status": 200}, "EPROTO"),
    ({"redirect_to": "http://127.0.0.1:1/"}, "EPROTO"),
    ({"refuse": True}, "EHOSTUNREACH"),
]


@pytest.fixture(scope="module")
def world(make_world):
    return make_world(runs=1, checkpoints=1, settings={"timeout_s": 1.0})


@pytest.mark.served("GET training_runs/{run}")
@pytest.mark.parametrize(("effects", "name"), LISTING, ids=lambda value: str(value)[:40])
def test_failed_listing_has_the_documented_errno(world, effects, name):
    run = world.new_run("weights/1")
    headers = effects.get("headers", {}) | (NO_RETRY if "status" in effects else {})
    fault = world.server.faults.add(
        "GET training_runs/{run}/checkpoints", **effects, headers=headers, times=None
    )
    try:
        assert outcome_of(lambda: world.driver.listdir(f"{run}/checkpoints")) == name
        if effects.get("body") is DETAIL:
            assert "the message of the server" in world.errors()
        reported = [line for line in world.errors().splitlines() if f"{run}/checkpoints" in line]
        assert f"\tlist\t{name}\t" in reported[-1]
        assert "GET training_runs/{run}/checkpoints" in reported[-1]
    finally:
        fault.remove()
    world.refresh()
    assert world.driver.listdir(world.kind_directory(run)) == ["1"]


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_lookup_of_an_absent_run_is_enoent(world, status):
    fault = world.server.faults.add(
        "GET training_runs/{run}", times=None, status=status, body=DETAIL
    )
    try:
        assert outcome_of(lambda: world.driver.stat(f"runs/nobody-{status}")) == "ENOENT"
    finally:
        fault.remove()


@pytest.mark.served("GET archive")
@pytest.mark.parametrize("status", [404, 405, 410, 501])
def test_missing_endpoint_is_eopnotsupp(world, status):
    run = world.new_run("weights/1")
    fault = world.server.faults.add(
        "GET archive",
        times=None,
        status=status,
        body={"detail": "Not Found" if status in (404, 410) else "Method Not Allowed"},
        headers=NO_RETRY,
    )
    try:
        path = f"{run}/checkpoints/weights/1/archive_url"
        assert outcome_of(lambda: world.driver.read(path)) == "EOPNOTSUPP"
        assert "this server has no such endpoint" in world.errors()
    finally:
        fault.remove()


@pytest.mark.served("GET training_runs/{run}")
def test_request_timeout_is_etimedout(world):
    run = world.new_run("weights/1")
    fault = world.server.faults.add("GET training_runs/{run}/checkpoints", hang=True, times=None)
    try:
        assert outcome_of(lambda: world.driver.listdir(f"{run}/checkpoints")) == "ETIMEDOUT"
    finally:
        fault.remove()


@pytest.mark.served("GET training_runs")
def test_unreachable_server_is_ehostunreach_unless_cached(world):
    known = world.new_run("weights/1")
    unknown = world.server.account.add_run().id
    assert world.driver.listdir(world.kind_directory(known)) == ["1"]
    world.driver.listdir("runs")
    world.server.stop_listening("api")
    try:
        assert world.driver.listdir(world.kind_directory(known)) == ["1"]
        assert outcome_of(lambda: world.driver.stat("runs/unknown")) == "EHOSTUNREACH"
        assert outcome_of(lambda: world.driver.listdir(f"runs/{unknown}/checkpoints")) == (
            "EHOSTUNREACH"
        )
        path = f"{known}/checkpoints/weights/1/published"
        assert outcome_of(lambda: world.driver.write(path, b"1")) == "EHOSTUNREACH"
        assert world.driver.read(path) == b"0\n"
    finally:
        world.server.resume_listening()
        world.refresh()


def test_errors_file_does_not_contain_the_key(world):
    fault = world.server.faults.add(
        "GET training_runs",
        status=500,
        body={"detail": f"your key {world.server.api_key} is odd"},
        headers=NO_RETRY,
        times=None,
    )
    try:
        world.refresh()
        assert outcome_of(lambda: world.driver.listdir("runs")) == "EIO"
        assert "[redacted key]" in world.errors()
        assert world.server.api_key not in world.errors()
    finally:
        fault.remove()
        world.refresh()


@pytest.mark.where(profile=lambda profile: profile.requires_key)
def test_refused_key_is_eacces_and_rarely_retried(make_world):
    world = make_world(runs=3, checkpoints=1)
    world.server.behaviour.api_keys.clear()
    for run_id in world.server.account.run_ids * 3:
        assert outcome_of(lambda run_id=run_id: world.driver.stat(f"runs/{run_id}")) == "EACCES"
    assert outcome_of(lambda: world.driver.listdir("runs")) == "EACCES"
    assert world.server.journal.count("api") <= 2
    assert "Invalid API key" in world.errors()
