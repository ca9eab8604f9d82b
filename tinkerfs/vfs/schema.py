"""Nodes, and their specs in the layout table.

A directory has a tuple of specs. A spec is either one fixed name (`GeneratedFile`, `ContentFile`,
`ControlFile`, `Symlink`, `Directory`) or a `DynamicEntries`, which stands for one node per name
that the account has. Every directory has an *entity*: None, a training run or a checkpoint, for
example. The functions of a spec receive a `Node`, which has the entity. Listing, lookup and
documentation are derived from the same spec, so a new name needs one spec and one function.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from tinkerfs import name_encoding
from tinkerfs.cache.directory import CachePaths
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.mutations import Mutations
from tinkerfs.catalog.sessions import Sessions
from tinkerfs.clock import Clock
from tinkerfs.config import Settings
from tinkerfs.context import RequestContext
from tinkerfs.journal import Journal
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import Validity
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.reader import WeightsReader


@dataclass(frozen=True, slots=True)
class Backend:
    """The services that the functions of the layout table use.

    Attributes:
        cache_paths: where the parts of the cache are; None if only memory is used.
    """

    settings: Settings
    cache_paths: CachePaths | None
    catalog: Catalog
    mutations: Mutations
    sessions: Sessions
    weights: WeightsReader
    exports: Exports
    telemetry: Telemetry
    clock: Clock
    started_ns: int

    def check_and_touch(self, validity: Validity, generation: int) -> bool:
        """Return whether a derived value is valid; if so, mark its dependencies as used."""
        return generation == self.catalog.generation and validity.check_and_touch(
            self.clock.with_suspend()
        )


class Node(msgspec.Struct, frozen=True):
    """A resolved path.

    Attributes:
        backend: the services of the mount.
        spec: what the table says of the node; for an entry of `DynamicEntries`, its `spec`.
        entity: what the node represents; a file has the entity of its directory.
        path: from the mount's root.
        parent: the directory; None for the root only.
        validity: how long the path leads to this node; None for a child that came from a listing.
    """

    backend: Backend
    spec: Any
    entity: Any
    path: str
    parent: "Node | None"
    validity: Validity | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is the directory of a checkpoint, which `rm -r` deletes."""
        spec = self.spec
        return isinstance(spec, Directory) and spec.removal is RemovalPolicy.CHECKPOINT


class SizeHint(NamedTuple):
    """The size that stat() reports before the file has been opened.

    Attributes:
        size_bytes: an upper bound, > 0.
        is_exact: whether the size is exact.
    """

    size_bytes: int
    is_exact: bool


@dataclass(frozen=True, slots=True)
class GeneratedFile:
    """A small file that is rendered from metadata.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        render: returns the content. open() calls it; so does stat(), for the length, unless
            there is a `size_hint`.
        mode: permission bits.
        size_hint: returns the size for stat(), without a request. Required if only open() may
            render the content.
        awaits_exact_size: if stat() reported a hint that is not exact, open() waits until the
            kernel's cached attributes have expired.
        is_expensive: rendering may send a request, so readdirplus omits the attributes until
            the content is cached.
        is_volatile: the content differs on every read and is never cached.
        journal: returns the journal that an open file follows as it grows; None for other files.
        waits: a read at the end of the journal waits for the next line.
        mtime_ns: None to use the modification time of the directory.
    """

    name: str
    doc: str
    render: Callable[[Node, RequestContext], bytes]
    mode: int = 0o444
    size_hint: Callable[[Node], SizeHint] | None = None
    awaits_exact_size: bool = False
    is_expensive: bool = False
    is_volatile: bool = False
    journal: Callable[[Node], Journal[Any]] | None = None
    waits: bool = False
    mtime_ns: Callable[[Node, RequestContext], int] | None = None

    @property
    def is_cacheable(self) -> bool:
        """Whether the content may be cached: it depends only on metadata."""
        return not self.is_volatile and self.size_hint is None


@dataclass(frozen=True, slots=True)
class ContentFile:
    """A file with random-access content, such as weights.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        open: opens the content; may block for minutes while an archive is built.
        size_hint: returns the size for stat(), without a request.
        awaits_exact_size: as in `GeneratedFile`; False if the hint of a version is always exact.
        mode: permission bits.
        mtime_ns: None to use the modification time of the directory.
        xattrs: as `Directory.xattrs`.
        version: returns what identifies the content of the path, without a request; None if only
            open() determines it.
    """

    name: str
    doc: str
    open: Callable[[Node, RequestContext], WeightsFile]
    size_hint: Callable[[Node], SizeHint]
    awaits_exact_size: bool = False
    mode: int = 0o444
    mtime_ns: Callable[[Node, RequestContext], int] | None = None
    xattrs: Callable[[Node, RequestContext], dict[str, str]] | None = None
    version: Callable[[Node], str | None] = lambda _node: None


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A file that triggers an action when it is written.

    `on_write` receives one whole value. An error that it raises becomes the error of write(2).
    `applies_to` returns whether an entity has the file; None if all have it.
    """

    name: str
    doc: str
    render: Callable[[Node, RequestContext], bytes]
    on_write: Callable[[Node, str, RequestContext], None]
    applies_to: Callable[[Any], bool] | None = None
    mode: int = 0o644
    mtime_ns: Callable[[Node, RequestContext], int] | None = None


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        target: returns a path from the mount's root, or None if an optional link is absent.
        is_optional: some directories of this kind do not have the link.
        mtime_ns: None to use the modification time of the directory.
        leads_to_file: whether the target is a file and not a directory.
        facts: returns values of the target, named like extended attributes; must not send a
            request.
    """

    name: str
    doc: str
    target: Callable[[Node, RequestContext], str | None]
    is_optional: bool = False
    mtime_ns: Callable[[Node, RequestContext], int] | None = None
    leads_to_file: bool = False
    facts: Callable[[Node, RequestContext], dict[str, str]] | None = None


class RemovalPolicy(Enum):
    """What rmdir and unlink do to a directory and its files."""

    NEVER = "neither the directory nor its files can be removed"
    CONTAINER = "rmdir of an empty directory succeeds and changes nothing"
    CHECKPOINT = "unlink hides a file, and rmdir deletes the checkpoint"


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        specs: the children, in listing order.
        mtime_ns: None to use the time of mounting.
        stored_bytes: returns the size that the server stores; None for 0.
        removal: what rmdir and unlink do here.
        xattrs: returns the extended attributes, without their namespace; must not send a request.
        static_children: the specs with a fixed name, by name.
        dynamic_children: the other specs.
        nlink: 2 plus the number of subdirectories. It is 1 (not counted) for a directory with
            dynamic children, because counting these would require a request.
    """

    name: str
    doc: str
    specs: "tuple[NodeSpec, ...]"
    mtime_ns: Callable[[Node, RequestContext], int] | None = None
    stored_bytes: Callable[[Node], int] | None = None
    removal: RemovalPolicy = RemovalPolicy.NEVER
    xattrs: Callable[[Node, RequestContext], dict[str, str]] | None = None
    static_children: "dict[str, _StaticSpec]" = field(init=False, repr=False)
    dynamic_children: "tuple[DynamicEntries, ...]" = field(init=False, repr=False)
    nlink: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        static = {spec.name: spec for spec in self.specs if not isinstance(spec, DynamicEntries)}
        dynamic = tuple(spec for spec in self.specs if isinstance(spec, DynamicEntries))
        subdirectories = sum(isinstance(spec, Directory) for spec in self.specs)
        object.__setattr__(self, "static_children", static)
        object.__setattr__(self, "dynamic_children", dynamic)
        object.__setattr__(self, "nlink", 1 if dynamic else 2 + subdirectories)


@dataclass(frozen=True, slots=True)
class DynamicEntries:
    """One node for each name of the account.

    Attributes:
        spec: that of each name; its own name is the pattern shown in the documentation. None
            for a directory of the same kind as its parent.
        list: returns server names and entities, in order. Lookup searches it for a file name
            that was truncated.
        lookup: returns the entity of one server name, or None. It also resolves names that
            `list` does not return.
        is_listed: whether a directory listing includes these names.
        encode: converts a server name to a file name.
        decode: converts a file name to a server name; raises ValueError if no server name is
            encoded like that.
    """

    spec: Directory | Symlink | GeneratedFile | ContentFile | None
    list: Callable[[Node, RequestContext], Iterable[tuple[Any, Any]]]
    lookup: Callable[[Node, Any, RequestContext], Any]
    is_listed: bool = True
    encode: Callable[[Any], str] = name_encoding.encode
    decode: Callable[[str], Any] = name_encoding.decode


FileSpec = GeneratedFile | ContentFile | ControlFile
_StaticSpec = FileSpec | Symlink | Directory
NodeSpec = _StaticSpec | DynamicEntries
