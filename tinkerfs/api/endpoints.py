"""The endpoints of the API, as a table: what each is called, and what its statuses mean (pure)."""

from dataclasses import dataclass
from enum import Enum


class Scope(Enum):
    """What a missing answer of an endpoint can speak of."""

    #: It lists or tells of the whole account, so that nothing but itself can be missing.
    ACCOUNT = "account"
    #: It names a thing by id, and some servers lack it.
    OPTIONAL_RESOURCE = "optional thing"
    #: It names a thing by id, and every server has it.
    RESOURCE = "thing"
    #: It does something with a checkpoint that a listing told, and some servers lack it.
    OPTIONAL_ACTION = "optional deed"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint of the API, as far as failures and retries are concerned.

    Attributes:
        label: method and path template, which names it in counters and messages.
        scope: what a missing answer speaks of.
        successes: statuses from 300 on that are no failure: "already so", an expected redirect.
        states: statuses that tell a state of the thing: not retried, since asking again at once
            tells the same.
        is_change: whether it changes something, so that a request that may have arrived is never
            sent again without a look at what it would change now.
        is_removal: whether it removes something, so that "not there" is what was wanted where an
            earlier try may have done it.
        is_build: whether the server makes something before it answers, which may take minutes: no
            other call has to wait for it to end.
    """

    label: str
    scope: Scope
    success_statuses: frozenset[int] = frozenset()
    non_retryable_statuses: frozenset[int] = frozenset()
    is_change: bool = False
    is_delete: bool = False
    is_long_running: bool = False

    @property
    def method(self) -> str:
        """The HTTP method."""
        return self.label.partition(" ")[0]


#: The archive is told by a redirect, which is read and not followed.
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_ALREADY_SO = frozenset({409})
_CHECKPOINT = "training_runs/{run}/checkpoints/{checkpoint}"

RUNS = Endpoint("GET training_runs", Scope.ACCOUNT)
RUN = Endpoint("GET training_runs/{run}", Scope.RESOURCE)
RUN_CHECKPOINTS = Endpoint("GET training_runs/{run}/checkpoints", Scope.OPTIONAL_ACTION)
USER_CHECKPOINTS = Endpoint("GET checkpoints", Scope.ACCOUNT)
WEIGHTS_INFO = Endpoint("POST weights_info", Scope.OPTIONAL_ACTION)
ARCHIVE = Endpoint(
    f"GET {_CHECKPOINT}/archive",
    Scope.OPTIONAL_ACTION,
    success_statuses=REDIRECTS,
    non_retryable_statuses=frozenset({425, 503}),
    is_long_running=True,
)
EXTERNAL_URLS = Endpoint(f"GET {_CHECKPOINT}/external_weights_urls", Scope.OPTIONAL_ACTION)
PUBLISH = Endpoint(
    f"POST {_CHECKPOINT}/publish",
    Scope.OPTIONAL_ACTION,
    success_statuses=_ALREADY_SO,
    is_change=True,
)
UNPUBLISH = Endpoint(
    f"DELETE {_CHECKPOINT}/publish",
    Scope.OPTIONAL_ACTION,
    success_statuses=_ALREADY_SO,
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
SESSIONS = Endpoint("GET sessions", Scope.ACCOUNT)
SESSION = Endpoint("GET sessions/{session}", Scope.OPTIONAL_RESOURCE)
SESSION_SEARCH = Endpoint("POST sessions/search", Scope.ACCOUNT)
SAMPLER = Endpoint("GET samplers/{sampler}", Scope.OPTIONAL_RESOURCE)
CAPABILITIES = Endpoint("GET get_server_capabilities", Scope.ACCOUNT)
HEALTH = Endpoint("GET healthz", Scope.ACCOUNT)
WHOAMI = Endpoint("GET auth/apikey/me", Scope.ACCOUNT)
