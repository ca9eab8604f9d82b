"""What `tinkerfs status` makes of a mount's counters."""

import click
import pytest

from tinkerfs.cli.status import _text


def test_a_report_reads_as_a_text():
    report = {
        "mountpoint": "/mnt",
        "state": "mounted",
        "pid": 42,
        "base_url": "https://api",
        "started": "2026-01-01T00:00:00Z",
        "uptime_s": 61.5,
        "calls": {"GET a": {"200": 3, "503": 1}, "POST longer": {"200": 1}},
        "calls_total": 5,
        "cache_hit_rate": 0.75,
        "waiting": [{"what": "archive /x", "for_s": 5.2}],
        "last_errors": ["2026-01-01T00:00:01Z\t/x\topen\tEIO\tbroken"],
    }
    text = _text(report)
    for line in (
        "  server   https://api",
        "  since    2026-01-01T00:00:00Z (1m 1s)",
        "  process  42",
        "  cache    75% of lookups answered",
        "    GET a        3 x 200, 1 x 503",
        "    archive /x (5s)",
        "    2026-01-01T00:00:01Z  /x  open  EIO  broken",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(("state", "cure"), [("dead", "umount"), ("hangs", "--force")])
def test_a_mount_that_is_none_any_more_has_a_cure(state, cure):
    assert cure in _text({"mountpoint": "/mnt", "state": state})


def test_what_a_server_sent_stays_on_its_line():
    report = {
        "mountpoint": "/a\nb",
        "state": "mounted",
        "waiting": [{"what": "archive /x\x1b[31m", "for_s": 5}],
        "last_errors": ["now\t/x\topen\tEIO\ttwo\nlines"],
        "account": {"runs": 1, "checkpoints": 1, "size_bytes": 5678, "runs_listed": 1},
    }
    text = click.unstyle(_text(report))
    assert "\x1b" not in text
    for line in (r"/a\nb", r"    archive /x\x1b[31m (5s)", r"    now  /x  open  EIO  two\nlines"):
        assert line in text.splitlines()
    assert "1 checkpoints, 5.5 KiB, in" in text, "and a small sum is not 0.0 GiB"
