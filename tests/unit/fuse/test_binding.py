"""The choice of binding and libfuse, and the mount options."""

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
    """A function that loads a binding on a system with some libfuses; it imports nothing."""

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


def test_auto_prefers_libfuse_3_then_fusepy_then_mfusepy(system):
    assert system(2, 3).name == "mfusepy3"
    assert system(2).name == "fusepy"
    assert system(2, broken=("fusepy",)).name == "mfusepy2"
    assert system(2, 3, broken=("mfusepy3",)).name == "fusepy"


@pytest.mark.parametrize("name", binding.BINDINGS)
def test_environment_variable_forces_a_binding(system, name):
    assert system(2, 3, wanted=name).name == name


def test_error_names_missing_library_and_package(system):
    with pytest.raises(StartupError, match=r"no libfuse 3.*no libfuse 2.*apt install fuse3"):
        system()
    with pytest.raises(StartupError, match=r"no libfuse 2.*libfuse2t64"):
        system(3, wanted="fusepy")
    with pytest.raises(StartupError, match=r"choose from auto, fusepy, mfusepy2, mfusepy3"):
        system(2, 3, wanted="pyfuse3")


def test_find_library_accepts_soname_and_path(monkeypatch):
    found = [each for each in map(binding.find_library, (2, 3)) if each is not None]
    for library in found:
        monkeypatch.setenv("FUSE_LIBRARY_PATH", library.path)
        assert binding.find_library(library.major) == library
        assert binding.find_library(5 - library.major) is None
    monkeypatch.setenv("FUSE_LIBRARY_PATH", "libc.so.6")
    assert binding.find_library(3) is None


@pytest.mark.parametrize(
    ("version", "major", "text"),
    [(29, 2, "libfuse 2.9 (x)"), (314, 3, "libfuse 3.14 (x)"), (39, 3, "libfuse 3.9 (x)")],
)
def test_library_parses_version_number(version, major, text):
    library = Library("x", version)
    assert (library.major, str(library)) == (major, text)


def options(version, **wanted):
    wanted = {"read_only": False, "allow_other": False} | wanted
    return Binding("x", Library("x", version), None, None).mount_options(**wanted)


def test_mount_options_depend_on_libfuse_version():
    # A libfuse rejects options that its version does not know.
    assert "max_background" in options(29)
    assert "max_background" not in options(314)
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


@pytest.mark.parametrize(("version", "intr"), [(314, False), (317, True)])
def test_configure_sets_what_libfuse_3_has_no_options_for(version, intr):
    connection, config = SimpleNamespace(), SimpleNamespace()
    Binding("x", Library("x", version), None, None).configure(
        SimpleNamespace(contents=connection), SimpleNamespace(contents=config)
    )
    assert vars(config) == {"use_ino": 1, "hard_remove": 1, "intr": intr}
    assert set(vars(connection).values()) == {binding.MAX_BACKGROUND}
    assert {"use_ino", "hard_remove"}.isdisjoint(options(version))
    assert options(29)["use_ino"] is options(29)["hard_remove"] is True


def test_importing_the_package_imports_no_binding():
    code = (
        "import sys\n"
        "import tinkerfs.fuse.binding, tinkerfs.fuse.operations, tinkerfs.fuse.session\n"
        "sys.exit(bool({'fuse', 'fusepy', 'mfusepy'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_session_does_not_import_the_file_system():
    # A mount that fails its first checks does not need it.
    code = (
        "import sys\n"
        "import tinkerfs.fuse.binding, tinkerfs.fuse.session\n"
        "sys.exit(bool({'tinkerfs.catalog.catalog', 'tinkerfs.vfs.schema'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
