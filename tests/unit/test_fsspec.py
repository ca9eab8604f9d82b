"""The fsspec file system in processes that fork, on many threads, and with tinker paths."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.account import checkpoint_ids
from tests.support.drivers import outcome_of
from tests.support.server import demo_server
from tinkerfs.cache.store import MetadataStore
from tinkerfs.fsspec import TinkerFileSystem

__all__ = ["demo_server"]

NAME = "adapter_model.safetensors"


@pytest.fixture
def server(demo_server, monkeypatch):
    server = demo_server(runs=2, checkpoints=2)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def make(server, tmp_path):
    """A factory of file systems with one cache."""

    def make(**options):
        cache_dir = tmp_path / "cache"
        cache_dir.mkdir(mode=0o700, exist_ok=True)
        settings = {"cache_dir": str(cache_dir)}
        return TinkerFileSystem(server.base_url, settings, skip_instance_cache=True, **options)

    return make


def checkpoint_of(server):
    run = server.account.runs()[0]
    return run.id, run.checkpoints[0].id


def exit_code_of(work, timeout_s=20):
    """Run work in a forked child; return 0 if it succeeds in time."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(timeout_s)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(3)
    return os.waitpid(pid, 0)[1]


def test_first_ls_by_8_threads_is_correct(make):
    starting = threading.Barrier(8)

    def first_ls(fs):
        starting.wait()
        return fs.ls("runs", detail=False)

    shared = make()
    for filesystems in ([shared] * 8, [make() for _ in range(8)]):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(first_ls, filesystems))
        assert all(names == found[0] and len(names) == 2 for names in found)


@contextmanager
def held(server, endpoint):
    """Make a request hang until the block ends."""
    rule = server.faults.add(endpoint, times=None, hang=True)
    try:
        yield rule
    finally:
        server.faults.clear()


def test_fork_while_a_thread_opens_does_not_hang(make, monkeypatch):
    fs, opening, forked = make(), threading.Event(), threading.Event()

    def late_open_app(settings):
        opening.set()
        assert forked.wait(20)
        return real_open_app(settings)

    from tinkerfs import fsspec

    real_open_app = fsspec.open_app
    monkeypatch.setattr(fsspec, "open_app", late_open_app)
    lister = threading.Thread(target=fs.ls, args=("runs",))
    lister.start()
    assert opening.wait(20)

    def list_here():
        monkeypatch.setattr(fsspec, "open_app", real_open_app)
        assert len(fs.ls("runs")) == 2

    try:
        assert exit_code_of(list_here) == 0
    finally:
        forked.set()
        lister.join(20)
    assert len(fs.ls("runs")) == 2


def test_fork_while_a_thread_lists_does_not_hang(make, server):
    fs = make()
    fs.ls("runs")
    fs.invalidate_cache()
    with held(server, "GET training_runs") as rule:
        lister = threading.Thread(target=fs.ls, args=("runs",))
        lister.start()
        rule.wait_for(1)

        def list_here():
            assert len(fs.ls(f"runs/{checkpoint_of(server)[0]}/checkpoints/weights")) >= 1

        assert exit_code_of(list_here) == 0
    lister.join(20)


def test_store_is_locked_during_a_fork(tmp_path):
    """SQLite has process-wide locks, so no thread may be inside it during a fork."""
    with MetadataStore(tmp_path) as store:
        stop = threading.Event()

        def write():
            number = 0
            while not stop.is_set():
                number += 1
                store.put("space", str(number % 50), bytes(3000))

        writer = threading.Thread(target=write)
        writer.start()

        def open_here():
            with MetadataStore(tmp_path) as own:
                own.get("space", "1")

        codes = [exit_code_of(open_here, 5) for _ in range(40)]
        stop.set()
        writer.join(20)
    assert codes == [0] * 40


def test_file_open_across_a_fork_is_read_by_both(make, server):
    fs = make()
    run_id, checkpoint_id = checkpoint_of(server)
    true = server.files(run_id, checkpoint_id)[NAME]
    with fs.open(f"tinker://{run_id}/{checkpoint_id}/{NAME}", block_size=1024) as file:
        assert file.read(10) == true.read(0, 10)

        def read_here():
            file.seek(5000)
            assert file.read(10) == true.read(5000, 5010)
            file.close()

        assert exit_code_of(read_here) == 0
        file.seek(9000)
        assert file.read(10) == true.read(9000, 9010)


def test_access_log_without_a_mount_is_its_header(make):
    fs = make()
    header = fs.cat("/.tinkerfs/access_log")
    assert header.startswith(b"#time\toperation\t")
    with fs.open("/.tinkerfs/access_log") as file:
        assert file.read() == header


@pytest.mark.parametrize("scheme", ["tinker://", ""])
def test_tinker_path_is_the_directory_of_its_files(make, server, scheme):
    fs, (run_id, checkpoint_id) = make(), checkpoint_of(server)
    path = f"{scheme}{run_id}/{checkpoint_id}"
    files = server.files(run_id, checkpoint_id)
    names = [f"{run_id}/{checkpoint_id}/{name}" for name in files]
    assert sorted(fs.ls(path, detail=False)) == sorted(names)
    assert sorted(fs.find(path)) == sorted(names)
    assert fs.isdir(path)
    true = files[NAME].read(0, files[NAME].size_bytes)
    assert fs.cat(f"{path}/{NAME}") == true
    with fs.open(f"{path}/{NAME}") as file:
        assert file.read() == true
    with pytest.raises(FileNotFoundError):
        fs.ls(f"{path}x")
    assert not fs.exists(f"{path}/nothing")


def test_tinker_path_of_a_run_is_the_run(make, server):
    fs, (run_id, checkpoint_id) = make(), checkpoint_of(server)
    kind = checkpoint_id.partition("/")[0]
    assert f"{run_id}/info.json" in fs.ls(f"tinker://{run_id}", detail=False)
    assert fs.cat(f"tinker://{run_id}/info.json") == fs.cat(f"tinker://runs/{run_id}/info.json")
    assert f"{run_id}/{checkpoint_id}" in fs.ls(f"tinker://{run_id}/{kind}", detail=False)
    assert not fs.exists("tinker://nothing")
    assert not fs.exists("tinker://nothing/weights/0001")


def test_recursion_over_tinker_paths_requests_no_archive(make, server):
    fs, (run_id, checkpoint_id) = make(), checkpoint_of(server)
    kind = checkpoint_id.partition("/")[0]
    server.journal.clear()
    found = fs.find(f"tinker://{run_id}/{kind}", withdirs=True)
    assert f"{run_id}/{checkpoint_id}" in found
    fs.find(f"tinker://{run_id}")
    list(fs.walk(f"tinker://{run_id}/{kind}"))
    assert server.journal.count("GET archive") == 0


def test_removal_of_a_tinker_path_removes_the_checkpoint(make, server):
    fs, (run_id, checkpoint_id) = make(), checkpoint_of(server)
    before = checkpoint_ids(server)
    fs.rm(f"tinker://{run_id}/{checkpoint_id}", recursive=True)
    assert before - checkpoint_ids(server) == {f"{run_id}/{checkpoint_id}"}


def test_removal_of_a_file_of_a_checkpoint_is_refused(make, server):
    fs, (run_id, checkpoint_id) = make(), checkpoint_of(server)
    before = checkpoint_ids(server)
    with pytest.raises(OSError, match="only checkpoints can be removed"):
        fs.rm(f"tinker://{run_id}/{checkpoint_id}/{NAME}")
    assert (
        outcome_of(lambda: make().rm(f"tinker://{run_id}/{checkpoint_id}", recursive=True))
        == "EPERM"
    )
    assert checkpoint_ids(server) == before
