"""Run curl, davfs2, rclone, gio, cadaver and litmus against `tinkerfs serve`.

    python -m scripts.interoperability.webdav_clients

Needs the packages of `scripts/setup webdav`, and root for davfs2.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from scripts.interoperability.litmus_proxy import proxied
from tinkerfs.demo.sample_data import Checkpoint
from tinkerfs.demo.server import DemoServer

#: Suite of litmus -> tests that pass, tests that run. The others create files or directories.
#: litmus cannot start where it may not create its own directory, so `litmus_proxy` lets it use an
#: empty directory of the tree.
LITMUS = {
    "basic": (8, 12),
    "copymove": (5, 10),
    "props": (9, 12),
    "locks": (7, 13),
    "http": (4, 4),
}
_WEIGHTS = "adapter_model.safetensors"
#: davfs2 1.6 reads directories in requests of this size, in KiB; newer kernels ask for more.
_DAVFS2 = "ask_auth 0\ndelay_upload 0\ngui_optimize 0\nbuf_size 2048\n"


@dataclass(frozen=True)
class Site:
    """A server with the sample account.

    Attributes:
        url: of the server, with a slash at the end.
        directory: for files of the clients.
    """

    url: str
    server: DemoServer
    directory: Path

    def checkpoint(self, run: int) -> str:
        """Return the path of the first sampler checkpoint of a run, without a slash at the start.

        Each client has a run of its own, because it deletes the checkpoint.
        """
        found = self.server.account.runs()[run]
        name = next(each.id for each in found.checkpoints if each.kind == "sampler_weights")
        return f"runs/{found.id}/checkpoints/{name}"

    def has(self, checkpoint: str) -> bool:
        """Return whether the server of the API still has a checkpoint."""
        return self._find(checkpoint) is not None

    def is_public(self, checkpoint: str) -> bool:
        """Return whether a checkpoint is published."""
        found = self._find(checkpoint)
        return found is not None and found.is_public

    def _find(self, checkpoint: str) -> Checkpoint | None:
        _, run_id, _, name = checkpoint.split("/", 3)
        return self.server.account.checkpoint(run_id, name)

    def digest(self, checkpoint: str) -> str:
        """Return the checksum of the weights, as curl downloads them."""
        command = ("curl", "-sSf", f"{self.url}{quote(checkpoint)}/files/{_WEIGHTS}")
        return hashlib.sha256(
            subprocess.run(command, check=True, capture_output=True).stdout
        ).hexdigest()


def run(
    *command: str | Path,
    text: str = "",
    status: int | None = 0,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a program, check its exit status if there is one to expect, and return its output."""
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | (environment or {}),
        timeout=120,
    )
    assert status is None or done.returncode == status, (command, done)
    return done.stdout + done.stderr


def check_curl(site: Site) -> None:
    """Listings, ranges, conditions, controls, deletion and refusals."""
    checkpoint = site.checkpoint(0)
    url = f"{site.url}{quote(checkpoint)}"
    head = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}")
    assert run(*head, "-X", "PROPFIND", "-H", "Depth: 1", f"{site.url}runs/") == "207"
    assert run(*head, "-X", "PROPFIND", f"{site.url}") == "403"
    assert run(*head, "-r", "0-9", f"{url}/files/{_WEIGHTS}") == "206"
    assert run(*head, "-I", f"{url}/archive.tar") == "200"
    assert run(*head, "-T", "-", f"{url}/published", text="1\n") == "204"
    assert site.is_public(checkpoint)
    assert "EINVAL: invalid value" in run("curl", "-sS", "-T", "-", f"{url}/published", text="x")
    assert run(*head, "--path-as-is", f"{site.url}../../etc/passwd") == "400"
    assert run(*head, "-H", "Host: evil.example", f"{site.url}runs/") == "421"
    assert run(*head, "-X", "DELETE", "-H", "Origin: http://evil.example", url) == "403"
    assert site.has(checkpoint)
    run_url = url.partition("/checkpoints/")[0]
    assert "EPERM: only checkpoints" in run("curl", "-sS", "-A", "other", "-X", "DELETE", run_url)
    assert run(*head, "-X", "DELETE", f"{url}/") == "204"
    assert not site.has(checkpoint)


def check_davfs2(site: Site) -> None:
    """Mount it, read weights, publish, and be refused a removal file by file."""
    if os.getuid() != 0:
        print("  davfs2: skipped, needs root")
        return
    checkpoint, mountpoint = site.checkpoint(1), site.directory / "davfs2"
    config = site.directory / "davfs2.conf"
    config.write_text(_DAVFS2)
    mountpoint.mkdir()
    run("mount", "-t", "davfs", "-o", f"conf={config}", site.url, mountpoint, text="\n")
    try:
        assert len(os.listdir(mountpoint / "runs")) == len(site.server.account.run_ids)
        directory = mountpoint / checkpoint
        data = (directory / "files" / _WEIGHTS).read_bytes()
        assert hashlib.sha256(data).hexdigest() == site.digest(checkpoint)
        # Their lengths are not known before they are opened.
        copy = site.directory / "archive.tar"
        shutil.copyfile(directory / "archive.tar", copy)
        with tarfile.open(copy) as archive:
            assert _WEIGHTS in archive.getnames()
        assert json.loads((directory / "tensors.json").read_bytes())["tensors"]
        with open(directory / "published", "w") as control:
            control.write("1\n")
        _wait(lambda: site.is_public(checkpoint))
        run("rm", "-r", directory, status=1)
        assert site.has(checkpoint)
    finally:
        run("umount", mountpoint)


def check_rclone(site: Site) -> None:
    """List, copy, publish, purge a checkpoint, and be refused a run."""
    environment = {
        "RCLONE_CONFIG": "/dev/null",
        "RCLONE_WEBDAV_URL": site.url,
        "RCLONE_RETRIES": "2",
    }
    checkpoint, target = site.checkpoint(2), site.directory / "rclone"
    listed = run("rclone", "lsf", ":webdav:runs", environment=environment).split()
    assert sorted(listed) == sorted(f"{each}/" for each in site.server.account.run_ids)
    run("rclone", "copy", f":webdav:{checkpoint}/files", target, environment=environment)
    data = (target / _WEIGHTS).read_bytes()
    assert hashlib.sha256(data).hexdigest() == site.digest(checkpoint)
    run("rclone", "rcat", f":webdav:{checkpoint}/published", text="1\n", environment=environment)
    assert site.is_public(checkpoint)
    run("rclone", "purge", f":webdav:{checkpoint}", environment=environment)
    assert not site.has(checkpoint)
    other = site.checkpoint(3)
    output = run(
        "rclone",
        "purge",
        f":webdav:{other[: other.index('/checkpoints')]}",
        status=1,
        environment=environment,
    )
    assert "EPERM: only checkpoints can be removed" in output
    assert site.has(other)


def check_gio(site: Site) -> None:
    """Mount it as GNOME Files does, list, copy, and be refused a removal."""
    url = site.url.replace("http://", "dav://")
    path = f"{url}{site.checkpoint(4)}"
    runtime = site.directory / "runtime"
    runtime.mkdir(mode=0o700)
    script = f"""
        gio mount '{url}' || exit 1
        gio list '{path}' && gio info '{path}/archive.tar'
        gio copy '{path}/files/{_WEIGHTS}' '{site.directory}/gio' || exit 1
        gio remove '{path.partition("/checkpoints/")[0]}/info.json' && exit 1
        gio mount -u '{url}'
    """
    output = run(
        "dbus-run-session", "--", "sh", "-c", script, environment={"XDG_RUNTIME_DIR": str(runtime)}
    )
    assert "tensors.json\n" in output
    assert "standard::size" not in output, "the length of an archive before it was opened"
    data = (site.directory / "gio").read_bytes()
    assert hashlib.sha256(data).hexdigest() == site.digest(site.checkpoint(4))


def check_cadaver(site: Site) -> None:
    """Read, write a control file under its lock, delete a checkpoint, and create nothing."""
    checkpoint = site.checkpoint(5)
    value = site.directory / "value"
    value.write_text("1\n")
    parent, _, name = checkpoint.rpartition("/")
    commands = f"cd {parent}\nput {value} {name}/published\nmkcol new\nrmcol {name}\nquit\n"
    output = run("cadaver", site.url, text=commands)
    assert re.search(r"Uploading .*succeeded", output), output
    assert re.search(r"Creating `new':\s*failed", output), output
    assert re.search(rf"Deleting collection `{name}':\s*succeeded", output), output
    assert not site.has(checkpoint)


def check_litmus(site: Site) -> None:
    """Run the suites of litmus; what creates files is refused with 403."""
    suites = Path("/usr/libexec/litmus")
    if not suites.is_dir():  # before Debian 12
        suites = Path("/usr/lib/litmus")
    environment = {"TESTROOT": str(suites), "HTDOCS": "/usr/share/litmus/htdocs"}
    directory = site.directory / "litmus"
    directory.mkdir()
    with proxied(site.url, "/shared/") as url:
        script = f"cd '{directory}' && exec litmus -k {url}"
        output = run("sh", "-c", script, status=None, environment=environment)
    counts = {
        name: (int(passed), int(count))
        for name, count, passed in re.findall(
            r"summary for `(\w+)': of (\d+) tests run: (\d+) passed", output
        )
    }
    assert counts == LITMUS, (counts, output)
    failures = re.findall(r"FAIL \((.*?)\)\s", output, re.DOTALL)
    assert all(re.search(r"40[34]|could not create", each) for each in failures), failures
    for name, (passed, count) in counts.items():
        print(f"  litmus {name}: {passed} of {count} passed, the others create files")


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@contextlib.contextmanager
def _site() -> Iterator[Site]:
    with (
        tempfile.TemporaryDirectory() as directory,
        DemoServer(runs=8, checkpoints=4) as server,
    ):
        environment = {**os.environ, **server.environment, "HOME": directory}
        command = [sys.executable, "-m", "tinkerfs", "serve", "--listen", "127.0.0.1:0"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            try:
                yield Site(process.stdout.readline().split()[1], server, Path(directory))
            finally:
                process.terminate()


def main() -> int:
    """Run every client."""
    checks = (check_curl, check_davfs2, check_rclone, check_gio, check_cadaver, check_litmus)
    with _site() as site:
        for check in checks:
            check(site)
            print(f"webdav {check.__name__.removeprefix('check_')}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
