"""Composition root: build a FileSystem and its dependencies from settings.

Used by the command line and the fsspec adapter. All resources are opened when the context is
entered, and closed when it is left.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.audit import AuditLog
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.directory import (
    UnusableCacheError,
    default_cache_dir,
    locate_cache_dir,
    prepare_cache_dir,
)
from tinkerfs.cache.memory_limit import weights_memory_bytes
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.mutations import Mutations
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.catalog.sessions import Sessions
from tinkerfs.catalog.trash import Trash
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.config import Settings
from tinkerfs.telemetry import Telemetry
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.schema import Backend
from tinkerfs.weights.base_models import BaseModels
from tinkerfs.weights.blob_proxy import BlobProxy
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.reader import WeightsReader
from tinkerfs.weights.url_cache import SignedUrlCache

log = logging.getLogger(__name__)

#: Name of the block cache's directory within the cache directory.
BLOCKS = "blocks"

#: Minimum free space that the block cache leaves on its disk, bytes.
FREE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class App:
    """The parts that an adapter needs.

    Attributes:
        settings: the effective settings: without a cache on disk its size is 0.
    """

    filesystem: FileSystem
    mutations: Mutations
    weights: WeightsReader
    exports: Exports
    client: Client
    credentials: Credentials
    catalog: Catalog
    policies: CachePolicies
    telemetry: Telemetry
    settings: Settings

    def reload(self, settings: Settings) -> None:
        """Adopt the fields of `RELOADABLE`, and read the key again before the next request."""
        self.policies.update(settings.ttl_s, settings.stale_if_error_s)
        self.credentials.reload()


def cache_directory(settings: Settings) -> Path:
    """Return the cache directory of a mount, which may not exist yet."""
    path = default_cache_dir() if settings.cache_dir is None else Path(settings.cache_dir)
    return locate_cache_dir(path.expanduser().absolute())


def _prepare_cache(settings: Settings) -> Path | None:
    """Return the cache directory, ready for use; None if it cannot be used.

    Raises:
        StartupError: the path is not a directory.
    """
    try:
        return prepare_cache_dir(cache_directory(settings))
    except UnusableCacheError as error:
        log.warning("caching only in memory: %s", error)
        return None


@contextmanager
def open_app(
    settings: Settings, clock: Clock = SYSTEM_CLOCK, *, is_one_transfer: bool = False
) -> Iterator[App]:
    """Build everything behind a mount.

    Args:
        settings: settings of the mount.
        clock: clock of all parts.
        is_one_transfer: see `SignedUrlCache`.

    Raises:
        StartupError: the base URL, a proxy, the cache directory or the audit log cannot be used.
    """
    cache_dir = _prepare_cache(settings)
    if cache_dir is None:
        settings = replace(settings, cache_dir=None, cache_size_bytes=0)
    else:
        settings = replace(settings, cache_dir=str(cache_dir))
    telemetry = Telemetry(clock)
    if settings.audit is not None:
        audit_log = AuditLog(settings.audit, clock, telemetry.record_error)
        telemetry.on_change = audit_log.record
    with ExitStack() as stack:
        credentials = Credentials(key_file=settings.api_key_file, clock=clock)
        client = stack.enter_context(
            Client(
                settings.base_url,
                credentials,
                telemetry,
                concurrency=settings.concurrency,
                timeout_s=settings.timeout_s,
                clock=clock,
            )
        )
        cache = MetadataCache(telemetry, clock)
        policies = CachePolicies.from_settings(settings.ttl_s, settings.stale_if_error_s)
        store = stack.enter_context(MetadataStore(cache_dir))
        trash = stack.enter_context(Trash(store, client.base_url, credentials.fingerprint, clock))
        catalog = Catalog(
            client, cache, store, telemetry, clock, policies, trash, settings.concurrency
        )
        mutations = Mutations(client, telemetry, clock, catalog, trash, settings.trash_s)
        sessions = Sessions(client, cache, policies, settings.concurrency)
        url_cache = SignedUrlCache(
            client,
            telemetry,
            clock,
            timeout_s=settings.archive_timeout_s,
            outage_timeout_s=settings.timeout_s,
            burst=settings.archive_build_limit,
            is_one_transfer=is_one_transfer,
        )
        blocks = BlockCache(
            cache_dir / BLOCKS if cache_dir is not None else None,
            telemetry,
            clock,
            max_bytes=settings.cache_size_bytes,
            min_free_bytes=FREE_BYTES,
        )
        exports = stack.enter_context(
            Exports(
                client,
                store,
                telemetry,
                clock,
                timeout_s=settings.archive_timeout_s,
                renews=not settings.read_only,
            )
        )
        blob_proxy = BlobProxy(settings.blob_proxy, telemetry) if settings.blob_proxy else None
        weights = stack.enter_context(
            WeightsReader(
                url_cache,
                exports,
                store,
                blocks,
                telemetry,
                timeout_s=settings.timeout_s,
                url_age_s=settings.ttl_s,
                memory_bytes=weights_memory_bytes(),
                base_models=BaseModels(settings.base_models),
                moe_layout=settings.moe_layout,
                blob_proxy=blob_proxy,
            )
        )
        backend = Backend(
            settings=settings,
            catalog=catalog,
            mutations=mutations,
            sessions=sessions,
            weights=weights,
            exports=exports,
            telemetry=telemetry,
            clock=clock,
            started_ns=int(clock.now() * 1e9),
        )
        filesystem = FileSystem(backend, cache_dir or Path("/"))
        yield App(
            filesystem=filesystem,
            mutations=mutations,
            weights=weights,
            exports=exports,
            client=client,
            credentials=credentials,
            catalog=catalog,
            policies=policies,
            telemetry=telemetry,
            settings=settings,
        )
