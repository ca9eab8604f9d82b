"""Archives that are refused, empty for a while, or replaced by the page of a captive portal."""

import pytest

from tests.support.drivers import outcome_of

pytestmark = pytest.mark.expect_warnings("(list|open|read|stat) E")

#: One binding: all of this is decided above the kernel.
FACES = [
    ("process", "official"),
    pytest.param(("mfusepy3", "official"), marks=pytest.mark.kernel),
]
PORTAL = {"status": 200, "html": True}


@pytest.fixture(scope="module", params=FACES, ids=lambda face: face[0])
def face(request):
    return request.param


@pytest.fixture
def world(make_world):
    """An account with a run of its own, and one of another account."""
    settings = {"archive_burst": 0, "timeout_s": 3.0}
    return make_world(runs=1, checkpoints=1, foreign_runs=1, settings=settings)


def foreign_place(world):
    (run_id,) = world.server.account.foreign_run_ids
    checkpoint = world.server.account.add_checkpoint(run_id, "weights/theirs", is_public=True)
    return f"runs/{run_id}/checkpoints/{checkpoint.id}"


def own_place(world):
    return f"{world.new_run('weights/1')}/checkpoints/weights/1"


def last_error(world):
    return world.errors().splitlines()[-1]


@pytest.mark.parametrize("words", ["Checkpoint not found", "Not Found"])
def test_refused_archive_of_another_account_is_not_a_lack(world, words):
    own, place = own_place(world), foreign_place(world)
    world.driver.listdir("runs")
    fault = world.server.faults.add("GET archive", times=None, status=404, body={"detail": words})
    for _ in range(4):
        assert outcome_of(lambda: world.driver.listdir(f"{place}/files")) == "EOPNOTSUPP"
    assert "does not give this of another account's checkpoint" in last_error(world)
    assert "no such endpoint" not in world.errors()
    fault.remove()
    # One's own are asked for all the same.
    assert world.driver.listdir(f"{own}/files")


def test_forbidden_archive_says_so(world):
    place = foreign_place(world)
    world.server.faults.add("GET archive", times=None, status=403, body={"detail": "not yours"})
    assert outcome_of(lambda: world.driver.listdir(f"{place}/files")) == "EACCES"
    assert "403: not yours" in last_error(world)
    assert "no such endpoint" not in world.errors()


def test_archive_refused_in_a_handlers_words_may_be_a_refusal(world):
    place = own_place(world)
    world.server.faults.add(
        "GET archive", times=None, status=404, body={"detail": "Checkpoint not found"}
    )
    assert outcome_of(lambda: world.driver.listdir(f"{place}/files")) == "EOPNOTSUPP"
    assert "or not for this checkpoint" in last_error(world)


@pytest.mark.parametrize("name", ["files", "archive.tar"])
def test_archive_that_is_empty_for_a_while_is_waited_for(world, name):
    place = own_place(world)
    world.server.faults.add("store", times=4, status=200, body=b"")
    if name == "files":
        assert "adapter_config.json" in world.driver.listdir(f"{place}/files")
    else:
        assert len(world.driver.read(f"{place}/archive.tar")) > 1024
    assert world.server.journal.count("store") > 4


@pytest.mark.parametrize("name", ["files", "archive.tar"])
def test_archive_that_stays_empty_says_so_and_is_not_cached(world, name):
    place = own_place(world)
    look = world.driver.listdir if name == "files" else world.driver.read
    fault = world.server.faults.add("store", times=None, status=200, body=b"")
    assert outcome_of(lambda: look(f"{place}/{name}")) == "EIO"
    assert "an empty file in place of the archive" in last_error(world)
    fault.remove()
    assert look(f"{place}/{name}")


@pytest.mark.parametrize("name", ["files", "archive.tar", "archive_url"])
def test_portal_in_place_of_the_api_gives_no_archive(world, name):
    place = own_place(world)
    look = world.driver.listdir if name == "files" else world.driver.read
    world.server.faults.add("GET archive", **PORTAL)
    assert outcome_of(lambda: look(f"{place}/{name}")) == "EPROTO"
    assert look(f"{place}/{name}")


@pytest.mark.parametrize("name", ["files", "archive.tar"])
def test_redirect_to_a_portal_gives_no_archive(world, name):
    place = own_place(world)
    look = world.driver.listdir if name == "files" else world.driver.read
    portal = world.server.faults.add("GET healthz", times=None, **PORTAL)
    # The store's first URL is refused, and so is the second: both lead to the portal.
    redirect = world.server.faults.add(
        "GET archive", times=2, redirect_to=f"{world.server.base_url}/api/v1/healthz"
    )
    assert outcome_of(lambda: look(f"{place}/{name}")) == "EPROTO"
    assert "captive portal" in last_error(world)
    assert redirect.applied == 2
    portal.remove()
    assert look(f"{place}/{name}")


def test_portal_in_place_of_the_store_gives_no_bytes(world):
    place = own_place(world)
    truth = world.driver.read(f"{place}/archive.tar")
    second = own_place(world)
    world.server.faults.add("store", times=2, **PORTAL)
    assert outcome_of(lambda: world.driver.read(f"{second}/archive.tar")) == "EPROTO"
    assert len(world.driver.read(f"{second}/archive.tar")) == len(truth)
