"""Settings of a mount, and the table of options that set them.

`OPTIONS` defines the command-line flags, `TINKERFS_*` variables, TOML keys, `-o` options and the
documentation (see `cli/options.py`). A flag overrides the environment, which overrides the TOML
file, which overrides the default. The API key is not a setting: `api/credentials.py` finds it, so
that it cannot appear in a command line.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

#: The official service (Tinker SDK, _client.py).
DEFAULT_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

#: Range of a checkpoint's TTL that the API accepts, seconds (Tinker SDK, rest_client.py).
TTL_RANGE_S = (3600, 315_360_000)

#: Maximum for `concurrency`; more requests at a time would overload a server.
MAX_CONCURRENCY = 64

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one mount; all times in seconds.

    Attributes:
        base_url: URL of the API, without a trailing slash.
        ttl_s: freshness of a metadata entry.
        stale_if_error_s: maximum age of a metadata entry that is served while the API fails.
        concurrency: maximum number of API requests at a time, except archive builds.
        timeout_s: bound on every wait, except for archive builds.
        archive_timeout_s: bound on the wait for an archive build.
        archive_build_limit: archive builds that one process group may start per minute; 0 for no
            limit.
        cache_dir: directory of the cache that survives the mount; None for the default.
        cache_size_bytes: bound on the weights cached on disk; 0 caches none.
        read_only: reject every change.
        allow_other: allow other users, subject to permission checks.
        trash_s: a removal makes a checkpoint expire after this time instead of deleting it, 3600 to
            315360000; None deletes it immediately.
        xattr: provide extended attributes.
        uid: owner of all files; None for the mounting user.
        gid: group of all files; None for the mounting user's group.
        umask: permission bits to clear.
        log_file: path of the log; None for standard error in the foreground, otherwise no log.
        log_level: least severe level that is logged.
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
    """One option, which sets one field of `Settings`.

    Attributes:
        field: name of the field.
        flag: name on the command line without the dashes; also the `-o` name and the TOML key.
        metavar: placeholder of the value in the help; empty for a switch.
        parse: returns the value of a text; raises ValueError with an error message.
        help: one line.
        default: default value as the help shows it; empty if the help shows none.
    """

    field: str
    flag: str
    metavar: str
    parse: Callable[[str], object]
    help: str
    default: str = ""

    @property
    def env_var(self) -> str:
        """The environment variable of the option."""
        return "TINKERFS_" + self.flag.upper().replace("-", "_")

    @property
    def is_path(self) -> bool:
        """Whether the value is the path of a file or a directory."""
        return self.parse is _parse_path

    @property
    def is_switch(self) -> bool:
        """Whether the option takes no value on the command line."""
        return not self.metavar


_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration_s(text: str) -> float:
    """Return the seconds of a duration: a number and optionally ms, s, m, h, d or w.

    Raises:
        ValueError: the text is not a duration, or is negative.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|[smhdw]?)", text.strip().lower())
    if not match:
        raise ValueError(f"not a duration: {text!r} (hint: 30, 30s, 12h or 7d)")
    seconds = float(match.group(1)) * _UNITS_S[match.group(2)]
    if not math.isfinite(seconds):
        raise ValueError(f"not a duration: {text!r}")
    return seconds


def _parse_positive_s(text: str) -> float:
    seconds = parse_duration_s(text)
    if seconds <= 0:
        raise ValueError(f"not more than 0 seconds: {text!r}")
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
        raise ValueError("a URL must start with http:// or https:// and a host name")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL must not contain a user name or password, which ps would show")
    if parts.query or parts.fragment:
        raise ValueError("the URL of the API must not contain a query (?) or a fragment (#)")
    del port
    return text.strip().rstrip("/")


_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _parse_size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ValueError(f"not a size: {text!r} (hint: 500M, 20G or 0)")
    return int(float(match.group(1)) * _SIZES[match.group(2)])


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise ValueError(f"not a non-negative integer: {text!r}")
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
    raise ValueError(f"not a boolean: {text!r} (hint: yes or no)")


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
        "URL of the API (also TINKER_BASE_URL).",
        "the official service",
    ),
    Option("read_only", "read-only", "", _parse_bool, "Reject every change."),
    Option(
        "allow_other",
        "allow-other",
        "",
        _parse_bool,
        "Allow other users, subject to permission checks.",
    ),
    Option("ttl_s", "ttl", "S", parse_duration_s, "How long cached metadata is fresh.", "30"),
    Option(
        "stale_if_error_s",
        "stale",
        "S",
        parse_duration_s,
        "How long cached metadata is served while the API fails.",
        "24h",
    ),
    Option(
        "cache_dir",
        "cache-dir",
        "DIR",
        _parse_path,
        "Directory of the cache.",
        "~/.cache/tinkerfs",
    ),
    Option(
        "cache_size_bytes",
        "cache-size",
        "SIZE",
        _parse_size_bytes,
        "Maximum size of the weights cached on disk; 0 caches none.",
        "10G",
    ),
    Option(
        "concurrency",
        "concurrency",
        "N",
        _parse_concurrency,
        "API requests at a time, 1 to 64; archive builds are not counted.",
        "8",
    ),
    Option(
        "timeout_s",
        "timeout",
        "S",
        _parse_positive_s,
        "Timeout of every wait, except for archive builds.",
        "30",
    ),
    Option(
        "archive_timeout_s",
        "archive-timeout",
        "S",
        _parse_positive_s,
        "Timeout of the wait for an archive build.",
        "15m",
    ),
    Option(
        "archive_build_limit",
        "archive-burst",
        "N",
        _parse_count,
        "Archive builds that one process group may start per minute; 0 for no limit.",
        "8",
    ),
    Option(
        "trash_s",
        "trash",
        "DURATION",
        _parse_trash_s,
        "Make removed checkpoints expire after this time, 1h to 3650d, instead of deleting them;"
        " `tinkerfs undelete` restores them.",
        "none",
    ),
    Option(
        "xattr",
        "xattr",
        "",
        _parse_bool,
        "Provide extended attributes (user.tinker.*); makes ls -l slower.",
    ),
    Option("uid", "uid", "U", _parse_id, "Numeric owner of all files.", "the mounting user"),
    Option("gid", "gid", "G", _parse_id, "Numeric group of all files.", "the mounting user's"),
    Option("umask", "umask", "M", _parse_umask, "Permission bits to clear, octal.", "000"),
    Option("log_file", "log-file", "F", _parse_path, "Write the log to this file.", "none"),
    Option(
        "log_level",
        "log-level",
        "L",
        _parse_log_level,
        f"Least severe level to log: {', '.join(LOG_LEVELS)}.",
        "warning",
    ),
)
