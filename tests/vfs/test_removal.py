"""Tests of removal: deletion of checkpoints, unlinked files, and denied removals."""

import pytest

from tests.support.account import deletes, lists_last_checkpoints

FILES = [
    "info.json",
    "archive_url",
    "published",
    "expires_at",
    "tinker_path",
    "files",
    "archive.tar",
    "tensors.json",
    "export",
]


@pytest.mark.every_binding
def test_rmtree_of_a_checkpoint_deletes_it(world):
    run = world.new_run("weights/1", "weights/2")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]
    # The first request may have used a form of the id that the server does not accept.
    assert deletes(world.server) in (1, 2)
    remaining = world.server.account.run(run.partition("/")[2]).checkpoints
    assert [c.id for c in remaining] == ["weights/2"]
    assert world.driver.listdir(world.kind_directory(run)) == ["2"]
    assert checkpoint_dir in world.changes()


@pytest.mark.where(profile=lists_last_checkpoints)
def test_rmtree_updates_every_listing_immediately(world):
    run = world.new_run("weights/1", "weights/2", "sampler_weights/1")
    world.driver.listdir("runs")
    assert world.driver.readlink(f"{run}/latest") == "checkpoints/weights/2"
    checkpoints = f"{run}/checkpoints"
    assert world.driver.remove(f"rmtree {checkpoints}/weights/2") == ["OK"]
    assert world.eventually(
        lambda: world.driver.readlink(f"{run}/latest") == "checkpoints/weights/1"
    )
    assert world.driver.remove(f"rmtree {checkpoints}/weights/1") == ["OK"]
    assert world.driver.listdir(run) == ["info.json", "checkpoints", "latest_sampler"]
    assert world.driver.listdir(checkpoints) == ["sampler_weights"]


def test_rmdir_deletes_after_every_file_was_unlinked(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    steps = [f"rmdir {checkpoint_dir}"]
    steps += [
        step
        for name in FILES
        for step in (f"unlink {checkpoint_dir}/{name}", f"rmdir {checkpoint_dir}")
    ]
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
        "rmdir shared",
        "rmtree projects",
        "unlink .tinkerfs/errors",
        "unlink .tinkerfs/refresh",
        "unlink {run}/info.json",
        pytest.param(
            "unlink {run}/latest", marks=pytest.mark.where(profile=lists_last_checkpoints)
        ),
        "rmdir {run}",
        "rmtree {run}",
        pytest.param("rmtree runs", marks=pytest.mark.served("GET training_runs")),
        "rmtree .content",
    ],
)
def test_other_removals_are_denied_and_block_the_group(world, step):
    run = world.new_run("weights/1", "weights/2")
    weights = f"{run}/checkpoints/weights"
    steps = [
        step.format(run=run),
        f"rmtree {weights}/1",
        f"unlink {weights}/2/info.json",
    ]
    assert world.driver.remove(*steps, f"rmdir {weights}/2") == ["EPERM"] * 4
    assert deletes(world.server) == 0
    assert "EPERM" in world.errors()
    # Another process group may remove it.
    assert world.driver.remove(f"rmtree {weights}/1") == ["OK"]


def test_rmdir_of_a_nonempty_container_is_enotempty(world):
    run = world.new_run("weights/1")
    checkpoints = f"{run}/checkpoints"
    steps = [
        f"rmdir {checkpoints}",
        f"rmdir {world.kind_directory(run)}",
        f"rmtree {checkpoints}",
    ]
    assert world.driver.remove(*steps) == ["ENOTEMPTY", "ENOTEMPTY", "OK"]
    assert world.driver.listdir(checkpoints) == []


def test_removal_of_an_absent_name_is_enoent(world):
    run = world.new_run("weights/1")
    weights = f"{run}/checkpoints/weights"
    steps = [
        f"unlink {weights}/1/nothing",
        f"rmdir {weights}/2",
        f"rmdir {weights}/1/info.json",
    ]
    assert world.driver.remove(*steps) == ["ENOENT", "ENOENT", "ENOTDIR"]
    assert world.driver.remove(f"unlink {weights}/1") in (["EISDIR"], ["EPERM"])
    assert deletes(world.server) == 0


@pytest.mark.expect_warnings("rmdir E")
@pytest.mark.parametrize(("status", "name"), [(403, "EACCES"), (404, "ENOENT"), (409, "EBUSY")])
def test_refused_deletion_is_reported_and_restores_the_files(world, status, name):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    fault = world.server.faults.add(
        "DELETE checkpoint",
        status=status,
        body={"detail": "the message of the server"},
        headers={"x-should-retry": "false"},
        times=None,
    )
    try:
        assert world.driver.remove(f"rmtree {checkpoint_dir}") == [name]
    finally:
        fault.remove()
    assert world.driver.listdir(checkpoint_dir) == FILES
    assert "the message of the server" in world.changes()
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]


@pytest.mark.every_binding
def test_unlinked_names_are_hidden_from_one_group_only(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    steps = [
        f"unlink {checkpoint_dir}/info.json",
        f"unlink {checkpoint_dir}/published",
        f"listdir {checkpoint_dir}",
    ]
    remaining = [name for name in FILES if name not in ("info.json", "published")]
    assert world.driver.remove(*steps) == ["OK", "OK", " ".join(remaining)]
    if world.driver.kind != "fsspec":  # fsspec uses the process group of this process
        assert world.driver.listdir(checkpoint_dir) == FILES
    assert deletes(world.server) == 0


def test_rmdir_of_what_another_group_emptied_is_enotempty(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    emptied = world.driver.remove(*(f"unlink {checkpoint_dir}/{name}" for name in FILES))
    assert emptied == ["OK"] * len(FILES)
    # With fsspec the next removal is by the same group, a minute later.
    assert world.driver.remove(f"rmdir {checkpoint_dir}") == ["ENOTEMPTY"]
    assert deletes(world.server) == 0
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]


def test_unlinked_names_are_visible_after_a_minute(world):
    if world.is_kernel:
        return  # a mount uses the clock of the machine
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    remaining = " ".join(name for name in FILES if name not in ("info.json", "published"))
    steps = [
        f"unlink {checkpoint_dir}/info.json",
        f"unlink {checkpoint_dir}/published",
        f"listdir {checkpoint_dir}",
    ]
    later = ["advance 59", f"listdir {checkpoint_dir}", "advance 2", f"listdir {checkpoint_dir}"]
    outcomes = world.driver.remove(*steps, *later)
    assert outcomes == ["OK", "OK", remaining, "OK", remaining, "OK", " ".join(FILES)]
    assert deletes(world.server) == 0


LINKS = ("archive_url", "files", "archive.tar", "tensors.json")


def test_group_that_copied_a_checkpoint_cannot_remove_it(world):
    if world.driver.kind in ("fsspec", "webdav"):
        return  # these follow links, so a copy includes the weights
    run = world.new_run("weights/1", "weights/2")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    steps = [f"read{'link' * (name in LINKS)} {checkpoint_dir}/{name}" for name in FILES]
    removal = [
        f"rmtree {checkpoint_dir}",
        f"unlink {checkpoint_dir}/files",
        f"rmdir {checkpoint_dir}",
        f"listdir {checkpoint_dir}",
    ]
    outcomes = world.driver.remove(*steps, *removal)
    assert outcomes == ["OK"] * len(FILES) + ["EPERM"] * 3 + [" ".join(FILES)]
    assert "tinkerfs get PATH DEST, then rm -r PATH" in world.errors()
    assert deletes(world.server) == 0
    # A group that read only a part may remove it, and so may another group.
    partial = [step for step in steps if "info.json" not in step]
    assert world.driver.remove(*partial, f"rmtree {checkpoint_dir}")[-1] == "OK"


def test_group_that_moves_single_files_removes_nothing(world):
    if world.driver.kind == "fsspec":
        return
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    steps = [
        f"{verb} {checkpoint_dir}/{name}"
        for name in ("info.json", "published")
        for verb in ("read", "unlink")
    ]
    assert world.driver.remove(*steps, f"listdir {checkpoint_dir}") == [
        *["OK", "OK", "OK", "EPERM"],
        " ".join(FILES),
    ]
    assert deletes(world.server) == 0


def test_rmtree_reloads_the_listing_before_the_deletion(world):
    run = world.new_run("weights/1")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    world.driver.listdir(checkpoint_dir)
    world.server.journal.clear()
    assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]
    endpoints = [entry.endpoint for entry in world.server.journal.entries("api")]
    deletion = endpoints.index("DELETE checkpoint")
    assert "GET training_runs/{run}/checkpoints" in endpoints[:deletion]
