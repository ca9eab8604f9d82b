"""The rules of conftest.py, seen to fail what breaks them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def outcomes(tmp_path):
    """Run a file of tests in a pytest of its own; its output."""

    def run(source, *, must_run_kernel_tests=False, folder="."):
        (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "test_it.py").write_text("import logging, pytest\n" + source)
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


def test_a_warning_fails_the_test_unless_announced(outcomes):
    output = outcomes(
        "def test_quiet(): logging.info('all well')\n"
        "def test_loud(): logging.getLogger('x').warning('%s', 'smoke')\n"
        "def test_told(expect_warnings):\n"
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


def test_a_kernel_test_may_be_skipped_at_home(outcomes):
    assert "2 skipped" in outcomes(SKIPPING)


def test_a_kernel_test_may_not_be_skipped_in_a_whole_run(outcomes):
    output = outcomes(SKIPPING, must_run_kernel_tests=True)
    assert "may not be skipped in this run: no libfuse 2" in output or "/dev/fuse" in output
    assert "1 failed, 1 skipped" in output


def test_a_module_of_kernel_tests_may_not_be_skipped_in_a_whole_run(outcomes):
    source = "pytest.skip('not today', allow_module_level=True)"
    assert "1 skipped" in outcomes(source, folder="kernel")
    output = outcomes(source, must_run_kernel_tests=True, folder="kernel")
    assert "may not be skipped in this run" in output
    assert "1 error" in output
