"""Specs of `.content`: files of a checkpoint's version that need an archive.

They are reached through the symlinks of a checkpoint's directory, so that tree walks avoid them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import msgspec
from msgspec.structs import replace as with_fields

from tinkerfs import errors, name_encoding
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.vfs import entities, render
from tinkerfs.vfs.schema import (
    ContentFile,
    Directory,
    DynamicEntries,
    GeneratedFile,
    Node,
    SizeHint,
    Symlink,
)
from tinkerfs.weights.adapter_files import AdapterFiles
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.reader import WeightsReader
from tinkerfs.weights.tar_index import Member

#: Upper bound of the size of `archive_url`; signed URLs have a few hundred bytes.
_MAX_URL_BYTES = 16_384
#: Upper bound of the archive's size beyond the stored bytes: headers, padding, other files.
_MAX_TAR_OVERHEAD_BYTES = 64 << 20
#: Upper bound of the archive's size if the server does not report the stored bytes.
_MAX_ARCHIVE_BYTES = 1 << 40
#: Upper bound of the size of `tensors.json`, which is made from headers of at most 100 MB.
_MAX_TENSORS_BYTES = 256 << 20

_DOCS = {
    "archive_url": "a fresh signed URL of the archive and a newline; resolved when opened",
    "files": "the weight files; resolved when listed",
    "archive.tar": "the archive, or a tar of separate files; resolved when opened",
    "tensors.json": "name, dtype, shape and bytes of every tensor; resolved when opened",
}


@dataclass(frozen=True, slots=True)
class _MemberRef:
    """A directory within `files/`, or a file in that directory.

    Attributes:
        checkpoint: the checkpoint of the archive.
        prefix: path of the directory within `files/`, with a trailing slash; empty for `files/`.
        member: the file; None for the directory.
    """

    checkpoint: ListedCheckpoint
    prefix: str
    member: Member | None = None


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The weights of one version of a checkpoint.

    Attributes:
        checkpoint: the checkpoint.
        version: the version, as `WeightsReader` expects it.
        is_archive: the archive is meant, not the files in it.
        member_path: path within `files/` of the file or directory that is meant; empty for all.
        base_model: returns the base model's name for the files in `/adapters`; None for those in
            `files/`.
    """

    checkpoint: ListedCheckpoint
    version: CheckpointVersion
    is_archive: bool = False
    member_path: str = ""
    base_model: Callable[[RequestContext], str | None] | None = None

    @property
    def directory(self) -> str:
        """The directory of the files: within the checkpoint's directory, or within the tree."""
        if self.base_model is None:
            return "files"
        return f"adapters/{name_encoding.encode_composite(self.checkpoint.key)}"

    @property
    def label(self) -> str:
        """The name in messages: the tinker path, or the directory in `/adapters`."""
        return self.checkpoint.tinker_path if self.base_model is None else self.directory

    def files(self, weights: WeightsReader) -> WeightsReader | AdapterFiles:
        """Return what lists and opens the files that are meant."""
        return weights if self.base_model is None else AdapterFiles(weights, self.base_model)


def weights_ref(node: Node) -> WeightsRef | None:
    """Return the weights of a node; None if it does not belong to one checkpoint."""
    entity, is_archive = node.entity, isinstance(node.spec, ContentFile)
    if not isinstance(entity, ListedCheckpoint):
        return None
    if not is_archive and not isinstance(node.spec, Directory | Symlink):
        return None
    base_model = partial(_base_model, node, entity) if _is_adapter(node) else None
    return WeightsRef(entity, _version(node, entity), is_archive, base_model=base_model)


def adapter_path(node: Node, _ctx: RequestContext) -> str:
    """Return the path of a checkpoint's files for serving engines from the root.

    The path is within `/adapters`, because engines compare real paths and refuse to load files from
    outside of the configured directory.
    """
    run_id, kind, name = map(name_encoding.encode, node.entity.key)
    return f"/adapters/.content/{run_id}/{kind}/{name}/{adapter_version(node)}"


def adapter_version(node: Node) -> str:
    """Return the version of a checkpoint's files for serving engines.

    It names the layout of experts, so that an engine that keeps what it has loaded from a path does
    not take it for the other layout.
    """
    version: str = node.entity.version
    layout = node.backend.settings.moe_layout
    return version if layout == "peft" else f"{version}+{layout}"


def _is_adapter(node: Node) -> bool:
    return node.path.startswith("/adapters/")


def _base_model(node: Node, checkpoint: ListedCheckpoint, ctx: RequestContext) -> str | None:
    """Return the name of a checkpoint's base model by its weights info."""
    info = msgspec.json.decode(node.backend.catalog.weights_info(checkpoint, ctx))
    name = info.get("base_model") if isinstance(info, dict) else None
    return name if isinstance(name, str) else None


def _files(node: Node, checkpoint: ListedCheckpoint) -> WeightsReader | AdapterFiles:
    """Return what lists and opens the files of a directory."""
    weights = node.backend.weights
    if not _is_adapter(node):
        return weights
    return AdapterFiles(weights, partial(_base_model, node, checkpoint))


def _path(checkpoint: ListedCheckpoint, name: str) -> str:
    run_id, kind, encoded = map(name_encoding.encode, checkpoint.key)
    return f"/.content/{run_id}/{kind}/{encoded}/{checkpoint.version}/{name}"


def version_of(node: Node) -> CheckpointVersion:
    """Return the version of the checkpoint that a node belongs to."""
    return _version(node, node.entity)


def _version(node: Node, checkpoint: ListedCheckpoint) -> CheckpointVersion:
    # Only errors of requests depend on it, and nothing that is cached.
    own_runs = node.backend.catalog.runs.peek(BACKGROUND_CONTEXT)
    is_own = own_runs is None or checkpoint.run_id in own_runs.by_id
    return CheckpointVersion(
        server=node.backend.settings.base_url,
        key=(
            *checkpoint.key,
            *checkpoint.fingerprint,
            node.backend.catalog.incarnations.get(checkpoint.key),
        ),
        ref=replace(checkpoint.ref, is_own=is_own),
        path=node.path,
        mtime_ns=checkpoint.record.time_ns or node.backend.started_ns,
        has_time=checkpoint.has_time,
    )


# archive_url


def _archive_url(node: Node, ctx: RequestContext) -> bytes:
    return render.line(node.backend.weights.archive_url(_version(node, node.entity), ctx))


def _archive_url_size(node: Node) -> SizeHint:
    cached = node.backend.weights.cached_archive_url(_version(node, node.entity))
    if cached is None:
        return SizeHint(_MAX_URL_BYTES, is_exact=False)
    return SizeHint(len(render.line(cached)), is_exact=True)


# archive.tar and tensors.json


def _archive_size(node: Node) -> SizeHint:
    version = _version(node, node.entity)
    archive_bytes = node.backend.weights.archive_bytes(version)
    if archive_bytes is not None:
        # open() may find another version of a checkpoint without a time.
        return SizeHint(archive_bytes, is_exact=version.has_time)
    stored_bytes = node.entity.record.size_bytes
    if stored_bytes is None:
        return SizeHint(_MAX_ARCHIVE_BYTES, is_exact=False)
    return SizeHint(stored_bytes + _MAX_TAR_OVERHEAD_BYTES, is_exact=False)


def _content_version(node: Node) -> str | None:
    """Return the version in the path; None if the record has no time, which would identify it."""
    checkpoint = _member_ref(node).checkpoint
    return checkpoint.version if checkpoint.has_time else None


def _open_archive(node: Node, ctx: RequestContext) -> WeightsFile:
    return node.backend.weights.open_archive(_version(node, node.entity), ctx)


def _tensors(node: Node, ctx: RequestContext) -> bytes:
    return node.backend.weights.tensors(_version(node, node.entity), ctx)


def _tensors_size(node: Node) -> SizeHint:
    version = _version(node, node.entity)
    cached = node.backend.weights.cached_tensors(version)
    if cached is None or not version.has_time:
        return SizeHint(_MAX_TENSORS_BYTES, is_exact=False)
    return SizeHint(len(cached), is_exact=True)


# files/

#: Entries that precede the error of a listing when the archive burst is exceeded. Shells and the
#: `glob` module ignore the error of a listing, so without these entries it would look complete.
#: The first one fails in stat(), for programs that report only that. The others fail in open(), for
#: programs that skip files without attributes. Their suffixes match common patterns.
_REFUSAL = "REFUSED-see-.tinkerfs-errors"
_REFUSALS = tuple(f"{_REFUSAL}{end}" for end in ("", ".json", ".safetensors"))


def _list_refusals(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    try:
        _members(node, _member_ref(node).checkpoint, ctx)
    except errors.BurstExceeded:
        yield from ((name, name) for name in _REFUSALS)
        raise


def _find_refusal(node: Node, name: str, ctx: RequestContext) -> str | None:
    version = _version(node, _member_ref(node).checkpoint)
    if (
        name not in _REFUSALS
        or _files(node, _member_ref(node).checkpoint).cached_files(version) is not None
    ):
        return None
    if name == _REFUSAL:
        _refuse(node, ctx)
    return name


def _refuse(node: Node, _ctx: RequestContext) -> bytes:
    raise errors.burst_exceeded(
        node.path, "the directory was not listed (--archive-burst); its entries are incomplete"
    )


def _member_ref(node: Node) -> _MemberRef:
    return node.entity if isinstance(node.entity, _MemberRef) else _MemberRef(node.entity, "")


def _members(
    node: Node, checkpoint: ListedCheckpoint, ctx: RequestContext, *, is_open: bool = False
) -> dict[str, Member]:
    """Return the members of the archive, without a deadline for building it.

    opendir() delays no other request. A lookup delays other lookups in the same directory, because
    the kernel serializes them; but these need the same archive, so a deadline would not help them.
    Besides, `os.path.exists` would treat a timeout as a missing file.
    """
    ctx.mark_uncacheable()  # the archive may be rebuilt
    ctx = with_fields(ctx, timeout_s=None)
    try:
        version = _version(node, checkpoint)
        return _files(node, checkpoint).files(version, ctx, is_open=is_open).members
    except errors.UnsupportedEndpoint as error:
        # The checkpoint exists, so the directory is not empty and the name not absent.
        raise errors.os_error_from_api(error, node.path) from error


def _list_files(node: Node, ctx: RequestContext) -> Iterator[tuple[str, _MemberRef]]:
    ref = _member_ref(node)
    for path, member in _members(node, ref.checkpoint, ctx, is_open=True).items():
        name = path.removeprefix(ref.prefix)
        if path.startswith(ref.prefix) and "/" not in name:
            yield name, _MemberRef(ref.checkpoint, ref.prefix, member)


def _list_directories(node: Node, ctx: RequestContext) -> Iterator[tuple[str, _MemberRef]]:
    ref = _member_ref(node)
    members = _members(node, ref.checkpoint, ctx)
    relative = (path.removeprefix(ref.prefix) for path in members if path.startswith(ref.prefix))
    for name in dict.fromkeys(path.partition("/")[0] for path in relative if "/" in path):
        yield name, _MemberRef(ref.checkpoint, f"{ref.prefix}{name}/")


def _find_file(node: Node, name: str, ctx: RequestContext) -> _MemberRef | None:
    ref = _member_ref(node)
    member = _members(node, ref.checkpoint, ctx).get(ref.prefix + name)
    if member is None and not ref.checkpoint.has_time:
        member = _members(node, ref.checkpoint, ctx, is_open=True).get(ref.prefix + name)
    return None if member is None else _MemberRef(ref.checkpoint, ref.prefix, member)


def _find_directory(node: Node, name: str, ctx: RequestContext) -> _MemberRef | None:
    ref = _member_ref(node)
    prefix = f"{ref.prefix}{name}/"
    if not any(path.startswith(prefix) for path in _members(node, ref.checkpoint, ctx)):
        return None
    return _MemberRef(ref.checkpoint, prefix)


def _open_file(node: Node, ctx: RequestContext) -> WeightsFile:
    ref = _member_ref(node)
    version = _version(node, ref.checkpoint)
    return _files(node, ref.checkpoint).open(version, _member(ref).name, ctx)


def _member(ref: _MemberRef) -> Member:
    assert ref.member is not None
    return ref.member


def _member_size(node: Node) -> SizeHint:
    return SizeHint(_member(_member_ref(node)).size_bytes, is_exact=True)


def _cached_bytes(node: Node, _ctx: RequestContext) -> dict[str, str]:
    ref = _member_ref(node)
    version = _version(node, ref.checkpoint)
    cached = _files(node, ref.checkpoint).cached_bytes(version, _member(ref).name)
    return {"tinkerfs.cached_bytes": str(cached)}


def _files_ns(node: Node, _ctx: RequestContext) -> int:
    return _version(node, _member_ref(node).checkpoint).mtime_ns


FILES = Directory(
    "files",
    _DOCS["files"],
    (
        DynamicEntries(
            GeneratedFile(
                f"{_REFUSAL}<ending>",
                "precedes the error EBUSY if `--archive-burst` refuses the listing",
                _refuse,
                # Some programs do not open an empty file.
                size_hint=lambda _node: SizeHint(1, is_exact=False),
                is_expensive=True,
            ),
            _list_refusals,
            _find_refusal,
        ),
        DynamicEntries(
            ContentFile(
                "<file>",
                "a weight file; only the ranges that are read are downloaded",
                _open_file,
                _member_size,
                mtime_ns=lambda node, _ctx: _member(_member_ref(node)).mtime_ns,
                xattrs=_cached_bytes,
                version=_content_version,
            ),
            _list_files,
            _find_file,
        ),
        DynamicEntries(None, _list_directories, _find_directory),
    ),
    _files_ns,
)

#: The files of the form that serving engines load, in the place that they load them from.
ADAPTER = replace(
    FILES, name="<version>", doc="that version in the form that engines load; resolved when listed"
)

VERSION = Directory(
    "<version>",
    "a version of the checkpoint, by the time it was saved",
    (
        GeneratedFile(
            "archive_url",
            _DOCS["archive_url"],
            _archive_url,
            mode=0o400,
            size_hint=_archive_url_size,
        ),
        FILES,
        ContentFile(
            "archive.tar",
            _DOCS["archive.tar"],
            _open_archive,
            _archive_size,
            awaits_exact_size=True,
            version=_content_version,
        ),
        GeneratedFile(
            "tensors.json",
            _DOCS["tensors.json"],
            _tensors,
            size_hint=_tensors_size,
            awaits_exact_size=True,
        ),
    ),
    entities.checkpoint_ns,
)


def _link(name: str) -> Symlink:
    return Symlink(
        name,
        _DOCS[name],
        lambda node, _ctx: _path(node.entity, name),
        leads_to_file=name != FILES.name,
    )


#: The links from a checkpoint's directory to its `VERSION`, by name.
LINKS = {name: _link(name) for name in _DOCS}
