"""The core without the features that only Linux has, in a process that lacks them.

The FUSE adapter, and the commands that manage mounts, need Linux.
"""

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import demo_server, web

__all__ = ["demo_server", "web"]

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinkerfs"
LACKING = ROOT / "tests/support/other_system"
NAME = "adapter_model.safetensors"

#: The parts that need Linux, and the embedded server, which is for tests.
LINUX_ONLY = ("fuse", "cli", "demo")

#: Names of the standard library that other systems lack, and functions of glibc and Linux.
LINUX_NAMES = re.compile(
    r"CLOCK_BOOTTIME|F_OFD_\w+|O_(DIRECT|NOATIME|PATH|TMPFILE)|POLLRDHUP|RWF_\w+|SEEK_(DATA|HOLE)"
    r"|SO_PEERCRED|TCP_KEEP\w+|copy_file_range|epoll|eventfd\w*|fallocate|mallopt|memfd_create"
    r"|[gs]etxattr|pidfd_open|posix_fa\w+|prctl|prlimit|sched_\w+|setns|splice|umount2|unshare"
)
LINUX_PATH = re.compile(r"/?(proc|sys)/|/(proc|sys)$")

#: The modules with features of Linux, each with a fallback.
ALLOWED = ("tinkerfs.operating_system", "tinkerfs.cache.memory_limit")


def core_modules():
    """Yield the path and the name of each module that every system can use."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name.split(".")[1] not in (*LINUX_ONLY, "__main__"):
            yield path, name


def linux_features(source):
    """Return the lines of a source that name a feature of Linux outside comments and docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        if isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.alias):
            name = getattr(node, "attr", None) or getattr(node, "id", None) or node.name
            if LINUX_NAMES.fullmatch(name):
                found.append(f"{node.lineno}: {name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_feature = LINUX_PATH.match(node.value) or LINUX_NAMES.fullmatch(node.value)
            if is_feature and id(node) not in docstrings:
                found.append(f"{node.lineno}: {node.value}")
    return found


def test_linux_features_are_in_their_modules():
    found = {name: linux_features(path.read_text()) for path, name in core_modules()}
    assert {name for name, lines in found.items() if lines} == {*ALLOWED}, found


@pytest.mark.parametrize(
    "source",
    [
        "os.O_NOATIME",
        "from os import memfd_create",
        "open('/proc/self/maps')",
        "open(f'/proc/{pid}/comm')",
        "getattr(os, 'copy_file_range')",
    ],
)
def test_linux_features_finds_feature(source):
    assert len(linux_features(source)) == 1
    assert linux_features('"""/proc is not opened here."""') == []


def environment(server, directory, *, lacks=True):
    """Return variables for a process without the features of Linux, or with them."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER", "COV"))}
    path = [str(LACKING), str(ROOT)] if lacks else [str(ROOT)]
    own = {"HOME": str(directory), "PYTHONPATH": os.pathsep.join(path)}
    return inherited | server.environment | own


def run(server, directory, *arguments, lacks=True):
    """Run Python without the features of Linux, or with them; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(server, directory, lacks=lacks),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


IMPORT = """
import importlib, os, sys
assert sys.platform == "darwin" and not hasattr(os, "O_NOATIME")
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def test_every_core_module_is_imported(demo_server, tmp_path):
    names = [name.removesuffix(".__init__") for _, name in core_modules()]
    assert run(demo_server(), tmp_path, "-c", IMPORT, *names) == (0, f"{len(names)}\n", "")


READ = """
import hashlib, os, sys
from tinkerfs.app import open_app
from tinkerfs.config import Settings
from tinkerfs.context import BACKGROUND_CONTEXT as ctx
from tinkerfs.fsspec import TinkerFileSystem

base_url, cache_dir, directory, path, name = sys.argv[1:]
settings = Settings(base_url=base_url, cache_dir=cache_dir)
with open_app(settings) as app:
    filesystem = app.filesystem
    assert [entry.name for entry in filesystem.listdir("/runs", ctx)]
    real = filesystem.realpath(f"{directory}/files/{name}", ctx)
    handle = filesystem.open(real, os.O_RDONLY, ctx)
    print(hashlib.sha256(handle.read(handle.size_bytes, 0, ctx)).hexdigest())
    handle.close()
    assert filesystem.statfs().total_bytes
    with_path = TinkerFileSystem(base_url, {"cache_dir": cache_dir})
    print(hashlib.sha256(with_path.cat_file(f"{path}/{name}")).hexdigest())
    with with_path.open(f"tinker:/{directory}/published", "wb") as file:
        file.write(b"1")
    assert with_path.cat_file(f"tinker:/{directory}/published") == b"1\\n"
    with_path.rm(path, recursive=True)
    assert not with_path.exists(path)
assert app.filesystem
"""


def test_core_reads_caches_and_removes(demo_server, tmp_path):
    server = demo_server(runs=2, checkpoints=2)
    run_id, checkpoint_id = server.account.runs()[0].id, server.account.runs()[0].checkpoints[0].id
    content = server.files(run_id, checkpoint_id)[NAME]
    digest = hashlib.sha256(content.read(0, content.size_bytes)).hexdigest()
    directory = f"/runs/{run_id}/checkpoints/{checkpoint_id}"
    path = f"tinker://{run_id}/{checkpoint_id}"
    arguments = (server.base_url, str(tmp_path / "cache"), directory, path, NAME)
    assert run(server, tmp_path, "-c", READ, *arguments) == (0, f"{digest}\n" * 2, "")
    assert server.journal.count("GET archive") == 1
    assert server.journal.count("store") <= 3  # one block, and the index of the archive
    assert server.account.checkpoint(run_id, checkpoint_id) is None


def test_prefetch_and_get_copy_and_share_the_cache(demo_server, tmp_path):
    server = demo_server(runs=1, checkpoints=1)
    run_id, checkpoint_id = server.account.runs()[0].id, server.account.runs()[0].checkpoints[0].id
    path = f"tinker://{run_id}/{checkpoint_id}"
    options = ("--cache-dir", str(tmp_path / "cache"))
    code, _, error = run(server, tmp_path, "-m", "tinkerfs", "prefetch", *options, path)
    assert (code, "Traceback" in error) == (0, False), error
    server.journal.clear()
    for name, lacks in (("here", True), ("linux", False)):
        arguments = ("-m", "tinkerfs", "get", *options, path, name)
        code, _, error = run(server, tmp_path, *arguments, lacks=lacks)
        assert (code, "Traceback" in error) == (0, False), error
        for file, content in server.files(run_id, checkpoint_id).items():
            [copied] = (tmp_path / name).rglob(file)
            assert copied.read_bytes() == content.read(0, content.size_bytes)
    assert server.journal.count("store") == 0


def test_serve_lists_and_publishes(demo_server, tmp_path, web):
    server = demo_server(runs=1, checkpoints=1)
    run_id, checkpoint_id = server.account.runs()[0].id, server.account.runs()[0].checkpoints[0].id
    process = subprocess.Popen(
        [sys.executable, "-m", "tinkerfs", "serve", "--listen", "127.0.0.1:0"],
        env=environment(server, tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.search(r"http://\S+/", process.stdout.readline())[0]
        assert run_id in web.request("PROPFIND", f"{url}runs/", headers={"Depth": "1"}).text
        control = f"{url}runs/{run_id}/checkpoints/{checkpoint_id}/published"
        assert web.put(control, content=b"1").is_success
        assert web.get(control).text == "1\n"
        # The wait for the archive checks whether the client has left.
        content = server.files(run_id, checkpoint_id)[NAME]
        response = web.get(f"{url}runs/{run_id}/checkpoints/{checkpoint_id}/files/{NAME}")
        assert response.content == content.read(0, content.size_bytes)
    finally:
        process.terminate()
        with process.stdout:
            assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mount", "mnt"), "only Linux can mount tinkerfs (hint: "),
        (("demo", "mnt"), "only Linux can mount tinkerfs (hint: "),
        (("status",), "nothing is mounted"),
        (("umount", "mnt"), "not mounted"),
    ],
)
def test_commands_of_mounts_fail_with_one_line(demo_server, tmp_path, arguments, message):
    (tmp_path / "mnt").mkdir()
    _, out, error = run(demo_server(), tmp_path, "-m", "tinkerfs", *arguments)
    assert message in out + error
    assert len((out + error).splitlines()) == 1
