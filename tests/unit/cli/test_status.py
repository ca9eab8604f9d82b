"""Text output of `tinkerfs status` for the statistics of a mount."""

import click
import pytest

from tinkerfs.cli.status import _text


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
