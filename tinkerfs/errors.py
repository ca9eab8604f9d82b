"""Exceptions of tinkerfs, and the mapping of every failure to an errno.

    TinkerfsError
    ├── StartupError              tinkerfs cannot start; one line, with a hint
    └── ApiError                  an API request failed
        ├── Unauthorized          401, 403
        ├── PaymentRequired       402: billing of the account
        ├── NotFound              404, 410: the object does not exist
        ├── UnsupportedEndpoint   404, 405, 410, 501: the server lacks the endpoint
        ├── BadRequest            400, 422
        ├── Conflict              409
        ├── ResourceNotReady      425, and 503 for an archive that is being built
        ├── BuildFailed           the server could not build a file, such as a trace
        ├── ClientError           any other 4xx
        ├── RateLimited           429, after the retries
        ├── ServerError           5xx, after the retries
        ├── ConnectionFailed      no route, refused, unknown host, closed before a response
        ├── RequestTimeout        no response in time
        ├── UntrustedCertificate  the server's certificate is not trusted
        └── ProtocolError         a response that violates the API's contract

Code above the API client raises `OSError(errno, text, path)`, made by the functions below.
External text passes through `redact` before it becomes part of an error.
"""

import copy
import errno
import os
from typing import Self

from tinkerfs.printable import redacted


class TinkerfsError(Exception):
    """Base class of the exceptions that tinkerfs defines."""


class StartupError(TinkerfsError):
    """tinkerfs cannot start. The message is one line and ends with a hint."""


class ApiError(TinkerfsError):
    """An API request that failed.

    Args:
        message: the server's error message, or our own if there was no response; no secrets.
        endpoint: method and path template, e.g. "GET training_runs/{run}".
        status: the HTTP status, None if there was no response.
        retry_after_s: value of Retry-After, seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        endpoint: str = "",
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.endpoint = endpoint
        self.status = status
        self.retry_after_s = retry_after_s
        #: Whether the error was raised without a request: a cached error, an open circuit breaker
        #: or a limiter rejection.
        self.is_local = False
        #: The server's id of the request; empty without one.
        self.request_id = ""
        #: Whether the request never reached the server.
        self.request_not_sent = False

    def as_local(self) -> Self:
        """Return a copy to raise without a request.

        Raising the same object repeatedly would grow its traceback.
        """
        error = copy.copy(self)
        error.is_local = True
        return error

    def with_consequence(self, consequence: str) -> Self:
        """Return a copy with the failure's consequence at the end of the message."""
        error = copy.copy(self)
        error.message = f"{self.message}; {consequence}"
        return error

    def __str__(self) -> str:
        """Return the endpoint, the status and the message."""
        status = f" {self.status}" if self.status is not None else ""
        return f"{self.endpoint or 'API'}{status}: {self.message}"


class Unauthorized(ApiError):
    """The API key is missing, invalid or expired, or lacks the permission."""


class PaymentRequired(ApiError):
    """The API refuses the request because of the account's billing."""


class NotFound(ApiError):
    """The API reports that the object does not exist."""


class UnsupportedEndpoint(ApiError):
    """The server does not implement the endpoint; the object itself may exist."""

    #: Precedes the server's message, which is that of a missing object.
    reason = "this server has no such endpoint"

    def __str__(self) -> str:
        """Return the reason and the server's error."""
        return f"{self.reason} ({super().__str__()})"


class BadRequest(ApiError):
    """The API rejected the content of the request."""


class NotExported(OSError):
    """EOPNOTSUPP: the server has neither an archive nor an export of the checkpoint."""


class BurstExceeded(OSError):
    """EBUSY: the process group has reached its limit of archive builds per minute."""


class Conflict(ApiError):
    """The object is in a state that does not allow the change."""


class ResourceNotReady(ApiError):
    """The object is still being created; the request may be retried later."""


class BuildFailed(ApiError):
    """The server reports that it could not build a file; a retry may start another build."""


class ClientError(ApiError):
    """A client error (4xx) without a class of its own."""


class RateLimited(ApiError):
    """The server still limits the request rate after all retries."""


class ServerError(ApiError):
    """The server still fails after all retries."""


class ConnectionFailed(ApiError):
    """No connection to the server could be made, or it was lost before a response."""


class RequestTimeout(ApiError):
    """The server sent no response before the timeout."""


class UntrustedCertificate(ApiError):
    """The server's certificate is not trusted; no request was sent."""


class ProtocolError(ApiError):
    """The response cannot be parsed."""


#: The errno that a file operation returns for each API failure (spec: "Errors").
ERRNO_OF_API_ERROR: dict[type[ApiError], int] = {
    Unauthorized: errno.EACCES,
    PaymentRequired: errno.EDQUOT,
    NotFound: errno.ENOENT,
    UnsupportedEndpoint: errno.EOPNOTSUPP,
    BadRequest: errno.EINVAL,
    Conflict: errno.EBUSY,
    ResourceNotReady: errno.EBUSY,
    BuildFailed: errno.EIO,
    ClientError: errno.EIO,
    RateLimited: errno.EBUSY,
    ServerError: errno.EIO,
    ConnectionFailed: errno.EHOSTUNREACH,
    RequestTimeout: errno.ETIMEDOUT,
    # EHOSTUNREACH would make users check their network, and EACCES their key. Here the peer
    # violates the protocol.
    UntrustedCertificate: errno.EPROTO,
    ProtocolError: errno.EPROTO,
}

#: Failures that say nothing about the requested object, so that a stale value may be served.
UNAVAILABLE_ERRORS: tuple[type[ApiError], ...] = (
    RateLimited,
    ServerError,
    ConnectionFailed,
    RequestTimeout,
    UntrustedCertificate,
    ProtocolError,
)

#: Failures that mean "does not exist" when the request was a lookup.
NOT_FOUND_ERRORS: tuple[type[ApiError], ...] = (NotFound, BadRequest, UnsupportedEndpoint)


def os_error_from_api(error: ApiError, path: str, *, is_lookup: bool = False) -> OSError:
    """Return the OSError for an API failure.

    Args:
        error: the API failure, which becomes the cause of the OSError.
        path: the path of the file operation.
        is_lookup: the operation is a lookup, so that `NOT_FOUND_ERRORS` become ENOENT: 400 and 422
            reject the name, and a server without the endpoint has no objects of that kind.
    """
    number = ERRNO_OF_API_ERROR[type(error)]
    if is_lookup and isinstance(error, NOT_FOUND_ERRORS):
        number = errno.ENOENT
    failure = OSError(number, str(error), path)
    failure.__cause__ = error
    return failure


def not_found(path: str) -> OSError:
    """ENOENT: the name does not exist."""
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def not_in_trash(path: str) -> OSError:
    """ENOENT: the name does not exist in the trash."""
    return OSError(errno.ENOENT, "not in the trash", path)


def not_a_directory(path: str) -> OSError:
    """ENOTDIR: the operation requires a directory."""
    return OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def not_followed(path: str) -> OSError:
    """ENOTDIR: a path component is a file, or a symbolic link that is not followed."""
    return OSError(errno.ENOTDIR, f"{path!r} is not a directory, or is a symbolic link", path)


def is_a_directory(path: str) -> OSError:
    """EISDIR: the operation requires a file, not a directory."""
    return OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def not_a_link(path: str) -> OSError:
    """EINVAL: readlink(2) of a file that is not a symbolic link."""
    return OSError(errno.EINVAL, "not a symbolic link", path)


def not_permitted(path: str, reason: str) -> OSError:
    """EPERM: the operation is not allowed, for anyone or for this caller now."""
    return OSError(errno.EPERM, reason, path)


def read_only(path: str) -> OSError:
    """EROFS: the file system is mounted read-only."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def not_empty(path: str, reason: str) -> OSError:
    """ENOTEMPTY: the directory still has entries."""
    return OSError(errno.ENOTEMPTY, reason, path)


def invalid(path: str, reason: str) -> OSError:
    """EINVAL: the control file cannot parse the value."""
    return OSError(errno.EINVAL, reason, path)


def out_of_range(path: str, reason: str) -> OSError:
    """ERANGE: the value is valid, but outside the range that the API accepts."""
    return OSError(errno.ERANGE, reason, path)


def busy(path: str, reason: str) -> OSError:
    """EBUSY: the operation is not possible at the moment."""
    return OSError(errno.EBUSY, reason, path)


def burst_exceeded(path: str, reason: str) -> BurstExceeded:
    """EBUSY: the process group has reached its limit of archive builds per minute."""
    return BurstExceeded(errno.EBUSY, reason, path)


def not_a_file(path: str) -> OSError:
    """ELOOP: open(2) of a symbolic link that was not followed."""
    return OSError(errno.ELOOP, "a symbolic link", path)


def not_regular(path: str | bytes) -> OSError:
    """EINVAL: the file on disk is a FIFO, a device, a socket or a directory."""
    return OSError(errno.EINVAL, "not a regular file", path)


def bad_handle(path: str, reason: str) -> OSError:
    """EBADF: the file handle was not opened for this operation."""
    return OSError(errno.EBADF, reason, path)


def no_attribute(path: str, name: str) -> OSError:
    """ENODATA: the extended attribute does not exist."""
    return OSError(errno.ENODATA, f"no attribute {name}", path)


def not_supported(path: str, reason: str) -> OSError:
    """EOPNOTSUPP: the operation is not supported."""
    return OSError(errno.EOPNOTSUPP, reason, path)


def not_exported(path: str, reason: str) -> NotExported:
    """EOPNOTSUPP: the server has neither an archive nor an export of the checkpoint."""
    return NotExported(errno.EOPNOTSUPP, reason, path)


def interrupted(path: str = "") -> OSError:
    """EINTR: the caller was interrupted, or the mount is shutting down."""
    return OSError(errno.EINTR, os.strerror(errno.EINTR), path or None)


def disconnected(path: str) -> OSError:
    """ENOTCONN: the mount is shutting down, so that waiters would wait forever."""
    return OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), path)


def timed_out(path: str, reason: str) -> OSError:
    """ETIMEDOUT: the caller's deadline has passed."""
    return OSError(errno.ETIMEDOUT, reason, path)


def stale(path: str, reason: str) -> OSError:
    """ESTALE: the opened file no longer exists, or was replaced by another one."""
    return OSError(errno.ESTALE, reason, path)


def corrupt(path: str, reason: str) -> OSError:
    """EIO: the data failed verification."""
    return OSError(errno.EIO, reason, path)


def no_space(path: str, reason: str) -> OSError:
    """ENOSPC: the cache or the disk has no space for the data."""
    return OSError(errno.ENOSPC, reason, path)


def not_lockable(error: OSError) -> OSError:
    """Return the error for a lock that a file system refuses, with its consequence."""
    reason = f"files cannot be locked there ({error.strerror}): mounts may fetch a block twice"
    return OSError(error.errno, reason, error.filename)


def not_stored(reason: str) -> OSError:
    """EIO: a record that must survive a crash was not written to disk."""
    return OSError(errno.EIO, f"the record cannot be stored: {reason}")


def not_audited(path: str, error: OSError) -> OSError:
    """Return the error for an audit log that cannot be written, with its consequence."""
    reason = f"changes are not written to the audit log: {error.strerror}"
    return OSError(error.errno, reason, path)


def exists(path: str, reason: str) -> OSError:
    """EEXIST: a file with that name exists and is not replaced."""
    return OSError(errno.EEXIST, reason, path)


def internal_error(error: Exception, path: str) -> OSError:
    """EIO: a bug in tinkerfs; the log has the traceback."""
    return OSError(errno.EIO, f"internal error: {type(error).__name__}", path)


def is_missing(error: OSError) -> bool:
    """Return whether the error means that a name does not exist."""
    return error.errno == errno.ENOENT


def is_missing_or_below_file(error: OSError) -> bool:
    """Return whether the error means that a path does not exist, also if its parent is a file."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR)


def is_upstream_failure(error: OSError) -> bool:
    """Return whether the error is an API failure that an operator should see."""
    return isinstance(error.__cause__, ApiError) and not is_missing(error)


#: Errors that programs provoke on purpose to test whether a file exists, or of which type it is.
_ROUTINE_ERRNOS = frozenset({errno.ENOENT, errno.EINTR, errno.ENOTDIR, errno.EISDIR, errno.ENODATA})


def should_report(error: OSError) -> bool:
    """Return whether an error is more than a routine lookup failure."""
    cause = error.__cause__
    if isinstance(cause, ApiError):
        return not (cause.is_local and is_missing(error))
    return not is_routine(error.errno or 0)


def is_routine(number: int) -> bool:
    """Return whether an errno is routine: programs provoke it on purpose."""
    return number in _ROUTINE_ERRNOS


def is_read_only(error: OSError) -> bool:
    """Return whether the error means that the mount is read-only."""
    return error.errno == errno.EROFS


def is_stale(error: OSError) -> bool:
    """Return whether the error means that the opened file no longer exists."""
    return error.errno == errno.ESTALE


def is_no_space(error: OSError) -> bool:
    """Return whether the error means that the disk or its quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_unsupported(error: OSError) -> bool:
    """Return whether the file system lacks the operation, such as a lock."""
    unsupported = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOLCK)
    return error.errno in unsupported


def is_cross_device(error: OSError) -> bool:
    """Return whether an operation is not possible between two file systems."""
    return error.errno == errno.EXDEV


def is_stacked_too_deep(error: OSError) -> bool:
    """Return whether the kernel refuses a file of a stacked file system as a backing file."""
    return error.errno == errno.ELOOP


def is_attribute_refused(error: OSError) -> bool:
    """Return whether the file system refuses to store modes or times."""
    return is_unsupported(error) or error.errno in (errno.EPERM, errno.EACCES)


def is_not_writable(error: OSError) -> bool:
    """Return whether a file may exist, and cannot be opened for writing."""
    return error.errno in (errno.EACCES, errno.EROFS)


def is_not_regular(error: OSError) -> bool:
    """Return whether open(2) failed for a directory, a FIFO or a socket."""
    return error.errno in (errno.EISDIR, errno.ENXIO)


def is_timeout(error: OSError) -> bool:
    """Return whether the error means that a wait exceeded its deadline."""
    return error.errno == errno.ETIMEDOUT


def is_interruption(error: OSError) -> bool:
    """Return whether the error means that the caller was interrupted."""
    return error.errno == errno.EINTR


#: Every operation on a mount fails with one of these after the mount's daemon has died.
DISCONNECTED = (errno.ENOTCONN, errno.ECONNABORTED)


def is_busy(error: OSError) -> bool:
    """Return whether the error means that the resource is in use."""
    return error.errno == errno.EBUSY


def is_not_permitted(error: OSError) -> bool:
    """Return whether the error means that the caller lacks a permission (EPERM)."""
    return error.errno == errno.EPERM


def os_error_from_errno(number: int, path: str) -> OSError:
    """Return the error for the errno of a system call."""
    return OSError(number, os.strerror(number), path)


def errno_name(error: OSError) -> str:
    """Return the errno's name as Linux documents it, e.g. "ENOENT"."""
    return name_of_errno(error.errno or 0)


def name_of_errno(number: int) -> str:
    """Return an errno's name as Linux documents it, "EIO" if it is unknown."""
    if number == errno.EOPNOTSUPP:  # Python's name for it is ENOTSUP
        return "EOPNOTSUPP"
    return errno.errorcode.get(number, "EIO")


def redact(text: str, *, limit: int = 500) -> str:
    """Return external text without secrets; see `printable.redacted`."""
    return redacted(text, limit=limit)
