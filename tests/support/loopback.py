"""A FUSE loopback file system with the lock behaviour of some servers.

`python -m tests.support.loopback DIRECTORY MOUNTPOINT LOCKS`; LOCKS is one of
- `none`: every lock fails with ENOLCK, like without a lock daemon;
- `leak`: a lock is granted, and stays when its file is closed, because the kernel does not forward
  the close for open file description locks.
"""

import ctypes
import errno
import fcntl
import os
import sys

import mfusepy


class _Flock(ctypes.Structure):
    """`struct flock` of 64-bit Linux."""

    _fields_ = (
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_int64),
        ("l_len", ctypes.c_int64),
        ("l_pid", ctypes.c_int),
    )


class Loopback(mfusepy.Operations):
    use_ns = True

    def __init__(self, root, locks):
        self._root = root
        self._locks = locks
        self._held = {}  # path -> [(start, kind)]

    def _path(self, path):
        return self._root + path

    def init(self, path):
        print("ready", flush=True)

    def getattr(self, path, fh=None):
        status = os.fstat(fh) if fh is not None else os.lstat(self._path(path))
        return {
            name: getattr(status, name)
            for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        } | {f"st_{each}time": getattr(status, f"st_{each}time_ns") for each in "acm"}

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._path(path))]

    def mkdir(self, path, mode):
        os.mkdir(self._path(path), mode)

    def rmdir(self, path):
        os.rmdir(self._path(path))

    def unlink(self, path):
        os.unlink(self._path(path))

    def rename(self, old, new, flags=0):
        os.rename(self._path(old), self._path(new))

    def chmod(self, path, mode):
        os.chmod(self._path(path), mode)

    def utimens(self, path, times=None):
        os.utime(self._path(path), ns=times)

    def truncate(self, path, length, fh=None):
        os.truncate(self._path(path), length)

    def create(self, path, mode, fi=None):
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT, mode)

    def open(self, path, flags):
        return os.open(self._path(path), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW))

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def statfs(self, path):
        status = os.statvfs(self._root)
        return {
            name: getattr(status, name) for name in ("f_bsize", "f_frsize", "f_blocks", "f_bavail")
        }

    def release(self, path, fh):
        os.close(fh)

    def lock(self, path, fh, cmd, lock):
        if self._locks == "none":
            raise mfusepy.FuseOSError(errno.ENOLCK)
        flock = ctypes.cast(lock, ctypes.POINTER(_Flock)).contents
        held = self._held.setdefault(path, [])
        if flock.l_type == fcntl.F_UNLCK:
            held[:] = [each for each in held if each[0] != flock.l_start]
            return 0
        for start, kind in held:
            if start == flock.l_start and fcntl.F_WRLCK in (kind, flock.l_type):
                raise mfusepy.FuseOSError(errno.EAGAIN)
        held.append((flock.l_start, flock.l_type))
        return 0


if __name__ == "__main__":
    mfusepy.FUSE(
        Loopback(sys.argv[1], sys.argv[3]),
        sys.argv[2],
        foreground=True,
        nothreads=True,
        fsname="loopback",
        subtype="loopback",
        use_ino=False,
        attr_timeout=0,
    )
