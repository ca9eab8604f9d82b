"""Signed URLs of exported checkpoints, and the errors of checkpoints without weights.

A server without archives provides the files of a training checkpoint's export. An export expires,
so each request for a URL looks for the current one.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.api.models import SignedUrl
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.export_records import ExportRecord
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.url_cache import SignedUrlCache, find_url

_NOT_EXPORTED = (
    "a server with exports can export a training checkpoint instead"
    " (hint: `echo 1h > export` in its directory, or tinkerfs get --export; this starts a training"
    " session on the server, takes minutes, needs capacity and may cost)"
)
_SAMPLER = (
    "without archives, the service does not provide a sampler checkpoint for download"
    " (hint: save a training checkpoint or external weights instead)"
)
_NO_ARCHIVE_URL = (
    "separate files have no URL of an archive (hint: read archive.tar, which is made of {source})"
)
_SOURCES = {True: "its files", False: "an export: `echo 1h > export` in its directory"}


def without_weights(
    checkpoint: CheckpointVersion, error: errors.UnsupportedEndpoint | None = None
) -> OSError | errors.ApiError:
    """Return the error EOPNOTSUPP for weights that the server does not provide.

    Args:
        error: the response to the request for the archive; None if an export had been used.
    """
    return _refusal(checkpoint, error, _NOT_EXPORTED)


def without_archive_url(
    checkpoint: CheckpointVersion, error: errors.UnsupportedEndpoint
) -> OSError | errors.ApiError:
    """Return the error EOPNOTSUPP for the URL of an archive that the server does not have."""
    return _refusal(
        checkpoint, error, _NO_ARCHIVE_URL.format(source=_SOURCES[checkpoint.is_external])
    )


def _refusal(
    checkpoint: CheckpointVersion, error: errors.UnsupportedEndpoint | None, advice: str
) -> OSError | errors.ApiError:
    if checkpoint.is_sampler:
        if error is not None and not checkpoint.ref.is_own:
            return error
        advice = _SAMPLER
    if error is None:
        message = f"{checkpoint.about} has no export any more; {advice}"
    else:
        message = str(error.with_consequence(advice))
    return errors.not_exported(checkpoint.path, message)


@dataclass(frozen=True, slots=True)
class ExportUrls:
    """The URLs of the files of a checkpoint's export. Thread-safe.

    Attributes:
        refusal: the response to the request for the checkpoint's archive, None if unknown.
    """

    url_cache: SignedUrlCache
    exports: Exports
    checkpoint: CheckpointVersion
    refusal: errors.UnsupportedEndpoint | None = None

    def get(self, ctx: RequestContext) -> Mapping[str, SignedUrl]:
        """Return a valid URL for each file, by file name.

        Raises:
            ApiError: the request fails.
            OSError: EOPNOTSUPP if there is no export; see also `SignedUrlCache.url`.
        """
        checkpoint = self.checkpoint
        record = self.exports.find(checkpoint)
        if record is None:
            recovery = run_in_thread(
                lambda: self.exports.recover(checkpoint), f"export of {checkpoint.path}"
            )
            record = ctx.wait_for(recovery)
        if record is None:
            raise without_weights(checkpoint, self.refusal)
        self.exports.renewal.on_read(checkpoint)
        try:
            return self.url_cache.external_urls(self._key(record), record.ref, checkpoint.path, ctx)
        except (errors.NotFound, errors.UnsupportedEndpoint):
            self.exports.forget(checkpoint)
            raise without_weights(checkpoint, self.refusal) from None

    def is_cached(self) -> bool:
        """Return whether valid URLs are cached."""
        key = self.key()
        return key is not None and self.url_cache.has_urls(key, is_external=True)

    def key(self) -> Hashable | None:
        """Return the key of the URLs in the cache, None if there is no export."""
        record = self.exports.find(self.checkpoint)
        return None if record is None else self._key(record)

    def _key(self, record: ExportRecord) -> Hashable:
        return (*self.checkpoint.key, record.path)


@dataclass(frozen=True, slots=True)
class ExportUrlProvider:
    """The `UrlProvider` of a file of an export."""

    urls: ExportUrls
    name: str

    @property
    def path(self) -> str:
        """See `UrlProvider.path`."""
        return self.urls.checkpoint.path

    def url(self, ctx: RequestContext = BACKGROUND_CONTEXT) -> SignedUrl:
        """See `UrlProvider.url`; OSError EOPNOTSUPP if there is no export any more."""
        return find_url(self.urls.get(ctx), self.name)

    def has_url(self) -> bool:
        """See `UrlProvider.has_url`."""
        return self.urls.is_cached()

    def invalidate(self, url: SignedUrl) -> None:
        """See `UrlProvider.invalidate`."""
        key = self.urls.key()
        if key is not None:
            self.urls.url_cache.invalidate(key, url, is_external=True)
