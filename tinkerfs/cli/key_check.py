"""Verify the API key before a mount or a server is ready."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tinkerfs.concurrency import run_in_thread
from tinkerfs.errors import StartupError, TinkerfsError, Unauthorized

if TYPE_CHECKING:
    from tinkerfs.api.client import Client

log = logging.getLogger(__name__)

#: Wait at most this long for the API to verify the key; then start without verification.
KEY_CHECK_TIMEOUT_S: Final = 3.0


def verify_credentials(client: "Client", is_stop_pending: Callable[[], bool]) -> None:
    """Fail if the API rejects the key; only log a warning if the API is unavailable.

    With a rejected key, every operation would fail with "Permission denied".

    Raises:
        StartupError: There is no key, or the API rejects it.
    """
    request = run_in_thread(lambda: client.list_training_runs(limit=1), "key check")
    waited_s, step_s = 0.0, 0.05
    while waited_s < KEY_CHECK_TIMEOUT_S and not is_stop_pending():
        try:
            request.result(step_s)
        except TimeoutError:
            waited_s += step_s
            continue
        except Unauthorized as error:
            if error.status is None:  # no key was found: the message already has a hint
                raise StartupError(error.message) from None
            raise StartupError(
                f"the API rejects the key: {error.message} (hint: set TINKER_API_KEY to a valid"
                " key, or run `tinker auth login`)"
            ) from None
        except StartupError:
            raise
        except TinkerfsError as error:
            log.warning("starting without a response from the server: %s", error)
        return
    log.warning("starting without a response from the server in %g s", KEY_CHECK_TIMEOUT_S)
