"""How a checkpoint is named in a URL.

Servers differ in the id that their URLs take: `<kind>/<name>`, or the bare `<name>` that they
list; SkyRL wants the one to delete and the other for an archive. So the form that the tinker path
gives is tried, then the listed one, and what worked is remembered for each operation.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar
from urllib.parse import quote

from tinkerfs import errors
from tinkerfs.api.endpoints import Endpoint

T = TypeVar("T")

#: What a server answers to a checkpoint id in the form that it does not take: FastAPI's routers,
#: and the official service's handlers.
_WRONG_FORM = frozenset({400, 404, 405, 422})


class IdForm(Enum):
    """Which of a checkpoint's ids a URL takes."""

    PATH = "path"
    LISTED = "listed"


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A checkpoint as an endpoint is asked about it.

    Attributes:
        run_id: the training run.
        path_id: `<kind>/<name>`, as the tinker path has it.
        listed_id: the id as the listing gave it.
        is_known: whether a listing has just shown it, so that "not there" speaks of the endpoint.
        is_shared: whether another checkpoint of the run is listed under the same bare id.
        is_foreign: whether the run is known to be another account's.
    """

    run_id: str
    path_id: str
    listed_id: str
    exists: bool = False
    has_ambiguous_id: bool = False
    is_foreign: bool = False

    def is_of(self, tinker_path: str | None, checkpoint_id: str | None) -> bool:
        """Return whether a listed checkpoint is this one, by its tinker path or its id."""
        return (tinker_path or "").endswith(f"/{self.path_id}") or (
            checkpoint_id == self.listed_id and not self.has_ambiguous_id
        )


def candidate_ids(
    ref: CheckpointRef, endpoint: Endpoint, last_accepted: IdForm | None
) -> list[tuple[IdForm, str]]:
    """Return the forms of an id to try, in order; none for an empty id.

    What is deleted, published or read must be the right one of two checkpoints with one bare id.
    Therefore:

    - A shared bare id goes into no change, and into a look only for a sampler checkpoint: SkyRL,
      where names are shared, takes bare ids for archives, and has archives of these alone.
    - Once a change worked with `<kind>/<name>`, "not there" is the truth, and the bare id may be
      another checkpoint's by now: it is not tried.

    Args:
        ref: the checkpoint.
        endpoint: what is asked of it.
        last_accepted: the form that this endpoint took last, None before any worked.
    """
    is_look = endpoint.method == "GET"
    forms = [(IdForm.PATH, ref.path_id)] if ref.path_id else []
    if not ref.listed_id or ref.listed_id == ref.path_id:
        return forms
    if ref.has_ambiguous_id and not (is_look and ref.path_id.startswith("sampler_weights/")):
        return forms
    if forms and last_accepted is IdForm.PATH and not is_look:
        return forms
    forms.append((IdForm.LISTED, ref.listed_id))
    return forms[::-1] if last_accepted is IdForm.LISTED else forms


class IdFormCache:
    """The form of a checkpoint's id that each endpoint of one server took last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worked: dict[str, IdForm] = {}  # guarded by _lock

    def try_forms(self, endpoint: Endpoint, ref: CheckpointRef, send: Callable[[str], T]) -> T:
        """Ask something of a checkpoint, in the form of its id that the server takes.

        Args:
            endpoint: what is asked of it.
            ref: the checkpoint.
            send: asks with an id in one form.

        Raises:
            ApiError: what was met; of two forms, what says more.
        """
        failure: errors.ApiError = errors.NotFound(
            "an empty id names nothing", endpoint=endpoint.label
        )
        with self._lock:
            worked = self._worked.get(endpoint.label)
        for number, (form, checkpoint_id) in enumerate(candidate_ids(ref, endpoint, worked)):
            try:
                answer = send(checkpoint_id)
            except errors.ApiError as error:
                if error.status not in _WRONG_FORM:
                    raise
                # A handler's words say more than a router's.
                if number == 0 or isinstance(failure, errors.UnsupportedEndpoint):
                    failure = error
            else:
                with self._lock:
                    self._worked[endpoint.label] = form
                return answer
        raise failure


def id_segment(endpoint: Endpoint, text: str) -> str:
    """Return an id as one segment of a URL path.

    Raises:
        NotFound: it is empty, and the URL would be another endpoint's.
    """
    if not text:
        raise errors.NotFound("an empty id names nothing", endpoint=endpoint.label)
    return quote_segment(text)


def quote_segment(text: str) -> str:
    """Return `text` as one segment of a URL path (RFC 3986, 3.3); `:` stays as it is.

    A name's bytes that are no UTF-8 (surrogate escapes) are encoded as those bytes. Dots are
    encoded where the whole segment is `.` or `..`, which clients and proxies would resolve.
    """
    if text in (".", ".."):
        return "%2E" * len(text)
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    return quote(raw, safe=":")


def id_path(checkpoint_id: str) -> str:
    """Return a checkpoint id in a URL path: the slash after the kind stays, others are encoded."""
    kind, slash, name = checkpoint_id.partition("/")
    return quote_segment(kind) + slash + quote_segment(name) if slash else quote_segment(kind)
