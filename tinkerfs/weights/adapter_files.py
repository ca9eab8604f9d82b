"""The files of a checkpoint in the form that serving engines load.

`adapters` makes some of them. All others that are not weights are those of the checkpoint.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from msgspec.structs import replace as replace_fields

from tinkerfs import errors
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.weights.adapters import (
    CONFIG,
    MADE_FILES,
    MODEL,
    WEIGHTS_ENDINGS,
    Adapter,
    AdapterSource,
    convert_source,
    parse_config,
)
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.peft_adapter import ConversionError
from tinkerfs.weights.reader import MemberListing, WeightsReader
from tinkerfs.weights.tar_index import Member


class AdapterFiles:
    """The files of adapters for serving engines. Thread-safe.

    Args:
        reader: reads the stored files.
        base_model: returns the base model's name; used if the configuration does not have it.
    """

    def __init__(
        self, reader: WeightsReader, base_model: Callable[[RequestContext], str | None]
    ) -> None:
        self._reader = reader
        self._base_model = base_model

    def cached_files(self, checkpoint: CheckpointVersion) -> MemberListing | None:
        """Return the members if they are cached; send no request."""
        listing = self._reader.cached_files(checkpoint)
        adapter = self._cached(checkpoint)
        if listing is None or adapter is None:
            return None
        return self._listing(checkpoint, listing, adapter)

    def files(
        self, checkpoint: CheckpointVersion, ctx: RequestContext, *, is_open: bool = True
    ) -> MemberListing:
        """Return the members, with their exact sizes.

        The made files of an adapter that cannot be converted are listed too, because a directory
        without them would look like an empty checkpoint. `open` refuses them.

        Raises:
            ApiError, OSError: as `WeightsReader.files`.
        """
        listing = self._reader.files(checkpoint, ctx, is_open=is_open)
        try:
            adapter = self._get(checkpoint, ctx)
        except OSError as error:
            if not errors.is_unsupported(error):
                raise
            adapter = None
        return self._listing(checkpoint, listing, adapter)

    def open(self, checkpoint: CheckpointVersion, name: str, ctx: RequestContext) -> WeightsFile:
        """Open a member by its name.

        Raises:
            ApiError, OSError: as `WeightsReader.open`; EOPNOTSUPP if the adapter cannot be
                converted.
        """
        if name in MADE_FILES:
            self._reader.files(checkpoint, ctx)
            layout = self._get(checkpoint, ctx)[name]
            return self._reader.open(checkpoint, MODEL, ctx, layout)
        if name.endswith(WEIGHTS_ENDINGS):
            raise errors.not_found(checkpoint.path)
        return self._reader.open(checkpoint, name, ctx)

    def cached_bytes(self, checkpoint: CheckpointVersion, name: str) -> int:
        """Return how many bytes of a member are on disk, 0 if that is not known."""
        if name not in MADE_FILES:
            return self._reader.cached_bytes(checkpoint, name)
        adapter = self._cached(checkpoint)
        return 0 if adapter is None else self._reader.cached_bytes(checkpoint, MODEL, adapter[name])

    def _listing(
        self, checkpoint: CheckpointVersion, listing: MemberListing, adapter: Adapter | None
    ) -> MemberListing:
        members = {
            name: member
            for name, member in listing.members.items()
            if not name.endswith(WEIGHTS_ENDINGS)
        }
        for name in (CONFIG, MODEL) if adapter is None else MADE_FILES:
            stored = listing.members.get(MODEL)
            mtime_ns = checkpoint.mtime_ns if stored is None else stored.mtime_ns
            # Some programs do not open an empty file, and so would not report the refusal.
            size_bytes = 1 if adapter is None else adapter[name].extents.size_bytes
            members[name] = Member(name, size_bytes, mtime_ns, ())
        return replace(listing, members=members)

    def _cached(self, checkpoint: CheckpointVersion) -> Adapter | None:
        """Return the converted adapter if no request is needed, None if it cannot be converted."""
        adapter = self._reader.adapters.cached(checkpoint.cache_key)
        source = self._reader.adapters.source(checkpoint.cache_key) if adapter is None else None
        if source is not None:
            with suppress(ConversionError):
                return self._convert(checkpoint, source, BACKGROUND_CONTEXT)
        return adapter

    def _get(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> Adapter:
        """Return the converted adapter of a checkpoint.

        Raises:
            ApiError, OSError: as `WeightsReader.files`; EOPNOTSUPP if it cannot be converted.
        """
        cache = self._reader.adapters
        adapter = cache.cached(checkpoint.cache_key)
        if adapter is not None:
            return adapter
        try:
            source = cache.source(checkpoint.cache_key)
            if source is None:
                source = self._reader.adapter_source(checkpoint, ctx)
                name = parse_config(source.config).get("base_model_name_or_path")
                name = name if isinstance(name, str) and name else self._base_model(ctx)
                source = replace_fields(source, base_model=name or "")
                cache.put_source(checkpoint.cache_key, source)
            return self._convert(checkpoint, source, ctx)
        except ConversionError as error:
            message = f"not convertible: {error} (hint: {error.hint})"
            raise errors.not_supported(checkpoint.path, message) from None

    def _convert(
        self, checkpoint: CheckpointVersion, source: AdapterSource, ctx: RequestContext
    ) -> Adapter:
        reader = self._reader
        work = partial(convert_source, source, reader.base_models, reader.moe_layout)
        return self._reader.adapters.get(checkpoint.cache_key, work, ctx)
