"""How the C library's allocator treats the memory of blocks that come and go.

glibc asks the kernel for each block of 4 MiB anew and gives it back when it is let go, so that
every page of it is made, and cleared, again. Measured on 2 cores shared with the server: 1 GB read
through a mount took 2.5 s instead of 3.4 s, and 1.3 s of the system's time instead of 2.5 s, for
30 MB more of resident memory.
"""

import ctypes

__all__ = ["keep_freed_memory"]

#: As malloc.h of glibc numbers them; mallopt(3) says what they do.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

#: More than a block, which is then taken from the heap as all else is.
_MMAP_BYTES = 8 << 20

#: What the end of a heap keeps for the next blocks.
_KEPT_BYTES = 16 << 20

#: Heaps: one thread at a time runs Python, and each heap keeps as much.
_HEAPS = 2


def keep_freed_memory() -> None:
    """Have freed memory of a block's size kept for the next one, where the C library is glibc.

    For the start of a process, before there are threads.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no such choice
        return
    mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_ARENA_MAX, _HEAPS)
