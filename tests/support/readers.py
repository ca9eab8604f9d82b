"""Processes that read a file like programs do, and checks of the bytes that they read."""

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time

#: Access patterns. Each program prints [offset, length, sha256] of its reads, or an errno.
READERS = {
    "sequential": """
while piece := os.read(fd, 131072):
    found.append((at, piece))
    at += len(piece)
""",
    "random": """
def run(seed):
    rng = random.Random(seed)
    try:
        for _ in range(8):
            at = rng.randrange(size)
            found.append((at, os.pread(fd, 200000, at)))
    except OSError as error:
        failures.append(error)
threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
if failures:
    raise failures[0]
""",
    "mmap": """
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
for at in (size - 1, size // 2, 0):
    found.append((at, mapped[at : at + 1]))
found.append((0, mapped[:]))
""",
}
READER = """
import hashlib, json, mmap, os, random, sys, threading
found, failures, at = [], [], 0
try:
    fd = os.open(sys.argv[1], os.O_RDONLY)
    size = os.fstat(fd).st_size
    {body}
except OSError as error:
    print(error.errno)
else:
    print(json.dumps([(at, len(data), hashlib.sha256(data).hexdigest()) for at, data in found]))
"""


class Reader:
    """A process that reads a file in some way."""

    def __init__(self, how, file):
        body = READERS[how].strip().replace("\n", "\n    ")
        command = [sys.executable, "-S", "-E", "-c", READER.format(body=body), str(file)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    def ends_with(self, expected, timeout_s=30.0):
        """Return whether it read all bytes correctly; False if it failed with an error in time.

        A memory mapping fails with SIGBUS.
        """
        try:
            output, _ = self.process.communicate(timeout=timeout_s)
        finally:
            self.process.kill()
        if self.process.returncode == -signal.SIGBUS:
            return False
        assert self.process.returncode == 0
        found = json.loads(output)
        if isinstance(found, int):
            assert found, "the errno of an error is not 0"
            return False
        assert found
        for at, length, digest in found:
            assert length > 0
            assert hashlib.sha256(expected[at : at + length]).hexdigest() == digest
        return True


def size_once_reachable(file, timeout_s=30.0):
    """Return the size of a file; repeat requests that time out because the machine is busy."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return file.stat().st_size
        except OSError as error:
            if error.errno != errno.ETIMEDOUT or time.monotonic() > deadline:
                raise


def read_all(file, expected):
    """Return whether each kind of reader, one after the other, reads every byte correctly."""
    return all(Reader(how, file).ends_with(expected) for how in READERS)
