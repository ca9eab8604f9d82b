"""Export a training checkpoint as external weights.

The official service has no call for this. Its SDK starts a training session, loads the checkpoint
into a new run, saves that run's weights as external weights, and finishes the session. Load and
save are futures, which a client polls. The server cancels a session without heartbeats, so a killed
process leaves nothing but the checkpoint it may have saved, and that one expires.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.checkpoint_ids import id_segment
from tinkerfs.api.client import Client
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.retry import Backoff

#: Seconds between heartbeats (Tinker SDK 0.38, `internal_client_holder.py`).
HEARTBEAT_S: Final = 10.0
#: Between polls of a future. A server may delay its response to a poll instead.
POLL: Final = Backoff(0.5, 5.0)
#: How often a lost future is requested again. The SDK has no limit.
MAX_LOST_FUTURES: Final = 3

#: What a queue state means for the user (Tinker SDK 0.38, `try_again_response.py`).
_QUEUE_STATES: Final = {
    "active": "",
    "paused_capacity": "waiting for capacity",
    "paused_rate_limit": "waiting because of a rate limit",
}


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """State of a running export.

    Attributes:
        step: `loading weights` or `saving weights`.
        queue: why the server has not begun, empty if it has.
    """

    step: str
    queue: str = ""

    def __str__(self) -> str:
        """Return the step, and why it waits."""
        return f"{self.step}, {self.queue}" if self.queue else self.step


class ExportStopped(Exception):
    """The export was stopped by this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export.

    Attributes:
        source: tinker path of a training checkpoint.
        name: name of the external weights, unique in the new run.
        ttl_s: time after which the server deletes them, seconds.
        recipients: age recipients for which the files are encrypted; empty for plain files.
    """

    source: str
    name: str
    ttl_s: int
    recipients: Sequence[str] = ()


class Export:
    """One export; `run` blocks until it is done. `stop` may be called by any thread.

    Args:
        timeout_s: time for all steps, seconds.
        on_session: receives the id of the session before anything is loaded into it.
        on_progress: receives each state.
    """

    def __init__(
        self,
        client: Client,
        request: ExportRequest,
        clock: Clock,
        *,
        timeout_s: float,
        on_session: Callable[[str], None],
        on_progress: Callable[[ExportProgress], None],
    ) -> None:
        self._client = client
        self._request = request
        self._clock = clock
        self._timeout_s = timeout_s
        self._deadline = clock.monotonic() + timeout_s
        self._on_session, self._on_progress = on_session, on_progress
        self._stop = threading.Event()
        self._is_session_lost = False

    def stop(self) -> None:
        """Stop waiting; `run` raises ExportStopped soon after."""
        self._stop.set()

    def run(self) -> str:
        """Export, and return the tinker path of the external weights.

        The session is finished in any case.

        Raises:
            ApiError: a request or a step failed; RequestTimeout after `timeout_s`.
            ExportStopped: `stop` was called.
        """
        session_id = self._create_session()
        ended = threading.Event()
        reason, detail, run_id = "errored", None, ""
        heartbeats = run_in_thread(lambda: self._send_heartbeats(session_id, ended), "heartbeats")
        try:
            self._on_session(session_id)
            path = self._export(session_id)
            reason, run_id = "success", path.removeprefix("tinker://").partition("/")[0]
        except ExportStopped:
            reason = "interrupted"
            raise
        except errors.ApiError as error:
            detail = error.message
            raise
        finally:
            ended.set()
            heartbeats.exception()
            # The server ends a session without heartbeats anyway.
            with contextlib.suppress(errors.ApiError):
                self._finish_session(session_id, reason, detail)
            self._client.announce_change(run_id)
        return path

    def _export(self, session_id: str) -> str:
        request, model_id = self._request, f"{session_id}:train:0"
        load = self._result("loading weights", lambda: self._load_weights(session_id))
        model_id = _text(load, "model_id") or model_id
        try:
            saved = self._result(
                "saving weights",
                lambda: self._save_weights(model_id),
            )
        except errors.BadRequest:
            # A save that was sent again finds the name taken by itself.
            path = f"tinker://{model_id}/external_weights/{request.name}"
            if path in {each.tinker_path for each in self._client.list_checkpoints(model_id)}:
                return path
            raise
        path = _text(saved, "path")
        if not path.startswith("tinker://"):
            raise errors.ProtocolError(
                "the result of an export has no path", endpoint=endpoints.SAVE_EXTERNAL.label
            )
        return path

    def _result(self, step: str, send: Callable[[], str]) -> dict[str, Any]:
        """Send a request that returns a future, and wait for its result."""
        self._on_progress(ExportProgress(step))
        request_id, lost, polls = send(), 0, 0
        while True:
            try:
                fields = self._retrieve_future(request_id)
            except errors.NotFound:
                lost += 1
                if lost > MAX_LOST_FUTURES:
                    raise
                request_id = send()
                continue
            except (errors.ConnectionFailed, errors.RequestTimeout, errors.ServerError):
                fields = {"type": "try_again"}
            if "error" in fields:
                raise _failure(fields)
            if fields.get("type") != "try_again":
                if not fields.keys() & {"type", "path", "model_id"}:
                    raise errors.ProtocolError(
                        "the result of an export has no field that is known",
                        endpoint=endpoints.RETRIEVE_FUTURE.label,
                    )
                return fields
            progress = ExportProgress(step, _queue(fields))
            self._on_progress(progress)
            polls += 1
            self._pause(POLL.delay_s(polls), progress)

    def _pause(self, delay_s: float, progress: ExportProgress) -> None:
        if self._stop.wait(delay_s):
            raise ExportStopped
        if self._is_session_lost:
            raise errors.ServerError(
                "the server has ended the session of the export",
                endpoint=endpoints.HEARTBEAT.label,
            )
        if self._clock.monotonic() > self._deadline:
            raise errors.RequestTimeout(
                f"not exported within {self._timeout_s:g} s (--archive-timeout); "
                f"last state: {progress}",
                endpoint=endpoints.RETRIEVE_FUTURE.label,
            )

    def _send_heartbeats(self, session_id: str, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            try:
                self._client.post(
                    endpoints.HEARTBEAT,
                    "session_heartbeat",
                    {"session_id": session_id, "type": "session_heartbeat"},
                )
            except errors.NotFound:
                self._is_session_lost = True
                return
            except errors.ApiError:
                pass  # the server tolerates missing ones for a while; the polls report an outage

    # The calls

    def _create_session(self) -> str:
        fields = {
            "tags": [],
            "user_metadata": {"created_by": "tinkerfs export"},
            "sdk_version": endpoints.SDK_VERSION,
            "type": "create_session",
        }
        try:
            found = self._client.post(endpoints.CREATE_SESSION, "create_session", fields)
        except errors.UnsupportedEndpoint as error:
            raise error.with_consequence("so it exports no checkpoints") from None
        return _required(found, "session_id", endpoints.CREATE_SESSION)

    def _load_weights(self, session_id: str) -> str:
        fields = {
            "session_id": session_id,
            "model_seq_id": 0,
            "path": self._request.source,
            "optimizer": False,
            "type": "load_weights",
        }
        found = self._client.post(endpoints.LOAD_WEIGHTS, "load_weights", fields)
        return _required(found, "request_id", endpoints.LOAD_WEIGHTS)

    def _save_weights(self, model_id: str) -> str:
        request = self._request
        fields: dict[str, object] = {
            "model_id": model_id,
            "path": request.name,
            "seq_id": 1,
            "ttl_seconds": request.ttl_s,
            "type": "save_weights_external",
        }
        if request.recipients:
            fields["age_encryption_recipients"] = list(request.recipients)
        found = self._client.post(endpoints.SAVE_EXTERNAL, "save_weights_external", fields)
        return _required(found, "request_id", endpoints.SAVE_EXTERNAL)

    def _retrieve_future(self, request_id: str) -> dict[str, Any]:
        fields = {"request_id": request_id, "allow_metadata_only": False}
        return self._client.post(endpoints.RETRIEVE_FUTURE, "retrieve_future", fields)

    def _finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        path = f"sessions/{id_segment(endpoints.FINISH_SESSION, session_id)}/finish"
        fields = {"reason": {"type": reason}, "detail": detail}
        self._client.post(endpoints.FINISH_SESSION, path, fields)


def _queue(fields: dict[str, Any]) -> str:
    state = _text(fields, "queue_state")
    meaning = _QUEUE_STATES.get(state, errors.redact(state))
    reason = errors.redact(_text(fields, "queue_state_reason"))
    return f"{meaning}: {reason}" if meaning and reason else meaning


def _failure(fields: dict[str, Any]) -> errors.ApiError:
    """Return the error of a future that failed for good."""
    kind = errors.BadRequest if fields.get("category") == "user" else errors.ServerError
    message = errors.redact(str(fields["error"]))
    return kind(message, endpoint=endpoints.RETRIEVE_FUTURE.label)


def _required(fields: dict[str, Any], name: str, endpoint: Endpoint) -> str:
    value = _text(fields, name)
    if not value:
        raise errors.ProtocolError(f"the response has no {name}", endpoint=endpoint.label)
    return value


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""
