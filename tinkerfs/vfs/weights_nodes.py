"""What costs the server something to read: a version of a checkpoint, reached through symlinks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from msgspec.structs import replace as with_fields

from tinkerfs import errors, name_encoding
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.vfs import entities, render
from tinkerfs.vfs.schema import (
    ContentFile,
    Directory,
    DynamicEntries,
    GeneratedFile,
    NodeContext,
    NodeSpec,
    Symlink,
)
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.subject import CheckpointVersion
from tinkerfs.weights.tar_index import Member

#: What `archive_url` is told to be long until it is known: signed URLs are a few hundred bytes.
LONGEST_URL_BYTES = 16_384
#: What an archive may have beyond what the server stores: headers, padding, other files.
TAR_OVERHEAD_BYTES = 64 << 20
#: And where the server does not tell what it stores.
LARGEST_ARCHIVE_BYTES = 1 << 40
#: More than any `tensors.json`: it is read from headers of 100 MB at most.
LONGEST_TENSORS_BYTES = 256 << 20

_DOCS = {
    "archive_url": "a fresh signed URL of the archive and a newline; resolved when opened",
    "files": "the weight files; resolved when listed",
    "archive.tar": "the archive as it is stored; resolved when opened",
    "tensors.json": "name, dtype, shape and bytes of every tensor; resolved when opened",
}


@dataclass(frozen=True, slots=True)
class _MemberRef:
    """A folder within `files/`, by its path with a slash at the end, or a file there."""

    checkpoint: Checkpoint
    prefix: str
    member: Member | None = None


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """Weights that a path names: of one version of a checkpoint.

    Attributes:
        checkpoint: which one.
        subject: as `Weights` is asked for it.
        is_archive: the archive as it is stored is meant, not the files in it.
        inside: of the files, which one or which folder, as a path within `files/`; empty for all.
    """

    checkpoint: Checkpoint
    subject: CheckpointVersion
    is_archive: bool = False
    member_path: str = ""


def weights_ref(row: NodeSpec, site: NodeContext) -> WeightsRef | None:
    """Return the weights that a node stands for; None where it is about no one checkpoint's.

    Args:
        row: its row of the table.
        site: where that is.
    """
    about, is_archive = site.entity, isinstance(row, ContentFile)
    if not (isinstance(about, Checkpoint) and (is_archive or isinstance(row, Directory | Symlink))):
        return None
    return WeightsRef(about, _subject(site, about), is_archive)


def adapter_path(checkpoint: Checkpoint) -> str:
    """Return the path from the mount's root of a checkpoint's files for serving engines.

    It lies within `/adapters`: engines compare real paths, and load from nowhere else.
    """
    return f"/adapters/.content/{_versioned(checkpoint)}"


def _path(checkpoint: Checkpoint, name: str) -> str:
    return f"/.content/{_versioned(checkpoint)}/{name}"


def _versioned(checkpoint: Checkpoint) -> str:
    run_id, kind, name = map(name_encoding.encode, checkpoint.key)
    return f"{run_id}/{kind}/{name}/{checkpoint.version}"


def _subject(site: NodeContext, checkpoint: Checkpoint) -> CheckpointVersion:
    own = site.model.catalogue.cached_runs()
    is_foreign = own is not None and checkpoint.run_id not in own.by_id
    return CheckpointVersion(
        server=site.model.settings.base_url,
        key=(
            *checkpoint.key,
            *checkpoint.fingerprint,
            site.model.catalogue.incarnations.get(checkpoint.key),
        ),
        ref=replace(checkpoint.ref, is_foreign=is_foreign),
        path=site.path,
        mtime_ns=checkpoint.record.time_ns or site.model.started_ns,
        is_dated=checkpoint.is_dated,
    )


# archive_url


def _archive_url(site: NodeContext) -> bytes:
    subject = _subject(site, site.entity)
    if not subject.is_dated:
        site.model.archives.expire(subject.key, site.model.settings.ttl_s)
    return render.line(site.model.archives.url(subject.key, subject.ref, site.path, site.call).url)


def _archive_url_bytes(site: NodeContext) -> int:
    known = site.model.archives.known(_subject(site, site.entity).key)
    return LONGEST_URL_BYTES if known is None else len(render.line(known.url))


# archive.tar and tensors.json


def _archive_bytes(site: NodeContext) -> int:
    known = site.model.weights.archive_bytes(_subject(site, site.entity))
    if known is not None:
        return known
    stored_bytes = site.entity.record.size_bytes
    return LARGEST_ARCHIVE_BYTES if stored_bytes is None else stored_bytes + TAR_OVERHEAD_BYTES


def _has_archive_bytes(site: NodeContext) -> bool:
    subject = _subject(site, site.entity)
    # Of an undated one another version may be found when it is opened.
    return subject.is_dated and site.model.weights.archive_bytes(subject) is not None


def _open_archive(site: NodeContext) -> WeightsFile:
    return site.model.weights.open_archive(_subject(site, site.entity), site.call)


def _tensors(site: NodeContext) -> bytes:
    return site.model.weights.tensors(_subject(site, site.entity), site.call)


def _tensors_bytes(site: NodeContext) -> int:
    known = site.model.weights.cached_tensors(_subject(site, site.entity))
    return LONGEST_TENSORS_BYTES if known is None or not site.entity.is_dated else len(known)


def _has_tensors(site: NodeContext) -> bool:
    subject = _subject(site, site.entity)
    return subject.is_dated and site.model.weights.cached_tensors(subject) is not None


# files/

#: What a listing shows before it fails because the burst is exceeded. Python's `glob` and shells
#: take a listing that fails for the end of what came of it, so that all else would look complete.
#: The first fails to be stat'ed, for programs that report that alone; the others, to be opened, for
#: those that leave out what they cannot stat. Patterns filter by their endings.
_REFUSAL = "REFUSED-see-.tinkerfs-errors"
_REFUSALS = tuple(f"{_REFUSAL}{end}" for end in ("", ".json", ".safetensors"))


def _list_refusals(site: NodeContext) -> Iterator[tuple[str, str]]:
    try:
        _members(site, _inside(site).checkpoint)
    except errors.BurstExceeded:
        yield from ((name, name) for name in _REFUSALS)
        raise


def _find_refusal(site: NodeContext, name: str) -> str | None:
    subject = _subject(site, _inside(site).checkpoint)
    if name not in _REFUSALS or site.model.weights.cached_files(subject) is not None:
        return None
    if name == _REFUSAL:
        _refuse(site)
    return name


def _refuse(site: NodeContext) -> bytes:
    raise errors.burst_exceeded(
        site.path, "the directory was not listed (--archive-burst), so this is not all of it"
    )


def _inside(site: NodeContext) -> _MemberRef:
    return site.entity if isinstance(site.entity, _MemberRef) else _MemberRef(site.entity, "")


def _members(
    site: NodeContext, checkpoint: Checkpoint, *, is_open: bool = False
) -> dict[str, Member]:
    """Return the members, waiting as long as the archive takes to build.

    A listing waits in opendir, which holds up nothing. A lookup holds up other lookups in this one
    directory (the kernel's rule), and those need the same archive: a shorter bound would answer
    none of them sooner, and "timed out" is "no such file" to `os.path.exists`.
    """
    site.call.mark_uncacheable()  # an archive may be built anew
    patient = with_fields(site.call, timeout_s=None)
    try:
        subject = _subject(site, checkpoint)
        return site.model.weights.files(subject, patient, is_open=is_open).members
    except errors.UnsupportedEndpoint as error:
        # Of a checkpoint that is there: not an empty folder, nor a name that is not there.
        raise errors.os_error_from_api(error, site.path) from error


def _list_files(site: NodeContext) -> Iterator[tuple[str, _MemberRef]]:
    here = _inside(site)
    for path, member in _members(site, here.checkpoint, is_open=True).items():
        name = path.removeprefix(here.prefix)
        if path.startswith(here.prefix) and "/" not in name:
            yield name, _MemberRef(here.checkpoint, here.prefix, member)


def _list_folders(site: NodeContext) -> Iterator[tuple[str, _MemberRef]]:
    here = _inside(site)
    members = _members(site, here.checkpoint)
    below = [path for path in members if path.startswith(here.prefix)]
    rests = (path[len(here.prefix) :] for path in below)
    for name in dict.fromkeys(rest.partition("/")[0] for rest in rests if "/" in rest):
        yield name, _MemberRef(here.checkpoint, f"{here.prefix}{name}/")


def _find_file(site: NodeContext, name: str) -> _MemberRef | None:
    here = _inside(site)
    member = _members(site, here.checkpoint).get(here.prefix + name)
    if member is None and not here.checkpoint.is_dated:
        member = _members(site, here.checkpoint, is_open=True).get(here.prefix + name)
    return None if member is None else _MemberRef(here.checkpoint, here.prefix, member)


def _find_folder(site: NodeContext, name: str) -> _MemberRef | None:
    here = _inside(site)
    prefix = f"{here.prefix}{name}/"
    if not any(path.startswith(prefix) for path in _members(site, here.checkpoint)):
        return None
    return _MemberRef(here.checkpoint, prefix)


def _open_file(site: NodeContext) -> WeightsFile:
    inside = _inside(site)
    subject = _subject(site, inside.checkpoint)
    return site.model.weights.open(subject, _member(inside).name, site.call)


def _member(inside: _MemberRef) -> Member:
    assert inside.member is not None
    return inside.member


def _cached_bytes(site: NodeContext) -> dict[str, str]:
    inside = _inside(site)
    subject = _subject(site, inside.checkpoint)
    cached = site.model.weights.cached_bytes(subject, _member(inside).name)
    return {"tinkerfs.cached_bytes": str(cached)}


def _files_ns(site: NodeContext) -> int:
    return _subject(site, _inside(site).checkpoint).mtime_ns


FILES = Directory(
    "files",
    _DOCS["files"],
    (
        DynamicEntries(
            GeneratedFile(
                f"{_REFUSAL}<ending>",
                "stands before EBUSY where `--archive-burst` refuses the listing",
                _refuse,
                size_hint=lambda _site: 1,  # of an empty file some programs read nothing
                is_expensive=True,
            ),
            _list_refusals,
            _find_refusal,
        ),
        DynamicEntries(
            ContentFile(
                "<file>",
                "a weight file, read by ranges",
                _open_file,
                lambda site: _member(_inside(site)).size_bytes,
                mtime_ns=lambda site: _member(_inside(site)).mtime_ns,
                xattrs=_cached_bytes,
            ),
            _list_files,
            _find_file,
        ),
        DynamicEntries(None, _list_folders, _find_folder),
    ),
    _files_ns,
)

#: The same files where serving engines look for them.
ADAPTER = replace(FILES, name="<version>", doc="the files of that version; resolved when listed")

VERSION = Directory(
    "<version>",
    "as of the time it was saved",
    (
        GeneratedFile(
            "archive_url",
            _DOCS["archive_url"],
            _archive_url,
            mode=0o400,
            size_hint=_archive_url_bytes,
        ),
        FILES,
        ContentFile(
            "archive.tar",
            _DOCS["archive.tar"],
            _open_archive,
            _archive_bytes,
            _has_archive_bytes,
        ),
        GeneratedFile(
            "tensors.json",
            _DOCS["tensors.json"],
            _tensors,
            size_hint=_tensors_bytes,
            is_size_exact=_has_tensors,
        ),
    ),
    entities.checkpoint_ns,
)


def _link(name: str) -> Symlink:
    return Symlink(name, _DOCS[name], lambda site: _path(site.entity, name))


#: The links to it from the checkpoint's own folder, by name.
LINKS = {name: _link(name) for name in _DOCS}
