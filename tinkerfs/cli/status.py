"""The command `tinkerfs status`."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import click

from tinkerfs.cli.options import mountpoint_argument
from tinkerfs.errors import StartupError
from tinkerfs.formatting import format_duration, format_size
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import Mount
from tinkerfs.fuse.mounted_fd import parse_fd
from tinkerfs.printable import escape_control_chars

#: Maximum number of levels of objects and arrays in statistics.
_MAX_DEPTH: Final = 8


@click.command(short_help="Show the state, statistics and pending requests of mounts.")
@mountpoint_argument(required=False)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: a list with an object per mount."
)
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the tinkerfs mount at MOUNTPOINT, or all tinkerfs mounts.

    For each mount: its server, uptime, API requests by endpoint and outcome, the hit ratio of the
    metadata cache, pending requests, and the last errors. Sends no API request, and does not hang
    if a mount hangs. Exits 1 if MOUNTPOINT is not a mount, or if a mount does not respond.

    \b
        tinkerfs status
        tinkerfs status ~/tinker --json | jq '.[].api_requests'
    """  # noqa: D301
    found = mount_table.tinkerfs_mounts()
    devices = {mount.device for mount in found}
    hidden = [each for each in mount_table.find_fd_daemons() if each.device not in devices]
    if mountpoint is not None:
        path = mount_table.canonical_mountpoint(mountpoint)
        if parse_fd(mountpoint) is not None:
            path = mountpoint  # every daemon of that argument, and not this process's descriptor
        found = [mount for mount in found if mount.mountpoint == path]
        hidden = [daemon for daemon in hidden if daemon.name == path]
        if not found and not hidden:
            raise StartupError(
                f"{mountpoint} is not a tinkerfs mount (hint: tinkerfs mount {mountpoint})"
            )
    with ThreadPoolExecutor(max_workers=8) as pool:  # an unresponsive mount takes 2 s to detect
        reports = list(pool.map(_report, found))
    reports += [
        {"mountpoint": daemon.name, "state": "elsewhere", "pid": daemon.pid} for daemon in hidden
    ]
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    elif not reports:
        click.echo("nothing is mounted")
    else:
        click.echo("\n\n".join(_text(report) for report in reports))
    if any(report["state"] in ("dead", "unresponsive") for report in reports):
        raise SystemExit(1)


def _report(mount: Mount) -> dict[str, Any]:
    mountpoint = mount.mountpoint
    shown = mountpoint.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    report: dict[str, Any] = {"mountpoint": shown, "state": "mounted"}
    pids = mount_table.find_daemon_pids(mount)
    if pids:
        report["pid"] = pids[0]
    try:
        content = mount_table.read_file(f"{mountpoint}/.tinkerfs/stats.json")
        stats = json.loads(content) if content is not None else None
        if isinstance(stats, dict):
            # The daemon reports its pid in its own PID namespace; one found here takes precedence.
            merged = {**stats, **report}
            # Another user's mount may report anything: no value of it may end the report of others.
            _text(merged)
            if not _is_nested_deeper(stats, _MAX_DEPTH):
                return merged
    except TimeoutError:
        return {**report, "state": "unresponsive"}
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        pass  # not the statistics of tinkerfs
    health = mount_table.check_health(mountpoint)
    report["state"] = {"responsive": "unreadable"}.get(health, health)
    return report


_STATE_MESSAGES = {
    "dead": "dead: the daemon has exited (hint: tinkerfs umount {0}, or mount it again)",
    "unresponsive": "unresponsive (hint: tinkerfs umount --force {0})",
    "elsewhere": "served by process {1}; its mountpoint is in another mount namespace",
    "unreadable": "its statistics are not readable by this user, or invalid",
}


def _is_nested_deeper(value: object, levels: int) -> bool:
    """Return whether JSON has more levels of objects and arrays, for which Python may recurse."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_nested_deeper(child, levels - 1) for child in children)


def _text(report: dict[str, Any]) -> str:
    mountpoint = escape_control_chars(str(report["mountpoint"]))
    lines = [click.style(mountpoint, bold=True)]
    if report["state"] != "mounted":
        lines.append(f"  {_STATE_MESSAGES[report['state']].format(mountpoint, report.get('pid'))}")
        return "\n".join(lines)
    ratio = report.get("metadata_cache_hit_ratio")
    rows: list[tuple[str, str]] = [
        ("server", str(report.get("base_url", "?"))),
        ("account", _account(report.get("account") or {})),
        ("since", f"{report.get('started', '?')} ({format_duration(report.get('uptime_s', 0))})"),
        ("process", str(report.get("pid", "?"))),
        ("cache", "no lookups yet" if ratio is None else f"{ratio:.0%} of lookups were hits"),
        ("weights", _shared_cache(report)),
        ("memory", _memory(report.get("weights_memory_bytes"))),
        ("kernel", _passthrough(report.get("passthrough", "?"))),
        ("requests", str(report.get("api_requests_total", 0))),
    ]
    lines += [f"  {name:<9}{escape_control_chars(text)}" for name, text in rows]
    requests = report.get("api_requests", {})
    width = max((len(endpoint) for endpoint in requests), default=0)
    for endpoint, outcomes in requests.items():
        counts = ", ".join(f"{count} x {outcome}" for outcome, count in outcomes.items())
        lines.append(f"    {escape_control_chars(f'{endpoint:<{width}}  {counts}')}")
    lines += _section(
        "pending",
        [
            f"{escape_control_chars(each['what'])} ({format_duration(each['elapsed_s'])})"
            for each in report["pending"]
        ],
    )
    errors = [escape_control_chars(each.replace("\t", "  ")) for each in report["last_errors"]]
    lines += _section("last errors", errors)
    return "\n".join(lines)


def _memory(max_bytes: int | None) -> str:
    """Describe the bound on memory for weights."""
    return "?" if max_bytes is None else f"at most {format_size(max_bytes)} for weights"


def _shared_cache(report: dict[str, Any]) -> str:
    """Describe where weights and metadata are cached."""
    directory = report.get("cache_dir")
    if directory is None:
        return "cached in memory"
    if not report.get("is_cache_shared"):
        return f"cached in {directory}"
    hangs = report["gauges"].get("shared_cache_hangs")
    state = "does not respond" if hangs else "shared with other hosts"
    return f"cached in {directory} ({state}); metadata in {report.get('metadata_dir')}"


def _passthrough(state: str) -> str:
    """Describe whether the kernel reads whole cached files itself."""
    if state == "on":
        return "reads cached weights itself"
    return f"reads cached weights through tinkerfs ({state.removeprefix('off: ')})"


def _account(totals: dict[str, int]) -> str:
    """Summarize the cached listings of the account; no request is sent."""
    if not totals:
        return "not listed yet"
    stored = format_size(totals["size_bytes"])
    where = f"in the {totals['runs_listed']} listed so far"
    return f"{totals['runs']} runs; {totals['checkpoints']} checkpoints, {stored}, {where}"


def _section(title: str, items: list[str]) -> list[str]:
    return [f"  {title}", *(f"    {item}" for item in items)] if items else []
