"""The interface of fsspec: caches, pickles, transactions, signed URLs, async callers, options."""

import asyncio
import gc
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from tests.support.account import checkpoint_ids
from tests.support.drivers import outcome_of
from tests.support.server import demo_server, web
from tinkerfs.fsspec import TinkerFileSystem

__all__ = ["demo_server", "web"]

NAME = "adapter_model.safetensors"


class Setup:
    """A server, the options of its file system, and a checkpoint."""

    def __init__(self, server, cache_dir):
        self.server = server
        self.options = {"base_url": server.base_url, "settings": {"cache_dir": str(cache_dir)}}
        run = server.account.runs()[0]
        self.run_id, self.checkpoint_id = run.id, run.checkpoints[0].id
        self.path = f"tinker://{run.id}/{self.checkpoint_id}"
        self.file = f"{self.path}/{NAME}"
        self.directory = f"tinker://runs/{run.id}/checkpoints/{self.checkpoint_id}"
        content = server.files(run.id, self.checkpoint_id)[NAME]
        self.data = content.read(0, content.size_bytes)
        self.fs = TinkerFileSystem(**self.options, skip_instance_cache=True)

    def chained(self, name, **options):
        return fsspec.open(
            f"{name}::{self.file}", **{name: options, "tinker": self.options}, mode="rb"
        )


@pytest.fixture
def setup(demo_server, tmp_path, monkeypatch):
    server = demo_server(runs=2, checkpoints=2)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield Setup(server, tmp_path / "cache")
    TinkerFileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["filecache", "simplecache"])
def test_caches_of_fsspec_return_the_bytes(setup, tmp_path, name):
    for _ in range(2):
        with setup.chained(name, cache_storage=str(tmp_path / name)) as file:
            assert file.read() == setup.data
    assert setup.server.journal.count("GET archive") == 1


def test_pickled_file_continues_at_its_offset(setup):
    with setup.fs.open(setup.file) as file:
        file.seek(5)
        with pickle.loads(pickle.dumps(file)) as copy:
            assert (copy.tell(), copy.read(9)) == (5, setup.data[5:14])


def read_pickled(pickled, path, key, results):
    os.environ["TINKER_API_KEY"] = key
    results.put(outcome_of(lambda: repr(pickle.loads(pickled).cat_file(path, 0, 8))))


def test_pickle_has_no_key_and_uses_that_of_its_process(setup, monkeypatch):
    setup.fs.ls("runs")
    pickled, key = pickle.dumps(setup.fs), setup.server.api_key
    for text in (repr(setup.fs), setup.fs.to_json(), setup.fs._fs_token, repr(pickled)):
        assert key not in text
    monkeypatch.delenv("TINKER_API_KEY")
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    found = []
    for each in (key, "tml-wrong"):
        arguments = (pickled, f"{setup.directory}/info.json", each, results)
        worker = spawn.Process(target=read_pickled, args=arguments)
        worker.start()
        found.append(results.get(timeout=60))
        worker.join(60)
    assert found == [repr(setup.fs.cat_file(f"{setup.directory}/info.json", 0, 8)), "EACCES"]


def test_token_of_a_file_is_the_same_until_it_is_saved_again(setup):
    other = TinkerFileSystem(**setup.options, skip_instance_cache=True)
    assert setup.fs.ukey(setup.file) == other.ukey(setup.file)
    before = setup.fs.ukey(setup.file), setup.fs.modified(setup.file)
    assert setup.fs.created(setup.file) == before[1]
    setup.server.account.delete_checkpoint(setup.run_id, setup.checkpoint_id)
    setup.server.account.add_checkpoint(setup.run_id, setup.checkpoint_id)
    setup.fs.invalidate_cache()
    assert setup.fs.ukey(setup.file) != before[0]
    assert setup.fs.modified(setup.file) > before[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": "tml-secret"}, r"unknown option 'api_key'.*hint: the key is read from"),
        ({"settings": {"tll": 1}}, "unknown setting 'tll'"),
        ({"settings": {"ttl_s": "soon"}}, "Expected `float`, got `str`"),
    ],
)
def test_wrong_option_is_refused_without_its_value(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        TinkerFileSystem(**options)
    assert "tml-secret" not in str(caught.value)


def test_instances_of_all_threads_share_one_cache(setup):
    starting = threading.Barrier(8)

    def first_read(_):
        starting.wait()
        fs = fsspec.filesystem("tinker", **setup.options)
        return len(fs.ls("runs")), fs.cat_file(setup.file)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(first_read, range(8)))
    assert found == [(2, setup.data)] * 8
    for endpoint in ("GET training_runs", "GET archive"):
        assert setup.server.journal.count(endpoint) == 1
    assert setup.server.journal.count("store") <= 3  # two for the index, one for the block


def test_fs_is_closed_after_its_last_instance(setup):
    other = TinkerFileSystem(**setup.options, skip_instance_cache=True)
    assert other.filesystem is setup.fs.filesystem
    filesystem = weakref.ref(setup.fs.filesystem)
    del setup.fs
    assert len(other.ls("runs")) == 2
    del other
    gc.collect()
    assert filesystem() is None


def test_du_requests_no_archive(setup):
    found = setup.fs.du("tinker://runs", total=False)
    names = setup.fs.find("tinker://runs")
    assert found.keys() == {*names}
    link = f"runs/{setup.run_id}/checkpoints/{setup.checkpoint_id}/archive.tar"
    assert 0 < found[link] < 4096
    assert setup.fs.du("tinker://runs") == sum(found.values())
    assert setup.fs.du(setup.file) == len(setup.data)
    assert setup.server.journal.count("GET archive") == 1  # of that file


@pytest.mark.parametrize("form", ["path", "directory", "archive"])
def test_signed_url_is_that_of_the_archive(setup, web, form):
    path = {
        "path": setup.path,
        "directory": setup.directory,
        "archive": f"{setup.directory}/archive.tar",
    }
    with tarfile.open(fileobj=io.BytesIO(web.get(setup.fs.sign(path[form])).content)) as tar:
        assert tar.extractfile(NAME).read() == setup.data
    with pytest.raises(OSError, match="not found"):
        setup.fs.sign(f"tinker://{setup.run_id}/weights/none")


def test_ranges_globs_text_and_mappings_agree(setup):
    fs = setup.fs
    assert fs.cat_ranges([setup.file] * 2, [0, -9], [7, None]) == [setup.data[:7], setup.data[-9:]]
    config = f"{setup.path}/adapter_config.json"
    assert fs.glob(f"{setup.path}/*.json") == [config.removeprefix("tinker://")]
    text = fs.read_text(config)
    with fs.open(config, "r") as file:
        assert file.read() == text
    mapping = fs.get_mapper(setup.path)
    assert mapping["adapter_config.json"] == text.encode()
    assert {*mapping} == {*setup.server.files(setup.run_id, setup.checkpoint_id)}
    assert "runs" in fs.tree("tinker://", recursion_limit=1)


def test_every_way_to_write_acts_on_a_control(setup, tmp_path):
    fs, control = setup.fs, f"{setup.directory}/published"
    record = setup.server.account.checkpoint(setup.run_id, setup.checkpoint_id)
    (tmp_path / "value").write_text("1\n")

    def write_text(value):
        with fs.open(control, "w") as file:
            file.write(value)

    for write, is_public in (
        (lambda: fs.put(str(tmp_path / "value"), control), True),
        (lambda: fs.write_text(control, "0"), False),
        (lambda: fs.get_mapper(setup.directory).update(published=b"1"), True),
        (lambda: write_text("off"), False),
        (lambda: fs.pipe({control: b"on"}), True),
        (lambda: fs.touch(control), True),
    ):
        write()
        assert record.is_public is is_public
    for refused in (
        lambda: fs.put(str(tmp_path / "value"), f"{setup.path}/new"),
        lambda: fs.touch(f"{setup.path}/new"),
        lambda: fs.mv(control, f"{setup.directory}/other"),
    ):
        assert outcome_of(refused) == "EPERM"


def test_transaction_writes_at_its_end_or_not_at_all(setup):
    fs, control = setup.fs, f"{setup.directory}/published"
    record = setup.server.account.checkpoint(setup.run_id, setup.checkpoint_id)
    record.is_public = False

    def write():
        with fs.open(control, "wb") as file:
            file.write(b"1")
        assert not record.is_public

    def fail():
        with fs.transaction:
            write()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not record.is_public
    with fs.transaction:
        write()
    assert record.is_public


def test_copy_of_a_checkpoint_directory_bars_its_removal(setup, tmp_path):
    before = checkpoint_ids(setup.server)
    setup.fs.get(setup.directory, str(tmp_path / "copy"), recursive=True)
    assert outcome_of(lambda: setup.fs.rm(setup.directory, recursive=True)) == "EPERM"
    assert checkpoint_ids(setup.server) == before


def test_copy_with_weights_may_be_followed_by_a_removal(setup, tmp_path):
    before = checkpoint_ids(setup.server)
    setup.fs.get(setup.path, str(tmp_path / "copy"), recursive=True)
    assert (tmp_path / "copy" / NAME).read_bytes() == setup.data
    setup.fs.rm(setup.path, recursive=True)
    gone = f"{setup.run_id}/{setup.checkpoint_id}"
    assert before - checkpoint_ids(setup.server) == {gone}


def test_running_event_loop_may_call_it(setup):
    async def read():
        wrapped = AsyncFileSystemWrapper(setup.fs, asynchronous=True)
        direct = setup.fs.cat_file(setup.file, 0, 8)
        in_thread = await asyncio.to_thread(setup.fs.cat_file, setup.file, 0, 8)
        together = await asyncio.gather(*(wrapped._cat_file(setup.file, 0, 8) for _ in range(8)))
        (ranges,) = await wrapped._cat_ranges([setup.file], [0], [8])
        fs, path = fsspec.core.url_to_fs(setup.file, asynchronous=True, **setup.options)
        return {direct, in_thread, *together, bytes(ranges), fs.cat_file(path, 0, 8)}

    assert asyncio.run(read()) == {setup.data[:8]}
