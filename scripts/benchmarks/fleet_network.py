"""Hosts of a site in network namespaces, their links, and a distant host.

Every host is a network namespace, and a bridge in another namespace connects them. tbf limits both
directions of each link. Not every kernel has netem, so `fleet_delay` delays the frames to and from
a distant host.

A namespace exists as long as a `cat` that waits for its standard input, or another process in it.
Therefore it ends with the benchmark. Only after SIGKILL, mounts and services stay, which keep it.
All addresses are loopback addresses, to which tinkerfs sends requests without TLS. They exist in
the namespaces only.
"""

import subprocess
import sys
from contextlib import ExitStack, closing
from typing import Self

#: The network of the hosts, which is routed as an ordinary one.
NETWORK = "127.9.0"
BRIDGE, INTERFACE, TAP = "br0", "eth0", "wan0"
#: Number of bytes that a link sends at once; a frame may have 64 KiB before its segmentation.
BURST_BYTES = 256 << 10
#: The second one makes TCP send long segments, as on a fast link, whatever the round-trip time.
#: With segments of two packets, the receivers would need many times the CPU time.
SETTINGS = ("net.ipv4.conf.all.route_localnet=1", "net.ipv4.tcp_tso_rtt_log=31")
#: Maximum delay of a frame in the queue of a link.
QUEUE_S = 0.05


class Namespace:
    """A network namespace, which ends with `close`."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.read(1) != b"\n":
            raise SystemExit("no network namespace could be made (hint: run as root)")
        self.pid = self._holder.pid

    def command(self, *command: str) -> list[str]:
        """Return a command that runs another one in the namespace, with the same process id."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *command]

    def run(self, *command: str) -> None:
        """Run a command in the namespace; it must succeed."""
        subprocess.run(self.command(*command), check=True)

    def close(self) -> None:
        """Let the namespace end with its last process."""
        self._holder.communicate()


class Host(Namespace):
    """A namespace with an address.

    Attributes:
        address: the address of its interface.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.address = f"{NETWORK}.{number}"

    def configure(self) -> None:
        """Set the address of the interface, and route the network through it."""
        self.run("ip", "link", "set", "lo", "up")
        # By default Linux routes all loopback addresses to lo, and drops packets from elsewhere.
        self.run("ip", "address", "add", "127.0.0.1/32", "dev", "lo")
        self.run("ip", "address", "del", "127.0.0.1/8", "dev", "lo")
        self.run("sysctl", "-q", *SETTINGS)
        self.run("ip", "address", "add", f"{self.address}/24", "dev", INTERFACE)
        self.run("ip", "link", "set", INTERFACE, "up")


class Network:
    """A site with its hosts; a context manager that removes them.

    Args:
        delay_s: one-way delay between the site and a distant host.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._hosts: list[Host] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._bridge = stack.enter_context(closing(Namespace()))
            self._bridge.run("ip", "link", "add", BRIDGE, "type", "bridge")
            self._bridge.run("ip", "link", "set", BRIDGE, "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def add_host(self, bits_per_s: float) -> Host:
        """Add a host of the site."""
        host = self._add()
        port = f"port{len(self._hosts)}"
        peer = ["peer", "name", INTERFACE, "netns", str(host.pid)]
        self._bridge.run("ip", "link", "add", port, "type", "veth", *peer)
        return self._connect(host, port, bits_per_s)

    def add_distant_host(self, bits_per_s: float) -> Host:
        """Add a host at the other end of the site's uplink."""
        host = self._add()
        ends = [f"{host.pid}:{INTERFACE}", f"{self._bridge.pid}:{TAP}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.benchmarks.fleet_delay", *ends, str(self._delay_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._stack.callback(process.communicate)
        assert process.stdout is not None
        if process.stdout.read(1) != b"\n":
            raise SystemExit("no TAP device could be made")
        return self._connect(host, TAP, bits_per_s)

    def _add(self) -> Host:
        host = self._stack.enter_context(closing(Host(len(self._hosts) + 1)))
        self._hosts.append(host)
        return host

    def _connect(self, host: Host, port: str, bits_per_s: float) -> Host:
        host.configure()
        self._bridge.run("ip", "link", "set", port, "master", BRIDGE, "up")
        limit = ["rate", f"{bits_per_s:.0f}bit", "burst", str(BURST_BYTES)]
        limit += ["latency", f"{QUEUE_S * 1000:.0f}ms"]
        for end, device in ((host, INTERFACE), (self._bridge, port)):
            end.run("tc", "qdisc", "add", "dev", device, "root", "tbf", *limit)
        return host
