"""Check the public API of the package, and the cost of importing it."""

import ast
import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import tinkerfs

#: Imported only by a mount or a request: they are slow to import, or libfuse may be missing.
COSTLY = ("httpx", "fuse", "fusepy", "mfusepy", "sqlite3", "fsspec")

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tinkerfs.__path__, "tinkerfs.")
    if module.name != "tinkerfs.__main__"
)


def source_of(name):
    return ast.parse(importlib.util.find_spec(name).loader.get_source(name))


def public_definitions(name):
    """Yield the public classes and functions that a module defines."""
    for node in source_of(name).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


#: The modules that users import; their `__all__` is the public API.
PUBLIC = ("tinkerfs", "tinkerfs.fsspec")


@pytest.mark.parametrize("name", ["tinkerfs", *MODULES])
def test_only_public_modules_have_all(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    assert (exported is not None) == (name in PUBLIC)
    if exported is not None:
        assert list(exported) == sorted(exported)
        assert [each for each in exported if not hasattr(module, each)] == []


@pytest.mark.parametrize("name", ["tinkerfs", *MODULES])
def test_public_definitions_have_docstrings(name):
    tree = source_of(name)
    assert ast.get_docstring(tree), f"{name} has no docstring"
    undocumented = [node.name for node in public_definitions(name) if not ast.get_docstring(node)]
    assert undocumented == []


def loaded_after(code):
    """Return the modules of COSTLY that a new interpreter has loaded after `code`."""
    code += f"\nimport json, sys\nprint(json.dumps([m for m in {COSTLY!r} if m in sys.modules]))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def test_importing_the_package_loads_nothing_costly():
    assert loaded_after("import tinkerfs") == []


def test_every_module_imports_without_libfuse():
    """Without libfuse the import of a binding raises OSError, so only mounting imports one."""
    code = (
        "import importlib, sys\nfor name in ('fuse', 'fusepy', 'mfusepy'): sys.modules[name] = None"
    )
    code += f"\nfor name in {MODULES!r}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], check=True)


def commands():
    """Return the arguments of every command: (), ("mount",), ("cache", "info"), ..."""
    import click

    from tinkerfs.cli.main import cli

    def walk(command, names):
        yield names
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from walk(command.get_command(context, name), (*names, name))

    return list(walk(cli, ()))


def test_help_loads_nothing_costly():
    for names in commands():
        code = "from tinkerfs.cli.main import main\n"
        code += f"try: main({[*names, '--help']!r})\nexcept SystemExit: pass"
        assert loaded_after(code) == [], " ".join(["tinkerfs", *names, "--help"])
