"""Table of the API endpoints and the meaning of their statuses. Pure."""

from dataclasses import dataclass
from enum import Enum


class Scope(Enum):
    """What a "not found" response of an endpoint can refer to."""

    #: The endpoint concerns the whole account, so that only the endpoint can be missing.
    ACCOUNT = "account"
    #: The endpoint addresses a resource by id, and some servers lack the endpoint.
    OPTIONAL_RESOURCE = "optional resource"
    #: The endpoint addresses a resource by id, and every server has the endpoint.
    RESOURCE = "resource"
    #: The endpoint acts on a listed checkpoint, and some servers lack the endpoint.
    OPTIONAL_ACTION = "optional action"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Properties of an endpoint that control error mapping and retries.

    Attributes:
        label: method and path template, used in counters and error messages.
        scope: what a "not found" response refers to.
        success_statuses: statuses of 300 or more that mean success, such as an expected redirect or
            "already in this state".
        non_retryable_statuses: statuses that report a state of the resource. They are not retried,
            because an immediate retry gets the same status.
        is_change: whether the request has a side effect. A change that the server may have received
            is retried only after a recheck.
        is_delete: whether the request deletes a resource. "Not found" then means success if an
            earlier attempt may have succeeded.
        is_long_running: whether the server may work for minutes before it responds. Such a request
            needs no permit, so that it delays no other request.
        is_shareable: whether hosts with the same key may share a response.
    """

    label: str
    scope: Scope
    success_statuses: frozenset[int] = frozenset()
    non_retryable_statuses: frozenset[int] = frozenset()
    is_change: bool = False
    is_delete: bool = False
    is_long_running: bool = False
    is_shareable: bool = False

    @property
    def method(self) -> str:
        """The HTTP method of the endpoint."""
        return self.label.partition(" ")[0]


#: Redirect statuses. The archive endpoint returns its URL in a redirect, which is not followed.
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ALREADY_DONE = frozenset({409})
_CHECKPOINT = "training_runs/{run}/checkpoints/{checkpoint}"

RUNS = Endpoint("GET training_runs", Scope.ACCOUNT, is_shareable=True)
RUN = Endpoint("GET training_runs/{run}", Scope.RESOURCE, is_shareable=True)
RUN_CHECKPOINTS = Endpoint(
    "GET training_runs/{run}/checkpoints", Scope.OPTIONAL_ACTION, is_shareable=True
)
USER_CHECKPOINTS = Endpoint("GET checkpoints", Scope.ACCOUNT, is_shareable=True)
WEIGHTS_INFO = Endpoint("POST weights_info", Scope.OPTIONAL_ACTION, is_shareable=True)
ARCHIVE = Endpoint(
    f"GET {_CHECKPOINT}/archive",
    Scope.OPTIONAL_ACTION,
    success_statuses=REDIRECTS,
    non_retryable_statuses=frozenset({425, 503}),
    is_long_running=True,
    is_shareable=True,
)
EXTERNAL_URLS = Endpoint(
    f"GET {_CHECKPOINT}/external_weights_urls", Scope.OPTIONAL_ACTION, is_shareable=True
)
PUBLISH = Endpoint(
    f"POST {_CHECKPOINT}/publish",
    Scope.OPTIONAL_ACTION,
    success_statuses=_ALREADY_DONE,
    is_change=True,
)
UNPUBLISH = Endpoint(
    f"DELETE {_CHECKPOINT}/publish",
    Scope.OPTIONAL_ACTION,
    success_statuses=_ALREADY_DONE,
    is_change=True,
)
TTL = Endpoint(f"PUT {_CHECKPOINT}/ttl", Scope.OPTIONAL_ACTION, is_change=True)
DELETE = Endpoint(
    f"DELETE {_CHECKPOINT}",
    Scope.OPTIONAL_ACTION,
    non_retryable_statuses=frozenset({409, 425}),
    is_change=True,
    is_delete=True,
)
SESSIONS = Endpoint("GET sessions", Scope.ACCOUNT, is_shareable=True)
SESSION = Endpoint("GET sessions/{session}", Scope.OPTIONAL_RESOURCE, is_shareable=True)
TRACE = Endpoint("GET sessions/{session}/trace_export", Scope.OPTIONAL_RESOURCE)
SESSION_SEARCH = Endpoint("POST sessions/search", Scope.ACCOUNT, is_shareable=True)
CREATE_SESSION = Endpoint("POST create_session", Scope.ACCOUNT, is_change=True)
# The server recognizes a repeated load or save by its sequence number, so both may be retried.
LOAD_WEIGHTS = Endpoint("POST load_weights", Scope.OPTIONAL_RESOURCE)
SAVE_EXTERNAL = Endpoint("POST save_weights_external", Scope.OPTIONAL_RESOURCE)
# 408 is an ordinary response: the result is not there yet.
RETRIEVE_FUTURE = Endpoint(
    "POST retrieve_future",
    Scope.OPTIONAL_RESOURCE,
    success_statuses=frozenset({408}),
    is_long_running=True,
)
HEARTBEAT = Endpoint("POST session_heartbeat", Scope.OPTIONAL_RESOURCE)
FINISH_SESSION = Endpoint("POST sessions/{session}/finish", Scope.OPTIONAL_RESOURCE)
SAMPLER = Endpoint("GET samplers/{sampler}", Scope.OPTIONAL_RESOURCE, is_shareable=True)
WHOAMI = Endpoint("GET auth/apikey/me", Scope.ACCOUNT)
CLIENT_CONFIG = Endpoint("POST client/config", Scope.ACCOUNT)
TOKEN = Endpoint("POST auth/token", Scope.ACCOUNT)

#: The version of the contract that requests declare: that of the Tinker SDK.
SDK_VERSION = "0.38.0"
