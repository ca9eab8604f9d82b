"""Removal by the rules, and what becomes of what was only unlinked."""

import pytest

from tests.support.account import deletes, tells_last

FILES = [
    "info.json",
    "archive_url",
    "published",
    "expires_at",
    "tinker_path",
    "files",
    "archive.tar",
    "tensors.json",
]


def test_removing_a_checkpoint_s_folder_deletes_it(world):
    run = world.new_run("weights/1", "weights/2")
    place = f"{run}/checkpoints/weights/1"
    assert world.driver.remove(f"rmtree {place}") == ["OK"]
    # Of which the first may have tried the form of the id that the server does not take.
    assert deletes(world.server) in (1, 2)
    left = world.server.account.run(run.partition("/")[2]).checkpoints
    assert [c.id for c in left] == ["weights/2"]
    assert world.driver.listdir(world.group(run)) == ["2"]
    assert place in world.changes()


@pytest.mark.where(profile=tells_last)
def test_every_listing_agrees_at_once(world):
    run = world.new_run("weights/1", "weights/2", "sampler_weights/1")
    world.driver.listdir("runs")
    assert world.driver.readlink(f"{run}/latest") == "checkpoints/weights/2"
    place = f"{run}/checkpoints"
    assert world.driver.remove(f"rmtree {place}/weights/2") == ["OK"]
    assert world.eventually(
        lambda: world.driver.readlink(f"{run}/latest") == "checkpoints/weights/1"
    )
    assert world.driver.remove(f"rmtree {place}/weights/1") == ["OK"]
    assert world.driver.listdir(run) == ["info.json", "checkpoints", "latest_sampler"]
    assert world.driver.listdir(place) == ["sampler_weights"]


def test_by_steps(world):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    steps = [f"rmdir {place}"]
    steps += [step for name in FILES for step in (f"unlink {place}/{name}", f"rmdir {place}")]
    steps += [f"rmdir {run}/checkpoints/weights", f"rmdir {run}/checkpoints"]
    outcomes = world.driver.remove(*steps)
    assert outcomes == ["ENOTEMPTY"] + ["OK", "ENOTEMPTY"] * (len(FILES) - 1) + ["OK", "OK"] + [
        "OK",
        "OK",
    ]
    assert deletes(world.server) == 1


@pytest.mark.parametrize(
    "step",
    [
        "unlink README.md",
        "rmdir runs",
        "rmdir .tinkerfs",
        "rmdir .content",
        "unlink .tinkerfs/errors",
        "unlink .tinkerfs/refresh",
        "unlink {run}/info.json",
        pytest.param("unlink {run}/latest", marks=pytest.mark.where(profile=tells_last)),
        "rmdir {run}",
        "rmtree {run}",
        pytest.param("rmtree runs", marks=pytest.mark.served("GET training_runs")),
        "rmtree .content",
    ],
)
def test_nothing_else_can_be_removed_and_who_tried_may_remove_nothing(world, step):
    run = world.new_run("weights/1", "weights/2")
    place = f"{run}/checkpoints/weights"
    steps = [step.format(run=run), f"rmtree {place}/1", f"unlink {place}/2/info.json"]
    assert world.driver.remove(*steps, f"rmdir {place}/2") == ["EPERM"] * 4
    assert deletes(world.server) == 0
    assert "EPERM" in world.errors()
    # Somebody else may.
    assert world.driver.remove(f"rmtree {place}/1") == ["OK"]


def test_a_full_folder_that_is_no_checkpoint_is_enotempty_and_no_refusal(world):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints"
    steps = [f"rmdir {place}", f"rmdir {world.pgid(run)}", f"rmtree {place}"]
    assert world.driver.remove(*steps) == ["ENOTEMPTY", "ENOTEMPTY", "OK"]
    assert world.driver.listdir(place) == []


def test_what_is_not_there_cannot_be_removed(world):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights"
    steps = [f"unlink {place}/1/nothing", f"rmdir {place}/2", f"rmdir {place}/1/info.json"]
    assert world.driver.remove(*steps) == ["ENOENT", "ENOENT", "ENOTDIR"]
    assert world.driver.remove(f"unlink {place}/1") in (["EISDIR"], ["EPERM"])
    assert deletes(world.server) == 0


@pytest.mark.expect_warnings("rmdir E")
@pytest.mark.parametrize(("status", "name"), [(403, "EACCES"), (404, "ENOENT"), (409, "EBUSY")])
def test_a_refusal_of_the_server_is_told_and_brings_everything_back(world, status, name):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    fault = world.server.faults.add(
        "DELETE checkpoint",
        status=status,
        body={"detail": "the server's words"},
        headers={"x-should-retry": "false"},
        times=None,
    )
    try:
        assert world.driver.remove(f"rmtree {place}") == [name]
    finally:
        fault.remove()
    assert world.driver.listdir(place) == FILES
    assert "the server's words" in world.changes()
    assert world.driver.remove(f"rmtree {place}") == ["OK"]


def test_unlinked_names_are_hidden_from_their_group_alone(world):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    steps = [f"unlink {place}/info.json", f"unlink {place}/published", f"listdir {place}"]
    left = [name for name in FILES if name not in ("info.json", "published")]
    assert world.driver.remove(*steps) == ["OK", "OK", " ".join(left)]
    if world.driver.kind != "fsspec":  # whose group is this process's own
        assert world.driver.listdir(place) == FILES
    assert deletes(world.server) == 0


def test_rmdir_of_what_another_group_emptied_is_enotempty(world):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    emptied = world.driver.remove(*(f"unlink {place}/{name}" for name in FILES))
    assert emptied == ["OK"] * len(FILES)
    # Of fsspec another remover is the same group, a minute later.
    assert world.driver.remove(f"rmdir {place}") == ["ENOTEMPTY"]
    assert deletes(world.server) == 0
    assert world.driver.remove(f"rmtree {place}") == ["OK"]


def test_what_was_unlinked_is_back_after_a_minute(world):
    if world.is_kernel:
        return  # whose clock is the machine's
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    left = " ".join(name for name in FILES if name not in ("info.json", "published"))
    steps = [f"unlink {place}/info.json", f"unlink {place}/published", f"listdir {place}"]
    later = ["advance 59", f"listdir {place}", "advance 2", f"listdir {place}"]
    outcomes = world.driver.remove(*steps, *later)
    assert outcomes == ["OK", "OK", left, "OK", left, "OK", " ".join(FILES)]
    assert deletes(world.server) == 0


LINKS = ("archive_url", "files", "archive.tar", "tensors.json")


def test_what_copied_a_checkpoint_may_not_remove_it(world):
    if world.driver.kind == "fsspec":
        return  # it follows links, and so copies the weights
    run = world.new_run("weights/1", "weights/2")
    place = f"{run}/checkpoints/weights/1"
    steps = [f"read{'link' * (name in LINKS)} {place}/{name}" for name in FILES]
    removal = [f"rmtree {place}", f"unlink {place}/files", f"rmdir {place}", f"listdir {place}"]
    outcomes = world.driver.remove(*steps, *removal)
    assert outcomes == ["OK"] * len(FILES) + ["EPERM"] * 3 + [" ".join(FILES)]
    assert "tinkerfs get PATH DEST, then rm -r PATH" in world.errors()
    assert deletes(world.server) == 0
    # What looked at a part of it may, and so may another group.
    some = [step for step in steps if "info.json" not in step]
    assert world.driver.remove(*some, f"rmtree {place}")[-1] == "OK"


def test_what_moves_file_by_file_removes_nothing(world):
    if world.driver.kind == "fsspec":
        return
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    steps = [
        f"{verb} {place}/{name}"
        for name in ("info.json", "published")
        for verb in ("read", "unlink")
    ]
    assert world.driver.remove(*steps, f"listdir {place}") == [
        *["OK", "OK", "OK", "EPERM"],
        " ".join(FILES),
    ]
    assert deletes(world.server) == 0


def test_nothing_is_deleted_on_the_word_of_a_stale_entry(world):
    run = world.new_run("weights/1")
    place = f"{run}/checkpoints/weights/1"
    world.driver.listdir(place)
    world.server.journal.clear()
    assert world.driver.remove(f"rmtree {place}") == ["OK"]
    asked = [entry.endpoint for entry in world.server.journal.entries("api")]
    deletion = asked.index("DELETE checkpoint")
    assert "GET training_runs/{run}/checkpoints" in asked[:deletion]
