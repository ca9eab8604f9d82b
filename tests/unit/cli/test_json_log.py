"""The JSON log: one object per record, whatever is in it."""

import json
import logging
from datetime import datetime

import pytest

from tests.unit.cli.test_logs import _restored  # noqa: F401
from tinkerfs import errors
from tinkerfs.cli import logs
from tinkerfs.context import Caller
from tinkerfs.operation_log import OperationLog, log_operation
from tinkerfs.printable import hide_secret
from tinkerfs.telemetry import Telemetry


def start_log(directory):
    """Log to a file as JSON at level debug; return a function that returns the records so far."""
    logs.set_up("debug", str(directory / "log"), to_stderr=False, log_format="json")
    return lambda: [json.loads(line) for line in (directory / "log").read_text().split("\n")[:-1]]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/plain", "/plain"),
        ('/a "quoted"\n{"level": "error"}\x85\u2028', '/a "quoted"\n{"level": "error"}\x85\u2028'),
        ("/non-utf8-\udcff", "/non-utf8-\\xff"),
        ("/\u00e9\U0001f600\x1b[2J", "/\u00e9\U0001f600\x1b[2J"),
    ],
    ids=["plain", "quotes and line ends", "not UTF-8", "Unicode and control characters"],
)
def test_operation_is_one_object_per_line(tmp_path, path, shown):
    lines = start_log(tmp_path)
    operation_log = OperationLog()
    operation_log.subscribe(log_operation)
    active = operation_log.begin("read", path, Caller(42, 1000, 42))
    active.add_request_id("req-1")
    operation_log.end(active, 5, read_bytes=7)
    [found] = lines()
    time = datetime.fromisoformat(found.pop("time"))
    assert time.utcoffset().total_seconds() == 0
    assert found.pop("duration_s") >= 0
    assert found.pop("message").startswith("read /")
    assert found == {
        "level": "debug",
        "logger": "tinkerfs.operation_log",
        "operation": "read",
        "path": shown,
        "errno": "EIO",
        "request_ids": ["req-1"],
        "pid": 42,
        "uid": 1000,
        "read_bytes": 7,
        "written_bytes": 0,
    }


def test_time_has_a_fraction(tmp_path):
    lines = start_log(tmp_path)
    logging.getLogger("tinkerfs").info("x")
    [found] = lines()
    assert found["time"][19] == "."
    assert found["time"].endswith("Z")


def test_failure_has_the_fields_of_its_operation(tmp_path):
    lines = start_log(tmp_path)
    cause = errors.ServerError("HTTP server error", endpoint="GET x", status=500)
    cause.request_id = "abc"
    Telemetry().record_error("/runs/a\nb", "open", errors.os_error_from_api(cause, "/runs"))
    [found] = lines()
    wanted = {"operation": "open", "path": "/runs/a\nb", "errno": "EIO", "request_ids": ["abc"]}
    assert wanted.items() <= found.items()
    assert found["level"] == "warning"


def test_secrets_are_redacted_everywhere(tmp_path):
    lines = start_log(tmp_path)
    hide_secret('odd"key\u00e9-value', "key")
    log = logging.getLogger("tinkerfs.test")
    fields = {"path": "/tml-path-secret", "request_ids": ["tml-id-secret"]}
    log.debug("https://s/x?X-Signature=signed", extra={"fields": fields})
    log.debug("%s", 'odd"key\u00e9-value')
    try:
        raise ValueError("tml-hidden-secret")
    except ValueError:
        log.debug("failed", exc_info=True)
    text = json.dumps(lines(), ensure_ascii=False)
    for secret in ("path-secret", "id-secret", "signed", "hidden-secret", "odd", "-value"):
        assert secret not in text
    assert lines()[2]["exception"].startswith("Traceback (most recent call last):\n  File ")


def test_secret_at_the_length_limit_is_redacted(tmp_path):
    lines = start_log(tmp_path)
    hide_secret("opaque-key-value", "key")
    for length in range(3990, 4001):
        logging.getLogger("x").info("%s opaque-key-value", "a" * length)
    for line in lines():
        assert "opaque" not in line["message"]
