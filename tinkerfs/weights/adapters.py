"""Read checkpoints as serving engines load them: adapters in PEFT's form.

The files are those of the checkpoint, except two. `adapter_model.safetensors` is laid out over the
bytes of the Tinker adapter, and `adapter_config.json` is made for it. What must be known for that
is the header and the config, so a conversion costs two small reads and no copy. Thread-safe.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.concurrency import SingleFlight
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.weights.base_models import BaseModels
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.extents import ExtentMap
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.peft_adapter import (
    CONFIG_NAME,
    ConversionError,
    PeftAdapter,
    convert,
    pass_on,
)
from tinkerfs.weights.reader import MemberListing, WeightsReader
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, tensors_json

#: The names that PEFT gives to the two files of an adapter.
MODEL: Final = "adapter_model.safetensors"
CONFIG: Final = CONFIG_NAME

#: Maximum number of conversions in memory. One of 100,000 tensors takes 20 MB.
_MAX_CONVERSIONS: Final = 8
#: Maximum size of an `adapter_config.json`.
_MAX_CONFIG_BYTES: Final = 1 << 20

_HINT: Final = (
    "(hint: files/ has the files as they are; `tinker_cookbook.weights.build_lora_adapter` converts"
    " a local copy)"
)


class AdapterReader:
    """Reads adapters in PEFT's form, with the interface of `WeightsReader` for files.

    Args:
        weights: reads the checkpoints' own files.
        base_models: knows the structure of base models.
        base_model_of: returns the name of the base model for a tinker path; sends a request.
    """

    def __init__(
        self,
        weights: WeightsReader,
        base_models: BaseModels,
        base_model_of: Callable[[str], str | None],
    ) -> None:
        self._weights = weights
        self._base_models = base_models
        self._base_model_of = base_model_of
        self._flights: SingleFlight[str, Future[PeftAdapter]] = SingleFlight()
        self._lock = threading.Lock()
        self._converted: OrderedDict[str, PeftAdapter] = OrderedDict()  # guarded by _lock

    def files(
        self, checkpoint: CheckpointVersion, ctx: RequestContext, *, is_open: bool = True
    ) -> MemberListing:
        """Return the files, with the sizes of the converted ones.

        An adapter that cannot be converted is listed as it is; `open` says why.

        Raises:
            ApiError, OSError: as `WeightsReader.files`.
        """
        listing = self._weights.files(checkpoint, ctx, is_open=is_open)
        try:
            adapter = self._adapter(checkpoint, listing, ctx)
        except ConversionError:
            return listing
        members = dict(listing.members)
        sizes = {MODEL: adapter.extents.size_bytes, CONFIG: len(adapter.config)}
        for name, size_bytes in sizes.items():
            members[name] = replace(members[name], size_bytes=size_bytes)
        return MemberListing(members, listing.skipped)

    def cached_files(self, checkpoint: CheckpointVersion) -> MemberListing | None:
        """Return the checkpoint's own files if their index is cached; send no request."""
        return self._weights.cached_files(checkpoint)

    def open(self, checkpoint: CheckpointVersion, name: str, ctx: RequestContext) -> WeightsFile:
        """Open a file.

        Raises:
            ApiError: as `WeightsReader.open`.
            OSError: EOPNOTSUPP if no rule says how to convert the adapter; else as
                `WeightsReader.open`.
        """
        if name not in (MODEL, CONFIG) and not name.endswith(".age"):
            return self._weights.open(checkpoint, name, ctx)
        listing = self._weights.files(checkpoint, ctx)
        try:
            adapter = self._adapter(checkpoint, listing, ctx)
        except ConversionError as error:
            raise errors.not_supported(checkpoint.path, f"{error} {_HINT}") from None
        file = self._weights.open(checkpoint, name, ctx)
        extents = adapter.extents if name == MODEL else ExtentMap.of_bytes(adapter.config)
        return AdapterFile(file, extents)

    def tensors(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> bytes:
        """Return the tensors of the converted adapter, as `WeightsReader.tensors`.

        Raises:
            ApiError, OSError: as `open`.
        """
        with self.open(checkpoint, MODEL, ctx) as file:
            length = int.from_bytes(file.read(LENGTH_BYTES, 0, ctx), "little")
            header = file.read(length, LENGTH_BYTES, ctx)
        return tensors_json({MODEL: (header, file.size_bytes)})

    def cached_bytes(self, checkpoint: CheckpointVersion, name: str) -> int:
        """Return how many bytes of the checkpoint's own file are on disk."""
        return self._weights.cached_bytes(checkpoint, name)

    def _adapter(
        self, checkpoint: CheckpointVersion, listing: MemberListing, ctx: RequestContext
    ) -> PeftAdapter:
        """Return the converted adapter; concurrent callers share one conversion.

        Raises:
            ConversionError: no rule says how to convert it.
            ApiError, OSError: as `WeightsReader.open`.
        """
        for name in (MODEL, CONFIG):
            if name not in listing.members:
                encrypted = f"{name}.age" in listing.members
                reason = "its files are encrypted" if encrypted else f"it has no {name}"
                raise ConversionError(reason)
        # The size distinguishes versions of a checkpoint that is not dated.
        key = f"{checkpoint.cache_key}\0{listing.members[MODEL].size_bytes}"
        with self._lock:
            adapter = self._converted.get(key)
            if adapter is not None:
                self._converted.move_to_end(key)
                return adapter
            future = self._flights.run(
                key,
                lambda: self._convert(key, checkpoint, listing.members[MODEL].size_bytes),
                f"adapter of {checkpoint.path}",
                Future[PeftAdapter](),
            )
        return ctx.wait_for(future)

    def _convert(self, key: str, checkpoint: CheckpointVersion, size_bytes: int) -> PeftAdapter:
        raw, config = self._config(checkpoint)
        name = config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            name = self._base_model_of(checkpoint.about)
        try:
            header = self._weights.header(checkpoint, MODEL, BACKGROUND_CONTEXT)
            base = self._base_models.get(name) if name else None
        except ValueError as error:
            raise ConversionError(str(error)) from None
        if base is not None:
            adapter = convert(header, size_bytes, config, base)
        else:
            try:
                adapter = pass_on(header, size_bytes, config, raw)
            except ConversionError as error:
                raise ConversionError(
                    f"no rule for the base model {errors.redact(name or '(unknown)')}, which is"
                    " neither in --base-models nor in the cache of Hugging Face nor among the"
                    f" known ones; and {error}"
                ) from None
        with self._lock:
            self._converted[key] = adapter
            if len(self._converted) > _MAX_CONVERSIONS:
                self._converted.popitem(last=False)
        return adapter

    def _config(self, checkpoint: CheckpointVersion) -> tuple[bytes, dict[str, Any]]:
        """Return `adapter_config.json` as it is stored, and parsed."""
        with self._weights.open(checkpoint, CONFIG, BACKGROUND_CONTEXT) as file:
            data = file.read(min(file.size_bytes, _MAX_CONFIG_BYTES), 0, BACKGROUND_CONTEXT)
        try:
            return data, msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ConversionError(f"its {CONFIG} is not a JSON object: {error}") from None


class AdapterFile(WeightsFile):
    """A virtual file, laid out over a file of the checkpoint.

    Args:
        source: the file with the bytes; closed with this one.
        extents: the layout.
    """

    def __init__(self, source: WeightsFile, extents: ExtentMap) -> None:
        self.key = f"{source.key}\0peft"  # these are other bytes than those of the source
        self.size_bytes = extents.size_bytes
        self.mtime_ns = source.mtime_ns
        self._source = source
        self._extents = extents

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """See `WeightsFile.read_into`."""

        def read_source(view: memoryview, start: int) -> None:
            self._source.read_into(view, start, ctx)

        return self._extents.read_into(buffer, offset, read_source)

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) if all are cached, else None; send no request."""
        ranges = self._extents.source_ranges(start, stop)
        if any(self._source.peek(*each) is None for each in ranges):
            return None
        return self.read(stop - start, start, BACKGROUND_CONTEXT)

    def blocks(self) -> dict[int, int]:
        """Return the blocks of the source; a dropped or repeated byte counts once."""
        return self._source.blocks()

    def block_bytes(self, block: int) -> int:
        """Return the length of a block of the source."""
        return self._source.block_bytes(block)

    def is_cached(self, block: int) -> bool:
        """Return whether a block of the source is on disk; send no request."""
        return self._source.is_cached(block)

    def cached_bytes(self) -> int:
        """Return how many bytes are on disk: all, or at most those of the source."""
        cached_bytes = self._source.cached_bytes()
        if cached_bytes == self._source.size_bytes:
            return self.size_bytes
        return min(cached_bytes, self.size_bytes - 1)

    def prepare(self, ctx: RequestContext) -> None:
        """See `WeightsFile.prepare`."""
        self._source.prepare(ctx)

    def fetch(self, block: int, ctx: RequestContext, count: int = 1) -> "Future[bytes | None]":
        """Start to download a block of the source."""
        return self._source.fetch(block, ctx, count)
