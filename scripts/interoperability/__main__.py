"""Run all checks of interoperability in the environments that `scripts/interop` has created.

    python -m scripts.interoperability DIRECTORY SERVER...

DIRECTORY has an environment of each name, and SERVERs are the ones to mount: skyrl, hatchery.
"""

import subprocess
import sys
from pathlib import Path

#: `timeout` sends SIGTERM, on which a check unmounts.
TIMEOUT_S = 300


def main() -> int:
    """Run the checks until one fails; return its exit status."""
    directory, servers = Path(sys.argv[1]), sys.argv[2:]
    loaders = directory / "loaders/bin/python"
    mounts: list[str | Path] = []
    for name in servers:
        script = Path(__file__).with_name(f"{name}_server.py")
        mounts += [script, directory / name / "bin/python"]
    checks: dict[str, list[str | Path]] = {
        "sdk": [directory / "0.35.0", directory / "newest"],
        "exports": [directory / "newest", loaders],
        "data_libraries": [directory / "data/bin/python", loaders],
        "containers": [directory / "containers"],
        "fleet_compose": [directory / "containers"],
        "slurm": [],
        "ray_workers": [directory / "ray"],
        "prometheus": [],
        "nginx": [],
        "shared_cache": [],
        "peft_loaders": [loaders],
        "families": [loaders],
        "vllm_engine": [loaders],
        "mount_checks": mounts,
        "systemd_units": [],
        "webdav_clients": [],
        "log_daemons": [],
    }
    for name, arguments in checks.items():
        command = [sys.executable, "-m", f"{__package__}.{name}", *arguments]
        status = subprocess.run(["timeout", str(TIMEOUT_S), *command], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
