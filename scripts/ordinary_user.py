"""Run a command as an ordinary user with an empty home, in namespaces of its own. Needs root.

The namespaces end with the command, and with them its mounts, its processes and the user.
"""

import sys
from pathlib import Path

HOME = "/home/ada"

#: Variables of the command; the programs of the virtual environment are on the PATH.
ENVIRONMENT = {
    "HOME": HOME,
    "USER": "ada",
    "LC_ALL": "C.UTF-8",
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
}

#: Replaces root by the user. The capability lets the user run an interpreter below /root.
_AS_USER = """
mount -t tmpfs -o dev,mode=755 tmpfs /home
mkdir /home/ada /home/etc
chown 1000:1000 /home/ada
printf 'root:x:0:0::/root:/bin/sh\\nada:x:1000:1000::/home/ada:/bin/bash\\n' >/home/etc/passwd
printf 'root:x:0:\\nada:x:1000:\\n' >/home/etc/group
mknod -m 666 /home/etc/fuse c 10 229
mount --bind /home/etc/passwd /etc/passwd
mount --bind /home/etc/group /etc/group
mount --bind /home/etc/fuse /dev/fuse
cd /home/ada
exec setpriv --reuid 1000 --regid 1000 --clear-groups \\
    --inh-caps +dac_read_search --ambient-caps +dac_read_search "$@"
"""


def as_user(*command: str) -> list[str]:
    """Return the command that runs `command` as the user, in the user's home."""
    namespaces = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    return ["unshare", *namespaces, "sh", "-ec", _AS_USER, "sh", *command]
