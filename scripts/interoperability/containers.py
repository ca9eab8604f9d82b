"""Check the image and the manifests of docs/deploy: built, validated, and run with podman.

    python -m scripts.interoperability.containers ENVIRONMENT

ENVIRONMENT has kubernetes-validate and podman-compose. Needs root and scripts/container/build. The
commands, arguments and variables of the containers are read from the manifests. Kubernetes itself
is not run: a thread does the work of the node plugin of a CSI driver, and podman that of kubelet.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts.interoperability.rootless import check_rootless
from tests.support.faulty_server import FaultyServer
from tests.support.mount import ROOT, force_unmount
from tests.support.passed_fd import mount_fd, send_fd
from tinkerfs.formatting import format_size
from tinkerfs.fuse import mount_table

DEPLOY = ROOT / "docs/deploy"
MANIFESTS = ("secret", "daemonset", "sidecar", "csi")
IMAGE = "localhost/tinkerfs"
#: Kubernetes has sidecars since 1.29.
OLDEST_VERSION = "1.29"
TIMEOUT_S = 60.0

#: Settings of podman: the network of the host, where the test server is, and small limits, which a
#: container may have to inherit.
CONTAINERS_CONF = """
[containers]
netns = "host"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def main() -> None:
    if os.geteuid() != 0:
        print("containers: skipped, needs root")
        return
    environment = Path(sys.argv[1])
    for name in MANIFESTS:
        validate = (environment / "bin/kubernetes-validate", "--strict", "--quiet")
        for version in ((), ("-k", OLDEST_VERSION)):
            run(*validate, *version, DEPLOY / f"{name}.yaml")
    print(f"containers: {', '.join(MANIFESTS)} are valid for Kubernetes {OLDEST_VERSION} and later")
    with tempfile.TemporaryDirectory(prefix="tinkerfs-containers-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with working_podman(directory), FaultyServer(runs=3) as server:
            size = run("podman", "image", "inspect", IMAGE, "--format", "{{.Size}}")
            print(f"containers: the image {IMAGE} has {format_size(int(size))}")
            check_rootless(directory, IMAGE)
            check_compose(directory, environment, server)
            for name in ("daemonset", "sidecar"):
                check_privileged(name, directory, server)
            check_csi(directory, server)


def run(*command: str | Path, timeout_s: float = 300, **options: Any) -> str:
    """Run a command that must succeed; return its output."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        **options,
    )
    if done.returncode:
        sys.exit(f"containers: FAIL {' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


@contextlib.contextmanager
def working_podman(directory: Path) -> Iterator[None]:
    """Build the image, and choose a runtime: crun fails where both cgroup versions are mounted."""
    run("scripts/container/build", IMAGE, timeout_s=900, cwd=ROOT)
    conf = directory / "containers.conf"
    os.environ["CONTAINERS_CONF"] = str(conf)
    for runtime in ("crun", "runc"):
        conf.write_text(CONTAINERS_CONF.format(runtime=runtime))
        probe = ["podman", "run", "--rm", "--no-healthcheck", IMAGE, "--version"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        sys.exit(f"containers: FAIL podman runs no container: {done.stderr}")
    # Mounts of containers are visible to others only below a shared mount.
    run("mount", "--bind", directory, directory)
    run("mount", "--make-rshared", directory)
    try:
        yield
    finally:
        for mount in reversed(mount_table.list_mounts()):
            if mount.mountpoint.startswith(f"{directory}/"):
                force_unmount(mount.mountpoint)
        run("umount", "--lazy", directory)


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"containers: FAIL {what}")
        time.sleep(0.1)


def is_mounted(path: Path) -> bool:
    return mount_table.find_mount(str(path)) is not None


def manifest(name: str) -> dict[str, Any]:
    """Return the pod of a manifest."""
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    pod: dict[str, Any] = loaded["spec"].get("template", loaded)["spec"]
    return pod


def container_of(pod: dict[str, Any], name: str) -> dict[str, Any]:
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    return next(each for each in containers if each["name"] == name)


def podman_command(
    container: dict[str, Any], pod: dict[str, Any], server: FaultyServer, *options: str
) -> list[str]:
    """Return the command that runs a container of a manifest, with its security context."""
    context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    flags = ["--privileged"] if context.get("privileged") else []
    flags += ["--read-only"] if context["readOnlyRootFilesystem"] else []
    if not context.get("allowPrivilegeEscalation", True):
        flags.append("--security-opt=no-new-privileges")
    flags += [f"--cap-drop={each}" for each in context.get("capabilities", {}).get("drop", [])]
    user = f"{context['runAsUser']}:{context.get('runAsGroup', context['runAsUser'])}"
    variables = {each["name"]: each["value"] for each in container.get("env", [])}
    variables["TINKER_BASE_URL"] = server.base_url
    flags += [f"--env={name}={value}" for name, value in variables.items()]
    entrypoint, *command = container["command"]
    image = IMAGE if container["name"] == "tinkerfs" else f"{IMAGE}-base"
    return [
        *("podman", "run", "--no-healthcheck", "--user", user, "--entrypoint", entrypoint),
        *flags,
        *options,
        image,
        *command,
        *container.get("args", []),
    ]


def write_key(path: Path, server: FaultyServer, uid: int, gid: int, mode: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(server.api_key)
    os.chown(path, uid, gid)
    path.chmod(mode)


def check_compose(directory: Path, environment: Path, server: FaultyServer) -> None:
    """Bring up the sidecar of the compose file, and read its mount in the other container."""
    shared = directory / "shared"
    shared.mkdir()
    os.chown(shared, 65532, 65532)
    write_key(directory / "compose/key", server, 65532, 65532, 0o600)
    env = os.environ | {
        "TINKERFS_DIRECTORY": str(shared),
        "TINKER_API_KEY_FILE": str(directory / "compose/key"),
        "TINKER_BASE_URL": server.base_url,
        "APP_IMAGE": f"{IMAGE}-base",
    }
    # The network of the host, as CONTAINERS_CONF says, instead of one of the project.
    override = directory / "override.yaml"
    services = {name: {"network_mode": "host"} for name in ("tinkerfs", "app")}
    override.write_text(yaml.safe_dump({"services": services}))
    files = ("-p", "tinkerfs-check", "-f", DEPLOY / "compose.yaml", "-f", override)
    compose = (environment / "bin/podman-compose", *files)
    try:
        run(*compose, "up", "-d", "tinkerfs", env=env)
        wait_for(lambda: is_mounted(shared), "the sidecar of compose.yaml mounts nothing")
        status = container_command("tinkerfs-check", "tinkerfs status /mnt/tinker")
        if "requests" not in status:
            sys.exit(f"containers: FAIL the health check of compose.yaml: {status}")
        shown = run(*compose, "run", "--rm", "--no-deps", "app", env=env)
        if shown.count("\n") < 3:
            sys.exit(f"containers: FAIL the app of compose.yaml sees {shown!r}")
    finally:
        run(*compose, "down", "-v", "-t", "10", env=env)
    wait_for(lambda: not is_mounted(shared), "the mount of compose.yaml stays")
    print("containers: compose.yaml was run: a sidecar of uid 65532, an app, and its end")


def container_command(prefix: str, command: str) -> str:
    names = run("podman", "ps", "--format", "{{.Names}}").splitlines()
    name = next(each for each in names if each.startswith(prefix))
    return run("podman", "exec", name, *command.split())


def check_privileged(kind: str, directory: Path, server: FaultyServer) -> None:
    """Run a container that mounts, kill it, and run it again over its dead mount."""
    pod = manifest(kind)
    container = container_of(pod, "tinkerfs")
    host, name = directory / f"{kind}-mounts", f"tinkerfs-{kind}"
    host.mkdir()
    [mounts] = [each for each in container["volumeMounts"] if each["name"] == "mounts"]
    assert mounts["mountPropagation"] == "Bidirectional"
    write_key(directory / f"{kind}/api-key", server, 0, 0, 0o400)
    command = podman_command(
        container,
        pod,
        server,
        *("--detach", "--name", name, "--volume", f"{host}:{mounts['mountPath']}:rshared"),
        *("--volume", f"{directory}/{kind}:/etc/tinker:ro", "--tmpfs", "/cache"),
    )
    probe = container["startupProbe"]["exec"]["command"]
    try:
        for signal in ("KILL", "TERM"):
            run(*command)
            wait_for(lambda: run_count(host / "tinker") == 3, f"{kind}.yaml mounts nothing")
            run("podman", "exec", name, *probe)
            run("podman", "kill", "--signal", signal, name)
            run("podman", "wait", name)
            code = run("podman", "inspect", name, "--format", "{{.State.ExitCode}}")
            run("podman", "rm", "--volumes", name)
    finally:
        subprocess.run(
            ["podman", "rm", "--force", "--volumes", name], capture_output=True, check=False
        )
    if code != "0" or is_mounted(host / "tinker"):
        sys.exit(f"containers: FAIL {kind}.yaml does not unmount on SIGTERM (exit code {code})")
    print(f"containers: the mount of {kind}.yaml was run, killed, and run again")


def run_count(mountpoint: Path) -> int:
    try:
        return len(os.listdir(mountpoint / "runs")) if is_mounted(mountpoint) else 0
    except OSError:  # the mount of the killed container
        return 0


def check_csi(directory: Path, server: FaultyServer) -> None:
    """Run both containers of the pod without privileges, beside a thread that mounts."""
    pod = manifest("csi")
    target, sockets = directory / "target", directory / "sockets"
    target.mkdir()
    sockets.mkdir()
    write_key(directory / "csi/api-key", server, 0, 65534, 0o440)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sockets / "tinker.sock"))
        os.chown(sockets / "tinker.sock", 65534, 65534)
        listener.listen()

        def pass_fd() -> None:
            connection, _ = listener.accept()
            with connection:
                fd = mount_fd(target, fstype="fuse")
                send_fd(connection, b'{"volumeName":"tinker"}', fd)
                os.close(fd)

        thread = threading.Thread(target=pass_fd, daemon=True)
        thread.start()
        name = "tinkerfs-csi"
        sidecar = podman_command(
            container_of(pod, "tinkerfs"),
            pod,
            server,
            *("--detach", "--name", name, "--volume", f"{sockets}:/sockets"),
            *("--volume", f"{directory}/csi:/etc/tinker:ro", "--tmpfs", "/cache:mode=1777"),
        )
        try:
            run(*sidecar)
            thread.join(TIMEOUT_S)
            wait_for(lambda: run_count(target) == 3, "the pod of csi.yaml serves nothing")
            probe = container_of(pod, "tinkerfs")["livenessProbe"]["exec"]["command"]
            run("podman", "exec", name, *probe)
            fields = run("podman", "exec", name, "cat", "/proc/1/status").splitlines()
            status = dict(line.split(":\t", 1) for line in fields)
            found = (status["CapEff"], status["CapBnd"], status["NoNewPrivs"], status["Seccomp"])
            if found != ("0" * 16, "0" * 16, "1", "2"):
                sys.exit(f"containers: FAIL the pod of csi.yaml has privileges: {found}")
            app = container_of(pod, "app")
            app["command"] = ["sh", "-c", "ls -l /mnt/tinker/runs"]  # without the sleep
            volume = f"{target}:/mnt/tinker:rslave"
            shown = run(*podman_command(app, pod, server, "--rm", "--volume", volume))
            if shown.count("\n") < 3:
                sys.exit(f"containers: FAIL the app of csi.yaml sees {shown!r}")
            force_unmount(str(target))  # as the node plugin does at the end of the pod
            code = run("podman", "wait", name)
        finally:
            subprocess.run(
                ["podman", "rm", "--force", "--volumes", name], capture_output=True, check=False
            )
    if code != "0":
        sys.exit(f"containers: FAIL the pod of csi.yaml ends with {code}")
    print("containers: the pod of csi.yaml was run, without capabilities and with seccomp")


if __name__ == "__main__":
    main()
