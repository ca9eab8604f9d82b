"""`tinkerfs status`."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli.formatting import format_duration, format_size
from tinkerfs.cli.options import mountpoint_argument
from tinkerfs.errors import StartupError
from tinkerfs.printable import printable

if TYPE_CHECKING:
    from tinkerfs.fuse.mount_table import Mount


@click.command(short_help="Show what mounts do, and what they wait for.")
@mountpoint_argument(required=False)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: a list, an object for each mount."
)
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the tinkerfs at MOUNTPOINT, or every one there is.

    For each: its server, since when it runs, the API calls by endpoint and outcome, how often the
    cache answered, what is being waited for now, and the last failures. Costs no API call, and does
    not hang where a mount does. Exits 1 where MOUNTPOINT is no mount, or one does not answer.

    \b
        tinkerfs status
        tinkerfs status ~/tinker --json | jq '.[].calls'
    """  # noqa: D301
    from tinkerfs.fuse import mount_table

    found = mount_table.tinkerfs_mounts()
    if mountpoint is not None:
        path = mount_table.canonical_mountpoint(mountpoint)
        found = [mount for mount in found if mount.mountpoint == path]
        if not found:
            raise StartupError(f"{mountpoint} is no mount of tinkerfs: tinkerfs mount {mountpoint}")
    with ThreadPoolExecutor(max_workers=8) as pool:  # each may take its 2 s
        reports = list(pool.map(_report, found))
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    elif not reports:
        click.echo("Nothing is mounted.")
    else:
        click.echo("\n\n".join(_text(report) for report in reports))
    if any(report["state"] in ("dead", "hangs") for report in reports):
        raise SystemExit(1)


def _report(mount: "Mount") -> dict[str, Any]:
    from tinkerfs.fuse import mount_table

    mountpoint = mount.mountpoint
    shown = mountpoint.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    report: dict[str, Any] = {"mountpoint": shown, "state": "mounted"}
    pids = mount_table.find_daemon_pids(mount)
    if pids:
        report["pid"] = pids[0]
    try:
        content = mount_table.read_file(f"{mountpoint}/.tinkerfs/stats.json")
        told = json.loads(content) if content is not None else None
    except TimeoutError:
        return {**report, "state": "hangs"}
    except ValueError:
        told = None
    if isinstance(told, dict):
        # Its own word on its pid is that of its namespace; so it counts where we see none.
        return {**told, **report}
    health = mount_table.check_health(mountpoint)
    report["state"] = {"answers": "unreadable"}.get(health, health)
    return report


_CURES = {
    "dead": "dead: its daemon is gone; tinkerfs umount {0}, or mount it again",
    "hangs": "hangs: it does not answer; tinkerfs umount --force {0}",
    "unreadable": "its counters may not be read by you",
}


def _text(report: dict[str, Any]) -> str:
    mountpoint = str(report["mountpoint"])
    lines = [click.style(printable(mountpoint), bold=True)]
    if report["state"] != "mounted":
        lines.append(f"  {_CURES[report['state']].format(printable(mountpoint))}")
        return "\n".join(lines)
    hit_rate = report.get("cache_hit_rate")
    rows: list[tuple[str, str]] = [
        ("server", str(report.get("base_url", "?"))),
        ("account", _account(report.get("account") or {})),
        ("since", f"{report.get('started', '?')} ({format_duration(report.get('uptime_s', 0))})"),
        ("process", str(report.get("pid", "?"))),
        ("cache", "not asked yet" if hit_rate is None else f"{hit_rate:.0%} of lookups answered"),
        ("calls", str(report.get("calls_total", 0))),
    ]
    lines += [f"  {name:<9}{printable(text)}" for name, text in rows]
    calls = report.get("calls", {})
    width = max((len(endpoint) for endpoint in calls), default=0)
    for endpoint, outcomes in calls.items():
        told = printable(", ".join(f"{n} x {outcome}" for outcome, n in outcomes.items()))
        lines.append(f"    {endpoint:<{width}}  {told}")
    lines += _section(
        "waits for",
        [f"{printable(w['what'])} ({format_duration(w['for_s'])})" for w in report["waiting"]],
    )
    errors = [printable(each.replace("\t", "  ")) for each in report["last_errors"]]
    lines += _section("last errors", errors)
    return "\n".join(lines)


def _account(facts: dict[str, int]) -> str:
    """Say what the listings so far add up to; nothing is asked for the sake of it."""
    if not facts:
        return "not listed yet"
    stored = format_size(facts["size_bytes"])
    where = f"in the {facts['runs_listed']} of them that were listed"
    return f"{facts['runs']} runs; {facts['checkpoints']} checkpoints, {stored}, {where}"


def _section(title: str, items: list[str]) -> list[str]:
    return [f"  {title}", *(f"    {item}" for item in items)] if items else []
