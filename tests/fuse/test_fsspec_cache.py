"""A mount and fsspec in one cache directory: what one has downloaded, the other finds."""

import pytest

from tests.support.account import mounted, new_run
from tests.support.server import demo_server
from tinkerfs.fsspec import TinkerFileSystem

__all__ = ["demo_server"]

pytestmark = pytest.mark.kernel

NAME = "adapter_model.safetensors"


@pytest.mark.parametrize("first", ["fsspec", "mount"])
def test_second_reader_downloads_nothing(demo_server, tmp_path, monkeypatch, first):
    server = demo_server(runs=1, checkpoints=1)
    run_id = new_run(server)
    server.account.add_checkpoint(run_id, "sampler_weights/1", size_bytes=9 << 20)
    content = server.files(run_id, "sampler_weights/1")[NAME]
    data = content.read(0, content.size_bytes)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    path = f"{run_id}/sampler_weights/1/{NAME}"

    def read_by_fsspec():
        settings = {"cache_dir": str(tmp_path / "host" / "cache")}
        fs = TinkerFileSystem(server.base_url, settings, skip_instance_cache=True)
        return fs.cat_file(path)

    def read_by_mount():
        with mounted(server, tmp_path / "host", "mfusepy3") as root:
            file = root / "runs" / run_id / "checkpoints/sampler_weights/1/files" / NAME
            return file.read_bytes()

    (tmp_path / "host" / "cache").mkdir(parents=True, mode=0o700)
    readers = [read_by_fsspec, read_by_mount]
    if first == "mount":
        readers.reverse()
    assert readers[0]() == data
    server.journal.clear()
    assert readers[1]() == data
    assert server.journal.count("store") == 0
