"""Forms of a checkpoint id in URLs.

Servers accept different forms: `<kind>/<name>`, or the bare `<name>` of their listing. SkyRL needs
one form to delete a checkpoint and the other form for its archive. So the form of the tinker path
is tried first and the listed form second. The accepted form is remembered per endpoint.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar
from urllib.parse import quote

from tinkerfs import errors
from tinkerfs.api.endpoints import Endpoint

T = TypeVar("T")

#: Statuses for an id in an unsupported form, from FastAPI's router or the official service.
_WRONG_FORM_STATUSES = frozenset({400, 404, 405, 422})


class IdForm(Enum):
    """Form of a checkpoint id: from the tinker path or from the listing."""

    PATH = "path"
    LISTED = "listed"


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """Identifies a checkpoint in requests.

    Attributes:
        path_id: `<kind>/<name>`, as in the tinker path.
        listed_id: the id in the listing.
        exists: whether a recent listing includes the checkpoint. A "not found" response then refers
            to the endpoint.
        has_ambiguous_id: whether another checkpoint of the run is listed with the same bare id.
        is_own: whether the run may belong to the account; False if it belongs to another one.
        version: which save of the checkpoint; empty if it is unknown.
    """

    run_id: str
    path_id: str
    listed_id: str
    exists: bool = False
    has_ambiguous_id: bool = False
    is_own: bool = True
    version: str = ""

    def is_of(self, tinker_path: str | None, checkpoint_id: str | None) -> bool:
        """Return whether a listed tinker path or id identifies this checkpoint."""
        return (tinker_path or "").endswith(f"/{self.path_id}") or (
            checkpoint_id == self.listed_id and not self.has_ambiguous_id
        )


def candidate_ids(
    ref: CheckpointRef, endpoint: Endpoint, last_accepted: IdForm | None
) -> list[tuple[IdForm, str]]:
    """Return the id forms to try, in order; an empty list for an empty id.

    Two checkpoints may have the same bare id, and a request must not reach the wrong one:

    - An ambiguous bare id is never used for a change. It is used for a GET only of a sampler
      checkpoint: SkyRL has ambiguous ids, uses them for archives, and has only sampler archives.
    - After a change succeeded with `<kind>/<name>`, a "not found" response is trusted. The bare id
      is not tried, because it may identify another checkpoint by now.

    `last_accepted` is the form that the endpoint accepted last, None if it has accepted none.
    """
    is_read = endpoint.method == "GET"
    forms = [(IdForm.PATH, ref.path_id)] if ref.path_id else []
    if not ref.listed_id or ref.listed_id == ref.path_id:
        return forms
    if ref.has_ambiguous_id and not (is_read and ref.path_id.startswith("sampler_weights/")):
        return forms
    if forms and last_accepted is IdForm.PATH and not is_read:
        return forms
    forms.append((IdForm.LISTED, ref.listed_id))
    return forms[::-1] if last_accepted is IdForm.LISTED else forms


class IdFormCache:
    """Remembers the last accepted id form of each endpoint of a server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_accepted: dict[str, IdForm] = {}  # guarded by _lock

    def try_forms(self, endpoint: Endpoint, ref: CheckpointRef, send: Callable[[str], T]) -> T:
        """Send a request with each form of the checkpoint's id until one is accepted.

        `send` sends the request with the given id.

        Raises:
            ApiError: the request failed. If both forms failed, the error of the endpoint's handler
                takes precedence over an unsupported endpoint.
        """
        failure: errors.ApiError = errors.NotFound("empty id", endpoint=endpoint.label)
        with self._lock:
            last_accepted = self._last_accepted.get(endpoint.label)
        candidates = candidate_ids(ref, endpoint, last_accepted)
        for index, (form, checkpoint_id) in enumerate(candidates):
            try:
                response = send(checkpoint_id)
            except errors.ApiError as error:
                if error.status not in _WRONG_FORM_STATUSES:
                    raise
                # The error of a handler is more specific than that of a router.
                if index == 0 or isinstance(failure, errors.UnsupportedEndpoint):
                    failure = error
            else:
                with self._lock:
                    self._last_accepted[endpoint.label] = form
                return response
        raise failure


def id_segment(endpoint: Endpoint, text: str) -> str:
    """Encode an id as one segment of a URL path.

    Raises:
        NotFound: the id is empty, so that the URL would address another endpoint.
    """
    if not text:
        raise errors.NotFound("empty id", endpoint=endpoint.label)
    return quote_segment(text)


def quote_segment(text: str) -> str:
    """Percent-encode a segment of a URL path (RFC 3986, 3.3), except `:`.

    Surrogate escapes are encoded as the non-UTF-8 bytes that they represent. The segments `.` and
    `..` are encoded, because clients and proxies would resolve them.
    """
    if text in (".", ".."):
        return "%2E" * len(text)
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    return quote(raw, safe=":")


def id_path(checkpoint_id: str) -> str:
    """Encode a checkpoint id for a URL path, except the slash after its kind."""
    kind, slash, name = checkpoint_id.partition("/")
    return quote_segment(kind) + slash + quote_segment(name) if slash else quote_segment(kind)


def capability(endpoint: Endpoint, ref: CheckpointRef) -> Hashable:
    """Return what a server supports or not: an endpoint, for one kind of checkpoint."""
    kind = ref.path_id.partition("/")[0]  # SkyRL has archives only of sampler checkpoints
    # Refusals for another account's checkpoints say nothing about the user's own.
    return (endpoint.label, kind, None if ref.is_own else ref.run_id)
