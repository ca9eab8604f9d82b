"""Log of FUSE operations: one record per operation, for subscribers that observe a mount.

The FUSE adapter creates the records, and only while there is a subscriber. Debug logging is one.
Replies that the adapter serves from its caches of packed replies are not recorded, so the adapter
bypasses these caches while `is_observed` is true.

API requests run in other threads than the operation that waits for them. The threads of
`concurrency` inherit the context variable that holds the operation. So a request is attributed to
the operation that started it, and not to one that joined it later.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Final, Protocol

import msgspec

from tinkerfs import errors
from tinkerfs.context import Caller
from tinkerfs.operation_counts import OperationCounts

log = logging.getLogger(__name__)

#: Maximum number of request ids per operation: a listing may need a request per page.
MAX_REQUEST_IDS: Final = 32

_FAILED: Final = "a subscriber of the operation log failed"


class OperationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One FUSE operation that has ended.

    Attributes:
        operation: name of the operation as libfuse has it, e.g. "getattr".
        path: absolute path within the mount; bytes that are not UTF-8 are surrogates, and an
            operation on an unknown handle has an empty path.
        caller: the calling process.
        errno: the errno that the caller received; 0 for success.
        started_at: time of its start, seconds since 1970.
        duration_s: time from its start to its end, seconds.
        offset: position in the file of the data that a read returned.
        read_bytes: length of the data that it returned.
        written_bytes: length of the data that it accepted.
        request_ids: the server's ids of the API requests that it started, the oldest first.
    """

    operation: str
    path: str
    caller: Caller
    errno: int
    started_at: float
    duration_s: float
    offset: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    request_ids: tuple[str, ...] = ()

    @property
    def errno_name(self) -> str:
        """The name of the errno, e.g. "ENOENT"; empty for success."""
        return errors.name_of_errno(self.errno) if self.errno else ""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request that has ended, of the API or of the object store.

    Attributes:
        endpoint: method and path template; "GET store" for the object store, "GET proxy" for
            the caching proxy.
        url: with its query, which may be a secret.
        outcome: the status, or the kind of failure.
        started_at: time of its start, seconds since 1970.
        duration_s: time to the end of its response, seconds.
        request_id: the server's id; empty without one.
    """

    endpoint: str
    url: str
    outcome: str
    started_at: float
    duration_s: float
    request_id: str = ""


#: Called with each record, in the thread that served the operation, before its caller continues.
Subscriber = Callable[[OperationRecord], None]


class Observer(Protocol):
    """Observes operations from their start on, and their requests, in the threads that do them."""

    def on_begin(self, active: "ActiveOperation") -> None:
        """Notice that an operation begins."""

    def on_request(self, active: "ActiveOperation", request: RequestRecord) -> None:
        """Notice that a request has ended, perhaps after the operation that started it."""

    def on_end(self, active: "ActiveOperation", record: OperationRecord) -> None:
        """Notice that an operation has ended."""


class _SubscriberObserver:
    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber

    def on_begin(self, active: "ActiveOperation") -> None:
        pass

    def on_request(self, active: "ActiveOperation", request: RequestRecord) -> None:
        pass

    def on_end(self, _active: "ActiveOperation", record: OperationRecord) -> None:
        self._subscriber(record)


class ActiveOperation:
    """An observed operation. Thread-safe.

    Attributes:
        span: belongs to the tracer.
    """

    __slots__ = (
        "_request_ids",
        "_started",
        "caller",
        "operation",
        "path",
        "span",
        "started_at",
        "token",
    )

    def __init__(self, operation: str, path: str, caller: Caller) -> None:
        self.operation = operation
        self.path = path
        self.caller = caller
        self.started_at = time.time()
        self._started = time.perf_counter()
        self._request_ids: list[str] = []  # only appended to, which is atomic
        self.span: object = None
        self.token: Token[ActiveOperation | None] | None = None

    def add_request_id(self, request_id: str) -> None:
        """Add the server's id of an API request that this operation started."""
        if len(self._request_ids) < MAX_REQUEST_IDS:
            self._request_ids.append(request_id)

    def record(
        self, errno: int, offset: int, read_bytes: int, written_bytes: int
    ) -> OperationRecord:
        """Return the record of this operation, which ends now."""
        return OperationRecord(
            operation=self.operation,
            path=self.path,
            caller=self.caller,
            errno=errno,
            started_at=self.started_at,
            duration_s=time.perf_counter() - self._started,
            offset=offset,
            read_bytes=read_bytes,
            written_bytes=written_bytes,
            request_ids=tuple(self._request_ids),
        )


_current: ContextVar[ActiveOperation | None] = ContextVar("tinkerfs_operation", default=None)


class OperationLog:
    """Passes the record of each operation to the subscribers, and counts all. Thread-safe.

    Attributes:
        counts: counts of the operations, with or without a subscriber.
        is_observed: whether there is a subscriber. A plain attribute, because every operation
            checks it.
    """

    def __init__(self) -> None:
        self.is_observed = False
        self.counts = OperationCounts()
        self._lock = threading.Lock()
        self._observers: tuple[Observer, ...] = ()  # replaced under _lock, read without it

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber` with the record of every operation that starts from now on.

        Returns:
            a function that ends the subscription, and may be called again without effect.
        """
        return self.observe(_SubscriberObserver(subscriber))

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Notify `observer` of every operation that starts from now on; see `subscribe`."""
        with self._lock:
            self._observers = (*self._observers, observer)
            self.is_observed = True

        def end() -> None:
            with self._lock:
                self._observers = tuple(each for each in self._observers if each is not observer)
                self.is_observed = bool(self._observers)

        return end

    def begin(self, operation: str, path: str, caller: Caller) -> ActiveOperation:
        """Make an operation the current one of this thread; `end` must follow in this thread."""
        active = ActiveOperation(operation, path, caller)
        active.token = _current.set(active)
        for observer in self._observers:
            try:
                observer.on_begin(active)
            except Exception:
                log.exception(_FAILED)
        return active

    def record_request(self, request: RequestRecord) -> None:
        """Add a request to the operation that this thread works for, if there is one."""
        active = _current.get()
        if active is None:
            return
        if request.request_id:
            active.add_request_id(request.request_id)
        for observer in self._observers:
            try:
                observer.on_request(active, request)
            except Exception:
                log.exception(_FAILED)

    def end(
        self,
        active: ActiveOperation,
        errno: int,
        *,
        offset: int = 0,
        read_bytes: int = 0,
        written_bytes: int = 0,
    ) -> None:
        """Pass the record of an operation to the subscribers; their failures are only logged."""
        if active.token is not None:
            _current.reset(active.token)
        record = active.record(errno, offset, read_bytes, written_bytes)
        for observer in self._observers:
            try:
                observer.on_end(active, record)
            except Exception:
                log.exception(_FAILED)


def log_operation(record: OperationRecord) -> None:
    """Write a record to the log at level debug: the subscriber of debug logging."""
    suffix = f": {record.errno_name}" if record.errno else ""
    fields = {
        "operation": record.operation,
        "path": record.path,
        "errno": record.errno_name or None,
        "duration_s": round(record.duration_s, 6),
        "request_ids": record.request_ids,
        "pid": record.caller.process or record.caller.pid,
        "uid": record.caller.uid,
        "read_bytes": record.read_bytes,
        "written_bytes": record.written_bytes,
    }
    log.debug("%s %s%s", record.operation, record.path, suffix, extra={"fields": fields})
