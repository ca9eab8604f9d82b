"""Serve the gateway of hatchery-core with a generated account, without a worker.

mount_checks.py runs this script inside the environment of hatchery. It prints one line of JSON
with its URL and account, and serves until standard input ends. The gateway imports neither torch
nor peft.
"""

import asyncio
import json
import socket
import sys
import threading
from typing import Any

import uvicorn
from hatchery.core.backends.auth.api_key import APIKeyAuthProvider
from hatchery.core.backends.compute.local import LocalComputeBackend
from hatchery.core.backends.metadata.memory import InMemoryMetadataStore
from hatchery.core.backends.metrics.log import LogMetrics
from hatchery.core.backends.object_store.memory import InMemoryObjectStore
from hatchery.core.backends.queue.memory import InMemoryJobQueue
from hatchery.core.config import Config
from hatchery.core.gateway import create_app
from hatchery.core.protocols import CheckpointRecord, SessionRecord, SessionStatus

RUNS = 36
NAMES = ("0001", "0002", "known-{}", "weights", "x" * 300)
KEY = "tml-interop"


async def fill(config: Config) -> dict[str, Any]:
    """Generate an account; return the expected data."""
    expected: dict[str, Any] = {"lists_runs": False, "deletes": True}
    expected |= {"runs": {}, "archives": {}, "samplers": {}}
    for number in range(RUNS):
        run_id, created_at = f"run-{number}", 1_767_000_000.5 + number
        await config.metadata.create_session(
            SessionRecord(
                session_id=run_id,
                user_id="me",
                base_model="Qwen/Qwen3-8B",
                lora_rank=16,
                lora_alpha=32,
                target_modules=["q_proj"],
                total_steps=1,
                accum_steps=0,
                created_at=created_at,
                last_accessed=created_at,
                status=SessionStatus.ACTIVE,
                state_prefix=f"sessions/{run_id}",
            )
        )
        names = [name.format(number) for name in NAMES[: number % (len(NAMES) + 1)]]
        for name in names:
            await config.objects.put(f"sessions/{run_id}/checkpoints/{name}/lora_weights.pt", b"x")
            # hatchery finds the record of a checkpoint only if its id equals its name. The
            # ids of other records have another form, so their checkpoints have no time and kind.
            record = CheckpointRecord(
                checkpoint_id=name if name.startswith("known") else f"{run_id}-{name}",
                session_id=run_id,
                user_id="me",
                name=name,
                checkpoint_type="sampler",
                created_at=created_at,
            )
            await config.metadata.create_checkpoint(record)
        paths = [f"tinker://{run_id}/checkpoints/{name}" for name in names]
        expected["runs"][run_id] = {"checkpoints": paths}
    return expected


def main() -> None:
    """Serve until standard input ends."""
    auth = APIKeyAuthProvider()
    auth.add_key(KEY, user_id="me")
    config = Config(
        auth=auth,
        metadata=InMemoryMetadataStore(),
        objects=InMemoryObjectStore(),
        queue=InMemoryJobQueue(),
        compute=LocalComputeBackend(),
        metrics=LogMetrics(),
    )
    expected = asyncio.run(fill(config))
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio sets TCP_NODELAY only if the socket was created with an explicit protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    expected["base_url"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_app(config), log_level="warning"))

    def stop() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    print(json.dumps(expected), flush=True)  # the socket listens already, and queues early clients
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
