"""The caching proxy of the site (`--blob-proxy`): its URLs and its outages.

Whatever the proxy does not deliver is requested from the store itself, so that an outage of the
proxy costs time and no read fails.
"""

import re
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from tinkerfs import errors
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.transfer_monitor import STORE_ENDPOINT

#: The header with the ETag of the version; `cli/nginx_config.py` makes it part of the cache's key.
VERSION_HEADER = "Tinkerfs-Version"

#: The parameter of a member of `Cache-Status` (RFC 9211) that is its outcome.
_CACHE_STATUS = re.compile(r";\s*(hit\b|fwd=)")

#: How long a proxy that failed is not used, seconds.
SET_ASIDE_S = 60.0

#: Statuses of the proxy itself: it does not serve this store, or cannot reach it.
OWN_FAILURES = {
    421: "it does not serve this store (hint: tinkerfs proxy-config --allow-host)",
    502: "it cannot reach the store",
    504: "the store did not respond to it in time",
}


class BlobProxy:
    """The caching proxy. Thread-safe.

    Args:
        url: of the proxy.
        telemetry: receives one error for each outage of the proxy.
        monotonic: clock for the end of an outage.
    """

    def __init__(
        self, url: str, telemetry: Telemetry, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._telemetry = telemetry
        self._monotonic = monotonic
        self._lock = threading.Lock()
        #: When one request tries the proxy again; None while it works. Guarded by _lock.
        self._retry_at: float | None = None

    def url_of(self, url: str) -> str:
        """Return the URL of the proxy that stands for a signed URL; it is a secret, too."""
        scheme, _, rest = url.partition("://")
        return f"{self._url}/{scheme.lower()}/{rest}"

    def claim_attempt(self) -> bool:
        """Return whether to ask the proxy; after a failure, only one request tries it at a time."""
        with self._lock:
            if self._retry_at is None:
                return True
            now = self._monotonic()
            if now < self._retry_at:
                return False
            self._retry_at = now + SET_ASIDE_S
            return True

    def set_aside(self, reason: str) -> None:
        """Read from the store itself for a while; record the first failure of an outage."""
        with self._lock:
            is_first = self._retry_at is None
            self._retry_at = self._monotonic() + SET_ASIDE_S
        if is_first:
            self._telemetry.count("blob_proxy_outages")
            host = urlsplit(self._url).netloc
            message = f"blob proxy {host} failed, weights are read from the store: {reason}"
            failure = errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT)
            self._telemetry.record_error("-", "blob proxy", errors.os_error_from_api(failure, "-"))

    def count_response(self, cache_status: str, slice_bytes: int) -> None:
        """Count a usable response as a hit or a miss; without a `Cache-Status`, as neither."""
        # The last member is that of the nearest cache: a store may have caches of its own.
        found = _CACHE_STATUS.search(cache_status.rpartition(",")[2])
        if found is None:
            return
        if found[1] == "hit":
            self._telemetry.count("blob_proxy_hits")
        else:
            self._telemetry.count("blob_proxy_misses")
            self._telemetry.count("blob_proxy_missed_bytes", slice_bytes)

    def count_fallback(self) -> None:
        """Count a range that is requested from the store instead of the proxy."""
        self._telemetry.count("blob_proxy_fallbacks")

    def end_outage(self) -> None:
        """Record that the proxy works."""
        with self._lock:
            self._retry_at = None
