"""The first process of a host under User Mode Linux: set it up, and run commands for its owner.

    python linux_host.py ADDRESS CLOCK-OFFSET-S

The host shares the files of the machine read-only. A connection to port 7000 sends a line of JSON,
a command of the shell, and gets its exit status, output and errors.
"""

import json
import os
import platform
import socketserver
import subprocess
import sys
import time

PORT = 7000

#: The first argument is the address.
SETUP = """
    mount -t proc none /proc
    mount -t sysfs none /sys
    mount -t tmpfs none /run
    mount -t tmpfs none /mnt
    mount -t tmpfs none /var/tmp
    mkdir -p /run/home /run/modules/lib /mnt/cache /mnt/tinker
    ln -s /usr/lib/uml/modules /run/modules/lib/modules
    modprobe -d /run/modules fuse
    modprobe -d /run/modules nfsv4
    hostname "host-$1"
    ip link set lo up
    ip address add "$1/16" dev vec0
    ip link set vec0 up
"""


class Commands(socketserver.StreamRequestHandler):
    """Runs the command of one connection."""

    def handle(self) -> None:
        """Run the command, and send its results."""
        command = json.loads(self.rfile.readline())
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())


class Server(socketserver.ThreadingTCPServer):
    """Listens for commands."""

    daemon_threads = True


if __name__ == "__main__":
    os.environ |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/run/home", "TMPDIR": "/run"}
    subprocess.run(["sh", "-ec", SETUP, "sh", sys.argv[1]], check=True)
    time.clock_settime(time.CLOCK_REALTIME, time.time() + float(sys.argv[2]))
    print(f"Linux {platform.release()} at {sys.argv[1]}", flush=True)
    Server(("", PORT), Commands).serve_forever()
