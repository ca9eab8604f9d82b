"""Let the workers of a real Ray mount the account by the hook of docs/deploy/ray_mount.py.

    python -m scripts.interoperability.ray_workers ENVIRONMENT

ENVIRONMENT has Ray and tinkerfs. Ray runs on this machine, with two workers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.faulty_server import FaultyServer
from tests.support.mount import ROOT, force_unmount
from tinkerfs.fuse import mount_table

DEPLOY = ROOT / "docs/deploy"
DIRECTORY = Path(f"/tmp/tinker-{os.getuid()}")

#: Runs in the environment: each of two workers lists the account.
DRIVER = """
import os, sys
import ray, ray_mount

ray.init(
    num_cpus=2, include_dashboard=False, logging_level="error", _temp_dir=sys.argv[1],
    object_store_memory=80 << 20,
    runtime_env={"py_modules": [ray_mount], "worker_process_setup_hook": ray_mount.mount},
)

@ray.remote
class Worker:
    def count(self):
        return len(os.listdir(ray_mount.MOUNTPOINT + "/runs"))

workers = [Worker.remote() for _ in range(2)]
print(ray.get([worker.count.remote() for worker in workers]))
ray.shutdown()
"""


def main() -> None:
    programs = Path(sys.argv[1]) / "bin"
    if DIRECTORY.exists():
        sys.exit(f"ray: FAIL {DIRECTORY} exists, which the recipe uses")
    with (
        FaultyServer(runs=3) as server,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory,
    ):
        env = os.environ | server.environment
        env["PATH"] = f"{programs.absolute()}:{env['PATH']}"
        env |= {"PYTHONPATH": str(DEPLOY), "HOME": directory, "RAY_USAGE_STATS_ENABLED": "0"}
        try:
            done = subprocess.run(
                [programs / "python", "-c", DRIVER, f"{directory}/ray"],
                env=env,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            mounts = [each.mountpoint for each in mount_table.tinkerfs_mounts()]
            if done.stdout != "[3, 3]\n" or mounts.count(f"{DIRECTORY}/mnt") != 1:
                sys.exit(f"ray: FAIL {done.stdout}{done.stderr}")
        finally:
            force_unmount(f"{DIRECTORY}/mnt")
            shutil.rmtree(DIRECTORY, ignore_errors=True)
    print("ray: two workers shared the mount that their setup hook made")


if __name__ == "__main__":
    main()
