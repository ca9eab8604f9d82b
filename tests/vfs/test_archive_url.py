"""archive_url: asked for when opened and never before, built once, kept while it is good."""

import threading
import urllib.request

import pytest

from tests.support.drivers import outcome_of

# Sampler checkpoints: of others SkyRL has no archive.
pytestmark = pytest.mark.served("GET archive")

signed = pytest.mark.where(profile=lambda profile: not profile.serves_archives_itself)


@pytest.fixture(scope="module")
def world(make_world):
    """An account; these tests are one process group, and start many builds."""
    return make_world(runs=1, checkpoints=1, settings={"archive_burst": 0})


def archives(world):
    asked = world.server.journal.entries("GET archive")
    # These two are answers to a wrong form of the id.
    return sum(entry.status not in (404, 405) for entry in asked)


@pytest.mark.parametrize("answer", ["redirect", "json"])
def test_it_holds_a_signed_url_of_the_whole_archive_and_a_newline(world, answer):
    world.server.behaviour.archive_answer = answer
    run = world.new_run("sampler_weights/1")
    run_id = run.partition("/")[2]
    try:
        text = world.driver.read(f"{run}/checkpoints/sampler_weights/1/archive_url").decode()
    finally:
        world.server.behaviour.archive_answer = "redirect"
    origins = (f"{world.server.store_url}/archives/", f"{world.server.base_url}/api/v1/")
    assert text.startswith(origins[world.profile.serves_archives_itself])
    assert text.count("\n") == 1
    assert text.endswith("\n")
    with urllib.request.urlopen(text.strip(), timeout=10) as response:
        data = response.read()
    truth = world.server.archive(run_id, "sampler_weights/1")
    assert len(data) == truth.size_bytes
    assert data == truth.read(0, truth.size_bytes)


def test_looking_never_asks_for_it(world):
    run = world.new_run("sampler_weights/1", "sampler_weights/2")
    for name in ("1", "2"):
        place = f"{run}/checkpoints/sampler_weights/{name}"
        world.driver.listdir(place)
        link = world.driver.readlink(f"{place}/archive_url")
        assert world.driver.stat(f"{place}/{link}").size >= 4096
        shown = world.driver.listdir(f"{place}/{link.rpartition('/')[0]}")
        assert shown == ["archive_url", "files", "archive.tar", "tensors.json"]
    assert archives(world) == 0


def test_the_size_is_exact_once_it_is_known(world):
    run = world.new_run("sampler_weights/1")
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    link = f"{run}/checkpoints/sampler_weights/1/{world.driver.readlink(path)}"
    told = world.driver.stat(link).size
    data = world.driver.read(path)
    assert told >= len(data)
    assert world.eventually(lambda: world.driver.stat(link).size == len(data))


@signed
def test_it_is_kept_while_it_is_good_and_asked_for_anew_before_it_is_not(world):
    run = world.new_run("sampler_weights/1")
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    first = world.driver.read(path)
    for _ in range(3):
        assert world.driver.read(path) == first
    assert archives(world) == 1
    if not world.is_kernel:
        world.driver.time.advance(900 - 60 - 1)
        assert world.driver.read(path) == first
        world.driver.time.advance(2)
        assert world.driver.read(path) != first
        assert archives(world) == 2
    world.refresh()
    assert world.driver.read(path) != first


@signed
def test_a_checkpoint_that_is_saved_again_has_another(world):
    run = world.new_run("sampler_weights/1")
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    link, first = world.driver.readlink(path), world.driver.read(path)
    world.server.account.add_checkpoint(
        run.partition("/")[2], "sampler_weights/1", time_s=1_900_000_000.0
    )
    world.refresh()
    assert world.eventually(lambda: world.driver.readlink(path) != link)
    assert world.driver.read(path) != first


@pytest.mark.parametrize("status", [503, 425])
def test_one_build_is_waited_for_however_many_read(world, status):
    run = world.new_run()
    world.server.account.add_checkpoint(
        run.partition("/")[2], "sampler_weights/1", building_polls=2
    )
    world.server.behaviour.building_status = status
    world.server.behaviour.retry_after = "0.05"
    world.refresh()
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    world.driver.readlink(path)
    barrier = threading.Barrier(6)
    read = []

    def reader():
        barrier.wait(10)
        read.append(world.driver.read(path))

    threads = [threading.Thread(target=reader) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        world.server.behaviour.building_status, world.server.behaviour.retry_after = 503, "1"
    assert len(read) == 6
    assert len(set(read)) == 1
    assert archives(world) == 3  # twice "being built", once there


def test_what_is_being_built_is_told(world):
    run = world.new_run("sampler_weights/1")
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    fault = world.server.faults.add("GET archive", hang=True)
    reader = threading.Thread(target=world.driver.read, args=(path,))
    reader.start()
    try:
        fault.wait_for(1)
        assert f"archive /.content/{run[5:]}" in world.driver.read(".tinkerfs/stats.json").decode()
    finally:
        fault.release()
        reader.join(10)
    assert not reader.is_alive()
    assert '"waiting": []' in world.driver.read(".tinkerfs/stats.json").decode()


@pytest.mark.expect_warnings("archive_url read E")
@pytest.mark.parametrize(("status", "name"), [(403, "EACCES"), (404, "EOPNOTSUPP"), (500, "EIO")])
def test_an_archive_that_cannot_be_had_fails_and_can_be_tried_again(world, status, name):
    run = world.new_run("sampler_weights/1")
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    world.server.faults.add(
        "GET archive",
        status=status,
        body={"detail": "Checkpoint not found, says the server"},
        headers={"x-should-retry": "false"},
    )
    assert outcome_of(lambda: world.driver.read(path)) == name
    assert "says the server" in world.errors()
    assert world.driver.read(path).startswith(b"http")


@signed
def test_no_url_and_no_key_is_told_anywhere(world):
    run = world.new_run("sampler_weights/1")
    url = world.driver.read(f"{run}/checkpoints/sampler_weights/1/archive_url").decode().strip()
    signature = url.partition("X-Signature=")[2]
    assert signature
    for name in ("stats.json", "errors", "changes"):
        text = world.driver.read(f".tinkerfs/{name}").decode()
        assert signature not in text
        assert world.server.api_key not in text


def test_the_key_is_sent_to_the_api_alone(world):
    assert all(entry.had_key for entry in world.server.journal.entries("api"))
    assert not any(entry.had_key for entry in world.server.journal.entries("store"))


def test_one_process_group_starts_so_many_builds_a_minute(make_world):
    world = make_world(runs=0, settings={"archive_burst": 3})
    run = world.new_run(*(f"sampler_weights/{n}" for n in range(6)))
    paths = [f"{run}/checkpoints/sampler_weights/{n}/archive_url" for n in range(6)]
    outcomes = [outcome_of(lambda path=path: world.driver.read(path)) for path in paths]
    assert outcomes == ["OK"] * 3 + ["EBUSY"] * 3
    assert archives(world) == 3
    assert "this looks like a walk that follows links" in world.errors()
    assert outcome_of(lambda: world.driver.read(paths[0])) == "OK"  # what is known is no build
    if not world.is_kernel:
        world.driver.time.advance(61)
        assert outcome_of(lambda: world.driver.read(paths[4])) == "OK"


@pytest.mark.expect_warnings("archive_url read ETIMEDOUT")
def test_an_archive_that_is_never_built_is_etimedout_and_not_abandoned(make_world):
    world = make_world(runs=0, settings={"archive_timeout_s": 0.5}, retry_after="0.1")
    run = world.new_run()
    checkpoint = world.server.account.add_checkpoint(
        run.partition("/")[2], "sampler_weights/1", building_polls=None
    )
    world.refresh()
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    if world.is_kernel:
        assert outcome_of(lambda: world.driver.read(path)) == "ETIMEDOUT"
        assert archives(world) > 1
    checkpoint.building_polls = 0
    assert world.driver.read(path).startswith(b"http")
