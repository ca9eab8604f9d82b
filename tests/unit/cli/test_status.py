"""Text output of `tinkerfs status` for the statistics of a mount."""

import json

import click
import pytest

from tinkerfs.cli.status import _report, _text
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import Mount


def test_text_shows_statistics_of_mount():
    report = {
        "mountpoint": "/mnt",
        "state": "mounted",
        "pid": 42,
        "base_url": "https://api",
        "started": "2026-01-01T00:00:00Z",
        "uptime_s": 61.5,
        "api_requests": {"GET a": {"200": 3, "503": 1}, "POST longer": {"200": 1}},
        "api_requests_total": 5,
        "metadata_cache_hit_ratio": 0.75,
        "passthrough": "off: needs libfuse 3.17",
        "pending": [{"what": "archive /x", "elapsed_s": 5.2}],
        "last_errors": ["2026-01-01T00:00:01Z\t/x\topen\tEIO\tbroken"],
    }
    text = _text(report)
    for line in (
        "  server   https://api",
        "  since    2026-01-01T00:00:00Z (1m 1s)",
        "  process  42",
        "  cache    75% of lookups were hits",
        "  kernel   reads cached weights through tinkerfs (needs libfuse 3.17)",
        "    GET a        3 x 200, 1 x 503",
        "    archive /x (5s)",
        "    2026-01-01T00:00:01Z  /x  open  EIO  broken",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(("state", "hint"), [("dead", "umount"), ("unresponsive", "--force")])
def test_text_of_failed_mount_has_hint(state, hint):
    assert hint in _text({"mountpoint": "/mnt", "state": state})


def test_text_escapes_line_ends_in_values():
    report = {
        "mountpoint": "/a\nb",
        "state": "mounted",
        "pending": [{"what": "archive /x\x1b[31m", "elapsed_s": 5}],
        "last_errors": ["now\t/x\topen\tEIO\ttwo\nlines"],
        "account": {"runs": 1, "checkpoints": 1, "size_bytes": 5678, "runs_listed": 1},
    }
    text = click.unstyle(_text(report))
    assert "\x1b" not in text
    for line in (r"/a\nb", r"    archive /x\x1b[31m (5s)", r"    now  /x  open  EIO  two\nlines"):
        assert line in text.splitlines()
    assert "1 checkpoints, 5.5 KiB, in" in text, "a small size is not rounded to 0.0 GiB"


def test_text_escapes_names_of_endpoints():
    report = {"mountpoint": "/mnt", "state": "mounted", "pending": [], "last_errors": []}
    assert "\x1b[31m" not in _text({**report, "api_requests": {"GET \x1b[31m": {"200": 1}}})


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"pending": [{}], "last_errors": []}',
        '{"pending": [], "last_errors": [7]}',
        '{"pending": [], "last_errors": [], "api_requests": []}',
        '{"pending": [], "last_errors": [], "api_requests": {"a": 1}}',
        '{"pending": [], "last_errors": [], "uptime_s": "x"}',
        '{"pending": [], "last_errors": [], "uptime_s": Infinity}',
        '{"pending": [], "last_errors": [], "account": {"runs": 1}}',
        '{"pending": [], "last_errors": [], "x": ' + "[" * 900 + "]" * 900 + "}",
        "[" * 100_000,
    ],
)
def test_report_of_foreign_statistics_is_unreadable(content, monkeypatch):
    monkeypatch.setattr(mount_table, "read_file", lambda _path: content.encode())
    monkeypatch.setattr(mount_table, "check_health", lambda _path: "responsive")
    report = _report(Mount("/mnt", "fuse.tinkerfs", "x", "0:1", 1))
    assert report == {"mountpoint": "/mnt", "state": "unreadable"}
    assert json.dumps(report, indent=2)
    assert "invalid" in _text(report)
