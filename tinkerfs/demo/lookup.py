"""Resolve the runs, checkpoints and parameters that requests refer to."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tinkerfs.demo.account import Account
from tinkerfs.demo.profiles import KIND_TYPES, IdForm, Profile
from tinkerfs.demo.request import Request
from tinkerfs.demo.sample_data import Checkpoint, Run


class HttpError(Exception):
    """The request fails with an HTTP error.

    Attributes:
        status: Status of the response.
        detail: Field `detail` of the body; None for the reason phrase of the status.
        headers: Additional headers.
    """

    def __init__(
        self, status: int, detail: Any = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.headers = status, detail, headers


class Lookup:
    """Resolves references in requests. The caller holds the account's lock."""

    def __init__(self, account: Account, profile: Profile) -> None:
        self._account, self._profile = account, profile

    def run(self, run_id: str) -> Run:
        """Return an own run, or another user's run with a public checkpoint; or 404."""
        run = self._account.run(run_id)
        if run is not None and (
            self._account.owns(run_id) or any(c.is_public for c in run.checkpoints)
        ):
            return run
        raise HttpError(404, f"Training run {run_id} not found")

    def may_list(self, run: Run, checkpoint: Checkpoint) -> bool:
        """Return whether a listing of the run includes a checkpoint."""
        return not checkpoint.is_pending and self._may_read(run, checkpoint)

    def checkpoint(
        self, run_id: str, reference: str, form: IdForm, kinds: Collection[str]
    ) -> tuple[Run, Checkpoint]:
        """Return the checkpoint that a URL refers to, with its run.

        Args:
            run_id: The run in the URL.
            reference: The checkpoint in the URL: `<kind>/<name>` or a bare name.
            form: The form that the endpoint accepts.
            kinds: The kinds that the endpoint supports; others are not found.

        Raises:
            HttpError: 404, or the server's error for the other form.
        """
        run = self.run(run_id)
        if form == "kind/name":
            kind, slash, name = reference.partition("/")
            if not slash or "/" in name:
                if self._profile.rejection_status == 404:
                    raise HttpError(404)
                raise HttpError(
                    self._profile.rejection_status,
                    f"Invalid checkpoint id {reference!r}: expected <type>/<name>",
                )
            wanted = [(kind, name)]
        elif form == "any" and "/" in reference:
            kind, _, name = reference.partition("/")
            wanted = [(kind, name)]
        elif "/" in reference:
            # The error of the framework, because the route matches one segment.
            raise HttpError(405 if self._profile.has_open_delete_route else 404)
        else:
            wanted = [(kind, reference) for kind in self._profile.kinds]
        for checkpoint in run.checkpoints:
            is_match = (checkpoint.kind, checkpoint.name) in wanted
            # Kinds outside the API contract may appear on any server.
            is_supported = checkpoint.kind in kinds or checkpoint.kind not in KIND_TYPES
            if is_match and is_supported and self._may_read(run, checkpoint):
                return run, checkpoint
        raise HttpError(404, f"Checkpoint not found: {run_id}/{reference}")

    def by_tinker_path(self, path: Any) -> tuple[Run, Checkpoint]:
        """Return the checkpoint of a tinker path, with its run.

        Raises:
            HttpError: 422 if the value is not a string, 400 if it is not a tinker path, 404 if
                the checkpoint does not exist.
        """
        if not isinstance(path, str):
            raise HttpError(422, [{"loc": ["body", "tinker_path"], "msg": "Field required"}])
        parts = path.removeprefix("tinker://").split("/")
        kinds = {"checkpoints"} if self._profile.flat_paths else self._profile.weights_info_kinds
        if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in kinds:
            detail = "Invalid tinker path format. Expected: tinker://<run>/<type>/<name>"
            raise HttpError(400, f"{detail}, got {path}")
        run_id, kind, name = parts
        if self._profile.flat_paths:
            return self.checkpoint(run_id, name, "name", self._profile.kinds)
        return self.checkpoint(run_id, f"{kind}/{name}", "kind/name", {kind})

    def number(self, request: Request, key: str, default: int) -> int:
        """Return a non-negative integer from the query; 422 if it is malformed."""
        text = request.query.get(key)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit()):
            message = "Input should be a valid integer, 0 or more"
            raise HttpError(422, [{"loc": ["query", key], "msg": message, "input": text}])
        return int(text)

    def body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object in the body of a request; 422 if there is none."""
        try:
            value = json.loads(request.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise HttpError(422, [{"loc": ["body"], "msg": "JSON object expected"}])
        return value

    def _may_read(self, run: Run, checkpoint: Checkpoint) -> bool:
        return checkpoint.is_public or self._account.owns(run.id)
