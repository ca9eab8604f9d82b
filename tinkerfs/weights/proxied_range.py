"""Request a range of a file from the caching proxy of the site.

The proxy caches by the path of a file and its strong ETag, and passes the ETag to the store as
`If-Range`. So the signature is not part of its key, and a version that was saved again has another
key. A response of another version is never used.
"""

from typing import TYPE_CHECKING

from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.errors import ApiError
from tinkerfs.weights.blob_proxy import OWN_FAILURES, VERSION_HEADER, BlobProxy
from tinkerfs.weights.responses import parse_content_range
from tinkerfs.weights.transfer import RangeResponse
from tinkerfs.weights.transfer_monitor import PROXY_ENDPOINT, TransferInterrupted
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

if TYPE_CHECKING:
    from tinkerfs.weights.http import ObjectStoreClient


def request_from_proxy(
    client: "ObjectStoreClient", url: str, start: int, stop: int, version: Version
) -> RangeResponse | None:
    """Request the bytes [start, stop) of a version; return None if the store must be asked.

    The response ends at the end of a slice; another request gets the rest.

    Raises:
        ConnectionFailed: the transfers were stopped.
    """
    proxy = client.blob_proxy
    if proxy is None:
        return None
    response = _send(client, proxy, url, start, stop, version)
    if response is None:
        proxy.count_fallback()
    return response


def _send(
    client: "ObjectStoreClient", proxy: BlobProxy, url: str, start: int, stop: int, version: Version
) -> RangeResponse | None:
    """Request the bytes from the proxy; return None if it does not deliver them.

    Raises:
        ConnectionFailed: as `request_from_proxy`.
    """
    # Without a strong ETag, no key distinguishes the versions of the file.
    if not version.is_exact or version.size_bytes == UNKNOWN_BYTES or not proxy.claim_attempt():
        return None
    # One slice per response, so that its `Cache-Status` is that of all its bytes.
    slice_start = start - start % BLOCK_BYTES
    slice_stop = min(slice_start + BLOCK_BYTES, version.size_bytes)
    stop = min(stop, slice_stop)
    headers = {"Range": f"bytes={start}-{stop - 1}", VERSION_HEADER: version.etag}
    try:
        response = client.get(proxy.url_of(url), headers, PROXY_ENDPOINT)
    except (TransferInterrupted, ApiError) as failure:
        client.monitor.raise_if_stopped()
        proxy.set_aside(str(failure))
        return None
    if response.status == 206 and response.headers.get("etag", "").strip() == version.etag:
        try:
            found = parse_content_range(response, start, stop, version.size_bytes)
        except TransferInterrupted as failure:
            proxy.set_aside(str(failure))
        else:
            if found.total_bytes == version.size_bytes:
                proxy.end_outage()
                cache_status = response.headers.get("cache-status", "")
                proxy.count_response(cache_status, slice_stop - slice_start)
                return RangeResponse(response, found, version)
    response.close()
    if response.status in OWN_FAILURES:
        proxy.set_aside(f"status {response.status}: {OWN_FAILURES[response.status]}")
    return None
