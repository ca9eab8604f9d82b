"""A FUSE file system over a directory that lacks some operations, for tests of copies.

Run as a program it serves: `python -m tests.support.limited_fs SOURCE MOUNTPOINT LIMITS-AS-JSON`.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys

from tests.support.mount import ROOT, force_unmount

#: By name, the errno of each operation that fails. `mode` and `uid` apply to every file, `caseless`
#: ignores the case of names, and `is_refused` rejects a rename onto a file. With `is_stale`, reads
#: of a file without a name fail. `subtype` is a part of the file system type.
LIMITS = {
    "Lustre without flock": {"flock": "ENOSYS"},
    "NFS without locks": {"flock": "ENOLCK"},
    "without modes": {"chmod": "EPERM", "mode": 0o777},
    "without modes at all": {"chmod": "ENOSYS", "utimens": "ENOSYS", "mode": 0o777},
    "without times": {"utimens": "EPERM"},
    "without flushes": {"fsync": "EINVAL"},
    "without replacing": {"is_refused": True},
    "of another owner": {"uid": 12345, "chmod": "EPERM", "utimens": "EPERM", "mode": 0o777},
    "with nothing of these": {
        "flock": "EOPNOTSUPP",
        "chmod": "EOPNOTSUPP",
        "utimens": "EOPNOTSUPP",
        "fsync": "EINVAL",
        "fallocate": "EOPNOTSUPP",
        "is_refused": True,
        "mode": 0o777,
    },
}


@contextlib.contextmanager
def limited_mount(directory, limits):
    """Serve an empty directory with limits until the block ends; yield the mountpoint."""
    source = directory / "source"
    source.mkdir()
    with limited_client(directory, limits, source) as (mountpoint, _process):
        yield mountpoint


@contextlib.contextmanager
def limited_client(directory, limits, source):
    """Serve `source` with limits until the block ends; yield the mountpoint and the process."""
    mountpoint = directory / "limited"
    mountpoint.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.limited_fs", source, mountpoint, json.dumps(limits)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield mountpoint, process
    finally:
        force_unmount(str(mountpoint))
        process.kill()
        process.wait(10)
        process.stdout.close()


def _serve(source, mountpoint, limits):
    import mfusepy

    class Limited(mfusepy.Operations):
        use_ns = True

        def _path(self, path):
            return source + (path.lower() if limits.get("caseless") else path)

        def _check(self, operation):
            if operation in limits:
                raise mfusepy.FuseOSError(getattr(errno, limits[operation]))

        def init(self, path):
            del path
            print("ready", flush=True)

        def getattr(self, path, fh=None):
            status = os.lstat(self._path(path))
            names = ("atime", "ctime", "gid", "ino", "mode", "mtime", "nlink", "size", "uid")
            attributes = {f"st_{name}": getattr(status, f"st_{name}") for name in names}
            for name in ("atime", "ctime", "mtime"):
                attributes[f"st_{name}"] = getattr(status, f"st_{name}_ns")
            attributes["st_mode"] |= limits.get("mode", 0)
            attributes["st_uid"] = limits.get("uid", status.st_uid)
            return attributes

        def readdir(self, path, fh):
            names = [".", "..", *os.listdir(self._path(path))]
            # With use_ino each entry needs an inode number, because glibc skips entries with 0.
            return [(name, {"st_ino": number}, 0) for number, name in enumerate(names, 1)]

        def create(self, path, mode, fi=None):
            return os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def open(self, path, flags):
            return os.open(self._path(path), flags & ~os.O_NOFOLLOW & ~os.O_APPEND)

        def read(self, path, size, offset, fh):
            if limits.get("is_stale") and not os.fstat(fh).st_nlink:
                raise mfusepy.FuseOSError(errno.ESTALE)
            return os.pread(fh, size, offset)

        def write(self, path, data, offset, fh):
            return os.pwrite(fh, data, offset)

        def truncate(self, path, length, fh=None):
            os.truncate(self._path(path), length)

        def release(self, path, fh):
            os.close(fh)

        def mkdir(self, path, mode):
            os.mkdir(self._path(path), mode)

        def unlink(self, path):
            os.unlink(self._path(path))

        def rmdir(self, path):
            os.rmdir(self._path(path))

        def statfs(self, path):
            status = os.statvfs(self._path(path))
            names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_namemax")
            return {name: getattr(status, name) for name in names}

        def rename(self, old, new):
            if limits.get("is_refused") and os.path.lexists(self._path(new)):
                raise mfusepy.FuseOSError(errno.EEXIST)
            os.rename(self._path(old), self._path(new))

        def chmod(self, path, mode):
            self._check("chmod")
            os.chmod(self._path(path), mode)

        def utimens(self, path, times=None):
            self._check("utimens")
            os.utime(self._path(path), ns=times)

        def fsync(self, path, datasync, fh):
            self._check("fsync")

        def fallocate(self, path, mode, offset, size, fh):
            self._check("fallocate")

        def flock(self, path, fh, operation):
            self._check("flock")

    subtype = {"subtype": limits["subtype"]} if "subtype" in limits else {}
    mfusepy.FUSE(Limited(), mountpoint, foreground=True, nothreads=True, use_ino=True, **subtype)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
