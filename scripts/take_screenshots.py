"""Take pictures of a file manager in a mount of the sample account, as an ordinary user.

    python -m scripts.take_screenshots DIRECTORY

Needs root, to make the user. The programs and the mount are real.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.ordinary_user import ENVIRONMENT, as_user
from tests.support.desktop import Desktop
from tinkerfs.fuse import mount_table

ROOT = Path(__file__).parents[1]
SIZE = (960, 480)
MAX_BYTES = 150_000
TIMEOUT_S = 300

#: Settings of Thunar.
THUNAR = {
    "last-view": "ThunarDetailsView",
    "misc-date-style": "THUNAR_DATE_STYLE_LONG",
    "last-sort-column": "THUNAR_COLUMN_DATE_MODIFIED",
    "last-sort-order": "GTK_SORT_DESCENDING",
}


def take_screenshots(target: Path) -> None:
    """Take the pictures as the user, in a session of D-Bus."""
    mountpoint = Path.home() / "tinker"
    mountpoint.mkdir()
    subprocess.run(["tinkerfs", "demo", "--detach", "--checkpoints=20", mountpoint], check=True)
    for name, value in THUNAR.items():
        query = [
            "xfconf-query",
            "-c",
            "thunar",
            "-p",
            f"/{name}",
            "-n",
            "-t",
            "string",
            "-s",
            value,
        ]
        subprocess.run(query, check=True)
    bus = {"DBUS_SESSION_BUS_ADDRESS": os.environ["DBUS_SESSION_BUS_ADDRESS"]}
    desktop = Desktop(Path.home(), SIZE, bus)
    try:
        _take_screenshots(desktop, mountpoint, target)
    finally:
        desktop.close()
    subprocess.run(["tinkerfs", "umount", mountpoint], check=True)


def _take_screenshots(desktop: Desktop, mountpoint: Path, target: Path) -> None:
    desktop.start("xfwm4", "--compositor=off")
    desktop.settle()
    run = max((mountpoint / "runs").iterdir(), key=os.path.getmtime)
    desktop.open(run / "checkpoints/weights")
    desktop.press("alt+F10")
    desktop.settle()
    desktop.save_screenshot(target / "file-manager.png")
    desktop.go(mountpoint / "runs")
    desktop.select(run.name[:8])
    desktop.press("shift+Delete")
    desktop.window("Attention")
    desktop.press("Return")
    desktop.window("File Operation Progress")
    assert mount_table.wait_until(lambda: len(desktop.windows("^Attention")) > 0, 20)
    desktop.settle()
    desktop.save_screenshot(target / "file-manager-refused.png")


def main() -> int:
    """Take the pictures; save them in DIRECTORY."""
    target = Path(sys.argv[1])
    if os.getuid() != 0:
        take_screenshots(target)
        return 0
    with tempfile.TemporaryDirectory(prefix="tinkerfs-screenshots-") as name:
        os.chown(name, 1000, 1000)
        session = ("dbus-run-session", "--", sys.executable, "-m", "scripts.take_screenshots", name)
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        subprocess.run(as_user(*session), env=environment, check=True, timeout=TIMEOUT_S)
        for picture in sorted(Path(name).iterdir()):
            if picture.stat().st_size > MAX_BYTES:
                raise ValueError(f"{picture.name} has {picture.stat().st_size} bytes")
            shutil.copyfile(picture, target / picture.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
