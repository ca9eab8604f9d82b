"""Enforce the import rules of docs/development/architecture.md.

    cli -> fuse, fsspec, webdav -> app -> transfer -> vfs -> catalog, weights -> api, cache -> base

A part imports only parts to its right, and not its neighbour of one level. `demo` imports none.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinkerfs"
MAX_LINES = 500

#: Module -> the reason why it is longer than MAX_LINES.
LONG_MODULES: dict[str, str] = {}

BASE = {
    "access_log",
    "audit",
    "clock",
    "concurrency",
    "config",
    "context",
    "errors",
    "formatting",
    "histogram",
    "journal",
    "name_encoding",
    "network",
    "operating_system",
    "operation_counts",
    "operation_log",
    "printable",
    "prometheus",
    "proxies",
    "retry",
    "safe_open",
    "telemetry",
    "tinker_path",
    "tls",
    "tracing",
    "validity",
}

#: Part of the package -> the parts that it may import besides itself.
ALLOWED_IMPORTS = {
    **dict.fromkeys(BASE, BASE),
    # The cache is independent of Tinker.
    "cache": BASE - {"tinker_path"},
    "api": BASE,
    "catalog": BASE | {"api", "cache"},
    "weights": BASE | {"api", "cache"},
    "vfs": BASE | {"api", "cache", "catalog", "weights"},
    "transfer": BASE | {"api", "cache", "catalog", "weights", "vfs"},
    "app": BASE | {"api", "cache", "catalog", "weights", "vfs", "transfer"},
    "fuse": BASE | {"api", "cache", "catalog", "weights", "vfs", "transfer", "app"},
    "fsspec": BASE | {"api", "cache", "catalog", "weights", "vfs", "transfer", "app"},
    "webdav": BASE | {"api", "cache", "catalog", "weights", "vfs", "transfer", "app"},
    "cli": BASE
    | {"api", "cache", "catalog", "weights", "vfs", "transfer", "app"}
    | {"fuse", "fsspec", "webdav", "demo"},
    "demo": set(),
    "__init__": set(),
    "__main__": {"cli"},
}

#: Groups of modules that import each other. An entry that is no longer needed is a failure, too.
ALLOWED_CIRCLES: set[tuple[str, ...]] = set()

#: Classes of one name, with their modules. An entry that is no longer needed is a failure, too.
#: The embedded server imports nothing of the package, and names what both sides of the API share as
#: the client does.
ALLOWED_NAMESAKES = {
    "Checkpoint": ["api.models", "demo.sample_data"],
    "Request": ["api.transport", "demo.request"],
    "Session": ["api.models", "demo.sample_data"],
}

#: Third-party module -> the parts, or single modules, that may import it.
CONFINED = {
    "cachetools": {"cache", "vfs.copy_tracker", "vfs.deletion_guard"},
    "certifi": {"tls"},
    "cheroot": {"webdav.server"},
    "click": {"cli"},
    "cryptography": {"api.shared_records"},
    "fsspec": {"fsspec"},
    "fuse": {"fuse"},
    "fusepy": {"fuse"},
    "httpcore": {"api"},
    "httpx": {"api"},
    "jinja2": {"webdav.pages"},
    "markupsafe": {"webdav.pages"},
    "mfusepy": {"fuse"},
    "opentelemetry": {"tracing"},
    "prometheus_client": {"prometheus"},
    "pyrage": {"transfer.age"},
    "redis": {"api.redis_server"},
    "sqlite3": {"cache"},
    "urllib3": {"api.network_backend", "weights.http", "weights.store_connection"},
    "wsgidav": {"webdav"},
    "xxhash": {"cache"},
}

#: Import name -> name of the installed distribution, if they differ.
INSTALLED_AS = {
    "fuse": "fusepy",
    "opentelemetry": "opentelemetry-sdk",
    "prometheus_client": "prometheus-client",
}


def violations(module, source):
    """Return the violations of `source` as `module`, such as "vfs.layout", with their lines."""
    part = module.partition(".")[0]
    if part not in ALLOWED_IMPORTS:
        return [f"{module}: a new part of the package: add it to ALLOWED_IMPORTS"]
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for target in _imported(node, module):
            top, _, rest = target.partition(".")
            if top == "tinkerfs":
                found += _crossed(part, rest, node.lineno)
            elif top not in sys.stdlib_module_names and part == "demo":
                found.append(
                    f"{node.lineno}: demo imports {top}: only the standard library is allowed"
                )
            if top in CONFINED and not CONFINED[top] & {part, module}:
                found.append(f"{node.lineno}: {top} belongs in {', '.join(sorted(CONFINED[top]))}")
        if module != "errors" and _names_an_errno(node):
            found.append(f"{node.lineno}: chooses an errno: use a function of errors.py")
        if part != "demo" and module not in OPENERS and _opens(node):
            found.append(f"{node.lineno}: opens a path: use safe_open.open_regular")
        if part not in ("cli", "demo") and _prints(node):
            found.append(f"{node.lineno}: prints")
    lines = source.count("\n")
    if lines > MAX_LINES and module not in LONG_MODULES:
        found.append(f"{lines} lines: more than {MAX_LINES}")
    return [f"{module}:{each}" for each in found]


def _imported(node, module):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    origin = _origin(node, module)
    if origin == "tinkerfs":  # `from tinkerfs import errors` names a module
        return [f"tinkerfs.{alias.name}" for alias in node.names]
    return [origin]


def _origin(node, module):
    origin = node.module or ""
    if node.level:
        package = ["tinkerfs", *module.split(".")][: -node.level]
        origin = ".".join([*package, *filter(None, [origin])])
    return origin


def import_circles(sources):
    """Return the groups of modules that import each other, directly or through others.

    `sources` is the source of each module by its name. Imports in functions and those for type
    checking count as well.
    """
    reachable = {
        module: _own_imports(module, source, sources) for module, source in sources.items()
    }
    for through in sources:  # Warshall's algorithm
        for found in reachable.values():
            if through in found:
                found |= reachable[through]
    return {
        tuple(sorted(other for other in sources if other in found and module in reachable[other]))
        for module, found in reachable.items()
        if module in found
    }


def _own_imports(module, source, sources):
    """Return the modules of the package that a module imports."""
    targets = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module)
            targets |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    names = {target.removeprefix("tinkerfs.") for target in targets}
    return {name for name in names if name in sources and name != module}


def _crossed(part, target, line):
    to = target.partition(".")[0] or "__init__"
    if to == part or to in ALLOWED_IMPORTS[part]:
        return []
    if to not in ALLOWED_IMPORTS:  # a name of tinkerfs/__init__.py, which all may read
        return []
    return [f"{line}: {part} -> {to} violates the import rules"]


def _names_an_errno(node):
    if isinstance(node, ast.ImportFrom):
        return node.module == "errno"
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "errno"
        and node.attr.startswith("E")
    )


#: Modules that open other files than those on disk: below /proc, /sys or /dev, or of a mount.
OPENERS = {
    "cli.known_secrets",  # /proc/PID/environ
    "cli.logs",  # non-blocking, may be a device
    "cli.main",
    "cli.paths",
    "fuse.daemonize",
    "fuse.mount_table",
    "fuse.mounted_fd",  # /proc
    "fuse.preflight",
    "fuse.session",
    "fuse.stack_dump",
    "operating_system",
    "safe_open",
}


def _opens(node):
    """Return whether a node opens a path. Wrapping a descriptor is allowed everywhere."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    if called == "open":
        opened = ast.unparse(node.args[0])
        return not opened.startswith(("fd", "open_regular("))
    return called == "os.open" or called.endswith(
        (".read_bytes", ".read_text", ".write_bytes", ".write_text", "io.open")
    )


def _prints(node):
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    )


def modules():
    """Yield (module name without "tinkerfs.", path) of the whole package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts), path


@pytest.mark.parametrize(
    ("module", "path"), [pytest.param(*each, id=each[0]) for each in modules()]
)
def test_module_follows_import_rules(module, path):
    assert violations(module, path.read_text()) == []


def test_import_circles_are_those_allowed():
    sources = {module: path.read_text() for module, path in modules()}
    assert import_circles(sources) == ALLOWED_CIRCLES


def namesakes(sources):
    """Return the modules of each class name that more than one module defines."""
    found = {}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(module)
    return {name: sorted(where) for name, where in found.items() if len(where) > 1}


def test_class_names_are_unique():
    sources = {module: path.read_text() for module, path in modules()}
    assert namesakes(sources) == ALLOWED_NAMESAKES


def test_namesakes_finds_private_and_nested_classes():
    sources = {
        "a": "class A: ...\nclass _B: ...",
        "b": "def f():\n    class _B: ...",
        "c": "class B: ...",
    }
    assert namesakes(sources) == {"_B": ["a", "b"]}


@pytest.mark.parametrize(
    ("a", "circles"),
    [
        ("import tinkerfs.vfs.b", {("vfs.a", "vfs.b")}),
        ("from tinkerfs.vfs import b", {("vfs.a", "vfs.b")}),
        ("from . import b", {("vfs.a", "vfs.b")}),
        ("from .b import B", {("vfs.a", "vfs.b")}),
        ("if TYPE_CHECKING:\n    from tinkerfs.vfs.b import B", {("vfs.a", "vfs.b")}),
        ("def f():\n    from tinkerfs.vfs.b import B", {("vfs.a", "vfs.b")}),
        ("from tinkerfs.vfs.c import C", {("vfs.a", "vfs.b", "vfs.c")}),
        ("from tinkerfs.errors import redact", set()),
        ("from tinkerfs import errors", set()),
    ],
)
def test_import_circles_finds_circle(a, circles):
    sources = {
        "vfs.a": a,
        "vfs.b": "from tinkerfs.vfs.a import A",
        "vfs.c": "from tinkerfs.vfs.b import B",
        "errors": "",
    }
    assert import_circles(sources) == circles


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(each for extra in extras for each in extra)]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    imported = set()
    for module, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            imported |= {target.partition(".")[0] for target in _imported(node, module)}
    foreign = imported - set(sys.stdlib_module_names) - {"tinkerfs"}
    assert {INSTALLED_AS.get(name, name) for name in foreign} - declared == set()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("cache.metadata", "import tinkerfs.api.client", "cache -> api"),
        ("cache.metadata", "from tinkerfs.tinker_path import TinkerPath", "cache -> tinker_path"),
        ("api.client", "from tinkerfs.cache.store import Store", "api -> cache"),
        ("api.client", "from ..cache import store", "api -> cache"),
        ("api.client", "from .. import cache", "api -> cache"),
        ("catalog", "from tinkerfs import weights", "catalog -> weights"),
        ("weights.reader", "from tinkerfs.transfer import job", "weights -> transfer"),
        ("transfer.job", "from tinkerfs.app import App", "transfer -> app"),
        ("transfer.job", "import click", "click belongs in cli"),
        ("vfs.layout", "def f():\n    from tinkerfs.fuse import session", "vfs -> fuse"),
        ("errors", "from tinkerfs import catalog", "errors -> catalog"),
        ("demo.server", "from tinkerfs.errors import redact", "demo -> errors"),
        ("demo.server", "import msgspec", "demo imports msgspec"),
        ("vfs.layout", "import httpx", "httpx belongs in api"),
        ("weights.url_cache", "import httpx", "httpx belongs in"),
        ("vfs.layout", "import mfusepy", "mfusepy belongs in fuse"),
        ("catalog", "import sqlite3", "sqlite3 belongs in cache"),
        ("fuse.operations", "import errno\nraise OSError(errno.EIO, '')", "2: chooses an errno"),
        ("fuse.operations", "from errno import EIO", "chooses an errno"),
        ("vfs.layout", "print()", "prints"),
        ("cache.block_cache", "import os\nos.open('x', 0)", "opens a path"),
        ("cache.block_cache", "path.read_bytes()", "opens a path"),
        ("cli.options", "open(path)", "opens a path"),
        ("vfs.layout", "pass\n" * 501, "501 lines"),
        ("kitchen", "", "a new part"),
    ],
)
def test_violations_finds_violation(module, source, wrong):
    [found] = violations(module, source)
    assert wrong in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli.mount", "import click\nfrom tinkerfs.demo import server\nprint()"),
        ("weights.http", "import urllib3"),
        ("vfs.layout", "from tinkerfs import __version__, errors\nfrom . import node"),
        ("errors", "import errno\nerrno.EIO"),
        ("demo.server", "from tinkerfs import __version__\nimport http.server\nprint()"),
        ("operating_system", "open('/proc/self/mountinfo')"),
        ("cli.options", "open(open_regular(path, 0))"),
    ],
)
def test_violations_passes_allowed_source(module, source):
    assert violations(module, source) == []
