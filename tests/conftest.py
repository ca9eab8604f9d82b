"""What holds for every test: warnings are announced, kernel tests run, nothing stays mounted."""

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

#: Set by scripts/test: a kernel test that cannot run is a failure, not a skip.
MUST_RUN_KERNEL_TESTS = os.environ.get("TINKERFS_REQUIRE_KERNEL_TESTS") == "1"

#: A kernel test may say this where the user who runs the tests is not root.
NEEDS_ROOT = "needs root"

#: Hours of one test's time are nobody's deadline; what fails in CI fails again at home.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")

# `kill -USR1` of a run that hangs tells where every thread stands.
faulthandler.register(signal.SIGUSR1, all_threads=True)

# A run in the background of a shell ignores SIGINT, and one under nohup SIGHUP. Mounts and commands
# that the tests start would inherit that, and a signal that was ignored stays ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for ignored in (signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)

_announced = pytest.StashKey[list[str]]()


def pytest_configure(config):
    """Register the markers that are made here."""
    config.addinivalue_line(
        "markers", "expect_warnings(*patterns): log records of warning or worse that may come"
    )


# --- a warning in the log that no test announced fails the test ----------------------------------


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@contextmanager
def _no_unannounced_warnings(item):
    collector = _Collector()
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield
    finally:
        root.removeHandler(collector)
    patterns = [*item.stash.get(_announced, [])]
    for marker in item.iter_markers("expect_warnings"):
        patterns += marker.args
    unannounced = [
        line for line in collector.lines if not any(re.search(each, line) for each in patterns)
    ]
    if unannounced:
        text = "\n".join(["in the log, and not announced by expect_warnings:", *unannounced])
        pytest.fail(text, pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skip or fail a kernel test where nothing can be mounted; watch the log."""
    if item.get_closest_marker("kernel") and (reason := _why_nothing_can_be_mounted()):
        pytest.skip(reason)  # which MUST_RUN_KERNEL_TESTS turns into a failure, below
    with _no_unannounced_warnings(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Watch the log."""
    with _no_unannounced_warnings(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Watch the log."""
    with _no_unannounced_warnings(item):
        return (yield)


@pytest.fixture
def expect_warnings(request):
    """Announce log records of warning or worse: `expect_warnings(r"timed out", ...)`.

    The patterns are searched in "LEVEL logger: message" and hold from here to the test's end.
    """

    def announce(*patterns):
        request.node.stash.setdefault(_announced, []).extend(patterns)

    return announce


# --- kernel tests --------------------------------------------------------------------------------


@cache
def _why_nothing_can_be_mounted():
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    if not any(ctypes.util.find_library(name) for name in ("fuse3", "fuse")):
        return "no libfuse is installed"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let no kernel test be skipped in silence."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("kernel"):
        _refuse_skip(report, call.excinfo.value.msg)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Let no module of kernel tests be skipped in silence."""
    report = yield
    if report.skipped and collector.path.parent.name == "kernel":
        _refuse_skip(report, str(report.longrepr))
    return report


def _refuse_skip(report, reason):
    if MUST_RUN_KERNEL_TESTS and not (reason.startswith(NEEDS_ROOT) and os.geteuid() != 0):
        report.outcome = "failed"
        report.longrepr = f"a kernel test may not be skipped in this run: {reason}"


@pytest.fixture
def needs_root():
    """Skip, for a reason that every run takes, where the user is not root."""
    if os.geteuid() != 0:
        pytest.skip(NEEDS_ROOT)


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays_mounted(tmp_path_factory):
    yield
    under = f"{tmp_path_factory.getbasetemp()}/"
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    left = [mountpoint for mountpoint in mounts if mountpoint.startswith(under)]
    assert not left, f"left mounted: {left}"
