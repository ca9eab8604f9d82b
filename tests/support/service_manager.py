"""The receiving end of sd_notify(3), as a service manager has it."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path


class ServiceManager:
    """A socket that receives the messages of a service."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self._sock = sock
        self.environment = {"NOTIFY_SOCKET": address}

    def receive(self, timeout_s: float = 30.0) -> dict[str, str] | None:
        """Return the values of the next message; None if none arrives in time."""
        self._sock.settimeout(timeout_s)
        try:
            message = self._sock.recv(65536).decode()
        except TimeoutError:
            return None
        return dict(line.split("=", 1) for line in message.split("\n"))

    def wait_for(self, name: str) -> dict[str, str]:
        """Return the next message that has a value of this name."""
        while (message := self.receive()) is not None:
            if name in message:
                return message
        raise AssertionError(f"no {name}")


@contextlib.contextmanager
def service_manager(directory: Path, address: str = "") -> Iterator[ServiceManager]:
    """Receive messages at an address, or at a socket in a directory, until the block ends."""
    address = address or str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        yield ServiceManager(sock, address)
