"""Manifests of docs/deploy: consistent with the command line, and without needless privileges.

scripts/interop validates them by the schemas of Kubernetes, and runs their containers.
"""

import re
from pathlib import Path

import click
import pytest
import yaml

from tests.support.mount import ROOT
from tinkerfs.cli.main import cli
from tinkerfs.cli.options import _parse_size_bytes, settings_of

DEPLOY = ROOT / "docs/deploy"
MANIFESTS = sorted(path.name for path in DEPLOY.glob("*.yaml"))
PODS = ("csi.yaml", "daemonset.yaml", "sidecar.yaml")
GIB = 1 << 30


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def pod_of(name):
    loaded = load(name)
    return loaded["spec"].get("template", loaded)["spec"]


def containers_of(pod):
    return [*pod.get("initContainers", []), *pod["containers"]]


def tinkerfs_of(pod):
    return next(each for each in containers_of(pod) if each["name"] == "tinkerfs")


def quantity_bytes(text):
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", text).groups()
    return int(number) << {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


def commands_of(name):
    """Return the arguments of each tinkerfs command in a manifest."""
    if name == "compose.yaml":
        service = load(name)["services"]["tinkerfs"]
        return [service["command"], service["healthcheck"]["test"][2:]]
    container = tinkerfs_of(pod_of(name))
    probes = [container[each] for each in ("startupProbe", "livenessProbe") if each in container]
    return [container["args"], *(probe["exec"]["command"][1:] for probe in probes)]


def test_every_manifest_is_linked_and_parsed():
    text = (ROOT / "docs/clusters.md").read_text()
    assert [name for name in MANIFESTS if f"(deploy/{name})" not in text] == []
    assert all(load(name) for name in MANIFESTS)


@pytest.mark.parametrize("name", [*PODS, "compose.yaml"])
def test_commands_and_variables_exist(name):
    for command, *arguments in commands_of(name):
        found = cli.get_command(click.Context(cli), command)
        flags = {flag for option in found.params for flag in (*option.opts, *option.secondary_opts)}
        used = {each.partition("=")[0] for each in arguments if each.startswith("--")}
        assert used <= flags
    mount = cli.get_command(click.Context(cli), "mount")
    known = {variable for option in settings_of(mount).values() for variable in option.envvar}
    service = load(name)["services"]["tinkerfs"] if name == "compose.yaml" else None
    variables = set(
        service["environment"]
        if service
        else (each["name"] for each in tinkerfs_of(pod_of(name))["env"])
    )
    assert variables <= known
    assert "TINKERFS_API_KEY_FILE" in variables


@pytest.mark.parametrize("name", PODS)
def test_cache_fits_into_its_volume_and_its_pod(name):
    pod = pod_of(name)
    container = tinkerfs_of(pod)
    variables = {each["name"]: each["value"] for each in container["env"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    cache = volumes["cache"]["emptyDir"]
    size_bytes = _parse_size_bytes(variables["TINKERFS_CACHE_SIZE"])
    volume_bytes = quantity_bytes(cache["sizeLimit"])
    limits = container["resources"]["limits"]
    # Metadata is beside the blocks, and blocks of open files are evicted late.
    assert size_bytes + 2 * GIB <= volume_bytes
    assert volume_bytes + GIB <= quantity_bytes(limits["ephemeral-storage"])
    assert cache.get("medium") != "Memory", "it would count as memory of the container"
    assert quantity_bytes(limits["memory"]) >= 4 * 256 << 20, "weights use 256 MiB of memory"


@pytest.mark.parametrize("name", PODS)
def test_pods_have_no_needless_privileges(name):
    pod = pod_of(name)
    for container in containers_of(pod):
        context = {**pod.get("securityContext", {}), **container["securityContext"]}
        assert context["readOnlyRootFilesystem"]
        assert container["resources"]["limits"]["memory"]
        if context.get("privileged"):
            propagations = {each.get("mountPropagation") for each in container["volumeMounts"]}
            assert container["name"] == "tinkerfs"
            assert "Bidirectional" in propagations
        else:
            assert context["runAsNonRoot"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert name != "csi.yaml" or "privileged: true" not in (DEPLOY / name).read_text()
    [key] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "key"]
    assert not key["defaultMode"] & 0o037, "tinkerfs refuses a key that others can read"
    secret = load("secret.yaml")
    assert key["secretName"] == secret["metadata"]["name"]
    variables = {each["name"]: each["value"] for each in tinkerfs_of(pod)["env"]}
    assert Path(variables["TINKERFS_API_KEY_FILE"]).name in secret["stringData"]
