"""Files that the kernel reads from the cache itself, and the same files where it cannot.

The file /backed in memory holds zeros, and its backing file other bytes. So the content of a read
shows whether the kernel or the daemon served it.
"""

import contextlib
import json
import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.account import mounted, new_run
from tests.support.mount import ROOT, memory_mount, run, tinkerfs, wait_until
from tinkerfs.fuse import binding as bindings

SIZE = 3 * (1 << 20) + 5
BACKED = os.urandom(SIZE)
ZEROS = bytes(SIZE)


@pytest.fixture
def backing(tmp_path):
    """Return the file that the kernel may read."""
    path = tmp_path / "backing"
    path.write_bytes(BACKED)
    return path


@pytest.fixture
def backed(mountpoint, binding, backing):
    """Mount the file, and return its path in the mount."""
    with memory_mount(mountpoint, binding, "--backing", str(backing)):
        yield mountpoint / "backed"


@pytest.fixture
def expected(binding):
    """Return what the file contains: passthrough needs root, libfuse 3.17 and Linux 6.9."""
    library = bindings.find_library(bindings.BINDINGS[binding])
    kernel = tuple(int(number) for number in os.uname().release.split(".")[:2])
    assert os.geteuid() == 0
    return BACKED if library.version >= 317 and kernel >= (6, 9) else ZEROS


def set_mode(backed, mode):
    """Choose the reply to the next open of the file."""
    (backed.parent / "control").write_text(mode)


def test_whole_file_is_read_from_backing_file(backed, expected):
    assert backed.read_bytes() == expected


def test_positional_reads_and_mmap_agree(backed, expected):
    with backed.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == expected
        assert os.pread(file.fileno(), 100, 1 << 20) == expected[1 << 20 :][:100]
        assert os.pread(file.fileno(), 100, SIZE - 3) == expected[-3:]


def test_many_readers_share_backing_file(backed, expected):
    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(lambda _: backed.read_bytes(), range(256))) == {expected}


def test_direct_open_beside_passthrough_reaches_daemon(backed, expected):
    with backed.open("rb") as file:
        set_mode(backed, "direct")
        assert backed.read_bytes() == ZEROS
        assert file.read() == expected


def test_backed_open_beside_cached_open_stays_cached(backed, expected):
    set_mode(backed, "cached")
    with backed.open("rb") as file:
        set_mode(backed, "backed")
        assert backed.read_bytes() == ZEROS
        assert file.read() == ZEROS
    wait_until(lambda: backed.read_bytes() == expected)  # the kernel sends RELEASE later


def test_cached_open_beside_passthrough_passes_through(backed, expected):
    with backed.open("rb") as file:
        set_mode(backed, "cached")
        assert backed.read_bytes() == expected
        assert file.read() == expected


def test_removed_backing_file_is_read_until_closed(backed, backing, expected):
    with backed.open("rb") as file:
        backing.unlink()
        assert file.read() == expected


def test_backing_file_is_freed_after_last_close(mountpoint, binding, tmp_path):
    """The kernel holds the backing file, also without a descriptor in any process."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
    try:
        free = os.statvfs(disk).f_bfree
        (disk / "backing").write_bytes(BACKED)
        with memory_mount(mountpoint, binding, "--backing", str(disk / "backing")):
            for _ in range(20):
                (mountpoint / "backed").read_bytes()
            (disk / "backing").unlink()
            wait_until(lambda: os.statvfs(disk).f_bfree == free)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_unprivileged_mount_reads_through_daemon(tmp_path, binding, backing):
    """The kernel demands a capability of the first user namespace."""
    program = """if True:
        import sys
        from pathlib import Path
        from tests.support.mount import memory_mount
        mountpoint, binding, backing = sys.argv[1:]
        with memory_mount(Path(mountpoint), binding, "--backing", backing):
            print({(Path(mountpoint) / "backed").read_bytes().strip(b"\\0") for _ in range(3)})
    """
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    python = [sys.executable, "-c", program, mountpoint, binding, backing]
    result = run("unshare", "--map-root-user", "--mount", *python, cwd=ROOT)
    assert result.stdout == "{b''}\n", result.stderr


@contextlib.contextmanager
def overlay(directory, lower):
    """Mount an overlay over a directory, with its writable layer on a file system of its own."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        for name in ("upper", "work", "merged"):
            (directory / name).mkdir()
        options = f"lowerdir={lower},upperdir={directory}/upper,workdir={directory}/work"
        command = ["mount", "-t", "overlay", "overlay", "-o", options, directory / "merged"]
        subprocess.run(command, check=True)
        try:
            yield directory / "merged"
        finally:
            subprocess.run(["umount", "--lazy", directory / "merged"], check=True)
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_mount_can_be_a_layer_of_overlayfs(backed, expected, tmp_path):
    assert backed.read_bytes() == expected
    with overlay(tmp_path / "overlay", backed.parent) as merged:
        assert (merged / "hello").read_text() == "hello\n"
        assert len((merged / "backed").read_bytes()) == SIZE


# --- Weights -------------------------------------------------------------------------------------

NAME = "adapter_model.safetensors"


@pytest.fixture
def weights(demo_server):
    """Return a server, the path of its largest file below a mount, and the file's bytes."""
    server = demo_server(runs=1, checkpoints=1)
    run_id = new_run(server)
    server.account.add_checkpoint(run_id, "sampler_weights/1", size_bytes=9 << 20)
    content = server.files(run_id, "sampler_weights/1")[NAME]
    path = f"runs/{run_id}/checkpoints/sampler_weights/1/files/{NAME}"
    return server, path, content.read(0, content.size_bytes)


def stats(root):
    """Return the statistics of a mount."""
    return json.loads((root / ".tinkerfs/stats.json").read_text())


def reads(root):
    """Return how many reads of blocks have reached the daemon."""
    counters = stats(root)["counters"]
    return counters.get("block_cache_hits", 0) + counters.get("block_cache_misses", 0)


def open_through(root, path):
    """Open a file until the kernel reads it itself, and return the open file."""

    def is_through():
        before = stats(root)["counters"].get("passthrough_opens", 0)
        opened.append((root / path).open("rb"))
        if stats(root)["counters"].get("passthrough_opens", 0) > before:
            return True
        opened.pop().close()
        return False

    opened = []
    wait_until(is_through)
    return opened.pop()


@pytest.fixture
def through(binding, expected):
    """Return whether the kernel reads whole cached files itself."""
    return expected is BACKED


def test_state_of_passthrough_is_reported(weights, tmp_path, binding, through):
    with mounted(weights[0], tmp_path / "m", binding) as root:
        state = stats(root)["passthrough"]
        assert state == "on" if through else state.startswith("off: needs ")


def test_whole_cached_file_is_read_without_the_daemon(weights, tmp_path, binding, through):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
        if not through:
            assert (root / path).read_bytes() == expected
            assert "passthrough_opens" not in stats(root)["counters"]
            return
        with open_through(root, path) as file:
            before, sent = reads(root), len(server.journal.entries("GET store/archive"))
            assert file.read() == expected
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == expected
            with ThreadPoolExecutor(64) as pool:
                offsets = [number * 31_337 % len(expected) for number in range(500)]
                found = pool.map(lambda offset: os.pread(file.fileno(), 4096, offset), offsets)
                assert list(found) == [expected[offset:][:4096] for offset in offsets]
            assert reads(root) == before
            assert len(server.journal.entries("GET store/archive")) == sent


def test_file_cached_by_an_earlier_mount_is_verified_first(weights, tmp_path, binding, through):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
    [data] = (tmp_path / "m/cache/blocks").glob("*/1")
    with data.open("r+b") as file:
        file.seek(5_000_000)
        byte = file.read(1)
        file.seek(5_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
        assert "was altered" in (root / ".tinkerfs/errors").read_text()
        if through:
            with open_through(root, path) as file:
                assert file.read() == expected


def test_cache_on_overlayfs_is_read_through_the_daemon(weights, tmp_path, binding, through):
    server, path, expected = weights
    (tmp_path / "lower").mkdir()
    with (
        overlay(tmp_path / "overlay", tmp_path / "lower") as merged,
        mounted(server, tmp_path / "m", binding, cache_dir=str(merged / "cache")) as root,
    ):
        assert (root / path).read_bytes() == expected
        if through:
            wait_until(lambda: (root / path).read_bytes() and stats(root)["passthrough"] != "on")
            assert "stacked file system" in stats(root)["passthrough"]
        assert (root / path).read_bytes() == expected


@pytest.mark.parametrize("change", ["clear", "delete"])
def test_open_file_keeps_its_bytes_when_cache_changes(weights, tmp_path, binding, through, change):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
        with open_through(root, path) if through else (root / path).open("rb") as file:
            if change == "clear":
                done = tinkerfs("cache", "clear", "--cache-dir", tmp_path / "m/cache")
                assert done.returncode == 0, done.stderr
            else:
                subprocess.run(["rm", "-r", root / path.partition("/files")[0]], check=True)
            with contextlib.suppress(OSError):  # ESTALE, through the daemon
                assert file.read() == expected
        if change == "clear":
            assert (root / path).read_bytes() == expected


def test_checkpoint_saved_again_has_its_new_bytes(weights, tmp_path, binding, through):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
        with open_through(root, path) if through else (root / path).open("rb") as file:
            run_id = path.split("/")[1]
            server.account.add_checkpoint(run_id, "sampler_weights/1", size_bytes=8 << 20)
            content = server.files(run_id, "sampler_weights/1")[NAME]
            (root / ".tinkerfs/refresh").write_text("1")
            assert (root / path).read_bytes() == content.read(0, content.size_bytes) != expected
            with contextlib.suppress(OSError):
                assert file.read() == expected
