"""Tests of archives that are refused, empty, or replaced by a captive portal."""

import pytest

from tests.support.drivers import outcome_of

pytestmark = pytest.mark.expect_warnings("(list|open|read|stat) E")

#: One binding is enough, because the behaviour does not depend on the kernel.
VARIANTS = [
    ("process", "official"),
    pytest.param(("mfusepy3", "official"), marks=pytest.mark.kernel),
]
PORTAL = {"status": 200, "html": True}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant[0])
def variant(request):
    return request.param


@pytest.fixture
def world(make_world):
    """An account with a run, and a run of another account."""
    settings = {"archive_build_limit": 0, "timeout_s": 3.0}
    return make_world(runs=1, checkpoints=1, foreign_runs=1, settings=settings)


def foreign_checkpoint_dir(world):
    (run_id,) = world.server.account.foreign_run_ids
    checkpoint = world.server.account.add_checkpoint(run_id, "weights/theirs", is_public=True)
    return f"runs/{run_id}/checkpoints/{checkpoint.id}"


def own_checkpoint_dir(world):
    return f"{world.new_run('weights/1')}/checkpoints/weights/1"


def last_error(world):
    return world.errors().splitlines()[-1]


@pytest.mark.parametrize("detail", ["Checkpoint not found", "Not Found"])
def test_refused_foreign_archive_is_not_a_missing_endpoint(world, detail):
    own, checkpoint_dir = own_checkpoint_dir(world), foreign_checkpoint_dir(world)
    world.driver.listdir("runs")
    fault = world.server.faults.add("GET archive", times=None, status=404, body={"detail": detail})
    for _ in range(4):
        assert outcome_of(lambda: world.driver.listdir(f"{checkpoint_dir}/files")) == "EOPNOTSUPP"
    assert "does not provide this for another account's checkpoint" in last_error(world)
    assert "no such endpoint" not in world.errors()
    fault.remove()
    # Archives of own checkpoints are still requested.
    assert world.driver.listdir(f"{own}/files")


def test_forbidden_archive_is_reported(world):
    checkpoint_dir = foreign_checkpoint_dir(world)
    world.server.faults.add("GET archive", times=None, status=403, body={"detail": "not yours"})
    assert outcome_of(lambda: world.driver.listdir(f"{checkpoint_dir}/files")) == "EACCES"
    assert "403: not yours" in last_error(world)
    assert "no such endpoint" not in world.errors()


def test_unspecific_404_mentions_both_possible_causes(world):
    checkpoint_dir = own_checkpoint_dir(world)
    world.server.faults.add(
        "GET archive", times=None, status=404, body={"detail": "Checkpoint not found"}
    )
    assert outcome_of(lambda: world.driver.listdir(f"{checkpoint_dir}/files")) == "EOPNOTSUPP"
    assert "or not for this checkpoint" in last_error(world)


@pytest.mark.parametrize("name", ["files", "archive.tar"])
def test_temporarily_empty_archive_is_retried(world, name):
    checkpoint_dir = own_checkpoint_dir(world)
    world.server.faults.add("store", times=4, status=200, body=b"")
    if name == "files":
        assert "adapter_config.json" in world.driver.listdir(f"{checkpoint_dir}/files")
    else:
        assert len(world.driver.read(f"{checkpoint_dir}/archive.tar")) > 1024
    assert world.server.journal.count("store") > 4


@pytest.mark.parametrize("name", ["files", "archive.tar"])
def test_permanently_empty_archive_fails_and_is_not_cached(world, name):
    checkpoint_dir = own_checkpoint_dir(world)
    read = world.driver.listdir if name == "files" else world.driver.read
    fault = world.server.faults.add("store", times=None, status=200, body=b"")
    assert outcome_of(lambda: read(f"{checkpoint_dir}/{name}")) == "EIO"
    assert "an empty file in place of the archive" in last_error(world)
    fault.remove()
    assert read(f"{checkpoint_dir}/{name}")


@pytest.mark.parametrize("name", ["files", "archive.tar", "archive_url"])
def test_portal_in_place_of_the_api_is_eproto(world, name):
    checkpoint_dir = own_checkpoint_dir(world)
    read = world.driver.listdir if name == "files" else world.driver.read
    world.server.faults.add("GET archive", **PORTAL)
    assert outcome_of(lambda: read(f"{checkpoint_dir}/{name}")) == "EPROTO"
    assert read(f"{checkpoint_dir}/{name}")


@pytest.mark.parametrize("name", ["files", "archive.tar"])
def test_redirect_to_a_portal_is_eproto(world, name):
    checkpoint_dir = own_checkpoint_dir(world)
    read = world.driver.listdir if name == "files" else world.driver.read
    portal = world.server.faults.add("GET healthz", times=None, **PORTAL)
    # Both URLs of the store lead to the portal and are rejected.
    redirect = world.server.faults.add(
        "GET archive", times=2, redirect_to=f"{world.server.base_url}/api/v1/healthz"
    )
    assert outcome_of(lambda: read(f"{checkpoint_dir}/{name}")) == "EPROTO"
    assert "captive portal" in last_error(world)
    assert redirect.applied == 2
    portal.remove()
    assert read(f"{checkpoint_dir}/{name}")


def test_portal_in_place_of_the_store_is_eproto(world):
    checkpoint_dir = own_checkpoint_dir(world)
    truth = world.driver.read(f"{checkpoint_dir}/archive.tar")
    second = own_checkpoint_dir(world)
    world.server.faults.add("store", times=2, **PORTAL)
    assert outcome_of(lambda: world.driver.read(f"{second}/archive.tar")) == "EPROTO"
    assert len(world.driver.read(f"{second}/archive.tar")) == len(truth)
