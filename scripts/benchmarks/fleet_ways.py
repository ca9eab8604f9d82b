"""The ways in which the hosts of a site read one checkpoint: alone, and with what they share.

Each host is a network namespace with a mount of its own. The origin is a server of the API and of a
store, at the other end of the site's uplink.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.benchmarks.fleet_model import Sharing
from scripts.benchmarks.fleet_network import Host, Network
from scripts.benchmarks.fleet_services import (
    etag_of,
    glusterfs,
    nginx,
    page_of,
    redis,
)
from scripts.benchmarks.harness import TINKERFS, daemon_environment, daemon_of
from scripts.benchmarks.other_mounts import served
from scripts.benchmarks.server import Server

#: One-way delay between the site and the origin.
DELAY_S = 0.01
CHECKPOINT = "0001"
#: How often nginx looks for the end of another request's download.
NGINX_POLL_S = 0.5
#: How often a mount looks for the file of another host.
DIRECTORY_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Links:
    """The rates of the links of a site, bits per second.

    Attributes:
        host: of each host.
        service: of a host with a service, such as the proxy.
        uplink: between the site and the origin.
    """

    host: float
    service: float
    uplink: float


@dataclass(frozen=True, kw_only=True)
class Site:
    """A running network with its origin.

    Attributes:
        expected: checksums of the checkpoint's files, and of its archive.
        checkpoint_bytes: length of the archive.
    """

    binding: str
    directory: Path
    hosts: Sequence[Host]
    proxy_host: Host
    directory_host: Host
    metadata_host: Host
    origin: Host
    server: Server
    expected: dict[str, dict[str, str]]
    checkpoint_bytes: int

    @property
    def url(self) -> str:
        """A signed URL of the checkpoint's archive."""
        return str(self.server.ask("url", CHECKPOINT))

    def empty(self, name: str) -> Path:
        """Make a directory of a run; the workers of nginx have another user."""
        directory = self.directory / name
        directory.mkdir(mode=0o755)
        return directory


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Mounts that can be read.

    Attributes:
        directories: what each host reads.
        error_logs: the errors of each mount of tinkerfs.
        expected: checksum by file.
        pids: processes by what they are; each may have children.
    """

    directories: Sequence[Path]
    error_logs: Sequence[Path]
    expected: dict[str, str]
    pids: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the hosts of a site read a checkpoint.

    Attributes:
        start: mounts on all hosts, and runs what they share.
    """

    name: str
    start: Callable[[Site], AbstractContextManager[Ready]]
    sharing: Sharing


@contextmanager
def site_of(links: Links, hosts: int, size_bytes: int, binding: str) -> Iterator[Site]:
    """Build a network and start the origin, with one checkpoint to read."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-fleet-") as name,
        Network(DELAY_S) as network,
    ):
        Path(name).chmod(0o755)
        origin = network.add_distant_host(links.uplink)
        services = [network.add_host(links.service) for _ in range(3)]
        found = [network.add_host(links.host) for _ in range(hosts)]
        account = {"runs": 1, "checkpoints": 5, "size_bytes": size_bytes}
        with Server(prefix=origin.command(), host=origin.address, **account) as server:
            facts = server.ask("checkpoint", CHECKPOINT)
            yield Site(
                binding=binding,
                directory=Path(name),
                hosts=found,
                proxy_host=services[0],
                directory_host=services[1],
                metadata_host=services[2],
                origin=origin,
                server=server,
                expected=facts["digests"],
                checkpoint_bytes=facts["bytes"],
            )


@contextmanager
def mounts(
    site: Site,
    *,
    local: bool = False,
    gluster: bool = False,
    proxy: bool = False,
    metadata: bool = False,
) -> Iterator[Ready]:
    """Mount on all hosts, and run what they share.

    Args:
        local: a cache directory of this machine, which has locks and needs no network.
        gluster: a cache directory on GlusterFS, which is a FUSE file system on each host.
        proxy: nginx.
        metadata: Redis.
    """
    home = site.empty("hosts")
    caches = [home / f"{host.address}.cache" for host in site.hosts]
    options, environ, pids = [], {}, {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        if local:
            (home / "cache").mkdir(mode=0o700)
            (home / "cache/shared").mkdir(mode=0o700)
            caches = [home / "cache"] * len(site.hosts)
        if gluster:
            where = (site.directory_host, site.hosts, site.empty("gluster"))
            roots, pids["GlusterFS"] = stack.enter_context(glusterfs(*where))
            caches = [root / "cache" for root in roots]
        if proxy:
            found = stack.enter_context(nginx(site.proxy_host, site.empty("nginx"), site.url))
            options.append(f"--blob-proxy={found.url}")
            environ["SSL_CERT_FILE"] = str(found.certificate)
            pids["proxy"] = [found.pid]
        if metadata:
            url, pid = stack.enter_context(redis(site.metadata_host, site.empty("redis")))
            options.append(f"--shared-cache={url}")
            pids["Redis"] = [pid]
        roots = [home / host.address / "mnt" for host in site.hosts]
        for root in roots:
            root.mkdir(parents=True)
            stack.callback(unmount, root)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(mount_on, site, options, environ), site.hosts, caches, roots))
        pids["mounts"] = [daemon_of(root) for root in roots]
        files = f"runs/{site.server.run_id}/checkpoints/sampler_weights/{CHECKPOINT}/files"
        yield Ready(
            directories=[root / files for root in roots],
            error_logs=[root / ".tinkerfs/errors" for root in roots],
            expected=site.expected["files"],
            pids=pids,
        )


def mount_on(
    site: Site,
    options: Sequence[str],
    environ: dict[str, str],
    host: Host,
    cache: Path,
    root: Path,
) -> None:
    """Mount on a host."""
    command = host.command(*TINKERFS, "mount", f"--cache-dir={cache}", *options, str(root))
    environment = daemon_environment(site.server, site.binding) | environ
    subprocess.run(command, env=environment | {"HOME": str(root.parent)}, check=True)


def unmount(root: Path) -> None:
    """Unmount what was mounted."""
    if root.is_mount():
        subprocess.run([*TINKERFS, "umount", "--force", str(root)], check=True, timeout=60)


@contextmanager
def rclone(site: Site) -> Iterator[Ready]:
    """Read the archive with rclone, through the same proxy."""
    with ExitStack() as stack:
        proxy = stack.enter_context(nginx(site.proxy_host, site.empty("nginx"), site.url))
        page = stack.enter_context(
            page_of(site.origin, proxy.url_of(site.url), site.checkpoint_bytes)
        )
        home = site.empty("hosts")
        stack.callback(shutil.rmtree, home)
        etag = etag_of(site.origin, site.url).replace('"', '""')
        command = ["env", f"SSL_CERT_FILE={proxy.certificate}", "rclone", "mount", "--read-only"]
        command += ["--config=/dev/null", "--vfs-cache-mode=full"]
        command += [f'--http-headers=Tinkerfs-Version,"{etag}"']
        mounted = [
            stack.enter_context(
                served(
                    host.command(
                        *command, f"--cache-dir={home / host.address}", f":http,url='{page}':"
                    )
                )
            )
            for host in site.hosts
        ]
        yield Ready(
            directories=[directory for directory, _ in mounted],
            error_logs=[],
            expected=site.expected["archive"],
            pids={"mounts": [pid for _, pid in mounted], "proxy": [proxy.pid]},
        )


ALONE = Way(name="lone mounts", start=mounts, sharing=Sharing())
DIRECTORY = Way(
    name="shared local directory",
    start=partial(mounts, local=True),
    sharing=Sharing(wait_s=DIRECTORY_POLL_S),
)
GLUSTER = Way(
    name="shared directory on GlusterFS", start=partial(mounts, gluster=True), sharing=Sharing()
)
PROXY = Way(
    name="caching proxy",
    start=partial(mounts, proxy=True),
    sharing=Sharing(wait_s=NGINX_POLL_S),
)
METADATA = Way(
    name="shared metadata",
    start=partial(mounts, metadata=True),
    sharing=Sharing(shares_calls=True),
)
TOGETHER = Way(
    name="GlusterFS, proxy and metadata",
    start=partial(mounts, gluster=True, proxy=True, metadata=True),
    sharing=Sharing(wait_s=NGINX_POLL_S, shares_calls=True),
)
RCLONE = Way(
    name="rclone behind the proxy",
    start=rclone,
    sharing=Sharing(wait_s=NGINX_POLL_S, calls=(0, 0)),
)
WAYS = (ALONE, DIRECTORY, GLUSTER, PROXY, METADATA, TOGETHER, RCLONE)
