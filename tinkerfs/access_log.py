"""Access log: a line per FUSE operation, while a reader has it open.

Without a reader, nothing is recorded. Operations on the log itself are left out, because reading
them would cause further ones. Thread-safe.
"""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from tinkerfs.journal import Journal
from tinkerfs.operation_log import OperationLog, OperationRecord
from tinkerfs.printable import escape_control_chars

if TYPE_CHECKING:
    from collections.abc import Callable

#: The path in every mount.
ACCESS_LOG_PATH: Final = "/.tinkerfs/access_log"

_COLUMNS: Final = (
    "time",
    "operation",
    "path",
    "size@offset",
    "outcome",
    "seconds",
    "uid",
    "pid",
    "command",
)
#: First line of the log. It also gives the file a length: `tail -f` reads a file of length 0 up to
#: its end at first, which never comes.
_HEADER: Final = "#" + "\t".join(_COLUMNS)


class AccessLog(Journal[OperationRecord]):
    """The operations of a mount as lines, which subscribes to them while it is open."""

    def __init__(self, operations: OperationLog) -> None:
        super().__init__(format_operation, max_entries=0, header=_HEADER)
        self._operations = operations
        self._unsubscribe: Callable[[], None] | None = None

    def _on_first_open(self) -> None:
        self._unsubscribe = self._operations.subscribe(self._on_operation)

    def _on_last_close(self) -> None:
        assert self._unsubscribe is not None
        self._unsubscribe()

    def _on_operation(self, record: OperationRecord) -> None:
        if record.path != ACCESS_LOG_PATH:
            self.add(record)


def format_operation(record: OperationRecord) -> str:
    """Return an operation as one line of tab-separated fields."""
    time = datetime.fromtimestamp(record.started_at, UTC)
    size_bytes = record.read_bytes or record.written_bytes
    transfer = "-"
    if record.operation in ("read", "write"):
        transfer = f"{size_bytes}@{record.offset}"
    fields = (
        time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        record.operation,
        escape_control_chars(record.path),
        transfer,
        record.errno_name or "OK",
        f"{record.duration_s:.6f}",
        str(record.caller.uid),
        str(record.caller.process or record.caller.pid),
        escape_control_chars(record.caller.command()),
    )
    return "\t".join(fields)


class AccessLine(msgspec.Struct, frozen=True, gc=False):
    """A line of an access log.

    Attributes:
        size_bytes: bytes read or written.
        outcome: "OK" or the name of an errno.
    """

    operation: str
    path: str
    size_bytes: int
    outcome: str
    duration_s: float
    pid: int
    command: str


def parse_line(line: str) -> AccessLine | None:
    """Return a line of an access log, None for a comment or anything else."""
    fields = line.rstrip("\n").split("\t")
    if line.startswith("#") or len(fields) != len(_COLUMNS):
        return None
    _time, operation, path, transfer, outcome, duration, _uid, pid, command = fields
    try:
        size_bytes = 0 if transfer == "-" else int(transfer.partition("@")[0])
        return AccessLine(operation, path, size_bytes, outcome, float(duration), int(pid), command)
    except ValueError:
        return None
