"""Composition root: build a FileSystem and its dependencies from settings.

Used by the command line and the fsspec adapter. All resources are opened when the context is
entered, and closed when it is left.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.audit import AuditLog
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.blocks import Blocks
from tinkerfs.cache.bounded_access import BOUND_S
from tinkerfs.cache.directory import (
    CachePaths,
    UnusableCacheError,
    can_lock_files,
    locate_cache,
    prepare_cache,
)
from tinkerfs.cache.memory_limit import weights_memory_bytes
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.shared_cache import SharedBlockCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.mutations import Mutations
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.catalog.sessions import Sessions
from tinkerfs.catalog.trash import Trash
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError
from tinkerfs.telemetry import Telemetry
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.schema import Backend
from tinkerfs.weights.base_models import BaseModels
from tinkerfs.weights.blob_proxy import BlobProxy
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.reader import WeightsReader
from tinkerfs.weights.url_cache import SignedUrlCache

if TYPE_CHECKING:
    from tinkerfs.api.shared_cache import SharedCache

log = logging.getLogger(__name__)

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


def cache_paths(settings: Settings) -> CachePaths:
    """Return where the parts of a mount's cache are; they may not exist yet."""
    return locate_cache(_cache_dir(settings))


def prepare_cache_paths(settings: Settings) -> CachePaths:
    """Return where the parts of a mount's cache are, ready for use.

    Raises:
        UnusableCacheError: it cannot be used; a mount works without it.
        StartupError: the path is not a directory.
    """
    return prepare_cache(_cache_dir(settings), min(BOUND_S, settings.timeout_s))


def _cache_dir(settings: Settings) -> Path | None:
    return None if settings.cache_dir is None else Path(settings.cache_dir).expanduser().absolute()


def _open_blocks(
    paths: CachePaths | None, settings: Settings, telemetry: Telemetry, clock: Clock
) -> Blocks:
    limits = {"max_bytes": settings.cache_size_bytes, "min_free_bytes": FREE_BYTES}
    if paths is None:
        return BlockCache(None, telemetry, clock, **limits)
    if not paths.is_shared:
        return BlockCache(paths.blocks, telemetry, clock, **limits)
    return SharedBlockCache(
        paths.blocks,
        telemetry,
        clock,
        owner=paths.root.stat().st_uid,
        has_locks=can_lock_files(paths.root),
        memory_bytes=weights_memory_bytes() // 4,
        bound_s=min(BOUND_S, settings.timeout_s),
        **limits,
    )


def _open_shared_cache(
    settings: Settings, credentials: Credentials, telemetry: Telemetry, clock: Clock
) -> "SharedCache | None":
    """Return the cache that hosts share; None without the option.

    Raises:
        StartupError: a library is not installed.
    """
    if settings.shared_cache is None:
        return None
    try:  # lazy: imports the client of Redis
        from tinkerfs.api.shared_cache import SharedCache
    except ImportError as error:
        raise StartupError(
            f"{error.name or 'a package'} is not installed (hint: pip install 'tinkerfs[redis]')"
        ) from None
    base_url = settings.base_url.rstrip("/")
    return SharedCache(settings.shared_cache, base_url, credentials, telemetry, clock)


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
        StartupError: the base URL, a proxy, the cache directory or the audit log cannot be used,
            or a library for an option is not installed.
    """
    paths: CachePaths | None = None
    try:
        paths = prepare_cache_paths(settings)
        settings = replace(settings, cache_dir=str(paths.root))
    except UnusableCacheError as error:
        log.warning("caching only in memory: %s", error)
        settings = replace(settings, cache_dir=None, cache_size_bytes=0)
    telemetry = Telemetry(clock)
    if settings.audit is not None:
        audit_log = AuditLog(settings.audit, clock, telemetry.record_error)
        telemetry.on_change = audit_log.record
    with ExitStack() as stack:
        credentials = Credentials(key_file=settings.api_key_file, clock=clock)
        shared = _open_shared_cache(settings, credentials, telemetry, clock)
        client = stack.enter_context(
            Client(
                settings.base_url,
                credentials,
                telemetry,
                concurrency=settings.concurrency,
                timeout_s=settings.timeout_s,
                clock=clock,
                shared=shared,
            )
        )
        cache = MetadataCache(telemetry, clock)
        policies = CachePolicies.from_settings(settings.ttl_s, settings.stale_if_error_s)
        store = stack.enter_context(MetadataStore(None if paths is None else paths.metadata))
        trash = stack.enter_context(Trash(store, client.base_url, credentials.fingerprint, clock))
        catalog = Catalog(
            client, cache, store, telemetry, clock, policies, trash, settings.concurrency
        )
        if shared is not None:
            stack.enter_context(shared.start(catalog.on_change_elsewhere))
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
        blocks = _open_blocks(paths, settings, telemetry, clock)
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
            cache_paths=paths,
            catalog=catalog,
            mutations=mutations,
            sessions=sessions,
            weights=weights,
            exports=exports,
            telemetry=telemetry,
            clock=clock,
            started_ns=int(clock.now() * 1e9),
        )
        filesystem = FileSystem(backend)
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
