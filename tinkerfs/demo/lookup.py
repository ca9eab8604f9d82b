"""What a request refers to: its run, its checkpoint, its numbers; or why it is refused."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tinkerfs.demo.account import Account
from tinkerfs.demo.profiles import KIND_TYPES, IdForm, Profile
from tinkerfs.demo.request_log import Entry
from tinkerfs.demo.sample_data import Checkpoint, Run


class Refusal(Exception):
    """A request gets an error for an answer.

    Attributes:
        status: Of the answer.
        detail: Its `detail`; None for what the status is called.
        headers: Further headers.
    """

    def __init__(
        self, status: int, detail: Any = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.headers = status, detail, headers


class Lookup:
    """Finds what requests name, under the account's lock, which the caller holds."""

    def __init__(self, account: Account, profile: Profile) -> None:
        self._account, self._profile = account, profile

    def run(self, run_id: str) -> Run:
        """Return an own run, or one of somebody else that has something public.

        Raises:
            Refusal: 404.
        """
        run = self._account.run(run_id)
        if run is not None and (
            self._account.owns(run_id) or any(c.is_public for c in run.checkpoints)
        ):
            return run
        raise Refusal(404, f"Training run {run_id} not found")

    def may_list(self, run: Run, checkpoint: Checkpoint) -> bool:
        """Tell whether a listing of the run shows a checkpoint."""
        return not checkpoint.is_pending and self._may_read(run, checkpoint)

    def checkpoint(
        self, run_id: str, reference: str, form: IdForm, kinds: Collection[str]
    ) -> tuple[Run, Checkpoint]:
        """Return the checkpoint that a URL names.

        Args:
            run_id: Its run.
            reference: What the URL says, `<kind>/<name>` or a bare name.
            form: Which of them the endpoint takes.
            kinds: Kinds that the endpoint knows; others are not found.

        Raises:
            Refusal: 404, or what the server says to the other form.
        """
        run = self.run(run_id)
        if form == "kind/name":
            kind, slash, name = reference.partition("/")
            if not slash or "/" in name:
                if self._profile.refuses_with == 404:
                    raise Refusal(404)
                raise Refusal(
                    self._profile.refuses_with,
                    f"Invalid checkpoint id {reference!r}: expected <type>/<name>",
                )
            wanted = [(kind, name)]
        elif "/" in reference:
            # The framework's: its route takes one segment.
            raise Refusal(405 if self._profile.has_open_delete_route else 404)
        else:
            wanted = [(kind, reference) for kind in self._profile.kinds]
        for checkpoint in run.checkpoints:
            is_named = (checkpoint.kind, checkpoint.name) in wanted
            # A kind that is not of the API's may appear on any server.
            is_of_kind = checkpoint.kind in kinds or checkpoint.kind not in KIND_TYPES
            if is_named and is_of_kind and self._may_read(run, checkpoint):
                return run, checkpoint
        raise Refusal(404, f"Checkpoint not found: {run_id}/{reference}")

    def by_tinker_path(self, path: Any) -> tuple[Run, Checkpoint]:
        """Return the checkpoint of a tinker path.

        Raises:
            Refusal: 422 when it is no text, 400 when it is no such path, 404.
        """
        if not isinstance(path, str):
            raise Refusal(422, [{"loc": ["body", "tinker_path"], "msg": "Field required"}])
        parts = path.removeprefix("tinker://").split("/")
        kinds = {"checkpoints"} if self._profile.flat_paths else self._profile.weights_info_kinds
        if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in kinds:
            detail = "Invalid tinker path format. Expected: tinker://<run>/<type>/<name>"
            raise Refusal(400, f"{detail}, got {path}")
        run_id, kind, name = parts
        if self._profile.flat_paths:
            return self.checkpoint(run_id, name, "name", self._profile.kinds)
        return self.checkpoint(run_id, f"{kind}/{name}", "kind/name", {kind})

    def number(self, entry: Entry, key: str, default: int) -> int:
        """Return a number of the query, 0 or more.

        Raises:
            Refusal: 422 when it is none.
        """
        text = entry.query.get(key)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit()):
            message = "Input should be a valid integer, 0 or more"
            raise Refusal(422, [{"loc": ["query", key], "msg": message, "input": text}])
        return int(text)

    def body(self, entry: Entry) -> dict[str, Any]:
        """Return the JSON object that a request carries.

        Raises:
            Refusal: 422 when it carries none.
        """
        try:
            value = json.loads(entry.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(422, [{"loc": ["body"], "msg": "JSON object expected"}])
        return value

    def _may_read(self, run: Run, checkpoint: Checkpoint) -> bool:
        return checkpoint.is_public or self._account.owns(run.id)
