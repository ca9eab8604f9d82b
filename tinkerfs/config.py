"""Every setting of tinkerfs in one frozen value, and how each is written.

`OPTIONS` is the one table: command-line flags, `TINKERFS_*` variables, TOML keys, `-o` options and
the documentation are made from it (by `cli/options.py`). Flag beats environment beats TOML file
beats default. The API key is no setting: `api/credentials.py` finds it, so that it can be in no
command line.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

#: The official service (Tinker SDK, _client.py).
DEFAULT_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

#: What the API takes as a checkpoint's TTL, seconds (Tinker SDK, rest_client.py).
TTL_RANGE_S = (3600, 315_360_000)

#: More calls at once than any server of the API is glad of.
MAX_CONCURRENCY = 64

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one mount does; all times in seconds.

    Attributes:
        base_url: where the API is, without a slash at its end.
        ttl_s: how long a metadata entry is fresh.
        stale_s: how long the last good answer is served when the API fails.
        concurrency: calls of the API at once, but those for archives.
        timeout_s: bound on every wait but those for archives.
        archive_timeout_s: bound on the wait for an archive that is being built.
        archive_burst: archive builds that one process group may start in a minute; 0 for no limit.
        cache_dir: where what is kept across mounts lies; None for the default place.
        cache_size_bytes: bound on the blocks of weights kept on disk; 0 keeps none.
        read_only: refuse every change.
        allow_other: let other users in, under true permissions.
        trash_s: a removal lets a checkpoint expire after this time instead of deleting it, 3600 to
            315360000; None deletes at once.
        xattr: tell extended attributes.
        uid: owner of everything; None for the mounting user.
        gid: group of everything; None for the mounting user's.
        umask: permission bits that are taken away.
        log_file: where the log goes; None for standard error in the foreground, else nowhere.
        log_level: the least severe record that is logged.
    """

    base_url: str = DEFAULT_BASE_URL
    ttl_s: float = 30.0
    stale_if_error_s: float = 24 * 3600.0
    concurrency: int = 8
    timeout_s: float = 30.0
    archive_timeout_s: float = 15 * 60.0
    archive_build_limit: int = 8
    cache_dir: str | None = None
    cache_size_bytes: int = 10 << 30
    read_only: bool = False
    allow_other: bool = False
    trash_s: float | None = None
    xattr: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int = 0
    log_file: str | None = None
    log_level: str = "warning"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as a user writes it.

    Attributes:
        field: the attribute of `Settings`.
        flag: its name on the command line without the dashes; also its `-o` name and TOML key.
        metavar: what stands for the value in help; empty for a switch.
        parse: text to value; raises ValueError with a sentence.
        help: one line.
        default: what holds where it is not set, as the help says it; empty for what needs no word.
    """

    field: str
    flag: str
    metavar: str
    parse: Callable[[str], object]
    help: str
    default: str = ""

    @property
    def env_var(self) -> str:
        """The environment variable that sets it."""
        return "TINKERFS_" + self.flag.upper().replace("-", "_")

    @property
    def is_path(self) -> bool:
        """Whether its value is the path of a file or a directory."""
        return self.parse is _parse_path

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value on the command line."""
        return not self.metavar


_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration_s(text: str) -> float:
    """Read a duration: a number of seconds, or with a unit of ms, s, m, h, d or w.

    Raises:
        ValueError: it is none, or negative.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|[smhdw]?)", text.strip().lower())
    if not match:
        raise ValueError(f"not a duration (30, 30s, 12h, 7d): {text!r}")
    seconds = float(match.group(1)) * _UNITS_S[match.group(2)]
    if not math.isfinite(seconds):
        raise ValueError(f"not a duration: {text!r}")
    return seconds


def _parse_positive_s(text: str) -> float:
    seconds = parse_duration_s(text)
    if seconds <= 0:
        raise ValueError(f"must be more than 0 seconds: {text!r}")
    return seconds


def _parse_trash_s(text: str) -> float:
    seconds = parse_duration_s(text)
    shortest_s, longest_s = TTL_RANGE_S
    if not shortest_s <= seconds <= longest_s:
        raise ValueError(f"not between 1h and 3650d: {text!r}")
    return seconds


def _parse_base_url(text: str) -> str:
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL starts with http:// or https:// and a host name")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a user name or password in it is refused: it would show in ps")
    if parts.query or parts.fragment:
        raise ValueError("the API's URL has no ? or # part")
    del port
    return text.strip().rstrip("/")


_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _parse_size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ValueError(f"not a size (500M, 20G, 0): {text!r}")
    return int(float(match.group(1)) * _SIZES[match.group(2)])


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise ValueError(f"not a whole number of 0 or more: {text!r}")
    return int(text)


def _parse_concurrency(text: str) -> int:
    count = _parse_count(text)
    if not 1 <= count <= MAX_CONCURRENCY:
        raise ValueError(f"not between 1 and {MAX_CONCURRENCY}: {text!r}")
    return count


def _parse_id(text: str) -> int:
    number = int(text) if re.fullmatch(r"\d{1,10}", text.strip()) else -1
    if not 0 <= number < 2**32 - 1:
        raise ValueError(f"not a numeric user or group id: {text!r}")
    return number


def _parse_umask(text: str) -> int:
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", text.strip()) or int(text, 8) > 0o777:
        raise ValueError(f"not an octal umask between 000 and 777: {text!r}")
    return int(text, 8)


def _parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"neither yes nor no: {text!r}")


def _parse_log_level(text: str) -> str:
    if text.strip().lower() not in LOG_LEVELS:
        raise ValueError(f"not one of {', '.join(LOG_LEVELS)}: {text!r}")
    return text.strip().lower()


def _parse_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"not a path: {text!r}")
    return text


OPTIONS: tuple[Option, ...] = (
    Option(
        "base_url",
        "base-url",
        "URL",
        _parse_base_url,
        "Where the API is (also TINKER_BASE_URL).",
        "the official service",
    ),
    Option("read_only", "read-only", "", _parse_bool, "Refuse every change."),
    Option(
        "allow_other", "allow-other", "", _parse_bool, "Let other users in, under true permissions."
    ),
    Option(
        "ttl_s", "ttl", "S", parse_duration_s, "How long what was listed is taken as fresh.", "30"
    ),
    Option(
        "stale_s",
        "stale",
        "S",
        parse_duration_s,
        "How long the last good answer serves when the API fails.",
        "24h",
    ),
    Option(
        "cache_dir",
        "cache-dir",
        "DIR",
        _parse_path,
        "Where what is kept across mounts lies.",
        "~/.cache/tinkerfs",
    ),
    Option(
        "cache_size_bytes",
        "cache-size",
        "SIZE",
        _parse_size_bytes,
        "Bound on the weights that are kept on disk; 0 keeps none.",
        "10G",
    ),
    Option(
        "concurrency",
        "concurrency",
        "N",
        _parse_concurrency,
        "Calls of the API at once, 1 to 64; archives that are built are no part of it.",
        "8",
    ),
    Option(
        "timeout_s",
        "timeout",
        "S",
        _parse_positive_s,
        "Bound on every wait but those for archives.",
        "30",
    ),
    Option(
        "archive_timeout_s",
        "archive-timeout",
        "S",
        _parse_positive_s,
        "Bound on the wait for an archive that is being built.",
        "15m",
    ),
    Option(
        "archive_burst",
        "archive-burst",
        "N",
        _parse_count,
        "Archive builds one process group may start in a minute; 0: no limit.",
        "8",
    ),
    Option(
        "trash_s",
        "trash",
        "DURATION",
        _parse_trash_s,
        "Let what is removed expire after this time, 1h to 3650d; `tinkerfs undelete` restores it.",
        "none",
    ),
    Option(
        "xattr",
        "xattr",
        "",
        _parse_bool,
        "Tell extended attributes (user.tinker.*); makes ls -l slower.",
    ),
    Option("uid", "uid", "U", _parse_id, "Numeric owner of everything.", "the mounting user"),
    Option("gid", "gid", "G", _parse_id, "Numeric group of everything.", "the mounting user's"),
    Option("umask", "umask", "M", _parse_umask, "Permission bits to take away, octal.", "000"),
    Option("log_file", "log-file", "F", _parse_path, "Write the log to this file.", "none"),
    Option(
        "log_level",
        "log-level",
        "L",
        _parse_log_level,
        f"Least severe record to log: {', '.join(LOG_LEVELS)}.",
        "warning",
    ),
)
