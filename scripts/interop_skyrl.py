"""Serve SkyRL's own Tinker API over an account that is made up, without its engine.

Run inside SkyRL's environment, by interop_mount.py. Prints one line of JSON, where it is and what
it has, and serves until standard input ends.

What is not SkyRL's here: the application's lifespan, which would launch the engine; the modules
that render prompts, sample, and read protocol buffers, whose imports take gigabytes; the rows of
the tables, which the engine would have written.
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

typing.TypedDict = typing_extensions.TypedDict  # pydantic refuses the other before Python 3.12

#: What the API's module takes from modules that import torch, vLLM's client, or Tinker's own SDK.
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

#: More than one page, of which a few dozen have checkpoints, and some of these archives.
RUNS, RUNS_WITH_CHECKPOINTS, RUNS_WITH_ARCHIVES = 120, 36, 3
NAMES = {
    CheckpointType.TRAINING: ("0001", "0002", "final", "weights"),
    CheckpointType.SAMPLER: ("final", "export", "x" * 200),
}
KIND = {CheckpointType.TRAINING: "weights", CheckpointType.SAMPLER: "sampler_weights"}
START = datetime(2026, 1, 1, tzinfo=UTC)


def save_adapter(path: Path, seed: str) -> str:
    """Write an archive as SkyRL's backends do; return its digest."""
    values = hashlib.shake_256(seed.encode()).digest(4 * 25_000)
    tensor = {"dtype": "F32", "shape": [25_000], "data_offsets": [0, len(values)]}
    header = json.dumps({"lora_A": tensor}).encode()
    with pack_and_upload(path) as folder:
        weights = struct.pack("<Q", len(header)) + header + values
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 16, "peft_type": "LORA"}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made_up(folder: Path) -> tuple[list[SQLModel], dict[str, Any]]:
    """Return the rows of an account, and what is to be found of it."""
    rows: list[SQLModel] = [SessionDB(session_id="session_1", sdk_version="0", status="active")]
    truth: dict[str, Any] = {"lists_runs": True, "deletes": True}
    truth |= {"runs": {}, "archives": {}, "samplers": {}}
    # A bare id may be a training and a sampler checkpoint's, so that it names none.
    truth["refused_deletions"] = {"model_00000000/checkpoints/0001": 400}
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
        paths = truth["runs"][run_id] = {"base_model": base_model, "checkpoints": []}
        if number >= RUNS_WITH_CHECKPOINTS:
            continue
        for kind, names in NAMES.items():
            for name in names[: 1 + number % 4]:
                path = f"tinker://{run_id}/{KIND[kind]}/{name}"
                status = CheckpointStatus.COMPLETED
                if name == "export" and number % 7 == 0:
                    status = CheckpointStatus.PENDING
                    truth["refused_deletions"][f"{run_id}/checkpoints/{KIND[kind]}/{name}"] = 425
                else:
                    paths["checkpoints"].append(path)
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
                    file = folder / run_id / KIND[kind] / f"{name}.tar.gz"
                    truth["archives"][path] = save_adapter(file, path)
    path = next(iter(truth["archives"]))
    for number, model_path in enumerate((path, None)):
        sampler_id = f"sampler_{number}"
        truth["samplers"][sampler_id] = model_path
        rows.append(
            SamplingSessionDB(
                sampling_session_id=sampler_id,
                session_id="session_1",
                sampling_session_seq_id=number,
                base_model=None if model_path else "plain",
                model_path=model_path,
            )
        )
    return rows, truth


async def fill(url: str, rows: list[SQLModel]) -> None:
    """Make the tables and put rows into them."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    async with AsyncSession(engine) as session:
        session.add_all(rows)
        await session.commit()
    await engine.dispose()


def main() -> None:
    """Serve until standard input ends."""
    folder = Path(sys.argv[1])
    database = f"sqlite+aiosqlite:///{folder}/skyrl.db"
    rows, truth = made_up(folder)
    asyncio.run(fill(database, rows))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.state.db_engine = create_async_engine(database)
        # What its own lifespan sets and a deletion uses.
        app.state.validated_sampler_checkpoints = set()
        app.state.sampler_checkpoint_validation_lock = asyncio.Lock()
        yield
        await app.state.db_engine.dispose()

    api.app.router.lifespan_context = lifespan
    api.app.state.engine_config = EngineConfig(
        base_model="plain", checkpoints_base=folder, database_url=database
    )
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio turns Nagle's algorithm off only where the socket's protocol was named.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    truth["base_url"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(api.app, log_level="warning"))

    def stop() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    print(json.dumps(truth), flush=True)  # the socket listens already: who is early waits in it
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
