"""Run the image as an ordinary user, with rootless podman.

The user has an empty home and a range of user ids, in namespaces that end with the check.
"""

import os
import subprocess
import sys
from pathlib import Path

#: Runs as root in the namespaces: makes the user, its home and its runtime directory.
_SETUP = """
mount -t tmpfs -o mode=755,dev none /home
mkdir -m 700 /home/ada
mkdir /home/etc
printf 'ada:x:12345:12345::/home/ada:/bin/sh\\n' | cat /etc/passwd - >/home/etc/passwd
printf 'ada:x:12345:\\n' | cat /etc/group - >/home/etc/group
printf 'ada:200000:65536\\n' | tee /home/etc/subuid >/home/etc/subgid
touch /etc/subuid /etc/subgid
for file in passwd group subuid subgid; do mount --bind /home/etc/$file /etc/$file; done
mknod -m 666 /home/etc/fuse c 10 229
mount --bind /home/etc/fuse /dev/fuse
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/user/12345
chown 12345:12345 /home/ada /run/user/12345
mount --make-rshared /
cd /home/ada
exec setpriv --reuid 12345 --regid 12345 --init-groups sh -ec "$1"
"""

#: Runs as the user. overlayfs would need a newer kernel, or fuse-overlayfs.
_AS_USER = """
export HOME=/home/ada XDG_RUNTIME_DIR=/run/user/12345 STORAGE_DRIVER=vfs
podman load --quiet --input {archive} >&2
podman run --detach --no-healthcheck --name mount --device /dev/fuse --cap-add SYS_ADMIN \\
    {image} demo /mnt/tinker >&2
for _ in $(seq 300); do
    podman exec mount tinkerfs status /mnt/tinker >/dev/null 2>&1 && break
    sleep 0.1
done
podman logs mount >&2
podman exec mount sh -c 'ls /mnt/tinker/runs | wc -l'
podman stop mount >&2
podman inspect mount --format '{{{{.State.ExitCode}}}}'
"""


def check_rootless(directory: Path, image: str) -> None:
    """Mount in a container of an ordinary user; CONTAINERS_CONF has the settings of podman."""
    archive = directory / "image.tar"
    save = ["podman", "save", "--quiet", "--output", str(archive), image]
    subprocess.run(save, check=True, capture_output=True)
    archive.chmod(0o644)
    script = _AS_USER.format(archive=archive, image=image)
    namespaces = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    done = subprocess.run(
        ["unshare", *namespaces, "sh", "-ec", _SETUP, "sh", script],
        env={"PATH": os.environ["PATH"], "CONTAINERS_CONF": os.environ["CONTAINERS_CONF"]},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if done.stdout != "10\n0\n":
        sys.exit(f"containers: FAIL rootless podman: {done.stdout}{done.stderr}")
    print("containers: the image was run by rootless podman, and mounted there")
