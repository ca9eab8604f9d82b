"""The open remote files of a reader, which all handles of a file share."""

import threading
import weakref
from functools import partial

from tinkerfs.cache.blocks import Blocks
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.archive_index import block_key
from tinkerfs.weights.origins import StoredFile
from tinkerfs.weights.remote_file import RemoteFile


class RemoteFilePool:
    """Opens remote files. Thread-safe.

    Args:
        cache: caches blocks across mounts.
        memory: the blocks of all files that the cache does not take.
        timeout_s: how long a transfer may make no progress, seconds.
    """

    def __init__(
        self, cache: Blocks, memory: BlockMemoryPool, telemetry: Telemetry, *, timeout_s: float
    ) -> None:
        self._cache = cache
        self._memory = memory
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        #: By block cache key; guarded by _lock.
        self._files: weakref.WeakValueDictionary[str, RemoteFile] = weakref.WeakValueDictionary()

    def acquire(self, cache_key: str, path: str, about: str, stored: StoredFile) -> RemoteFile:
        """Return the acquired file of a version; all handles share it.

        Args:
            cache_key: unique on this host for what the file belongs to.
            path: the path that a user requested, for messages.
            about: what the file belongs to, for users of the cache.
            stored: the version and its source.
        """
        key = block_key(cache_key, stored.version, stored.kind)
        with self._lock:
            file = self._files.get(key)
            if file is not None and file.acquire():
                return file
            file = RemoteFile(
                key,
                path,
                stored.size_bytes,
                stored.source,
                self._cache.open(key, f"{about} {stored.kind}", stored.size_bytes, stored.layout),
                self._memory,
                self._telemetry,
                timeout_s=self._timeout_s,
                digests=stored.digests,
            )
            file.acquire()
            self._files[key] = file
        stored.on_open(partial(_is_open, weakref.ref(file)))
        return file

    def blocks_in_flight(self) -> int:
        """Return the number of blocks that are being downloaded, or will be."""
        return sum(file.blocks_in_flight() for file in list(self._files.values()))

    def is_idle(self) -> bool:
        """Return whether no download is in flight."""
        return all(file.is_idle() for file in list(self._files.values()))


def _is_open(file: "weakref.ref[RemoteFile]") -> bool:
    """Return whether a file is open, and not stale."""
    found = file()
    if found is None or not found.acquire():
        return False
    found.release()
    return True
