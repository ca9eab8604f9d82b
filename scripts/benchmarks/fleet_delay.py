"""A link with a delay between two network namespaces.

    python -m scripts.benchmarks.fleet_delay PID:DEVICE PID:DEVICE SECONDS

It makes a TAP device in the network namespace of each process, prints an empty line, and passes
frames on, each after the delay, until its standard input ends. Frames are passed on before their
segmentation, so that the link costs little CPU time.
"""

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: Maximum length of a frame before its segmentation, with the header of virtio.
FRAME_BYTES = (64 << 10) + 64
#: Maximum number of frames in a device's queue.
QUEUE_FRAMES = 1000

# From linux/sched.h and linux/if_tun.h.
CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x1, 0x2


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Let this thread make sockets and devices in the network namespace of a process."""
    with open("/proc/thread-self/ns/net") as own, open(f"/proc/{pid}/ns/net") as other:
        enter(other.fileno())
        try:
            yield
        finally:
            enter(own.fileno())


def enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class End:
    """One end of the link: a TAP device, and the frames that it sends to the other end.

    Attributes:
        fd: descriptor of the device.
        frames: the frames in flight, each with the instant of its arrival.
    """

    def __init__(self, pid: int, name: str) -> None:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        with network_of(pid):
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        self.frames: deque[tuple[float, bytes]] = deque()

    def receive(self, delay_s: float) -> None:
        """Take all frames from the queue of the device."""
        for _ in range(QUEUE_FRAMES):
            try:
                frame = os.read(self.fd, FRAME_BYTES)
            except BlockingIOError:
                return
            self.frames.append((time.monotonic() + delay_s, frame))

    def deliver(self, other: "End") -> None:
        """Pass on the frames that have arrived."""
        while self.frames and self.frames[0][0] <= time.monotonic():
            _, frame = self.frames.popleft()
            with suppress(OSError):  # a link loses a frame while the other device is down
                os.write(other.fd, frame)


def main() -> None:
    """Run the link."""
    *places, delay = sys.argv[1:]
    first, second = (End(int(pid), name) for pid, _, name in map(partition, places))
    print(flush=True)
    poll = select.poll()
    for fd in (sys.stdin.fileno(), first.fd, second.fd):
        poll.register(fd, select.POLLIN)
    while True:
        due_s = min((end.frames[0][0] for end in (first, second) if end.frames), default=None)
        # Wait a little too long rather than too short, which would be busy waiting.
        wait_ms = None if due_s is None else max(0, int((due_s - time.monotonic()) * 1000) + 1)
        if any(fd == sys.stdin.fileno() for fd, _ in poll.poll(wait_ms)):
            return
        for end, other in ((first, second), (second, first)):
            end.receive(float(delay))
            end.deliver(other)


def partition(place: str) -> tuple[str, str, str]:
    return place.partition(":")


if __name__ == "__main__":
    main()
