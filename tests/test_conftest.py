"""Check that conftest.py fails the tests that break its rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def outcomes(tmp_path):
    """Run a file of tests in a separate pytest, and return its output."""

    def run(source, *, must_run_kernel_tests=False, directory="."):
        (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / "test_it.py").write_text("import logging, pytest\n" + source)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = kernel: mounts\n")
        environment = {
            **os.environ,
            "TINKERFS_REQUIRE_KERNEL_TESTS": "1" if must_run_kernel_tests else "0",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
        return subprocess.run(
            [*command, f"--basetemp={tmp_path}/base"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        ).stdout

    return run


def test_conftest_unannounced_warning_fails_test(outcomes):
    output = outcomes(
        "def test_quiet(): logging.info('all well')\n"
        "def test_loud(): logging.getLogger('x').warning('%s', 'smoke')\n"
        "def test_announced(expect_warnings):\n"
        "    expect_warnings('smoke')\n"
        "    logging.error('smoke')\n"
        "@pytest.mark.expect_warnings('ERROR root: fire')\n"
        "def test_marked(): logging.error('fire')\n"
        "@pytest.fixture\n"
        "def late():\n"
        "    yield\n"
        "    logging.warning('late')\n"
        "def test_late(late): pass\n"
    )
    assert "WARNING x: smoke" in output
    assert "FAILED test_it.py::test_loud" in output
    assert "ERROR test_it.py::test_late" in output
    assert "1 failed, 4 passed, 1 error" in output


SKIPPING = (
    "@pytest.mark.kernel\n"
    "def test_it(): pytest.skip('no libfuse 2')\n"
    "def test_other(): pytest.skip('whatever')\n"
)


def test_conftest_kernel_test_may_be_skipped(outcomes):
    assert "2 skipped" in outcomes(SKIPPING)


def test_conftest_required_kernel_test_is_not_skipped(outcomes):
    output = outcomes(SKIPPING, must_run_kernel_tests=True)
    assert "may not be skipped in this run: no libfuse 2" in output or "/dev/fuse" in output
    assert "1 failed, 1 skipped" in output


def test_conftest_required_kernel_module_is_not_skipped(outcomes):
    source = "pytest.skip('not today', allow_module_level=True)"
    assert "1 skipped" in outcomes(source, directory="fuse")
    output = outcomes(source, must_run_kernel_tests=True, directory="fuse")
    assert "may not be skipped in this run" in output
    assert "1 error" in output
