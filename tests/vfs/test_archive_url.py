"""Tests of archive_url: requested by open(), built once, cached until it expires."""

import threading
import urllib.request

import pytest

from tests.support.drivers import outcome_of

# The tests use sampler checkpoints, because SkyRL has no archives of other kinds.
pytestmark = pytest.mark.served("GET archive")

signed = pytest.mark.where(profile=lambda profile: not profile.serves_archives_itself)


@pytest.fixture(scope="module")
def world(make_world):
    """An account without a build limit, because the tests are one process group."""
    return make_world(runs=1, checkpoints=1, settings={"archive_build_limit": 0})


def archives(world):
    requests = world.server.journal.entries("GET archive")
    # Requests with a wrong form of the id get these two statuses.
    return sum(entry.status not in (404, 405) for entry in requests)


@pytest.mark.parametrize("kind", ["redirect", "json"])
def test_archive_url_is_a_signed_url_and_a_newline(world, kind):
    world.server.behaviour.archive_response = kind
    run = world.new_run("sampler_weights/1")
    run_id = run.partition("/")[2]
    try:
        text = world.driver.read(f"{run}/checkpoints/sampler_weights/1/archive_url").decode()
    finally:
        world.server.behaviour.archive_response = "redirect"
    origins = (f"{world.server.store_url}/archives/", f"{world.server.base_url}/api/v1/")
    assert text.startswith(origins[world.profile.serves_archives_itself])
    assert text.count("\n") == 1
    assert text.endswith("\n")
    with urllib.request.urlopen(text.strip(), timeout=10) as response:
        data = response.read()
    truth = world.server.archive(run_id, "sampler_weights/1")
    assert len(data) == truth.size_bytes
    assert data == truth.read(0, truth.size_bytes)


def test_archive_url_is_not_requested_by_metadata_operations(world):
    run = world.new_run("sampler_weights/1", "sampler_weights/2")
    for name in ("1", "2"):
        checkpoint_dir = f"{run}/checkpoints/sampler_weights/{name}"
        world.driver.listdir(checkpoint_dir)
        link = world.driver.readlink(f"{checkpoint_dir}/archive_url")
        assert world.driver.stat(f"{checkpoint_dir}/{link}").size >= 4096
        shown = world.driver.listdir(f"{checkpoint_dir}/{link.rpartition('/')[0]}")
        assert shown == ["archive_url", "files", "archive.tar", "tensors.json"]
    assert archives(world) == 0


def test_archive_url_size_is_exact_after_a_read(world):
    run = world.new_run("sampler_weights/1")
    path = f"{run}/checkpoints/sampler_weights/1/archive_url"
    link = f"{run}/checkpoints/sampler_weights/1/{world.driver.readlink(path)}"
    hint = world.driver.stat(link).size
    data = world.driver.read(path)
    assert hint >= len(data)
    assert world.eventually(lambda: world.driver.stat(link).size == len(data))


@signed
def test_archive_url_is_cached_until_shortly_before_it_expires(world):
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
def test_archive_url_of_a_checkpoint_saved_again_differs(world):
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
def test_concurrent_reads_share_one_archive_build(world, status):
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
    assert archives(world) == 3  # two responses "being built", and the archive


def test_archive_being_built_is_listed_in_stats(world):
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
    assert '"pending": []' in world.driver.read(".tinkerfs/stats.json").decode()


@pytest.mark.expect_warnings("archive_url read E")
@pytest.mark.parametrize(("status", "name"), [(403, "EACCES"), (404, "EOPNOTSUPP"), (500, "EIO")])
def test_failed_archive_request_can_be_repeated(world, status, name):
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
def test_control_files_contain_neither_urls_nor_the_key(world):
    run = world.new_run("sampler_weights/1")
    url = world.driver.read(f"{run}/checkpoints/sampler_weights/1/archive_url").decode().strip()
    signature = url.partition("X-Signature=")[2]
    assert signature
    for name in ("stats.json", "errors", "changes"):
        text = world.driver.read(f".tinkerfs/{name}").decode()
        assert signature not in text
        assert world.server.api_key not in text


def test_key_is_sent_only_to_the_api(world):
    assert all(entry.had_key for entry in world.server.journal.entries("api"))
    assert not any(entry.had_key for entry in world.server.journal.entries("store"))


def test_archive_builds_of_a_process_group_are_rate_limited(make_world):
    world = make_world(runs=0, settings={"archive_build_limit": 3})
    run = world.new_run(*(f"sampler_weights/{n}" for n in range(6)))
    paths = [f"{run}/checkpoints/sampler_weights/{n}/archive_url" for n in range(6)]
    outcomes = [outcome_of(lambda path=path: world.driver.read(path)) for path in paths]
    assert outcomes == ["OK"] * 3 + ["EBUSY"] * 3
    assert archives(world) == 3
    assert "this looks like a walk that follows links" in world.errors()
    assert outcome_of(lambda: world.driver.read(paths[0])) == "OK"  # a cached URL needs no build
    if not world.is_kernel:
        world.driver.time.advance(61)
        assert outcome_of(lambda: world.driver.read(paths[4])) == "OK"


@pytest.mark.expect_warnings("archive_url read ETIMEDOUT")
def test_archive_build_continues_after_etimedout(make_world):
    world = make_world(runs=0, settings={"archive_timeout_s": 2.0}, retry_after="0.1")
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
