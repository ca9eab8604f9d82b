"""A demo server in a process of its own, so that it takes no time of what is measured."""

import json
import subprocess
import sys
from typing import Any, Self


class Server:
    """A demo server elsewhere, told what to do a line at a time.

    Args:
        bytes_per_s: how fast each connection of its store is at the most; 0 for no bound.
        **arguments: of `DemoServer`.
    """

    base_url: str
    api_key: str
    run_id: str

    def __init__(self, *, bytes_per_s: int = 0, **arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"bytes_per_s": bytes_per_s} | arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        told = self._answer()
        self.base_url, self.api_key = told["base_url"], told["api_key"]
        self.run_id = told["run_id"]
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.communicate(timeout=30)

    def ask(self, word: str, *values: object) -> Any:
        """Return the answer to a word of `answers`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([word, *values]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def serve(arguments: dict[str, Any]) -> None:
    """Be that process."""
    from tinkerfs.demo.server import DemoServer

    bytes_per_s = arguments.pop("bytes_per_s")
    with DemoServer(**arguments) as server:
        if bytes_per_s:
            server.faults.add("store", times=None, bytes_per_s=bytes_per_s)
        run_id = server.account.run_ids[0]
        facts = {"base_url": server.base_url, "api_key": server.api_key, "run_id": run_id}
        print(json.dumps(facts), flush=True)
        for line in sys.stdin:
            word, *values = json.loads(line)
            print(json.dumps(answers(server, word, *values)), flush=True)


def answers(server: Any, word: str, *values: Any) -> object:
    """Do what a word means, and return what it asks for."""
    if word == "url":  # of the archive of a sampler checkpoint of the first run
        return server.archive_url(server.account.run_ids[0], f"sampler_weights/{values[0]}")
    if word == "latency":
        (server.latency_s,) = values
        return None
    server.journal.wait_until_idle()
    if word == "clear":
        server.journal.clear()
        return None
    entries = server.journal.entries()
    if word == "entries":
        fields = ("origin", "method", "path", "query", "endpoint", "start_s", "end_s", "status")
        return [
            {name: getattr(entry, name) for name in fields} | {"body": entry.body.decode()}
            for entry in entries
        ]
    assert word == "counts", word
    return {
        "api": sum(e.origin == "api" for e in entries),
        "archives": sum(e.endpoint == "GET archive" for e in entries),
        "store": sum(e.origin == "store" for e in entries),
        "sent": sum(e.sent_bytes for e in entries if e.origin == "store"),
    }


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
