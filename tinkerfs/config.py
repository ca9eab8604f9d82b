"""Settings of a mount.

Callers without a command line, such as fsspec, set fields of `Settings`. `cli/options.py` sets them
from flags, environment variables and TOML files. The API key is not a setting, only the path of a
file with it: `api/key_sources.py` finds the key, so that it cannot appear in a command line.
"""

import math
import re
from dataclasses import dataclass, field
from ipaddress import ip_address

#: The official service (Tinker SDK, _client.py).
DEFAULT_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

#: Range of a checkpoint's TTL that the API accepts, seconds (Tinker SDK, rest_client.py).
TTL_RANGE_S = (3600, 315_360_000)

#: Maximum for `concurrency`; more requests at a time would overload a server.
MAX_CONCURRENCY = 64

#: Layouts of the experts of adapters; see `weights/peft_adapter.py`.
MOE_LAYOUTS = ("peft", "packed")

#: Destination of the audit log: the system's log.
SYSLOG = "syslog"

#: Formats of the log; see `cli/json_log.py` for the second one.
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

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


#: Fields of `Settings` that a running mount adopts when it reloads its configuration. The log file
#: and the key are opened again, too, but from the same place.
RELOADABLE = frozenset({"log_level", "ttl_s", "stale_if_error_s"})


def parse_address(text: str) -> tuple[str, int]:
    """Return the host and port of ADDRESS:PORT, :PORT or PORT; the default host is 127.0.0.1.

    Raises:
        ValueError: the text has another form.
    """
    host, colon, port = text.strip().rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    try:
        if is_bracketed or ":" in host:
            ip_address(host)
        number = int(port) if port.isascii() and port.isdigit() else -1
    except ValueError:
        number = -1
    if not 0 < number < 65536 or (":" in host and not is_bracketed) or (is_bracketed and not colon):
        raise ValueError(f"not an address: {text!r} (hint: 9464, 127.0.0.1:9464 or [::1]:9464)")
    return host or "127.0.0.1", number


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one mount; all times in seconds.

    `tinkerfs mount --help` describes the option of each field, and what None means.
    """

    base_url: str = DEFAULT_BASE_URL
    api_key_file: str | None = None
    read_only: bool = False
    allow_other: bool = False
    ttl_s: float = 30.0
    stale_if_error_s: float = 86400.0
    cache_dir: str | None = None
    cache_size_bytes: int = 10 << 30
    blob_proxy: str | None = None
    shared_cache: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout_s: float = 30.0
    archive_timeout_s: float = 900.0
    archive_build_limit: int = 8
    trash_s: float | None = None
    base_models: str | None = None
    moe_layout: str = "peft"
    xattr: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int = 0
    log_file: str | None = None
    log_level: str = "warning"
    log_format: str = "text"
    metrics: str | None = None
    audit: str | None = None
