"""Serve the Tinker API of SkyRL with a generated account, without its engine.

mount_checks.py runs this script inside the environment of SkyRL. It prints one line of JSON with
its URL and account, and serves until standard input ends.

These parts of SkyRL are replaced:

- the lifespan of the application, which would launch the engine
- the modules for prompts, sampling and protocol buffers, which import gigabytes of packages
- the rows of the tables, which the engine would write
"""

import asyncio
import hashlib
import json
import socket
import struct
import sys
import threading
import types
import typing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import typing_extensions
import uvicorn

typing.TypedDict = (
    typing_extensions.TypedDict
)  # pydantic rejects typing.TypedDict before Python 3.12

#: Names that the API module imports from modules which need torch, vLLM's client or Tinker's SDK.
_STAND_INS = {
    "skyrl.backends.renderer": ("render_model_input",),
    "skyrl.tinker.extra": ("ExternalInferenceClient", "SkyRLTrainInferenceForwardingClient"),
    "skyrl.tinker.proto_serialization": (
        "PROTO_CONTENT_TYPE",
        "PROTO_SERIALIZABLE_REQUEST_TYPES",
        "parse_forward_backward_request",
        "serialize_result",
    ),
}
for _module, _names in _STAND_INS.items():
    sys.modules[_module] = types.ModuleType(_module)
    for _name in _names:
        setattr(sys.modules[_module], _name, None)

from skyrl.tinker import api  # noqa: E402
from skyrl.tinker.config import EngineConfig  # noqa: E402
from skyrl.tinker.db_models import (  # noqa: E402
    CheckpointDB,
    CheckpointStatus,
    ModelDB,
    SamplingSessionDB,
    SessionDB,
)
from skyrl.tinker.types import CheckpointType, LoraConfig  # noqa: E402
from skyrl.utils.storage import pack_and_upload  # noqa: E402
from sqlalchemy.ext.asyncio import create_async_engine  # noqa: E402
from sqlmodel import SQLModel  # noqa: E402
from sqlmodel.ext.asyncio.session import AsyncSession  # noqa: E402

#: More runs than fit on a page; some have checkpoints, and some of these have archives.
RUNS, RUNS_WITH_CHECKPOINTS, RUNS_WITH_ARCHIVES = 120, 36, 3
NAMES = {
    CheckpointType.TRAINING: ("0001", "0002", "final", "weights"),
    CheckpointType.SAMPLER: ("final", "export", "x" * 200),
}
KIND = {CheckpointType.TRAINING: "weights", CheckpointType.SAMPLER: "sampler_weights"}
START = datetime(2026, 1, 1, tzinfo=UTC)


def save_adapter(path: Path, seed: str) -> str:
    """Write an archive as the backends of SkyRL do; return its digest."""
    values = hashlib.shake_256(seed.encode()).digest(4 * 25_000)
    tensor = {"dtype": "F32", "shape": [25_000], "data_offsets": [0, len(values)]}
    header = json.dumps({"lora_A": tensor}).encode()
    with pack_and_upload(path) as directory:
        weights = struct.pack("<Q", len(header)) + header + values
        (directory / "adapter_model.safetensors").write_bytes(weights)
        (directory / "adapter_config.json").write_text(json.dumps({"r": 16, "peft_type": "LORA"}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def generate_account(directory: Path) -> tuple[list[SQLModel], dict[str, Any]]:
    """Generate an account; return its rows and the expected data."""
    rows: list[SQLModel] = [SessionDB(session_id="session_1", sdk_version="0", status="active")]
    expected: dict[str, Any] = {"lists_runs": True, "deletes": True}
    expected |= {"runs": {}, "archives": {}, "samplers": {}}
    # An id without a kind is ambiguous, because both kinds may have it.
    expected["refused_deletions"] = {"model_00000000/checkpoints/0001": 400}
    for number in range(RUNS):
        run_id, created_at = f"model_{number:08x}", START + timedelta(minutes=number)
        base_model = ("Qwen/Qwen3-8B", "plain")[number % 2]
        lora = LoraConfig(rank=16, alpha=32.0, seed=0).model_dump()
        rows.append(
            ModelDB(
                model_id=run_id,
                base_model=base_model,
                lora_config=lora,
                status="created",
                request_id=number,
                session_id="session_1",
                created_at=created_at,
            )
        )
        paths: list[str] = []
        expected["runs"][run_id] = {"base_model": base_model, "checkpoints": paths}
        if number >= RUNS_WITH_CHECKPOINTS:
            continue
        for kind, names in NAMES.items():
            for name in names[: 1 + number % 4]:
                path = f"tinker://{run_id}/{KIND[kind]}/{name}"
                status = CheckpointStatus.COMPLETED
                if name == "export" and number % 7 == 0:
                    status = CheckpointStatus.PENDING
                    expected["refused_deletions"][f"{run_id}/checkpoints/{KIND[kind]}/{name}"] = 425
                else:
                    paths.append(path)
                rows.append(
                    CheckpointDB(
                        model_id=run_id,
                        checkpoint_id=name,
                        checkpoint_type=kind,
                        status=status,
                        created_at=created_at,
                        completed_at=created_at,
                    )
                )
                if kind is CheckpointType.SAMPLER and number < RUNS_WITH_ARCHIVES:
                    file = directory / run_id / KIND[kind] / f"{name}.tar.gz"
                    expected["archives"][path] = save_adapter(file, path)
    path = next(iter(expected["archives"]))
    for number, model_path in enumerate((path, None)):
        sampler_id = f"sampler_{number}"
        expected["samplers"][sampler_id] = model_path
        rows.append(
            SamplingSessionDB(
                sampling_session_id=sampler_id,
                session_id="session_1",
                sampling_session_seq_id=number,
                base_model=None if model_path else "plain",
                model_path=model_path,
            )
        )
    return rows, expected


async def fill(url: str, rows: list[SQLModel]) -> None:
    """Create the tables and insert the rows."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    async with AsyncSession(engine) as session:
        session.add_all(rows)
        await session.commit()
    await engine.dispose()


def main() -> None:
    """Serve until standard input ends."""
    directory = Path(sys.argv[1])
    database = f"sqlite+aiosqlite:///{directory}/skyrl.db"
    rows, expected = generate_account(directory)
    asyncio.run(fill(database, rows))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.state.db_engine = create_async_engine(database)
        # The original lifespan sets these attributes, which a deletion uses.
        app.state.validated_sampler_checkpoints = set()
        app.state.sampler_checkpoint_validation_lock = asyncio.Lock()
        yield
        await app.state.db_engine.dispose()

    api.app.router.lifespan_context = lifespan
    api.app.state.engine_config = EngineConfig(
        base_model="plain", checkpoints_base=directory, database_url=database
    )
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio sets TCP_NODELAY only if the socket was created with an explicit protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    expected["base_url"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(api.app, log_level="warning"))

    def stop() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    print(json.dumps(expected), flush=True)  # the socket listens already, and queues early clients
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
