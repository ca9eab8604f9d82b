"""Which binding drives which libfuse, and with which options."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.fuse import binding
from tinkerfs.fuse.binding import Binding, Library

LIBRARIES = {2: Library("libfuse.so.2", 29), 3: Library("libfuse3.so.3", 314)}


@pytest.fixture
def system(monkeypatch):
    """A system with the libraries that the test names; nothing is imported."""

    def choose(*majors, wanted=None, broken=()):
        def import_(name, library):
            if name in broken:
                raise ImportError(f"no {name}")
            return SimpleNamespace()

        monkeypatch.setattr(
            binding, "find_library", lambda major: LIBRARIES[major] if major in majors else None
        )
        monkeypatch.setattr(binding, "_import", import_)
        monkeypatch.delenv("FUSE_LIBRARY_PATH", raising=False)
        if wanted is None:
            monkeypatch.delenv("TINKERFS_FUSE_BINDING", raising=False)
        else:
            monkeypatch.setenv("TINKERFS_FUSE_BINDING", wanted)
        return binding.load_binding()

    return choose


def test_libfuse_3_is_preferred_then_fusepy_then_mfusepy(system):
    assert system(2, 3).name == "mfusepy3"
    assert system(2).name == "fusepy"
    assert system(2, broken=("fusepy",)).name == "mfusepy2"
    assert system(2, 3, broken=("mfusepy3",)).name == "fusepy"


@pytest.mark.parametrize("name", binding.BINDINGS)
def test_a_combination_can_be_forced(system, name):
    assert system(2, 3, wanted=name).name == name


def test_what_is_missing_is_named_with_its_package(system):
    with pytest.raises(StartupError, match=r"no libfuse 3.*no libfuse 2.*apt install fuse3"):
        system()
    with pytest.raises(StartupError, match=r"no libfuse 2.*libfuse2t64"):
        system(3, wanted="fusepy")
    with pytest.raises(StartupError, match=r"takes auto, fusepy, mfusepy2, mfusepy3"):
        system(2, 3, wanted="pyfuse3")


def test_libraries_are_found_by_soname_and_by_path(monkeypatch):
    found = [each for each in map(binding.find_library, (2, 3)) if each is not None]
    for library in found:
        monkeypatch.setenv("FUSE_LIBRARY_PATH", library.path)
        assert binding.find_library(library.major) == library
        assert binding.find_library(5 - library.major) is None
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "libc.so.6")
    assert binding.find_library(3) is None


@pytest.mark.parametrize(
    ("version", "major", "words"),
    [(29, 2, "libfuse 2.9 (x)"), (314, 3, "libfuse 3.14 (x)"), (39, 3, "libfuse 3.9 (x)")],
)
def test_versions_are_read_as_libfuse_tells_them(version, major, words):
    library = Library("x", version)
    assert (library.major, str(library)) == (major, words)


def options(version, **wanted):
    wanted = {"read_only": False, "allow_other": False} | wanted
    return Binding("x", Library("x", version), None, None).mount_options(**wanted)


def test_options_are_those_that_the_library_takes():
    # The other library refuses to mount over them.
    assert "max_background" in options(29)
    assert "max_background" not in options(314)
    assert "intr" in options(317)  # without it, Ctrl-C ends no wait there
    assert "intr" not in options(314)
    for version in (29, 39, 310, 314, 317):
        assert options(version)["default_permissions"] is True
        assert float(options(version)["attr_timeout"]) <= 1
        assert float(options(version)["entry_timeout"]) <= 1
    assert (
        options(314, read_only=True, allow_other=True).items()
        >= {
            "ro": True,
            "allow_other": True,
        }.items()
    )


def test_no_binding_is_imported_before_it_is_wanted():
    code = (
        "import sys\n"
        "import tinkerfs.fuse.binding, tinkerfs.fuse.operations, tinkerfs.fuse.session\n"
        "sys.exit(bool({'fuse', 'fusepy', 'mfusepy'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
