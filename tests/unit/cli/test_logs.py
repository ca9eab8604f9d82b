"""Content of the log, and its file."""

import logging
import os
import stat

import pytest

from tinkerfs.cli import logs
from tinkerfs.concurrency import run_in_thread
from tinkerfs.errors import StartupError


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield
    logging.basicConfig(level=level, handlers=[logging.NullHandler()], force=True)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_log_redacts_keys_and_signatures(tmp_path):
    logs.set_up("debug", str(tmp_path / "log"), to_stderr=True)
    log = logging.getLogger("tinkerfs.test")
    log.info("key tml-secret-123 and %s", "https://store/x?X-Signature=abc")
    try:
        raise ValueError("tml-hidden-456")
    except ValueError:
        log.info("failed", exc_info=True)
    log.info("a name \udcff")
    text = (tmp_path / "log").read_text()
    for secret in ("secret-123", "abc", "hidden-456"):
        assert secret not in text
    assert "tinkerfs.test: key [redacted key] and https://store/x?[redacted]" in text
    assert '  File "' in text
    assert "a name \\udcff" in text


def test_log_message_is_one_printable_line(tmp_path):
    logs.set_up("info", str(tmp_path / "log"), to_stderr=False)
    logging.getLogger("x").info("/a\n2026 INFO y: forged \x85\u2028\x1b[2J\u202e%s", "\x9b")
    (line,) = (tmp_path / "log").read_bytes().decode().split("\n")[:-1]
    assert line.endswith(r"/a\n2026 INFO y: forged \x85\u2028\x1b[2J\u202e\x9b")
    assert line.isprintable()


def test_log_file_is_private_and_appended_to(tmp_path):
    path = tmp_path / "log"
    for word in ("first", "second"):
        logs.set_up("info", str(path), to_stderr=False)
        logging.getLogger("tinkerfs").info(word)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "first" in path.read_text()
    assert "second" in path.read_text()


def test_log_file_in_missing_directory_fails_with_hint(tmp_path):
    with pytest.raises(StartupError, match="--log-file"):
        logs.set_up("info", str(tmp_path / "none/log"), to_stderr=False)


def test_libraries_log_only_warnings(tmp_path):
    logs.set_up("debug", str(tmp_path / "log"), to_stderr=False)
    for name in ("httpx", "httpcore", "urllib3", "fuse"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)


def test_log_file_that_is_fifo_fails_without_blocking(tmp_path):
    path = tmp_path / "log"
    os.mkfifo(path)
    opened = run_in_thread(lambda: logs.set_up("info", str(path), to_stderr=False), "log")
    with pytest.raises(StartupError, match="cannot be written"):
        opened.result(10)
