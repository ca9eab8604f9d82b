"""Read a checkpoint by its tinker path with the libraries that use fsspec.

Runs in an environment with pandas, pyarrow, datasets, safetensors and dask, and with the address
and key of a server. Standard input has the paths and the expected values. Prints a line per step.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.bytes
import dask.dataframe
import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import safetensors
import safetensors.numpy
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

if TYPE_CHECKING:
    from collections.abc import Callable

#: The file of weights, and the table in three formats.
WEIGHTS, PARQUET, CSV, LINES = "model.safetensors", "rows.parquet", "rows.csv", "rows.jsonl"


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_in_worker(arguments: tuple[Any, str, int]) -> bytes:
    """Read 16 bytes in a worker process, through a file system of its parent."""
    fs, path, start = arguments
    with fs.open(path) as file:
        file.seek(start)
        data: bytes = file.read(16)
        return data


class Steps:
    """The steps, which read the files of one checkpoint."""

    def __init__(self, expected: dict[str, Any], scratch: Path) -> None:
        self.path: str = expected["path"]
        self.total: int = expected["total"]
        self.rows: int = expected["rows"]
        self.sha256: str = expected["sha256"]
        self.tensors: list[str] = expected["tensors"]
        self._scratch = scratch

    def of(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.path}/{name}"

    def pandas(self) -> None:
        """Pandas reads and maps every format, and chained URLs of fsspec."""
        for frame in (
            pd.read_parquet(self.of(PARQUET)),
            pd.read_csv(self.of(CSV)),
            pd.read_json(self.of(LINES), lines=True),
            pd.read_csv(
                f"filecache::{self.of(CSV)}",
                storage_options={"filecache": {"cache_storage": str(self._scratch / "pandas")}},
            ),
        ):
            assert (len(frame), int(frame["x"].sum())) == (self.rows, self.total)

    def pyarrow(self) -> None:
        """Pyarrow scans a dataset, reads one column, and lists links without following them."""
        fs, path = pa.fs.FileSystem.from_uri(f"fsspec+{self.of(PARQUET)}")
        assert pa.parquet.read_table(path, filesystem=fs, columns=["x"]).num_rows == self.rows
        found = pa.dataset.dataset(path, filesystem=fs).to_table(filter=pa.dataset.field("x") < 10)
        assert found.num_rows == 10
        name = self.path.removeprefix("tinker://")
        infos = fs.get_file_info(pa.fs.FileSelector(name, recursive=True))
        assert {info.base_name for info in infos} == {WEIGHTS, PARQUET, CSV, LINES}
        assert all(info.type == pa.fs.FileType.File and info.size for info in infos)
        with fs.open_input_file(f"{name}/{WEIGHTS}") as file:
            assert sha256(file.read()) == self.sha256

    def datasets(self) -> None:
        """Datasets loads files, in worker processes too, and streams them."""
        options = {"cache_dir": str(self._scratch / "datasets"), "split": "train"}
        for builder, name in (("parquet", PARQUET), ("csv", CSV), ("json", LINES)):
            loaded = datasets.load_dataset(builder, data_files=self.of(name), **options)
            assert sum(loaded["x"]) == self.total
            streamed = datasets.load_dataset(
                builder, data_files=self.of(name), streaming=True, **options
            )
            assert sum(row["x"] for row in streamed) == self.total
        names = [self.of(PARQUET), f"{self.path}-2/{PARQUET}"]
        loaded = datasets.load_dataset("parquet", data_files=names, num_proc=2, **options)
        assert sum(loaded["x"]) == 2 * self.total

    def safetensors(self) -> None:
        """Safetensors loads the bytes, and maps a file that fsspec has cached."""
        with fsspec.open(self.of(WEIGHTS)) as file:
            loaded = safetensors.numpy.load(file.read())
        assert sorted(loaded) == self.tensors
        local = fsspec.open_local(
            f"simplecache::{self.of(WEIGHTS)}",
            simplecache={"cache_storage": str(self._scratch / "safetensors")},
        )
        with safetensors.safe_open(local, "np") as opened:
            assert sorted(opened.keys()) == self.tensors
            for name in self.tensors:
                assert (opened.get_tensor(name) == loaded[name]).all()

    def dask(self) -> None:
        """Dask reads in threads and processes, and names equal tasks alike."""
        frame = dask.dataframe.read_csv(self.of(CSV), blocksize=4096)
        assert frame.npartitions > 1
        for scheduler in ("threads", "processes"):
            with dask.config.set(scheduler=scheduler):
                assert int(frame["x"].sum().compute()) == self.total
        names = {dask.bytes.read_bytes(self.of(WEIGHTS))[1][0][0].key for _ in range(2)}
        assert len(names) == 1

    def workers(self) -> None:
        """Workers read through a file system and an open file of their parent."""
        fs, path = fsspec.core.url_to_fs(self.of(WEIGHTS))
        data = fs.cat_file(path)
        starts = range(0, len(data) - 16, len(data) // 7)
        for method in ("fork", "forkserver", "spawn"):
            with multiprocessing.get_context(method).Pool(2) as pool:
                found = pool.map(read_in_worker, [(fs, path, start) for start in starts])
            assert found == [data[start : start + 16] for start in starts], method

    def callers(self) -> None:
        """An event loop, its threads, and the asynchronous wrapper of fsspec read together."""
        fs, path = fsspec.core.url_to_fs(self.of(WEIGHTS))

        async def read() -> set[str]:
            wrapped = AsyncFileSystemWrapper(fs, asynchronous=True)
            parts = [wrapped._cat_file(path) for _ in range(8)]
            parts += [asyncio.to_thread(fs.cat_file, path) for _ in range(8)]
            return {sha256(data) for data in [fs.cat_file(path), *await asyncio.gather(*parts)]}

        assert asyncio.run(read()) == {self.sha256}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert {*pool.map(sha256, pool.map(fs.cat_file, [path] * 16))} == {self.sha256}

    def caches(self) -> None:
        """The caches of fsspec and its file systems over another one return the bytes."""
        for name in ("filecache", "simplecache", "blockcache"):
            options = {name: {"cache_storage": str(self._scratch / name)}}
            with fsspec.open(f"{name}::{self.of(WEIGHTS)}", **options) as file:
                assert sha256(file.read()) == self.sha256
        for kind in ("none", "readahead", "bytes", "mmap", "blockcache", "all", "background"):
            with fsspec.filesystem("tinker").open(self.of(WEIGHTS), cache_type=kind) as file:
                assert sha256(file.read()) == self.sha256, kind
        directory = fsspec.filesystem("dir", path=self.path, fs=fsspec.filesystem("tinker"))
        assert {*directory.find("")} == {WEIGHTS, PARQUET, CSV, LINES}


def main() -> int:
    """Run the steps; return 1 if one of them failed."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of the libraries
    datasets.disable_progress_bars()
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        steps = Steps(json.load(sys.stdin), Path(scratch))
        calls: list[Callable[[], None]] = [
            steps.pandas,
            steps.pyarrow,
            steps.datasets,
            steps.safetensors,
            steps.dask,
            steps.workers,
            steps.callers,
            steps.caches,
        ]
        for call in calls:
            started = time.monotonic()
            try:
                call()
            except Exception as error:  # noqa: BLE001 - run the other steps too
                failures += 1
                print(f"FAIL {call.__name__}: {type(error).__name__}: {error}"[:700])
            else:
                print(f"ok {call.__name__} in {time.monotonic() - started:.1f} s", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
