"""Settings of a mount, and the options that set them.

The fields of `Settings` define the command-line flags, `TINKERFS_*` variables, TOML keys, `-o`
options and the documentation (see `cli/options.py`). A flag overrides the environment, which
overrides the TOML file, which overrides the default. The API key is not a setting:
`api/key_sources.py` finds it, so that it cannot appear in a command line.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

#: The official service (Tinker SDK, _client.py).
DEFAULT_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

#: Range of a checkpoint's TTL that the API accepts, seconds (Tinker SDK, rest_client.py).
TTL_RANGE_S = (3600, 315_360_000)

#: Maximum for `concurrency`; more requests at a time would overload a server.
MAX_CONCURRENCY = 64

#: Layouts of the experts of adapters; see `weights/peft_adapter.py`.
MOE_LAYOUTS = ("peft", "packed")

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Option:
    """One option, which sets one field of `Settings`.

    Attributes:
        field: name of the field.
        flag: name on the command line without the dashes; also the `-o` name and the TOML key.
        metavar: placeholder of the value in the help; empty for a switch.
        parse: returns the value of a text; raises ValueError with an error message.
        default: default value as the help shows it, `no` for a switch.
        help: one line.
    """

    field: str
    flag: str
    metavar: str
    parse: Callable[[str], object]
    default: str
    help: str

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


def _parse_moe_layout(text: str) -> str:
    if text.strip().lower() not in MOE_LAYOUTS:
        raise ValueError(f"not one of {', '.join(MOE_LAYOUTS)}: {text!r}")
    return text.strip().lower()


def _parse_path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"not a path: {text!r}")
    return text


def _option(
    usage: str, parse: Callable[[str], object], default: str, help: str, **value: Any
) -> Any:
    """Return a field of `Settings`; its default is `value`, or else what `default` parses to."""
    flag, _, metavar = usage.partition(" ")
    option = (flag, metavar, parse, default, help)
    return field(default=value["value"] if value else parse(default), metadata={"option": option})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one mount, and the options that set them; all times in seconds.

    None means what the help shows as the default, for example the ids of the mounting user.
    """

    base_url: str = _option(
        "base-url URL",
        _parse_base_url,
        "the official service",
        "URL of the API (also TINKER_BASE_URL).",
        value=DEFAULT_BASE_URL,
    )
    read_only: bool = _option("read-only", _parse_bool, "no", "Reject every change.")
    allow_other: bool = _option(
        "allow-other", _parse_bool, "no", "Allow other users, subject to permission checks."
    )
    ttl_s: float = _option("ttl S", parse_duration_s, "30", "How long cached metadata is fresh.")
    stale_if_error_s: float = _option(
        "stale S",
        parse_duration_s,
        "24h",
        "How long cached metadata is served while the API fails.",
    )
    cache_dir: str | None = _option(
        "cache-dir DIR", _parse_path, "~/.cache/tinkerfs", "Directory of the cache.", value=None
    )
    cache_size_bytes: int = _option(
        "cache-size SIZE",
        _parse_size_bytes,
        "10G",
        "Maximum size of the weights cached on disk; 0 caches none.",
    )
    concurrency: int = _option(
        "concurrency N",
        _parse_concurrency,
        "8",
        "API requests at a time, 1 to 64; archive builds are not counted.",
    )
    timeout_s: float = _option(
        "timeout S", _parse_positive_s, "30", "Timeout of every wait, except for archive builds."
    )
    archive_timeout_s: float = _option(
        "archive-timeout S", _parse_positive_s, "15m", "Timeout of the wait for an archive build."
    )
    archive_build_limit: int = _option(
        "archive-burst N",
        _parse_count,
        "8",
        "Archive builds that one process group may start per minute; 0 for no limit.",
    )
    trash_s: float | None = _option(
        "trash DURATION",
        _parse_trash_s,
        "none",
        "Make removed checkpoints expire after this time, 1h to 3650d, instead of deleting them;"
        " `tinkerfs undelete` restores them.",
        value=None,
    )
    base_models: str | None = _option(
        "base-models DIR",
        _parse_path,
        "none",
        "Directory of base models, which decide how the files in /adapters are named; without it,"
        " the local Hugging Face cache and a table of the service's models are used.",
        value=None,
    )
    moe_layout: str = _option(
        "moe-layout LAYOUT",
        _parse_moe_layout,
        "peft",
        "Layout of experts in /adapters: peft, one tensor per expert; or packed, one for all of"
        " them, as vLLM loads it with --enable-moe-shared-loras.",
    )
    xattr: bool = _option(
        "xattr",
        _parse_bool,
        "no",
        "Provide extended attributes (user.tinker.*); makes ls -l slower.",
    )
    uid: int | None = _option(
        "uid U", _parse_id, "the mounting user", "Numeric owner of all files.", value=None
    )
    gid: int | None = _option(
        "gid G", _parse_id, "the mounting user's", "Numeric group of all files.", value=None
    )
    umask: int = _option("umask M", _parse_umask, "000", "Permission bits to clear, octal.")
    log_file: str | None = _option(
        "log-file F", _parse_path, "none", "Write the log to this file.", value=None
    )
    log_level: str = _option(
        "log-level L",
        _parse_log_level,
        "warning",
        f"Least severe level to log: {', '.join(LOG_LEVELS)}.",
    )


OPTIONS = tuple(Option(each.name, *each.metadata["option"]) for each in fields(Settings))
