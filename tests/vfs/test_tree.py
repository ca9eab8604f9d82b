"""Tests of the names of the tree and their attributes."""

import os
import stat

import pytest

from tests.support.account import lists_last_checkpoints
from tests.support.drivers import outcome_of
from tinkerfs.demo import serialization

pytestmark = pytest.mark.every_binding

VIEWS = [
    "checkpoints",
    "published",
    "expiring",
    "models",
    "shared",
    "projects",
    "adapters",
    "sessions",
    "samplers",
]
ROOT_NAMES = ["README.md", "runs", *VIEWS, ".content", ".tinkerfs"]
RUN_NAMES = ["info.json", "checkpoints", "latest", "latest_sampler"]
CHECKPOINT_NAMES = [
    "info.json",
    "archive_url",
    "published",
    "expires_at",
    "tinker_path",
    "files",
    "archive.tar",
    "tensors.json",
]
CONTROL_NAMES = ["stats.json", "errors", "changes", "refresh", "trash"]


def test_names_of_the_tree_match_the_specification(world):
    driver, account = world.driver, world.server.account
    assert driver.listdir("") == ROOT_NAMES
    if world.serves("GET training_runs"):
        assert driver.listdir("runs") == account.run_ids
    assert driver.listdir(".content") == []
    assert driver.listdir(".tinkerfs") == CONTROL_NAMES
    for run in account.runs():
        names = RUN_NAMES if lists_last_checkpoints(world.profile) else RUN_NAMES[:2]
        assert driver.listdir(f"runs/{run.id}") == names
        listed = list(world.checkpoint_dirs(f"runs/{run.id}"))
        status = {
            driver.read(f"{checkpoint_dir}/tinker_path").decode().strip()
            for checkpoint_dir in listed
        }
        assert status == {
            serialization.tinker_path(run.id, c, world.profile) for c in run.checkpoints
        }
        assert len(listed) == len(run.checkpoints)
        for checkpoint_dir in (
            *listed,
            *(f"runs/{run.id}/checkpoints/{c.id}" for c in run.checkpoints),
        ):
            export = ["export"] if "/checkpoints/weights/" in checkpoint_dir else []
            assert driver.listdir(checkpoint_dir) == CHECKPOINT_NAMES + export


def test_listed_names_resolve_and_have_unique_inodes(world):
    seen = dict(world.walk())
    assert len(seen) > 100
    inodes = {status.ino for status in seen.values()}
    assert len(inodes) == len(seen)
    assert not inodes & {0, 1}


def test_sizes_equal_the_lengths_of_the_content(world):
    for path, status in world.walk():
        if status.is_link:
            assert status.size == len(world.driver.readlink(path)), path
        elif (
            not status.is_directory and path != ".tinkerfs/stats.json"
        ):  # its counters change with this read
            assert status.size == len(world.driver.read(path)), path


def test_modes_owners_and_link_counts(world):
    for path, status in world.walk():
        name = path.rpartition("/")[2]
        if status.is_directory:
            assert status.permissions == 0o755, path
            below = [world.driver.stat(f"{path}/{n}") for n in world.driver.listdir(path)]
            # 1 means "not counted", which find(1) and similar tools respect.
            assert status.nlink in (1, 2 + sum(s.is_directory for s in below)), path
        elif not status.is_link:
            assert status.nlink == 1, path
            expected = 0o444
            if path.startswith("runs/") and path.count("/") > 3:
                expected = 0o644
            expected = {"errors": 0o600, "changes": 0o600, "refresh": 0o644}.get(name, expected)
            assert status.permissions == expected, path
        assert (status.uid, status.gid) == (os.getuid(), os.getgid()), path


@pytest.mark.served("GET training_runs/{run}")
def test_mtimes_are_those_of_the_account(world):
    newest = None
    for run in world.server.account.runs():
        directory = f"runs/{run.id}"
        time_ns = round(run.last_request_time_s * 1e6) * 1000
        newest = max(newest or 0, time_ns)
        for name in (
            "",
            "/info.json",
            "/checkpoints",
            "/latest" * lists_last_checkpoints(world.profile),
        ):
            path = f"{directory}{name}"
            assert abs(world.driver.stat(path).mtime_ns - time_ns) < 1000, path
        for checkpoint in run.checkpoints:
            checkpoint_dir = f"{directory}/checkpoints/{checkpoint.id}"
            if checkpoint.time_s is None:
                assert world.driver.stat(checkpoint_dir).mtime_ns > 0
                continue
            time_ns = round(checkpoint.time_s * 1e6) * 1000
            for path in (
                checkpoint_dir,
                f"{checkpoint_dir}/info.json",
                f"{checkpoint_dir}/published",
                f"{checkpoint_dir}/archive_url",
            ):
                assert abs(world.driver.stat(path).mtime_ns - time_ns) < 1000, path
    assert world.driver.stat("runs").mtime_ns >= newest


@pytest.mark.where(profile=lambda profile: "size_bytes" not in profile.omitted)
def test_checkpoint_directory_size_is_what_is_stored(world):
    for run in world.server.account.runs():
        for checkpoint in run.checkpoints:
            status = world.driver.stat(f"runs/{run.id}/checkpoints/{checkpoint.id}")
            assert status.size == checkpoint.size_bytes
            if world.kind != "fsspec":  # fsspec reports no blocks
                assert status.blocks == -(-checkpoint.size_bytes // 512)


@pytest.mark.where(profile=lambda profile: "size_bytes" in profile.omitted)
def test_checkpoint_directory_size_is_zero_where_unknown(world):
    for checkpoint_dir in world.checkpoint_dirs(f"runs/{world.server.account.run_ids[0]}"):
        assert world.driver.stat(checkpoint_dir).size == 0


def test_block_counts_cover_the_sizes(world):
    if world.kind == "fsspec":  # fsspec reports no blocks
        return
    for path, status in world.walk():
        assert status.blocks == (0 if status.is_link else -(-status.size // 512)), path


@pytest.mark.where(profile=lists_last_checkpoints)
def test_latest_links_lead_to_the_newest_checkpoints(world):
    for run in world.server.account.runs():
        for link, kind in (("latest", "weights"), ("latest_sampler", "sampler_weights")):
            path = f"runs/{run.id}/{link}"
            assert world.driver.readlink(path) == f"checkpoints/{run.newest(kind).id}"
            expected = f"tinker://{run.id}/{run.newest(kind).id}\n".encode()
            assert world.driver.read(f"{path}/tinker_path") == expected


def test_archive_url_is_a_symlink_into_content(world):
    run = world.server.account.runs()[0]
    for checkpoint in run.checkpoints:
        checkpoint_dir = f"runs/{run.id}/checkpoints/{checkpoint.id}"
        target = world.driver.readlink(f"{checkpoint_dir}/archive_url")
        assert target.startswith(f"../../../../../.content/{run.id}/{checkpoint.id}/")
        status = world.driver.stat(os.path.normpath(f"{checkpoint_dir}/{target}"))
        assert stat.S_ISREG(status.mode)
        assert status.permissions == 0o400
        assert status.size > 0
    assert not world.server.journal.count("GET archive")


def test_run_without_checkpoints_has_no_latest_links(world):
    run = world.new_run()
    assert world.driver.listdir(run) == ["info.json", "checkpoints"]
    assert world.driver.listdir(f"{run}/checkpoints") == []
    assert outcome_of(lambda: world.driver.readlink(f"{run}/latest")) == "ENOENT"


@pytest.mark.where(profile=lambda profile: "public" not in profile.omitted)
def test_run_of_another_user_resolves_unlisted(world):
    run = world.server.account.run(world.server.account.foreign_run_ids[0])
    directory = f"runs/{run.id}"
    assert run.id not in world.driver.listdir("runs")
    assert world.driver.stat(directory).is_directory
    for checkpoint in run.checkpoints:
        path = f"{directory}/checkpoints/{checkpoint.id}"
        expected = "OK" if checkpoint.is_public else "ENOENT"
        assert outcome_of(lambda path=path: world.driver.stat(path)) == expected
    public = next(c for c in run.checkpoints if c.is_public)
    assert world.driver.read(f"{directory}/checkpoints/{public.id}/published") == b"1\n"
    assert outcome_of(
        lambda: world.driver.write(f"{directory}/checkpoints/{public.id}/published", b"0")
    ) in ("ENOENT", "EACCES", "EOPNOTSUPP")


@pytest.mark.parametrize(
    "path",
    [
        "nothing",
        "runs/nobody",
        "{run}/nothing",
        "{run}/checkpoints/nothing",
        "{run}/checkpoints/weights/nothing",
        "{run}/checkpoints/weights/0001/nothing",
        ".content/nobody",
        ".content/{id}/weights/0001/1",
        ".tinkerfs/nothing",
    ],
)
def test_absent_path_is_enoent(world, path):
    run_id = world.server.account.run_ids[0]
    path = path.format(run=f"runs/{run_id}", id=run_id)
    assert outcome_of(lambda: world.driver.stat(path)) == "ENOENT"
    assert outcome_of(lambda: world.driver.listdir(path)) == "ENOENT"
    assert outcome_of(lambda: world.driver.read(path)) == "ENOENT"


def test_wrong_file_type_has_the_posix_errno(world):
    # WebDAV has one status for both.
    below_file = "ENOENT" if world.kind == "webdav" else "ENOTDIR"
    assert outcome_of(lambda: world.driver.stat("README.md/x")) == below_file
    assert outcome_of(lambda: world.driver.read("runs")) == "EISDIR"
    if world.kind != "fsspec":  # fsspec lists a file as itself
        assert outcome_of(lambda: world.driver.listdir("README.md")) == "ENOTDIR"
    assert outcome_of(lambda: world.driver.readlink("README.md")) == "EINVAL"


PROBES = [".git", ".Trash", ".Trash-1000", ".hidden", ".directory", "autorun.inf", ".DS_Store"]
PROBES += ["._info.json", "Thumbs.db", "desktop.ini", ".xdg-volume-info"]


def test_lookup_of_probe_names_sends_no_request(world):
    run = world.new_run("weights/1")
    world.driver.listdir(f"{run}/checkpoints")
    world.server.journal.clear()
    for directory in (
        "",
        "runs/",
        f"{run}/",
        f"{run}/checkpoints/",
        f"{run}/checkpoints/weights/1/",
    ):
        for name in PROBES:
            path = f"{directory}{name}"
            assert outcome_of(lambda path=path: world.driver.stat(path)) == "ENOENT", path
    assert world.server.journal.count("api") == 0


@pytest.mark.parametrize(
    "path", ["README.md", "{run}/info.json", "{run}/checkpoints/weights/1/info.json"]
)
def test_write_to_a_read_only_file_is_eperm(world, path):
    path = path.format(run=world.new_run("weights/1"))
    assert outcome_of(lambda: world.driver.write(path, b"x")) == (
        "EACCES" if world.is_kernel and os.getuid() else "EPERM"
    )


def test_create_is_eperm(world):
    for path in ("new", "runs/new", f"runs/{world.server.account.run_ids[0]}/checkpoints/new"):
        assert outcome_of(lambda path=path: world.driver.create(path)) == "EPERM"


def test_readme_explains_deletion_and_errors(world):
    text = world.driver.read("README.md").decode()
    for text_part in ("rm -r runs/", ".tinkerfs/errors", "archive_url", "published"):
        assert text_part in text


def test_read_only_mount_has_no_write_bits_and_returns_erofs(make_world):
    world = make_world(runs=1, checkpoints=2, settings={"read_only": True})
    for path, status in world.walk():
        assert status.is_link or not status.permissions & 0o222, path
    checkpoint_dir = f"runs/{world.server.account.run_ids[0]}/checkpoints/weights/0001"
    for file in ("published", "expires_at", "info.json"):
        assert (
            outcome_of(lambda f=file: world.driver.write(f"{checkpoint_dir}/{f}", b"1")) == "EROFS"
        )
    steps = [
        f"unlink {checkpoint_dir}/info.json",
        f"rmdir {checkpoint_dir}",
        f"rmtree {checkpoint_dir}",
    ]
    assert world.driver.remove(*steps) == ["EROFS"] * 3
    assert {e.method for e in world.server.journal} <= {"GET", "POST"}
    assert not world.server.journal.count("POST publish")


def test_owner_and_umask_are_configurable(make_world):
    settings = {"uid": 1234, "gid": 567, "umask": 0o077}
    world = make_world(runs=1, checkpoints=1, settings=settings)
    for path, status in world.walk():
        assert (status.uid, status.gid) == (1234, 567), path
        assert status.is_link or not status.permissions & 0o077, path
