"""Convert the adapters of checkpoints to the form that serving engines load.

`adapter_config.json`, `adapter_model.safetensors` and `tensors.json` are made from the header and
the configuration of the Tinker adapter. Tensors are read from its bytes, so they share its blocks.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from threading import Lock
from typing import Any, TypeAlias

import msgspec

from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import SingleFlight
from tinkerfs.context import RequestContext
from tinkerfs.weights.base_models import BaseModel, BaseModels
from tinkerfs.weights.extents import ExtentMap, OwnBytes
from tinkerfs.weights.peft_adapter import ConversionError, PeftAdapter, convert, pass_on
from tinkerfs.weights.safetensors_header import tensors_json
from tinkerfs.weights.tar_index import Member
from tinkerfs.weights.virtual_file import Layout

MODEL, CONFIG, TENSORS = "adapter_model.safetensors", "adapter_config.json", "tensors.json"

#: The files that are made.
MADE_FILES = (CONFIG, MODEL, TENSORS)

#: Maximum size of `adapter_config.json`.
MAX_CONFIG_BYTES = 1 << 20

#: Maximum number of converted adapters in memory. The largest take 100 MB each.
_MAX_ADAPTERS = 8

#: Namespace of the metadata store. The number is the version of the stored format.
_NAMESPACE = "weights adapter 1"

#: Endings of files with weights that engines would load without a conversion.
WEIGHTS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".age")


class AdapterSource(msgspec.Struct, frozen=True):
    """What an adapter is converted from: the stored files without their tensors.

    Attributes:
        header: the header of `adapter_model.safetensors`, without its length prefix.
        size_bytes: the size of that file.
        config: content of `adapter_config.json`.
        base_model: the base model's name.
    """

    header: bytes
    size_bytes: int
    config: bytes
    base_model: str = ""


#: The made files of an adapter by name, over the bytes of its stored safetensors file.
Adapter: TypeAlias = Mapping[str, Layout]


class AdapterCache:
    """The converted adapters in memory, by checkpoint version. Thread-safe.

    Concurrent callers share one conversion. A failed conversion is not cached. What they are
    converted from is cached in the metadata store, across mounts.
    """

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._conversions: SingleFlight[str, Future[Adapter]] = SingleFlight()
        self._lock = Lock()
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # guarded by _lock

    def cached(self, cache_key: str) -> Adapter | None:
        """Return a converted adapter, None if it is not cached."""
        with self._lock:
            adapter = self._adapters.get(cache_key)
            if adapter is not None:
                self._adapters.move_to_end(cache_key)
            return adapter

    def get(self, cache_key: str, work: Callable[[], Adapter], ctx: RequestContext) -> Adapter:
        """Return an adapter; convert it by `work`, on a thread, unless it is cached.

        Raises:
            ValueError: as raised by `work`.
            OSError: EINTR if the caller was interrupted.
        """
        future = Future[Adapter]()
        with self._lock:
            adapter = self._adapters.get(cache_key)
            if adapter is not None:
                return adapter
            task = partial(self._convert, cache_key, work, future)
            future = self._conversions.run(cache_key, task, "adapter", future)
        return ctx.wait_for(future)

    def source(self, cache_key: str) -> AdapterSource | None:
        """Return what an adapter is converted from if it is cached."""
        raw = self._store.get(_NAMESPACE, cache_key)
        try:
            return None if raw is None else msgspec.msgpack.decode(raw, type=AdapterSource)
        except msgspec.MsgspecError:
            return None

    def put_source(self, cache_key: str, source: AdapterSource) -> None:
        """Cache what an adapter is converted from."""
        self._store.put(_NAMESPACE, cache_key, msgspec.msgpack.encode(source))

    def drop(self, cache_key: str) -> None:
        """Drop an adapter, because its weights have changed."""
        with self._lock:
            self._adapters.pop(cache_key, None)
            self._conversions.forget(cache_key)
        self._store.delete(_NAMESPACE, cache_key)

    def _convert(
        self, cache_key: str, work: Callable[[], Adapter], future: "Future[Adapter]"
    ) -> Adapter:
        """Convert an adapter, and cache it unless it was dropped meanwhile."""
        adapter = work()
        with self._lock:
            if self._conversions.get(cache_key) is future:
                self._adapters[cache_key] = adapter
                if len(self._adapters) > _MAX_ADAPTERS:
                    self._adapters.popitem(last=False)
        return adapter


def find_stored_files(members: Mapping[str, Member]) -> tuple[Member, Member]:
    """Return the files that an adapter is converted from: tensors and configuration.

    Raises:
        ConversionError: a file is missing or too large.
    """
    for name in (MODEL, CONFIG):
        if name in members:
            continue
        if any(each.endswith(".age") for each in members):
            raise ConversionError("its files are encrypted (.age)")
        others = [each for each in members if each.endswith(WEIGHTS_ENDINGS)]
        reason = f"; no rule for {others[0]}" if others and name == MODEL else ""
        raise ConversionError(f"it has no {name}{reason}")
    if members[CONFIG].size_bytes > MAX_CONFIG_BYTES:
        raise ConversionError(f"{CONFIG} is larger than {MAX_CONFIG_BYTES} bytes")
    return members[MODEL], members[CONFIG]


def parse_config(data: bytes) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Raises:
        ConversionError: it is not a JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConversionError(f"{CONFIG} is not a JSON object: {error}") from None


def convert_source(source: AdapterSource, base_models: BaseModels, moe_layout: str) -> Adapter:
    """Return the converted adapter.

    Args:
        moe_layout: layout of the experts, as for `convert`.

    Raises:
        ConversionError: it is invalid, or no rule says how to convert it.
    """
    try:
        base = base_models.get(source.base_model)
    except (OSError, ValueError) as error:
        raise ConversionError(f"the files of its base model are invalid: {error}") from None
    peft = _convert(source, base, moe_layout)
    header = source.header if peft.header is None else peft.header
    made = {
        CONFIG: source.config if peft.config is None else peft.config,
        TENSORS: tensors_json({MODEL: (header, peft.extents.size_bytes)}),
    }
    return {
        MODEL: Layout(peft.extents, _digest(header)),
        **{name: Layout(ExtentMap([OwnBytes(data)]), _digest(data)) for name, data in made.items()},
    }


def _convert(source: AdapterSource, base: BaseModel | None, moe_layout: str) -> PeftAdapter:
    config = parse_config(source.config)
    if base is not None:
        return convert(source.header, source.size_bytes, config, base, moe_layout)
    peft = pass_on(source.header, source.size_bytes, config, None, moe_layout)
    if peft is None:
        raise ConversionError(
            f"the base model {source.base_model!r} is unknown; --base-models names a directory"
            " that has it"
        )
    return peft


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
