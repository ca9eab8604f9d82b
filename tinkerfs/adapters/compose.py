"""The composition root: settings -> a FileSystem with everything behind it.

For the command line and the fsspec adapter. Nothing is opened before the context is entered, and
all of it is closed when it is left.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.cache.blocks import BlockCache
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.store import Store, default_cache_dir, prepare_cache_dir
from tinkerfs.catalogue.freshness import Freshness
from tinkerfs.catalogue.mutations import Mutations
from tinkerfs.catalogue.runs import Catalogue
from tinkerfs.catalogue.sessions import Sessions
from tinkerfs.catalogue.warm import Warm
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.settings import Settings
from tinkerfs.telemetry import Telemetry
from tinkerfs.tree.filesystem import FileSystem
from tinkerfs.tree.rows import Model
from tinkerfs.weights.archives import Archives
from tinkerfs.weights.content import Weights

__all__ = ["BLOCKS", "Parts", "cache_folder", "compose"]

#: The folder of the block cache in that of the cache.
BLOCKS = "blocks"

#: What the block cache leaves free on its disk, bytes.
FREE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Parts:
    """What an adapter needs: the tree, the weights in it, the client for a first look."""

    filesystem: FileSystem
    weights: Weights
    client: Client
    telemetry: Telemetry


def cache_folder(settings: Settings) -> Path:
    """Return where what outlives a mount is kept, made or not.

    Raises:
        SetupError: the default one may not be used.
    """
    folder = default_cache_dir() if settings.cache_dir is None else Path(settings.cache_dir)
    return folder.expanduser().absolute()


@contextmanager
def compose(settings: Settings, clock: Clock = SYSTEM_CLOCK) -> Iterator[Parts]:
    """Build everything behind a mount.

    Raises:
        SetupError: the cache folder cannot be used.
    """
    cache_dir = prepare_cache_dir(cache_folder(settings))
    telemetry = Telemetry(clock)
    with ExitStack() as stack:
        credentials = Credentials(clock=clock)
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
        freshness = Freshness.of(settings.ttl_s, settings.stale_s)
        store = stack.enter_context(Store(cache_dir))
        warm = stack.enter_context(
            Warm(store, client.base_url, credentials, clock, stale_s=settings.stale_s)
        )
        catalogue = Catalogue(
            client, cache, store, telemetry, clock, freshness, warm, settings.concurrency
        )
        mutations = Mutations(client, cache, warm, telemetry, clock, catalogue)
        sessions = Sessions(client, cache, freshness)
        archives = Archives(
            client,
            telemetry,
            clock,
            timeout_s=settings.archive_timeout_s,
            burst=settings.archive_burst,
        )
        blocks = BlockCache(
            cache_dir / BLOCKS,
            telemetry,
            clock,
            limit_bytes=settings.cache_size_bytes,
            floor_bytes=FREE_BYTES,
        )
        weights = stack.enter_context(
            Weights(archives, store, blocks, telemetry, timeout_s=settings.timeout_s)
        )
        model = Model(
            settings=replace(settings, cache_dir=str(cache_dir)),
            catalogue=catalogue,
            mutations=mutations,
            sessions=sessions,
            archives=archives,
            weights=weights,
            telemetry=telemetry,
            clock=clock,
            started_ns=int(clock.now() * 1e9),
        )
        yield Parts(FileSystem(model, cache_dir), weights, client, telemetry)
