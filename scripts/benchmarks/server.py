"""A demo server in a separate process, which does not slow down the benchmark."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

from tinkerfs.demo.content import iter_chunks


class Server:
    """Client of a demo server in a subprocess; both exchange lines of JSON.

    Args:
        bytes_per_s: Maximum rate of each connection to the store; 0 for no limit.
        prefix: Start of the command, such as one that changes the network namespace.
        **arguments: Arguments of `FaultyServer`.
    """

    base_url: str
    api_key: str
    run_id: str

    def __init__(
        self, *, bytes_per_s: int = 0, prefix: Sequence[str] = (), **arguments: object
    ) -> None:
        arguments |= {"bytes_per_s": bytes_per_s}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", __name__, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        facts = self._read_reply()
        self.base_url, self.api_key = facts["base_url"], facts["api_key"]
        self.run_id = facts["run_id"]
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.communicate(timeout=30)

    def ask(self, command: str, *values: object) -> Any:
        """Send a command of `execute`; return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *values]) + "\n")
        self._process.stdin.flush()
        return self._read_reply()

    def _read_reply(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def serve(arguments: dict[str, Any]) -> None:
    """Run the demo server; execute the commands on standard input until it ends."""
    from tests.support.faulty_server import FaultyServer

    bytes_per_s = arguments.pop("bytes_per_s")
    with FaultyServer(**arguments) as server:
        if bytes_per_s:
            server.faults.add("store", times=None, bytes_per_s=bytes_per_s)
        run_id = server.account.run_ids[0]
        facts = {"base_url": server.base_url, "api_key": server.api_key, "run_id": run_id}
        print(json.dumps(facts), flush=True)
        for line in sys.stdin:
            command, *values = json.loads(line)
            print(json.dumps(execute(server, command, *values)), flush=True)


def execute(server: Any, command: str, *values: Any) -> object:
    """Execute a command of the client; return its result."""
    if command == "url":  # of the archive of a sampler checkpoint of the first run
        return server.archive_url(server.account.run_ids[0], f"sampler_weights/{values[0]}")
    if command == "checkpoint":  # the same: its size and checksums
        name = (server.account.run_ids[0], f"sampler_weights/{values[0]}")
        archive, files = server.archive(*name), server.files(*name)
        return {
            "bytes": archive.size_bytes,
            "digests": {"archive": sha256({"archive.tar": archive}), "files": sha256(files)},
        }
    if command == "latency":
        (server.latency_s,) = values
        return None
    if command == "base_model":  # of the first run
        (server.account.runs()[0].base_model,) = values
        return None
    if command == "exports":  # attributes of `ExportOptions`
        for name, value in values[0].items():
            setattr(server.behaviour.exports, name, value)
        return None
    server.journal.wait_until_idle()
    if command == "clear":
        server.journal.clear()
        return None
    entries = server.journal.entries()
    if command == "entries":
        fields = ("origin", "method", "path", "query", "endpoint", "start_s", "end_s", "status")
        return [
            {name: getattr(entry, name) for name in fields} | {"body": entry.body.decode()}
            for entry in entries
        ]
    assert command == "counts", command
    return {
        "api": sum(e.origin == "api" for e in entries),
        "archives": sum(e.endpoint == "GET archive" for e in entries),
        "store": sum(e.origin == "store" for e in entries),
        "sent": sum(e.sent_bytes for e in entries if e.origin == "store"),
    }


def sha256(files: Any) -> dict[str, str]:
    """Return the checksum of each file."""
    digests = {}
    for name, content in files.items():
        digest = hashlib.sha256()
        for chunk in iter_chunks(content, 0, content.size_bytes):
            digest.update(chunk)
        digests[name] = digest.hexdigest()
    return digests


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
