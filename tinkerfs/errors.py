"""Every failure tinkerfs knows, and the one place that decides an errno.

    TinkerfsError
    ├── SetupError              it cannot start: one line, with the cure
    └── ApiError                the API, or the way to it, failed
        ├── Unauthorized        401, 403
        ├── NotFound            404, 410: the thing is not there
        ├── EndpointMissing     404, 405, 410, 501: the server lacks the whole endpoint
        ├── BadRequest          400, 422
        ├── Conflict            409
        ├── NotReady            425, and 503 of an archive that is being built
        ├── Rejected            any other 4xx
        ├── RateLimited         429, after the retries
        ├── ServerError         5xx, after the retries
        ├── Unreachable         no route, refused, no such host, cut off before an answer
        ├── TimedOut            no answer in time
        ├── UntrustedCertificate  a server that cannot prove what it is
        └── ProtocolError       an answer that is not what the API promises

Above the API everything is an `OSError(errno, text, path)`, made by the functions below. All text
that comes from outside passes `redact` before it gets here.
"""

import copy
import errno
import os
from typing import Self

from tinkerfs.printable import redacted


class TinkerfsError(Exception):
    """Base of all that tinkerfs raises on its own account."""


class StartupError(TinkerfsError):
    """Why tinkerfs cannot start, in one line that names the cure."""


class ApiError(TinkerfsError):
    """A call of the API that failed.

    Args:
        message: the server's own words, or ours where there was no answer; no secrets.
        endpoint: method and path template, e.g. "GET training_runs/{run}".
        status: the HTTP status, None where there was no answer.
        retry_after_s: how long the server asked us to wait, seconds.
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
        #: Whether this is told again from memory, without a new call.
        self.is_local = False
        #: Whether the request never reached the server.
        self.is_unsent = False

    def as_local(self) -> Self:
        """Return a copy to raise again; raising one object ever again would grow its traceback."""
        again = copy.copy(self)
        again.is_local = True
        return again

    def explained(self, consequence: str) -> Self:
        """Return a copy whose message goes on with what the failure means for the caller."""
        again = copy.copy(self)
        again.message = f"{self.message}; {consequence}"
        return again

    def __str__(self) -> str:
        """Say which call failed, how, and in whose words."""
        status = f" {self.status}" if self.status is not None else ""
        return f"{self.endpoint or 'API'}{status}: {self.message}"


class Unauthorized(ApiError):
    """The key is missing, wrong, expired, or may not do this."""


class NotFound(ApiError):
    """The API says that the thing is not there."""


class UnsupportedEndpoint(ApiError):
    """The thing is there, but this server has no such endpoint."""

    #: What is said in place of the server's own words, which are those of a missing thing.
    reason = "this server has no such endpoint"

    def __str__(self) -> str:
        """Say so."""
        return f"{self.reason} ({super().__str__()})"


class BadRequest(ApiError):
    """The API refused the request's content."""


class BurstExceeded(OSError):
    """EBUSY: a process group has started as many archive builds as it may for now."""


class Conflict(ApiError):
    """The thing is in a state that forbids the change."""


class ResourceNotReady(ApiError):
    """The thing is still being made; ask again later."""


class ClientError(ApiError):
    """A client error that has no meaning of its own here."""


class RateLimited(ApiError):
    """Too many calls, also after waiting."""


class ServerError(ApiError):
    """The server failed, also after retries."""


class ConnectionFailed(ApiError):
    """No connection to the server."""


class RequestTimeout(ApiError):
    """No answer within the time that was allowed."""


class UntrustedCertificate(ApiError):
    """The server's certificate is refused: no request was sent."""


class ProtocolError(ApiError):
    """An answer that cannot be understood."""


#: What the caller of a file operation sees of each API failure (spec: "Errors").
ERRNO_OF_API_ERROR: dict[type[ApiError], int] = {
    Unauthorized: errno.EACCES,
    NotFound: errno.ENOENT,
    UnsupportedEndpoint: errno.EOPNOTSUPP,
    BadRequest: errno.EINVAL,
    Conflict: errno.EBUSY,
    ResourceNotReady: errno.EBUSY,
    ClientError: errno.EIO,
    RateLimited: errno.EBUSY,
    ServerError: errno.EIO,
    ConnectionFailed: errno.EHOSTUNREACH,
    RequestTimeout: errno.ETIMEDOUT,
    # Neither EHOSTUNREACH, which sends people to look at their network, nor EACCES, which sends
    # them to their key: the other end does not do what the protocol asks of it.
    UntrustedCertificate: errno.EPROTO,
    ProtocolError: errno.EPROTO,
}

#: Failures that say nothing about the thing asked for, so that a last good answer may be served.
UNAVAILABLE_ERRORS: tuple[type[ApiError], ...] = (
    RateLimited,
    ServerError,
    ConnectionFailed,
    RequestTimeout,
    UntrustedCertificate,
    ProtocolError,
)

#: What says that there is no such thing, where its existence was asked.
NOT_FOUND_ERRORS: tuple[type[ApiError], ...] = (NotFound, BadRequest, UnsupportedEndpoint)


def os_error_from_api(error: ApiError, path: str, *, is_lookup: bool = False) -> OSError:
    """Return the OSError for an API failure.

    Args:
        error: the failure.
        path: the file path of the operation.
        is_lookup: the operation asked whether a name exists: 400 and 422 mean that it does not, and
            a server without the endpoint has nothing of that kind.
    """
    number = ERRNO_OF_API_ERROR[type(error)]
    if is_lookup and isinstance(error, NOT_FOUND_ERRORS):
        number = errno.ENOENT
    failure = OSError(number, str(error), path)
    failure.__cause__ = error
    return failure


def not_found(path: str) -> OSError:
    """ENOENT: there is no such name."""
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def not_in_trash(path: str) -> OSError:
    """ENOENT: there is no such name in the trash."""
    return OSError(errno.ENOENT, "not in the trash", path)


def not_a_directory(path: str) -> OSError:
    """ENOTDIR: a folder was asked for and this is none."""
    return OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def not_followed(path: str) -> OSError:
    """ENOTDIR: a symbolic link or a file stands where a directory must be, and is not followed."""
    return OSError(errno.ENOTDIR, f"{path!r} is not a directory, or is a symbolic link", path)


def is_a_directory(path: str) -> OSError:
    """EISDIR: a file was asked for and this is a folder."""
    return OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def not_a_link(path: str) -> OSError:
    """EINVAL: readlink(2) of something else."""
    return OSError(errno.EINVAL, "not a symbolic link", path)


def not_permitted(path: str, reason: str) -> OSError:
    """EPERM: this is never done here, or not by this caller now."""
    return OSError(errno.EPERM, reason, path)


def read_only(path: str) -> OSError:
    """EROFS: the mount was made read-only."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def not_empty(path: str, reason: str) -> OSError:
    """ENOTEMPTY: the folder still shows something."""
    return OSError(errno.ENOTEMPTY, reason, path)


def invalid(path: str, reason: str) -> OSError:
    """EINVAL: a value that means nothing to this control."""
    return OSError(errno.EINVAL, reason, path)


def out_of_range(path: str, reason: str) -> OSError:
    """ERANGE: a value that has a meaning, outside what the API takes."""
    return OSError(errno.ERANGE, reason, path)


def busy(path: str, reason: str) -> OSError:
    """EBUSY: not now."""
    return OSError(errno.EBUSY, reason, path)


def burst_exceeded(path: str, reason: str) -> BurstExceeded:
    """EBUSY: a process group has started as many archive builds as it may for now."""
    return BurstExceeded(errno.EBUSY, reason, path)


def not_a_file(path: str) -> OSError:
    """ELOOP: open(2) of a symbolic link that nobody followed."""
    return OSError(errno.ELOOP, "a symbolic link", path)


def not_regular(path: str | bytes) -> OSError:
    """EINVAL: a FIFO, a device, a socket or a directory has the name of a file on disk."""
    return OSError(errno.EINVAL, "not a regular file", path)


def bad_handle(path: str, reason: str) -> OSError:
    """EBADF: the file was not opened for this."""
    return OSError(errno.EBADF, reason, path)


def no_attribute(path: str, name: str) -> OSError:
    """ENODATA: there is no such extended attribute."""
    return OSError(errno.ENODATA, f"no attribute {name}", path)


def not_supported(path: str, reason: str) -> OSError:
    """EOPNOTSUPP: nothing of that kind is kept here."""
    return OSError(errno.EOPNOTSUPP, reason, path)


def interrupted(path: str = "") -> OSError:
    """EINTR: the caller was interrupted, or the mount is going down."""
    return OSError(errno.EINTR, os.strerror(errno.EINTR), path or None)


def disconnected(path: str) -> OSError:
    """ENOTCONN: the mount is going down, and whoever waits would wait in vain."""
    return OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), path)


def timed_out(path: str, reason: str) -> OSError:
    """ETIMEDOUT: the caller's own bound on waiting has passed."""
    return OSError(errno.ETIMEDOUT, reason, path)


def stale(path: str, reason: str) -> OSError:
    """ESTALE: what was opened is not there any more, though something else may be."""
    return OSError(errno.ESTALE, reason, path)


def corrupt(path: str, reason: str) -> OSError:
    """EIO: bytes that are not what they must be."""
    return OSError(errno.EIO, reason, path)


def no_space(path: str, reason: str) -> OSError:
    """ENOSPC: no room for what was to be kept."""
    return OSError(errno.ENOSPC, reason, path)


def not_lockable(error: OSError) -> OSError:
    """Return the error of a lock that a file system refuses, in words that say what follows."""
    reason = f"files cannot be locked there ({error.strerror}): mounts may fetch a block twice"
    return OSError(error.errno, reason, error.filename)


def not_stored(reason: str) -> OSError:
    """EIO: a record that must survive a crash is not on disk."""
    return OSError(errno.EIO, f"the record cannot be stored: {reason}")


def exists(path: str, reason: str) -> OSError:
    """EEXIST: something has that name, and is left alone."""
    return OSError(errno.EEXIST, reason, path)


def internal_error(error: Exception, path: str) -> OSError:
    """EIO: a fault of tinkerfs itself; the log has the traceback."""
    return OSError(errno.EIO, f"internal error: {type(error).__name__}", path)


def is_missing(error: OSError) -> bool:
    """Tell whether the error says that a name does not exist."""
    return error.errno == errno.ENOENT


def is_upstream_failure(error: OSError) -> bool:
    """Tell whether the API failed in a way that an operator wants to know of."""
    return isinstance(error.__cause__, ApiError) and not is_missing(error)


#: What programs ask for to learn that it is not there, or is of another kind.
_ROUTINE_ERRNOS = frozenset({errno.ENOENT, errno.EINTR, errno.ENOTDIR, errno.EISDIR, errno.ENODATA})


def should_report(error: OSError) -> bool:
    """Tell whether an error says more than that a name is not there or is of another kind."""
    cause = error.__cause__
    if isinstance(cause, ApiError):
        return not (cause.is_local and is_missing(error))
    return error.errno not in _ROUTINE_ERRNOS


def is_read_only(error: OSError) -> bool:
    """Return whether the error says that nothing can be changed in that mount."""
    return error.errno == errno.EROFS


def is_stale(error: OSError) -> bool:
    """Tell whether the error says that what was opened is not there any more."""
    return error.errno == errno.ESTALE


def is_no_space(error: OSError) -> bool:
    """Tell whether the error says that there is no room, on the disk or in a quota of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_unsupported(error: OSError) -> bool:
    """Return whether the file system has no such operation: a lock, a flush, a mode, a time."""
    unsupported = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOLCK)
    return error.errno in unsupported


def is_attribute_refused(error: OSError) -> bool:
    """Return whether the file system keeps no modes or times, or not those of this user."""
    return is_unsupported(error) or error.errno in (errno.EPERM, errno.EACCES)


def is_not_regular(error: OSError) -> bool:
    """Return whether open(2) failed because the file is a directory, a FIFO or a socket."""
    return error.errno in (errno.EISDIR, errno.ENXIO)


def is_timeout(error: OSError) -> bool:
    """Tell whether the error says that a wait took too long."""
    return error.errno == errno.ETIMEDOUT


def is_interruption(error: OSError) -> bool:
    """Tell whether the error says that the caller gave up."""
    return error.errno == errno.EINTR


#: What a mount whose daemon is dead answers to everything.
DISCONNECTED = (errno.ENOTCONN, errno.ECONNABORTED)


def is_busy(error: OSError) -> bool:
    """Tell whether somebody holds what was to go."""
    return error.errno == errno.EBUSY


def is_not_permitted(error: OSError) -> bool:
    """Tell whether the error says that the caller lacks a right (EPERM)."""
    return error.errno == errno.EPERM


def os_error_from_errno(number: int, path: str) -> OSError:
    """Return the error that a system call left behind."""
    return OSError(number, os.strerror(number), path)


def errno_name(error: OSError) -> str:
    """Return the errno's name, e.g. "ENOENT"; of two names the one that Linux documents."""
    if error.errno == errno.EOPNOTSUPP:  # which Python calls ENOTSUP
        return "EOPNOTSUPP"
    return errno.errorcode.get(error.errno or 0, "EIO")


def redact(text: str, *, limit: int = 500) -> str:
    """Return text from outside for people: as `printable.redacted`."""
    return redacted(text, limit=limit)
