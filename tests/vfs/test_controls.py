"""Tests of control files: write() acts, and read() returns the actual state."""

import pytest

from tests.support.drivers import outcome_of

YEAR = 365 * 86400


def new_checkpoint(world, **fields):
    run = world.new_run()
    world.server.account.add_checkpoint(run.partition("/")[2], "weights/1", **fields)
    world.refresh()
    checkpoint = world.server.account.checkpoint(run.partition("/")[2], "weights/1")
    return f"{run}/checkpoints/weights/1", checkpoint


@pytest.mark.served("POST publish", "DELETE publish")
@pytest.mark.parametrize(
    "value", [b"1", b"1\n", b"true", b"yes\n", b" on \n", b"TRUE", b"Yes", b"\t1"]
)
def test_published_accepts_words_that_publish(world, value):
    checkpoint_dir, checkpoint = new_checkpoint(world)
    world.driver.write(f"{checkpoint_dir}/published", value)
    assert checkpoint.is_public
    assert world.driver.read(f"{checkpoint_dir}/published") == b"1\n"
    assert b'"public": true' in world.driver.read(f"{checkpoint_dir}/info.json")


@pytest.mark.served("POST publish", "DELETE publish")
@pytest.mark.parametrize("value", [b"0", b"0\n", b"false", b"no\n", b" off \n", b"FALSE"])
def test_published_accepts_words_that_unpublish(world, value):
    checkpoint_dir, checkpoint = new_checkpoint(world, is_public=True)
    assert world.driver.read(f"{checkpoint_dir}/published") == b"1\n"
    world.driver.write(f"{checkpoint_dir}/published", value)
    assert not checkpoint.is_public
    assert world.driver.read(f"{checkpoint_dir}/published") == b"0\n"
    assert b'"public": false' in world.driver.read(f"{checkpoint_dir}/info.json")


@pytest.mark.parametrize("value", [b"2", b"maybe", b"1 0", b"\xff\xfe", b"11", b"x" * 5000])
def test_published_of_anything_else_is_einval(world, value):
    checkpoint_dir, checkpoint = new_checkpoint(world)
    assert outcome_of(lambda: world.driver.write(f"{checkpoint_dir}/published", value)) == "EINVAL"
    assert not checkpoint.is_public
    assert world.driver.read(f"{checkpoint_dir}/published") == b"0\n"
    assert not world.server.journal.count("POST publish")
    assert "write 1, true, yes or on to publish" in world.errors()


@pytest.mark.parametrize("value", [b"\n", b"  \n"])
@pytest.mark.parametrize("control", ["published", "expires_at"])
def test_control_file_ignores_white_space(world, control, value):
    checkpoint_dir, checkpoint = new_checkpoint(world)
    world.driver.write(f"{checkpoint_dir}/{control}", value)
    assert not {"POST", "PUT", "DELETE"} & {e.method for e in world.server.journal.entries("api")}
    assert not checkpoint.is_public


@pytest.mark.served("POST publish", "DELETE publish")
def test_publish_of_a_published_checkpoint_succeeds(world):
    checkpoint_dir, checkpoint = new_checkpoint(world, is_public=True)
    world.driver.write(f"{checkpoint_dir}/published", b"1")
    assert checkpoint.is_public
    assert not world.server.journal.count("POST publish")
    # The server may know more than the cached record, and respond with 409.
    world.server.faults.add(
        "DELETE publish", status=409, body={"detail": "Checkpoint is already private"}
    )
    world.driver.write(f"{checkpoint_dir}/published", b"0")
    assert world.server.journal.count("DELETE publish") == 1


@pytest.mark.served("PUT ttl")
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"3600", 3600),
        (b"315360000\n", 10 * YEAR),
        (b"12h\n", 12 * 3600),
        (b"30d", 30 * 86400),
        (b" 2w ", 14 * 86400),
    ],
)
def test_expires_at_sets_an_expiry(world, value, seconds):
    checkpoint_dir, checkpoint = new_checkpoint(world)
    before = checkpoint.time_s
    world.driver.write(f"{checkpoint_dir}/expires_at", value)
    assert checkpoint.expires_at_s == pytest.approx(before + seconds, abs=30)
    text = world.driver.read(f"{checkpoint_dir}/expires_at").decode()
    assert text.startswith("20")
    assert text.endswith("Z\n")
    assert world.driver.stat(f"{checkpoint_dir}/expires_at").size == len(text) or world.is_kernel
    if 3600 < seconds < 10 * YEAR:  # the content of the file can be written back
        world.driver.write(f"{checkpoint_dir}/expires_at", text.encode())
        assert checkpoint.expires_at_s == pytest.approx(before + seconds, abs=30)
    world.driver.write(f"{checkpoint_dir}/expires_at", b"never\n")
    assert checkpoint.expires_at_s is None
    assert world.driver.read(f"{checkpoint_dir}/expires_at") == b"never\n"


@pytest.mark.parametrize(
    ("value", "name"),
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
def test_expires_at_rejects_invalid_values(world, value, name):
    checkpoint_dir, checkpoint = new_checkpoint(world)
    assert outcome_of(lambda: world.driver.write(f"{checkpoint_dir}/expires_at", value)) == name
    assert checkpoint.expires_at_s is None
    assert world.driver.read(f"{checkpoint_dir}/expires_at") == b"never\n"
    assert not world.server.journal.count("PUT ttl")


@pytest.mark.served("POST publish", "PUT ttl")
@pytest.mark.expect_warnings("write E")
@pytest.mark.parametrize(
    ("status", "name"),
    [(403, "EACCES"), (404, "ENOENT"), (422, "EINVAL"), (418, "EIO"), (429, "EBUSY"), (500, "EIO")],
)
@pytest.mark.parametrize("control", ["published", "expires_at"])
def test_refused_change_fails_and_the_file_is_unchanged(world, control, status, name):
    checkpoint_dir, checkpoint = new_checkpoint(world)
    endpoint = {"published": "POST publish", "expires_at": "PUT ttl"}[control]
    fault = world.server.faults.add(
        endpoint,
        times=None,
        status=status,
        body={"detail": "the message of the server"},
        headers={"x-should-retry": "false"},
    )
    value, truth = {"published": (b"1", b"0\n"), "expires_at": (b"30d", b"never\n")}[control]
    try:
        assert outcome_of(lambda: world.driver.write(f"{checkpoint_dir}/{control}", value)) == name
    finally:
        fault.remove()
    assert world.driver.read(f"{checkpoint_dir}/{control}") == truth
    assert not checkpoint.is_public
    reported = [
        line for line in world.errors().splitlines() if f"/{checkpoint_dir}/{control}" in line
    ]
    assert f"\twrite\t{name}\t" in reported[-1]
    assert "the message of the server" in reported[-1]
    changed = [
        line for line in world.changes().splitlines() if f"/{checkpoint_dir}/{control}" in line
    ]
    assert "failed: " in changed[-1]
    world.driver.write(f"{checkpoint_dir}/{control}", value)
    assert world.driver.read(f"{checkpoint_dir}/{control}") != truth


@pytest.mark.served("PUT ttl")
@pytest.mark.expect_warnings("write EBUSY")
def test_change_in_conflict_is_ebusy(world):
    checkpoint_dir, _checkpoint = new_checkpoint(world)
    world.server.faults.add(
        "PUT ttl", status=409, headers={"x-should-retry": "false"}, body={"detail": "busy"}
    )
    assert outcome_of(lambda: world.driver.write(f"{checkpoint_dir}/expires_at", b"30d")) == "EBUSY"


@pytest.mark.served("POST publish", "DELETE publish")
def test_published_is_consistent_in_all_views(world):
    checkpoint_dir, _checkpoint = new_checkpoint(world)
    run = checkpoint_dir.partition("/checkpoints")[0]
    world.driver.write(f"{run}/latest/published", b"1")
    assert world.driver.read(f"{checkpoint_dir}/published") == b"1\n"
    assert world.driver.read(f"{run}/latest/published") == b"1\n"
    assert b'"public": true' in world.driver.read(f"{checkpoint_dir}/info.json")
    assert b'"public": true' in world.driver.read(f"{run}/info.json")


@pytest.mark.served("POST publish", "DELETE publish")
def test_open_control_file_reads_the_written_value(world):
    if world.kind in ("fsspec", "webdav"):
        return  # these open a file either for reading or for writing
    import os

    checkpoint_dir, checkpoint = new_checkpoint(world)
    if world.is_kernel:
        fd = os.open(world.driver.path(f"{checkpoint_dir}/published"), os.O_RDWR)
        try:
            assert os.pread(fd, 10, 0) == b"0\n"
            os.write(fd, b"1\n")
            assert os.pread(fd, 10, 0) == b"1\n"
            assert os.fstat(fd).st_size == 2
        finally:
            os.close(fd)
    else:
        filesystem, ctx = world.driver.filesystem, world.driver.call
        handle = filesystem.open(f"/{checkpoint_dir}/published", os.O_RDWR, ctx)
        assert handle.read(10, 0, ctx) == b"0\n"
        handle.write(b"1\n", ctx)
        assert handle.read(10, 0, ctx) == b"1\n"
    assert checkpoint.is_public


@pytest.mark.served("POST publish", "DELETE publish")
def test_changes_file_contains_the_calling_process(world):
    checkpoint_dir, _checkpoint = new_checkpoint(world)
    world.driver.write(f"{checkpoint_dir}/published", b"1")
    line = [line for line in world.changes().splitlines() if f"/{checkpoint_dir}/" in line][-1]
    time, path, action, actor, outcome = line.split("\t")
    assert time.endswith("Z")
    assert path == f"/{checkpoint_dir}/published"
    assert action == "publish"
    assert "] uid " in actor
    assert outcome == "done"
