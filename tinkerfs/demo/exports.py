"""Handlers of the endpoints that export a training checkpoint as external weights.

An export is a training session of its own: create a session, load the checkpoint into a new run,
save that run's weights as external weights, and finish the session. Load and save are futures,
which a client polls. The server cancels a session without heartbeats.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinkerfs.demo.account import Account
from tinkerfs.demo.content import Content, Data
from tinkerfs.demo.http import Reply, json_reply
from tinkerfs.demo.lookup import HttpError, Lookup
from tinkerfs.demo.mutations import TTL_RANGE_S
from tinkerfs.demo.request import Request
from tinkerfs.demo.sample_data import Checkpoint, Run, Session
from tinkerfs.demo.store import Store

#: Reasons with which a client may finish a session.
_FINISH_REASONS = ("success", "errored", "interrupted")

Json = dict[str, Any]


@dataclass(slots=True)
class ExportOptions:
    """Options of exports, which may be changed while the server runs.

    Attributes:
        load_s: Seconds until a load has finished.
        save_s: Seconds until a save has finished.
        queue_state: State that a poll reports before that: `active`, `paused_capacity` or
            `paused_rate_limit`.
        queue_state_reason: Reason that a poll reports.
        try_again_status: Status of the response to a poll before that: 200 or 408.
        heartbeat_timeout_s: Seconds without a heartbeat after which a session is cancelled.
        retired_models: Base models that cannot be loaded.
        encrypt: Encrypts bytes for age recipients; None if the server cannot.
        failure: Error and category of every load and save, None for success.
    """

    load_s: float = 0.0
    save_s: float = 0.0
    queue_state: str = "active"
    queue_state_reason: str | None = None
    try_again_status: int = 200
    heartbeat_timeout_s: float = 120.0
    retired_models: frozenset[str] = frozenset()
    encrypt: Callable[[bytes, list[str]], bytes] | None = None
    failure: tuple[str, str] | None = None


@dataclass(slots=True)
class _Future:
    """A request that has a result after some time, also if it is not polled.

    Attributes:
        due_s: Unix time of the result.
        finish: Returns the result.
    """

    session_id: str
    due_s: float
    finish: Callable[[], Json]
    result: Json | None = None


@dataclass(slots=True)
class _Export:
    """A session that a client created."""

    session: Session
    seen_s: float
    source: tuple[Run, Checkpoint] | None = None
    request_ids: dict[tuple[str, Any], str] = field(default_factory=dict)


class ExportEndpoints:
    """API handlers, called with the account's lock held.

    Args:
        account: The records; exports add runs, checkpoints and sessions.
        lookup: Finds the checkpoint to export.
        store: Knows the files of a checkpoint.
        options: Delays and failures.
        clock: Returns Unix time.
    """

    def __init__(
        self,
        account: Account,
        lookup: Lookup,
        store: Store,
        options: ExportOptions,
        clock: Callable[[], float],
    ) -> None:
        self._account, self._lookup, self._store = account, lookup, store
        self._options, self._clock = options, clock
        self._exports: dict[str, _Export] = {}
        self._futures: dict[str, _Future] = {}
        self._numbers = itertools.count(1)

    def advance(self) -> None:
        """Finish what is due, and cancel the sessions that have received nothing for too long."""
        for future in list(self._futures.values()):
            self._finish_if_due(future)
        for export in self._exports.values():
            is_lost = self._clock() - export.seen_s > self._options.heartbeat_timeout_s
            if is_lost and self._is_active(export):
                export.session.status = {"type": "cancelled", "detail": "no heartbeat"}

    def forget_futures(self) -> None:
        """Lose every future, as a restart of the service may; polls then fail with 410."""
        self._futures.clear()
        for export in self._exports.values():
            export.request_ids.clear()

    def create_session(self, request: Request, _args: dict[str, str]) -> Reply:
        """Create a session."""
        body = self._lookup.body(request)
        if not isinstance(body.get("sdk_version"), str) or not isinstance(body.get("tags"), list):
            raise HttpError(422, [{"loc": ["body"], "msg": "tags and sdk_version are required"}])
        session_id = f"export-session-{next(self._numbers)}"
        session = Session(
            id=session_id,
            created_at_s=self._clock(),
            run_ids=[],
            samplers={},
            display_name=body.get("display_name"),
            user_metadata=body.get("user_metadata"),
            status={"type": "active"},
        )
        self._account.add_session(session)
        self._exports[session_id] = _Export(session, self._clock())
        return json_reply({"type": "create_session", "session_id": session_id})

    def load_weights(self, request: Request, _args: dict[str, str]) -> Reply:
        """Start to load a training checkpoint into a new run of a session."""
        body = self._lookup.body(request)
        export = self._active(body.get("session_id"))
        run, checkpoint = self._lookup.by_tinker_path(body.get("path"))
        if checkpoint.kind != "weights":
            raise HttpError(400, f"{checkpoint.id} is not a training checkpoint")
        model_id = f"{export.session.id}:train:{body.get('model_seq_id', 0)}"

        def finish() -> Json:
            if run.base_model in self._options.retired_models:
                return {"error": f"Base model {run.base_model} was retired", "category": "user"}
            if self._account.run(model_id) is None:
                self._account.add_run(
                    model_id, base_model=run.base_model, lora_rank=run.lora_rank, owner=run.owner
                )
                export.session.run_ids.append(model_id)
            export.source = run, checkpoint
            return {"type": "load_weights", "path": body["path"], "model_id": model_id}

        key = ("load_weights", body.get("model_seq_id", 0))
        return self._promise(export, key, self._options.load_s, finish, model_id=model_id)

    def get_info(self, request: Request, _args: dict[str, str]) -> Reply:
        """Return the base model of a loaded run."""
        run = self._lookup.run(str(self._lookup.body(request).get("model_id")))
        data = {"arch": "unknown", "model_name": run.base_model, "tokenizer_id": run.base_model}
        value = {
            "type": "get_info",
            "model_id": run.id,
            "model_data": data,
            "is_lora": True,
            "lora_rank": run.lora_rank,
            "model_name": run.base_model,
        }
        return json_reply(value)

    def save_weights_external(self, request: Request, _args: dict[str, str]) -> Reply:
        """Start to save a loaded run's weights as external weights."""
        body = self._lookup.body(request)
        model_id, name, ttl_s = str(body.get("model_id")), body.get("path"), body.get("ttl_seconds")
        export = self._active(model_id.partition(":train:")[0])
        if not isinstance(name, str) or not name or "/" in name:
            raise HttpError(422, [{"loc": ["body", "path"], "msg": "a name is required"}])
        if ttl_s is not None and not TTL_RANGE_S[0] <= ttl_s <= TTL_RANGE_S[1]:
            raise HttpError(400, f"ttl_seconds must be from {TTL_RANGE_S[0]} to {TTL_RANGE_S[1]}")
        if export.source is None:
            raise HttpError(404, f"Model {model_id} not found")
        recipients = body.get("age_encryption_recipients") or ()
        source = export.source
        path = f"tinker://{model_id}/external_weights/{name}"
        due_s = self._clock() + self._options.save_s

        def finish() -> Json:
            if self._account.checkpoint(model_id, f"external_weights/{name}") is not None:
                return {"error": f"A checkpoint named {name} exists", "category": "user"}
            files = self._store.files(*source)
            if recipients:
                files = self._encrypted(files, recipients)
            expires_at_s = None if ttl_s is None else math.floor(due_s) + ttl_s
            checkpoint = self._account.add_checkpoint(
                model_id,
                f"external_weights/{name}",
                files=files,
                size_bytes=sum(content.size_bytes for content in files.values()),
            )
            self._account.set_expiry(model_id, checkpoint, expires_at_s)
            return {"type": "save_weights_external", "path": path}

        key = ("save_weights_external", body.get("seq_id"))
        return self._promise(export, key, self._options.save_s, finish)

    def retrieve_future(self, request: Request, _args: dict[str, str]) -> Reply:
        """Return the result of a future, or ask to try again."""
        request_id = str(self._lookup.body(request).get("request_id"))
        future = self._futures.get(request_id)
        if future is None:
            raise HttpError(410, f"Request {request_id} is gone; send the original request again")
        if future.result is None and not self._is_active(self._exports[future.session_id]):
            future.result = {"error": "The session has ended", "category": "user"}
        self._finish_if_due(future)
        if future.result is not None:
            return json_reply(future.result)
        value = {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": self._options.queue_state,
            "queue_state_reason": self._options.queue_state_reason,
        }
        return json_reply(value, self._options.try_again_status)

    def session_heartbeat(self, request: Request, _args: dict[str, str]) -> Reply:
        """Keep a session alive; 410 if it has ended."""
        export = self._active(self._lookup.body(request).get("session_id"))
        export.seen_s = self._clock()
        return json_reply({"type": "session_heartbeat"})

    def finish_session(self, request: Request, args: dict[str, str]) -> Reply:
        """End a session; the first reason stays."""
        body = self._lookup.body(request)
        reason = (body.get("reason") or {}).get("type")
        if reason not in _FINISH_REASONS:
            raise HttpError(422, [{"loc": ["body", "reason"], "msg": "unknown reason"}])
        export = self._export(args["session"])
        if self._is_active(export):
            export.session.status = {
                "type": "client_finished",
                "reason": {"type": reason},
                "detail": body.get("detail"),
            }
        return json_reply(None)

    def _encrypted(self, files: Mapping[str, Content], recipients: list[str]) -> dict[str, Content]:
        """Return files as age files, with the suffix `.age`."""
        encrypt = self._options.encrypt
        if encrypt is None:
            raise HttpError(501, "This server cannot encrypt")
        return {
            f"{name}.age": Data(encrypt(content.read(0, content.size_bytes), recipients))
            for name, content in files.items()
        }

    def _promise(
        self,
        export: _Export,
        key: tuple[str, Any],
        duration_s: float,
        finish: Callable[[], Json],
        **values: Any,
    ) -> Reply:
        """Return a future; a repeated request of the same sequence number gets the same one."""
        export.seen_s = self._clock()
        request_id = export.request_ids.get(key)
        if request_id is None:
            request_id = export.request_ids[key] = f"{export.session.id}:{next(self._numbers)}"
            due_s = self._clock() + duration_s
            self._futures[request_id] = _Future(export.session.id, due_s, finish)
        return json_reply({"request_id": request_id, **values})

    def _finish_if_due(self, future: _Future) -> None:
        """Set the result of a future that was due before its session was lost."""
        export = self._exports[future.session_id]
        is_due = future.result is None and self._clock() >= future.due_s and self._is_active(export)
        if not is_due or future.due_s > export.seen_s + self._options.heartbeat_timeout_s:
            return
        failure = self._options.failure
        future.result = (
            future.finish() if failure is None else {"error": failure[0], "category": failure[1]}
        )

    def _export(self, session_id: Any) -> _Export:
        if session_id not in self._exports:
            raise HttpError(404, f"Session {session_id} not found")
        return self._exports[session_id]

    def _active(self, session_id: Any) -> _Export:
        export = self._export(session_id)
        if not self._is_active(export):
            raise HttpError(410, f"Session {session_id} has ended")
        return export

    def _is_active(self, export: _Export) -> bool:
        """Return whether a session has neither been finished nor cancelled."""
        return export.session.status == {"type": "active"}
