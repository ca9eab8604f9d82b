"""The kinds of row that the layout table is made of.

A folder is a tuple of rows. A row is a name that is always there (`File`, `Control`, `Link`,
`Folder`) or an `Each`: one node for every name that the account has. Each folder is about a
*subject* (nothing, a training run, a checkpoint), which its rows' functions are given. So listing,
lookup and documentation come from the same row, and a new name is one row and one function.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from tinkerfs import name_encoding
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.mutations import Mutations
from tinkerfs.catalog.sessions import Sessions
from tinkerfs.catalog.trash_reader import TrashReader
from tinkerfs.clock import Clock
from tinkerfs.config import Settings
from tinkerfs.context import RequestContext
from tinkerfs.journal import Journal
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.reader import WeightsReader
from tinkerfs.weights.url_cache import SignedUrlCache


@dataclass(frozen=True, slots=True)
class Backend:
    """What the functions of the table may ask."""

    settings: Settings
    catalogue: Catalog
    mutations: Mutations
    trash: TrashReader
    sessions: Sessions
    archives: SignedUrlCache
    weights: WeightsReader
    telemetry: Telemetry
    clock: Clock
    started_ns: int


class NodeContext(msgspec.Struct, frozen=True):
    """Where a function of the table is at work: the model, the node's subject, its path, the call.

    Attributes:
        model: what may be asked.
        subject: what the folder is about.
        path: the node's path, for messages.
        call: how to wait; functions that take no call must not.
    """

    model: Backend
    entity: Any
    path: str
    call: RequestContext


@dataclass(frozen=True, slots=True)
class GeneratedFile:
    """A file whose bytes are made of metadata.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        render: its bytes; called by `open`, and by `stat` for the length without `told_bytes`.
        mode: permission bits.
        told_bytes: for what only `open` may resolve: the length told without asking anybody, an
            upper bound above 0.
        is_exact: whether `told_bytes` is no mere bound; None where nobody is to wait until who
            was told a bound has forgotten it.
        is_costly: rendering may take a call of its own, so a listing leaves its attributes out
            until its bytes are known.
        is_momentary: it tells of the mount itself, and so something else at every look.
        journal: what grows while it is open, and is rendered as it is; None for all others.
        mtime_ns: None for the folder's.
    """

    name: str
    doc: str
    render: Callable[[NodeContext], bytes]
    mode: int = 0o444
    size_hint: Callable[[NodeContext], int] | None = None
    is_size_exact: Callable[[NodeContext], bool] | None = None
    is_expensive: bool = False
    is_volatile: bool = False
    journal: Callable[[NodeContext], Journal[Any]] | None = None
    mtime_ns: Callable[[NodeContext], int] | None = None


@dataclass(frozen=True, slots=True)
class ContentFile:
    """A file whose bytes come by position, as weights do.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        open: resolves it; may wait for long.
        told_bytes: the length told without asking anybody, an upper bound above 0.
        is_exact: whether that is no mere bound; None for always.
        mode: permission bits.
        mtime_ns: None for the folder's.
        xattrs: as `Folder.xattrs`.
    """

    name: str
    doc: str
    open: Callable[[NodeContext], WeightsFile]
    size_hint: Callable[[NodeContext], int]
    is_size_exact: Callable[[NodeContext], bool] | None = None
    mode: int = 0o444
    mtime_ns: Callable[[NodeContext], int] | None = None
    xattrs: Callable[[NodeContext], dict[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A file whose writes act: `store` gets one whole value, and its errors are the write's."""

    name: str
    doc: str
    render: Callable[[NodeContext], bytes]
    store: Callable[[NodeContext, str], None]
    mode: int = 0o644
    mtime_ns: Callable[[NodeContext], int] | None = None


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        target: a path from the mount's root; None, where it `is_optional`, for no link.
        is_optional: not every folder of its kind has it.
        mtime_ns: None for the folder's.
    """

    name: str
    doc: str
    target: Callable[[NodeContext], str | None]
    is_optional: bool = False
    mtime_ns: Callable[[NodeContext], int] | None = None


class RemovalPolicy(Enum):
    """What removing does to a folder."""

    NEVER = "it and what is in it cannot be removed"
    CONTAINER = "rmdir succeeds once nothing is left in it, and changes nothing"
    CHECKPOINT = "its files can be hidden by unlink, and rmdir deletes the checkpoint"


@dataclass(frozen=True, slots=True)
class Directory:
    """A folder.

    Attributes:
        name: file name.
        doc: one line for the documentation.
        rows: its names, in the order they are listed.
        mtime_ns: None for when the mount was made.
        stored_bytes: its size, what the server stores; None for 0.
        removal: what removing does to it.
        xattrs: its extended attributes, without their namespace; takes no call of its own.
        fixed: the rows that are a name, by it.
        each: the others.
        nlink: 2 and one for each subfolder, or 1, "not counted", where that would take a call.
    """

    name: str
    doc: str
    rows: "tuple[NodeSpec, ...]"
    mtime_ns: Callable[[NodeContext], int] | None = None
    stored_bytes: Callable[[NodeContext], int] | None = None
    removal: RemovalPolicy = RemovalPolicy.NEVER
    xattrs: Callable[[NodeContext], dict[str, str]] | None = None
    static_children: "dict[str, GeneratedFile | ContentFile | ControlFile | Symlink | Directory]" = field(
        init=False, repr=False
    )
    dynamic_children: "tuple[DynamicEntries, ...]" = field(init=False, repr=False)
    nlink: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fixed = {row.name: row for row in self.rows if not isinstance(row, DynamicEntries)}
        each = tuple(row for row in self.rows if isinstance(row, DynamicEntries))
        subfolders = sum(isinstance(row, Directory) for row in self.rows)
        object.__setattr__(self, "fixed", fixed)
        object.__setattr__(self, "each", each)
        object.__setattr__(self, "nlink", 1 if each else 2 + subfolders)


@dataclass(frozen=True, slots=True)
class DynamicEntries:
    """One `node` for each name of the account.

    Attributes:
        node: the kind of node; its own name is the pattern shown in the documentation. None for a
            folder of the same kind as the one that holds it.
        list: the server's names and their subjects, in order; a file name that had to be cut is
            looked for in it.
        find: the subject behind one server name, None where there is none; resolves names that no
            listing tells as well.
        is_listed: whether a listing of the folder shows them.
        encode: a server name to its file name.
        decode: the way back; ValueError for what no server name is encoded as.
    """

    node: Directory | Symlink | GeneratedFile | ContentFile | None
    list: Callable[[NodeContext], Iterable[tuple[Any, Any]]]
    lookup: Callable[[NodeContext, Any], Any]
    is_listed: bool = True
    encode: Callable[[Any], str] = name_encoding.encode
    decode: Callable[[str], Any] = name_encoding.decode


NodeSpec = GeneratedFile | ContentFile | ControlFile | Symlink | Directory | DynamicEntries
