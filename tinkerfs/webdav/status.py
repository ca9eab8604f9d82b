"""The HTTP status of each errno, and responses with the reason in words."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from wsgidav.dav_error import DAVError

from tinkerfs import errors

log = logging.getLogger(__name__)

#: Statuses of RFC 9110 and RFC 4918; an errno that is absent here is an internal error (500).
_STATUSES: Final = {
    "EPERM": 403,
    "EACCES": 403,
    "EROFS": 403,
    "ENOENT": 404,
    "ENOTDIR": 404,
    "ELOOP": 404,
    "EISDIR": 405,
    "ENOTEMPTY": 409,
    "ESTALE": 410,
    "EINVAL": 422,
    "ERANGE": 422,
    "EDQUOT": 402,
    "EOPNOTSUPP": 501,
    "EHOSTUNREACH": 502,
    "EPROTO": 502,
    "EBUSY": 503,
    "EINTR": 503,
    "ENOTCONN": 503,
    "EMFILE": 503,
    "ENFILE": 503,
    "ETIMEDOUT": 504,
    "ENOSPC": 507,
}


class FileError(DAVError):  # type: ignore[misc]
    """A failed file operation; the body of the response is the errno's name and the reason."""

    def __init__(self, error: OSError) -> None:
        super().__init__(_STATUSES.get(errors.errno_name(error), 500))
        self.error = error

    def get_user_info(self) -> str:
        """Return the errno's name and the reason."""
        return f"{errors.errno_name(self.error)}: {errors.redact(self.error.strerror or '')}"

    def get_response_page(self) -> tuple[str, bytes]:
        """Return the type and the body of the response."""
        return "text/plain; charset=utf-8", f"{self.get_user_info()}\n".encode()


@contextmanager
def as_responses(path: str) -> Iterator[None]:
    """Raise every failure in the block as a `DAVError`; log those that are bugs."""
    try:
        yield
    except DAVError:
        raise
    except OSError as error:
        if not error.errno:
            log.exception("%s: an error without an errno", path)
            raise FileError(errors.internal_error(error, path)) from error
        raise FileError(error) from error
    except Exception as error:
        log.exception("%s failed", path)
        raise FileError(errors.internal_error(error, path)) from error
