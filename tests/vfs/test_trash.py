"""Tests of `--trash`: removed checkpoints expire, are hidden, can be restored."""

import json
import posixpath
import re
import time

import pytest

from tests.support.account import deletes, new_run
from tests.support.drivers import outcome_of
from tinkerfs import name_encoding

DAY_S = 86_400
TRASH = ".tinkerfs/trash"
TTL = "PUT ttl"

SETTINGS = {"trash_s": 30.0 * DAY_S, "ttl_s": 3600.0}

pytestmark = pytest.mark.served("DELETE checkpoint")
expires = pytest.mark.served(TTL)
never_expires = pytest.mark.where(profile=lambda profile: TTL in profile.missing)


@pytest.fixture(scope="module")
def world(make_world):
    """An account with a trash of 30 days."""
    return make_world(settings=SETTINGS, runs=2, checkpoints=3)


def trash_link(run, checkpoint_id):
    key = (run.partition("/")[2], *checkpoint_id.split("/", 1))
    return f"{TRASH}/{name_encoding.encode_composite(key)}"


def stored(world, run, checkpoint_id):
    return world.server.account.checkpoint(run.partition("/")[2], checkpoint_id)


def ttls(world):
    """Return the TTLs of the requests to the server."""
    return [json.loads(entry.body)["ttl_seconds"] for entry in world.server.journal.entries(TTL)]


def account_totals(world):
    world.driver.listdir("runs")
    return json.loads(world.driver.read(".tinkerfs/stats.json"))["account"]


def now_s(world):
    return world.driver.time.now if world.driver.time else time.time()


@expires
def test_rmtree_with_trash_sets_an_expiry_and_hides(world):
    run = world.new_run("weights/1", "weights/2", "sampler_weights/1")
    for saved_id in ("weights/2", "sampler_weights/1"):
        stored(world, run, saved_id).is_public = True
    world.refresh()
    name = posixpath.basename(trash_link(run, "weights/2"))
    sampler = posixpath.basename(trash_link(run, "sampler_weights/1"))
    views = {"checkpoints": name, "published": name, "adapters": sampler}
    for view, shown in views.items():
        assert shown in world.driver.listdir(view)
    directory = f"{run}/checkpoints"
    world.driver.listdir(f"{directory}/weights")
    before = account_totals(world)
    outcomes = world.driver.remove(
        f"rmtree {directory}/weights/2", f"rmtree {directory}/sampler_weights/1"
    )
    assert outcomes == ["OK", "OK"]
    assert deletes(world.server) == 0
    assert ttls(world) == [30 * DAY_S] * 2
    assert stored(world, run, "weights/2") is not None

    assert world.driver.listdir(f"{directory}/weights") == ["1"]
    assert world.driver.listdir(directory) == ["weights"]
    assert world.driver.listdir(run) == ["info.json", "checkpoints", "latest"]
    assert world.eventually(lambda: world.driver.readlink(f"{run}/latest").endswith("weights/1"))
    last = json.loads(world.driver.read(f"{run}/info.json"))["last_checkpoint"]
    assert last["checkpoint_id"] == "weights/1"
    for view in (*views, "expiring"):
        assert not {name, sampler} & set(world.driver.listdir(view))
        for entry in (name, sampler):
            assert world.eventually(
                lambda path=f"{view}/{entry}": (
                    outcome_of(lambda: world.driver.stat(path)) == "ENOENT"
                )
            )
    for path in (f"{directory}/weights/2", f"{directory}/2"):
        assert outcome_of(lambda path=path: world.driver.stat(path)) == "ENOENT"
    after = account_totals(world)
    assert after["checkpoints"] == before["checkpoints"] - 2
    assert after["size_bytes"] < before["size_bytes"]
    assert {name, sampler} <= set(world.driver.listdir(TRASH))
    assert "move to the trash" in world.changes()


@expires
@pytest.mark.served("GET archive")
def test_trash_link_leads_to_what_was_removed(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    info = json.loads(world.driver.read(f"{checkpoint_dir}/info.json"))
    members = world.driver.listdir(f"{checkpoint_dir}/files")
    data = world.driver.read(f"{checkpoint_dir}/files/{members[0]}")
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]
    link = trash_link(run, "weights/1")
    status = world.driver.stat(link)
    assert status.is_link
    assert status.mtime_ns / 1e9 == pytest.approx(now_s(world) + 30 * DAY_S, abs=60)
    target = posixpath.join(TRASH, world.driver.readlink(link))
    assert world.driver.stat(target).is_directory
    assert posixpath.basename(target) not in world.driver.listdir(TRASH)
    shown = json.loads(world.driver.read(f"{link}/info.json"))
    assert shown.pop("expires_at") is not None
    assert shown == {name: value for name, value in info.items() if name != "expires_at"}
    assert world.driver.read(f"{link}/tinker_path").endswith(b"/weights/1\n")
    shown = world.driver.read(f"{link}/expires_at").decode()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\n", shown)
    assert world.driver.listdir(f"{link}/files") == members
    assert world.driver.read(f"{link}/files/{members[0]}") == data


@expires
@pytest.mark.parametrize("previous_s", [None, 60 * DAY_S, 2 * DAY_S])
def test_never_in_trash_restores_the_previous_expiry(world, previous_s):
    run = world.new_run("weights/1")
    checkpoint = stored(world, run, "weights/1")
    previous = None if previous_s is None else int(now_s(world)) + previous_s
    checkpoint.expires_at_s = previous
    world.refresh()
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    before = world.driver.read(f"{checkpoint_dir}/expires_at")
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]
    # An expiry that is earlier than that of the trash is unchanged.
    is_unchanged = previous_s == 2 * DAY_S
    assert ttls(world) == ([] if is_unchanged else [30 * DAY_S])
    assert world.driver.listdir(world.kind_directory(run)) == []
    world.driver.write(f"{trash_link(run, 'weights/1')}/expires_at", b"never\n")
    assert len(ttls(world)) == (0 if is_unchanged else 2)
    assert checkpoint.expires_at_s == (previous and pytest.approx(previous, abs=60))
    assert world.driver.listdir(world.kind_directory(run)) == ["1"]
    world.refresh()
    after = world.driver.read(f"{checkpoint_dir}/expires_at")
    assert after == before if previous_s is None else after[:4] == before[:4]
    assert posixpath.basename(trash_link(run, "weights/1")) not in world.driver.listdir(TRASH)
    assert "restore from the trash" in world.changes()


@expires
def test_rmtree_of_all_checkpoints_with_trash_empties_the_run(world):
    run = world.new_run("weights/1", "weights/2", "sampler_weights/1")
    assert world.driver.remove(f"rmtree {run}/checkpoints") == ["OK"]
    assert world.driver.listdir(f"{run}/checkpoints") == []
    assert len(stored_names(world, run)) == 3
    assert world.driver.listdir(run) == ["info.json", "checkpoints"]


def stored_names(world, run):
    return [c.id for c in world.server.account.run(run.partition("/")[2]).checkpoints]


@expires
def test_checkpoint_saved_again_is_independent_of_the_trash(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]
    if world.driver.time:
        world.driver.time.advance(1)
    world.server.account.add_checkpoint(run.partition("/")[2], "weights/1")
    world.refresh()
    assert world.driver.listdir(world.kind_directory(run)) == ["1"]
    assert world.driver.read(f"{checkpoint_dir}/expires_at") == b"never\n"
    name = posixpath.basename(trash_link(run, "weights/1"))
    assert name not in world.driver.listdir(TRASH)
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]
    assert world.driver.listdir(world.kind_directory(run)) == []
    assert name in world.driver.listdir(TRASH)


@expires
@pytest.mark.parametrize("ended_by", ["deleted", "cleared"])
def test_trash_omits_checkpoints_that_changed_elsewhere(world, ended_by):
    run = world.new_run("weights/1")
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/1") == ["OK"]
    world.refresh()
    name = posixpath.basename(trash_link(run, "weights/1"))
    assert name in world.driver.listdir(TRASH)
    if ended_by == "deleted":
        world.server.account.delete_checkpoint(run.partition("/")[2], "weights/1")
    else:
        stored(world, run, "weights/1").expires_at_s = None
    world.refresh()
    assert name not in world.driver.listdir(TRASH)
    assert outcome_of(lambda: world.driver.read(f"{TRASH}/{name}/tinker_path")) == "ENOENT"
    assert world.driver.listdir(world.kind_directory(run)) == (
        [] if ended_by == "deleted" else ["1"]
    )


@expires
@pytest.mark.expect_warnings("rmdir E")
@pytest.mark.parametrize(
    ("status", "name"), [(403, "EACCES"), (404, "ENOENT"), (409, "EBUSY"), (500, "EIO")]
)
def test_rmtree_with_a_refused_expiry_restores_it(world, status, name):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    fault = world.server.faults.add(
        TTL,
        status=status,
        body={"detail": "the message of the server"},
        headers={"x-should-retry": "false"},
        times=None,
    )
    try:
        [outcome] = world.driver.remove(f"rmtree {checkpoint_dir}")
    finally:
        fault.remove()
    assert outcome in (name, "EOPNOTSUPP" if status == 404 else name)
    assert "info.json" in world.driver.listdir(checkpoint_dir)
    assert "the message of the server" in world.changes()
    assert posixpath.basename(trash_link(run, "weights/1")) not in world.driver.listdir(TRASH)
    assert deletes(world.server) == 0
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]


@expires
@pytest.mark.expect_warnings("rmdir EBUSY")
def test_rmtree_after_a_lost_response_keeps_a_newer_one(world):
    run = world.new_run("weights/1")
    checkpoint = stored(world, run, "weights/1")

    def save_again():
        run_id = run.partition("/")[2]
        world.server.account.add_checkpoint(run_id, "weights/1", time_s=checkpoint.time_s + 1)

    world.server.faults.add(TTL, call=save_again, status=503, headers={"Retry-After": "0"})
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/1") == ["EBUSY"]
    assert stored(world, run, "weights/1").expires_at_s is None
    assert world.driver.listdir(world.kind_directory(run)) == ["1"]
    assert posixpath.basename(trash_link(run, "weights/1")) not in world.driver.listdir(TRASH)


@expires
def test_rmtree_after_a_lost_response_succeeds(world):
    run = world.new_run("weights/1")
    checkpoint = stored(world, run, "weights/1")

    def carry_out():
        checkpoint.expires_at_s = int(now_s(world)) + 30 * DAY_S

    world.server.faults.add(TTL, call=carry_out, status=503, headers={"Retry-After": "0"})
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/1") == ["OK"]
    assert len(ttls(world)) == 1
    assert world.driver.listdir(world.kind_directory(run)) == []
    assert posixpath.basename(trash_link(run, "weights/1")) in world.driver.listdir(TRASH)


@expires
@pytest.mark.expect_warnings("write E")
def test_expires_at_in_trash_accepts_only_never(world):
    run = world.new_run("weights/1")
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/1") == ["OK"]
    control = f"{trash_link(run, 'weights/1')}/expires_at"
    world.server.journal.clear()
    for text in (b"7d", b"sometimes", b"2030-01-31T12:00:00Z"):
        assert outcome_of(lambda text=text: world.driver.write(control, text)) == "EINVAL"
    world.driver.write(control, b" \n")
    assert ttls(world) == []
    world.driver.write(control, b" Never ")
    assert ttls(world) == [None]


@expires
@pytest.mark.expect_warnings("EPERM")
def test_removal_in_the_trash_is_eperm(world):
    run = world.new_run("weights/1")
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/1") == ["OK"]
    link = trash_link(run, "weights/1")
    target = posixpath.join(TRASH, world.driver.readlink(link))
    world.server.journal.clear()
    for step in (f"unlink {link}", f"rmtree {target}", f"rmdir {target}", f"rmtree {TRASH}"):
        assert world.driver.remove(step) == ["EPERM"]
    assert world.server.journal.count(TTL) == deletes(world.server) == 0
    assert "tinker_path" in world.driver.listdir(link)


@expires
def test_trash_takes_one_listing_per_run(make_world):
    world = make_world(settings=SETTINGS, runs=5)
    assert world.driver.listdir(TRASH) == []
    assert world.server.journal.count() == 0
    removed = [world.new_run("weights/1", "weights/2", "weights/3") for _ in range(3)]
    for run in removed:
        directory = f"{run}/checkpoints/weights"
        assert world.driver.remove(f"rmtree {directory}/1", f"rmtree {directory}/2") == ["OK", "OK"]
    world.refresh()
    world.server.journal.clear()
    listed = world.driver.listdir(TRASH)
    assert len(listed) == 6
    for name in listed:
        world.driver.stat(f"{TRASH}/{name}")
        world.driver.readlink(f"{TRASH}/{name}")
    assert world.server.journal.endpoints() == {"GET training_runs/{run}/checkpoints": 3}


@expires
def test_trash_of_hostile_names_is_listed_and_restored(world):
    names = ["x" * 300, "a@b", "new\nline", "\udcff\udcfe", "HEAD", "ü", "..", "%41"]
    run = world.new_run(*(f"weights/{name}" for name in names))
    directory = f"{run}/checkpoints/weights"
    steps = [f"rmtree {directory}/{name_encoding.encode(name)}" for name in names]
    assert world.driver.remove(*steps) == ["OK"] * len(names)
    assert world.driver.listdir(directory) == []
    listed = [name for name in world.driver.listdir(TRASH) if run.partition("/")[2] in name]
    assert len(listed) == len(names)
    for name in listed:
        assert world.driver.read(f"{TRASH}/{name}/tinker_path").startswith(b"tinker://")
        assert world.driver.readlink(f"{TRASH}/{name}/files").startswith("../../../.content/")
        world.driver.write(f"{TRASH}/{name}/expires_at", b"never")
    assert sorted(world.driver.listdir(directory)) == sorted(map(name_encoding.encode, names))


@expires
def test_rmtree_with_trash_does_not_affect_other_runs(world):
    run = world.new_run("weights/1")
    other = f"runs/{new_run(world.server, 'weights/1')}"
    world.refresh()
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/1") == ["OK"]
    assert world.driver.listdir(f"{other}/checkpoints/weights") == ["1"]
    assert world.driver.readlink(f"{other}/latest") == "checkpoints/weights/1"


@never_expires
@pytest.mark.expect_warnings("rmdir EOPNOTSUPP")
def test_rmtree_without_expiries_removes_nothing(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    # The errno has two names; a child process reports the one that Python prefers.
    assert world.driver.remove(f"rmtree {checkpoint_dir}") in (["EOPNOTSUPP"], ["ENOTSUP"])
    assert deletes(world.server) == 0
    assert "info.json" in world.driver.listdir(checkpoint_dir)
    assert world.driver.listdir(TRASH) == []
    assert "--trash needs a server with expiries; nothing was removed" in world.errors()
