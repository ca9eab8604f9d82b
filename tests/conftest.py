"""Rules for every test: no unexpected warnings, no skipped kernel tests, no leftover mounts."""

import ctypes.util
import faulthandler
import logging
import os
import re
import signal
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tinkerfs import printable

#: Set by scripts/test: a kernel test that cannot run is a failure, not a skip.
MUST_RUN_KERNEL_TESTS = os.environ.get("TINKERFS_REQUIRE_KERNEL_TESTS") == "1"

#: Directory of the kernel tests.
KERNEL_TESTS = "fuse"

#: Reason for which a kernel test may be skipped if the user is not root.
NEEDS_ROOT = "needs root"

#: No deadline, because machines are slow. In CI derandomized, so that failures are reproducible.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")

# `kill -USR1` of a run that hangs prints the stack of every thread.
faulthandler.register(signal.SIGUSR1, all_threads=True)

# A run in the background of a shell ignores SIGINT, and one under nohup SIGHUP. Mounts and commands
# of the tests would inherit that, and an ignored signal stays ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)

_expected = pytest.StashKey[list[str]]()


def pytest_configure(config):
    """Register the markers of this file."""
    config.addinivalue_line(
        "markers", "expect_warnings(*patterns): expected log records of level warning or higher"
    )


# --- an unexpected warning in the log fails the test ---------------------------------------------


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@contextmanager
def _no_unexpected_warnings(item):
    collector = _Collector()
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield
    finally:
        root.removeHandler(collector)
    patterns = [*item.stash.get(_expected, [])]
    for marker in item.iter_markers("expect_warnings"):
        patterns += marker.args
    unexpected = [
        line for line in collector.lines if not any(re.search(each, line) for each in patterns)
    ]
    if unexpected:
        text = "\n".join(["in the log, but not expected by expect_warnings:", *unexpected])
        pytest.fail(text, pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skip or fail a kernel test if nothing can be mounted; check the log."""
    if item.get_closest_marker("kernel") and (reason := _mount_obstacle()):
        pytest.skip(reason)  # MUST_RUN_KERNEL_TESTS turns it into a failure, see below
    with _no_unexpected_warnings(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Check the log."""
    with _no_unexpected_warnings(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Check the log."""
    with _no_unexpected_warnings(item):
        return (yield)


@pytest.fixture
def expect_warnings(request):
    """Announce log records of level warning or higher: `expect_warnings(r"timed out", ...)`.

    The patterns are searched in "LEVEL logger: message", from the call to the end of the test.
    """

    def expect(*patterns):
        request.node.stash.setdefault(_expected, []).extend(patterns)

    return expect


# --- no test redacts the keys of another one -----------------------------------------------------


@pytest.fixture(autouse=True)
def _no_known_secrets(monkeypatch):
    monkeypatch.setattr(printable, "_known_secrets", type(printable._known_secrets)())


# --- kernel tests --------------------------------------------------------------------------------


@cache
def _mount_obstacle():
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    if not any(ctypes.util.find_library(name) for name in ("fuse3", "fuse")):
        return "no libfuse is installed"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a skipped kernel test if kernel tests are required."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("kernel"):
        _reject_skip(report, call.excinfo.value.msg)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Fail a skipped module of kernel tests if kernel tests are required."""
    report = yield
    if report.skipped and collector.path.parent.name == KERNEL_TESTS:
        _reject_skip(report, str(report.longrepr))
    return report


def _reject_skip(report, reason):
    if MUST_RUN_KERNEL_TESTS and not (reason.startswith(NEEDS_ROOT) and os.geteuid() != 0):
        report.outcome = "failed"
        report.longrepr = f"a kernel test may not be skipped in this run: {reason}"


@pytest.fixture
def needs_root():
    """Skip the test if the user is not root, also if kernel tests are required."""
    if os.geteuid() != 0:
        pytest.skip(NEEDS_ROOT)


@pytest.fixture(scope="session", autouse=True)
def _no_leftover_mounts(tmp_path_factory):
    yield
    under = f"{tmp_path_factory.getbasetemp()}/"
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    left = [mountpoint for mountpoint in mounts if mountpoint.startswith(under)]
    assert not left, f"left mounted: {left}"
