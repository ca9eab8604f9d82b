"""Open files and directories of a mount, as the operations hand them out."""

from typing import TYPE_CHECKING, NamedTuple

from tinkerfs.vfs.node import Handle

if TYPE_CHECKING:
    from tinkerfs.vfs.directory_stream import DirectoryStream


class OpenFile(NamedTuple):
    """An open file, and the flags that the reply to OPEN carries."""

    path: str
    handle: Handle
    direct_io: bool
    keep_cache: bool


class OpenDirectory(NamedTuple):
    """An open directory.

    Attributes:
        mutation_count: `FileSystem.local_mutation_count` when the directory was opened.
    """

    path: str
    stream: "DirectoryStream"
    mutation_count: int
