"""Tune the memory allocator of glibc for buffers of one chunk that are freed soon.

By default glibc maps each buffer of that size from the kernel, and unmaps it when it is freed. So
the kernel clears every page again. Buffers on the heap are reused instead, for 4 MiB of memory.
"""

import ctypes

#: Parameter numbers from glibc's malloc.h; mallopt(3) describes them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

#: Larger than a chunk, so that chunks are allocated on the heap.
_MMAP_BYTES = 2 << 20

#: Free memory that the end of a heap keeps for the next chunks.
_FREE_BYTES = 4 << 20

#: Maximum number of heaps, each with its own free memory. Only one thread at a time runs Python.
_MAX_HEAPS = 2


def tune_malloc() -> None:
    """Make glibc reuse freed memory of the size of a chunk; do nothing on other C libraries.

    Must be called at the start of the process, before there are threads.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no mallopt
        return
    mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_TRIM_THRESHOLD, _FREE_BYTES)
    mallopt(_ARENA_MAX, _MAX_HEAPS)
