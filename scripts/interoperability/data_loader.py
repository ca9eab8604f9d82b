"""Read weights in the worker processes of PyTorch's DataLoader, by `tinker://`.

Runs in an environment with torch. The argument is the URL of a file. Prints a line per way to
start workers.
"""

import sys
import time
from typing import Any

import fsspec
import torch
from torch.utils.data import DataLoader, Dataset

WINDOW_BYTES = 64 << 10


class Windows(Dataset):  # type: ignore[misc]
    """The consecutive windows of a file, which is open before the workers start."""

    def __init__(self, url: str) -> None:
        self.fs, self.path = fsspec.core.url_to_fs(url)
        self.file = self.fs.open(self.path)

    def __len__(self) -> int:
        return int(self.file.size) // WINDOW_BYTES

    def __getitem__(self, index: int) -> Any:
        self.file.seek(index * WINDOW_BYTES)
        return torch.frombuffer(bytearray(self.file.read(WINDOW_BYTES)), dtype=torch.uint8)


def main() -> int:
    """Compare two epochs of each way to start workers with the bytes of the file."""
    windows = Windows(sys.argv[1])
    expected = windows.fs.cat_file(windows.path)[: len(windows) * WINDOW_BYTES]
    for method in ("fork", "spawn"):
        started = time.monotonic()
        loader = DataLoader(
            windows,
            batch_size=4,
            num_workers=2,
            multiprocessing_context=method,
            persistent_workers=True,
        )
        for _ in range(2):
            if b"".join(batch.numpy().tobytes() for batch in loader) != expected:
                print(f"FAIL DataLoader, {method}")
                return 1
        print(f"ok DataLoader, {method}, in {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    from tinkerfs.fsspec import TinkerFileSystem

    fsspec.register_implementation("tinker", TinkerFileSystem)
    sys.exit(main())
