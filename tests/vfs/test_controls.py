"""Controls act inside write, and read the truth."""

import pytest

from tests.support.drivers import outcome_of

YEAR = 365 * 86400


def place_of(world, **fields):
    run = world.new_run()
    world.server.account.add_checkpoint(run.partition("/")[2], "weights/1", **fields)
    world.refresh()
    checkpoint = world.server.account.checkpoint(run.partition("/")[2], "weights/1")
    return f"{run}/checkpoints/weights/1", checkpoint


@pytest.mark.served("POST publish")
@pytest.mark.parametrize(
    "word", [b"1", b"1\n", b"true", b"yes\n", b" on \n", b"TRUE", b"Yes", b"\t1"]
)
def test_words_that_publish(world, word):
    place, checkpoint = place_of(world)
    world.driver.write(f"{place}/published", word)
    assert checkpoint.is_public
    assert world.driver.read(f"{place}/published") == b"1\n"
    assert b'"public": true' in world.driver.read(f"{place}/info.json")


@pytest.mark.served("POST publish")
@pytest.mark.parametrize("word", [b"0", b"0\n", b"false", b"no\n", b" off \n", b"FALSE"])
def test_words_that_unpublish(world, word):
    place, checkpoint = place_of(world, is_public=True)
    assert world.driver.read(f"{place}/published") == b"1\n"
    world.driver.write(f"{place}/published", word)
    assert not checkpoint.is_public
    assert world.driver.read(f"{place}/published") == b"0\n"
    assert b'"public": false' in world.driver.read(f"{place}/info.json")


@pytest.mark.parametrize("word", [b"2", b"maybe", b"1 0", b"\xff\xfe", b"11", b"x" * 5000])
def test_anything_else_is_einval_and_changes_nothing(world, word):
    place, checkpoint = place_of(world)
    assert outcome_of(lambda: world.driver.write(f"{place}/published", word)) == "EINVAL"
    assert not checkpoint.is_public
    assert world.driver.read(f"{place}/published") == b"0\n"
    assert not world.server.journal.count("POST publish")
    assert "write 1, true, yes or on to publish" in world.errors()


@pytest.mark.parametrize("word", [b"\n", b"  \n"])
@pytest.mark.parametrize("control", ["published", "expires_at"])
def test_white_space_alone_is_ignored(world, control, word):
    place, checkpoint = place_of(world)
    world.driver.write(f"{place}/{control}", word)
    assert not {"POST", "PUT", "DELETE"} & {e.method for e in world.server.journal.entries("api")}
    assert not checkpoint.is_public


@pytest.mark.served("POST publish")
def test_already_so_is_success(world):
    place, checkpoint = place_of(world, is_public=True)
    world.driver.write(f"{place}/published", b"1")
    assert checkpoint.is_public
    assert not world.server.journal.count("POST publish")
    # Also where only the server knows that it is: its 409 says so.
    world.server.faults.add(
        "DELETE publish", status=409, body={"detail": "Checkpoint is already private"}
    )
    world.driver.write(f"{place}/published", b"0")
    assert world.server.journal.count("DELETE publish") == 1


@pytest.mark.served("PUT ttl")
@pytest.mark.parametrize(
    ("word", "seconds"),
    [
        (b"3600", 3600),
        (b"315360000\n", 10 * YEAR),
        (b"12h\n", 12 * 3600),
        (b"30d", 30 * 86400),
        (b" 2w ", 14 * 86400),
    ],
)
def test_an_expiry_is_set(world, word, seconds):
    place, checkpoint = place_of(world)
    before = checkpoint.time_s
    world.driver.write(f"{place}/expires_at", word)
    assert checkpoint.expires_at_s == pytest.approx(before + seconds, abs=30)
    text = world.driver.read(f"{place}/expires_at").decode()
    assert text.startswith("20")
    assert text.endswith("Z\n")
    assert world.driver.stat(f"{place}/expires_at").size == len(text) or world.is_kernel
    if 3600 < seconds < 10 * YEAR:  # what it reads can be written
        world.driver.write(f"{place}/expires_at", text.encode())
        assert checkpoint.expires_at_s == pytest.approx(before + seconds, abs=30)
    world.driver.write(f"{place}/expires_at", b"never\n")
    assert checkpoint.expires_at_s is None
    assert world.driver.read(f"{place}/expires_at") == b"never\n"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        (b"3599", "ERANGE"),
        (b"315360001", "ERANGE"),
        (b"-1", "ERANGE"),
        (b"59m", "ERANGE"),
        (b"2020-01-01T00:00:00Z", "ERANGE"),
        (b"9999-01-01T00:00:00Z", "ERANGE"),
        (b"soon", "EINVAL"),
        (b"12 parsecs", "EINVAL"),
        (b"2030-01-01", "EINVAL"),
    ],
)
def test_no_expiry_is_set(world, word, name):
    place, checkpoint = place_of(world)
    assert outcome_of(lambda: world.driver.write(f"{place}/expires_at", word)) == name
    assert checkpoint.expires_at_s is None
    assert world.driver.read(f"{place}/expires_at") == b"never\n"
    assert not world.server.journal.count("PUT ttl")


@pytest.mark.served("POST publish", "PUT ttl")
@pytest.mark.expect_warnings("write E")
@pytest.mark.parametrize(
    ("status", "name"),
    [(403, "EACCES"), (404, "ENOENT"), (422, "EINVAL"), (418, "EIO"), (429, "EBUSY"), (500, "EIO")],
)
@pytest.mark.parametrize("control", ["published", "expires_at"])
def test_what_the_server_refuses_fails_and_the_file_reads_the_truth(world, control, status, name):
    place, checkpoint = place_of(world)
    endpoint = {"published": "POST publish", "expires_at": "PUT ttl"}[control]
    fault = world.server.faults.add(
        endpoint,
        times=None,
        status=status,
        body={"detail": "the server's own words"},
        headers={"x-should-retry": "false"},
    )
    word, truth = {"published": (b"1", b"0\n"), "expires_at": (b"30d", b"never\n")}[control]
    try:
        assert outcome_of(lambda: world.driver.write(f"{place}/{control}", word)) == name
    finally:
        fault.remove()
    assert world.driver.read(f"{place}/{control}") == truth
    assert not checkpoint.is_public
    told = [line for line in world.errors().splitlines() if f"/{place}/{control}" in line]
    assert f"\twrite\t{name}\t" in told[-1]
    assert "the server's own words" in told[-1]
    changed = [line for line in world.changes().splitlines() if f"/{place}/{control}" in line]
    assert "failed: " in changed[-1]
    world.driver.write(f"{place}/{control}", word)
    assert world.driver.read(f"{place}/{control}") != truth


@pytest.mark.served("PUT ttl")
@pytest.mark.expect_warnings("write EBUSY")
def test_a_change_conflicts_as_the_api_says(world):
    place, _checkpoint = place_of(world)
    world.server.faults.add(
        "PUT ttl", status=409, headers={"x-should-retry": "false"}, body={"detail": "busy"}
    )
    assert outcome_of(lambda: world.driver.write(f"{place}/expires_at", b"30d")) == "EBUSY"


@pytest.mark.served("POST publish")
def test_the_flag_is_the_same_in_every_place_that_shows_it(world):
    place, _checkpoint = place_of(world)
    run = place.partition("/checkpoints")[0]
    world.driver.write(f"{run}/latest/published", b"1")
    assert world.driver.read(f"{place}/published") == b"1\n"
    assert world.driver.read(f"{run}/latest/published") == b"1\n"
    assert b'"public": true' in world.driver.read(f"{place}/info.json")
    assert b'"public": true' in world.driver.read(f"{run}/info.json")


@pytest.mark.served("POST publish")
def test_a_control_that_is_open_reads_what_was_written(world):
    if world.kind == "fsspec":
        return  # which opens for the one or the other
    import os

    place, checkpoint = place_of(world)
    if world.is_kernel:
        fd = os.open(world.driver.path(f"{place}/published"), os.O_RDWR)
        try:
            assert os.pread(fd, 10, 0) == b"0\n"
            os.write(fd, b"1\n")
            assert os.pread(fd, 10, 0) == b"1\n"
            assert os.fstat(fd).st_size == 2
        finally:
            os.close(fd)
    else:
        filesystem, call = world.driver.filesystem, world.driver.call
        handle = filesystem.open(f"/{place}/published", os.O_RDWR, call)
        assert handle.read(10, 0, call) == b"0\n"
        handle.write(b"1\n", call)
        assert handle.read(10, 0, call) == b"1\n"
    assert checkpoint.is_public


@pytest.mark.served("POST publish")
def test_who_asked_stands_in_changes(world):
    place, _checkpoint = place_of(world)
    world.driver.write(f"{place}/published", b"1")
    line = [line for line in world.changes().splitlines() if f"/{place}/" in line][-1]
    time, path, what, who, ending = line.split("\t")
    assert time.endswith("Z")
    assert path == f"/{place}/published"
    assert what == "publish"
    assert "] uid " in who
    assert ending == "done"
