"""Mount the account once per node of a Ray cluster, before the first task of each worker.

    import ray, ray_mount
    ray.init(runtime_env={"py_modules": [ray_mount], "worker_process_setup_hook": ray_mount.mount})

tinkerfs and FUSE must be installed on the nodes. The key is that of the user of Ray's processes. Or
`"env_vars": {"TINKERFS_API_KEY_FILE": ...}` in the runtime_env names a file with another one.
"""

import contextlib
import fcntl
import os
import subprocess

DIRECTORY = f"/tmp/tinker-{os.getuid()}"
MOUNTPOINT = f"{DIRECTORY}/mnt"


def mount() -> None:
    """Mount unless another worker of this node has, also in place of a mount without a daemon."""
    os.makedirs(DIRECTORY, mode=0o700, exist_ok=True)
    if os.lstat(DIRECTORY).st_uid != os.getuid():
        raise PermissionError(f"{DIRECTORY} belongs to another user")
    with open(f"{DIRECTORY}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = subprocess.run(["tinkerfs", "status", MOUNTPOINT], capture_output=True)
        if status.returncode != 0:
            with contextlib.suppress(FileExistsError):
                os.mkdir(MOUNTPOINT)
            subprocess.run(["tinkerfs", "mount", MOUNTPOINT], check=True)
