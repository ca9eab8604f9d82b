"""What must be so before a mount is tried; each refusal is one line with its cure.

The same checks serve `tinkerfs mount` and `tinkerfs doctor`.
"""

import os
import re
import stat
from typing import Final

from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table

_DEVICE: Final = "/dev/fuse"
_CONFIGURATION: Final = "/etc/fuse.conf"
_MTAB: Final = "/etc/mtab"
_CONTAINER: Final = (
    "start a container with --device /dev/fuse --cap-add SYS_ADMIN; elsewhere: modprobe fuse"
)


def check_device(path: str = _DEVICE) -> None:
    """Make sure that the kernel's door can be opened.

    Raises:
        SetupError: it cannot.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise StartupError(f"there is no {path}: {_CONTAINER}") from None
    except PermissionError:
        raise StartupError(
            f"{path} may not be opened by you: have root run chmod 666 {path}, as udev does;"
            f" or {_CONTAINER}"
        ) from None
    except OSError as error:
        raise StartupError(f"{path} does not open ({error.strerror}): {_CONTAINER}") from None


def check_fusermount(major: int, *, is_root: bool | None = None) -> None:
    """Make sure that the program is there, and can work, which mounts for users other than root.

    Args:
        major: the libfuse that will call it.
        is_root: root mounts without it; None to look.

    Raises:
        SetupError: it is not.
    """
    if os.geteuid() == 0 if is_root is None else is_root:
        return
    if mount_table.fusermount(major) is None:
        name = "fusermount3" if major == 3 else "fusermount"
        raise StartupError(
            f"there is no {name}, by which users mount: apt install fuse3 | dnf install fuse3"
            " | apk add fuse3; or mount as root"
        )
    # fusermount mounts without it, and then cannot unmount (a root of debootstrap's has none).
    if not os.path.exists(_MTAB):
        raise StartupError(
            f"there is no {_MTAB}, without which users cannot unmount: have root run"
            f" ln -s /proc/self/mounts {_MTAB}"
        )


def may_be_apparmor(root: str = "/") -> bool:
    """Tell whether a profile of AppArmor for fusermount3 may be what refuses a mount.

    Ubuntu has one since 24.10. A process that is confined itself, as in a container, is refused by
    the profile that confines it.
    """
    for name in ("apparmor/current", "current"):
        try:
            with open(os.path.join(root, "proc/self/attr", name), "rb") as file:
                if not file.read(32).startswith(b"unconfined"):
                    return False
            break
        except OSError:  # EINVAL where no security module has the file
            continue
    try:
        with open(os.path.join(root, "sys/module/apparmor/parameters/enabled"), "rb") as file:
            return file.read(1) == b"Y"
    except OSError:
        return os.path.exists(os.path.join(root, "etc/apparmor.d/fusermount3"))


def check_allow_other(path: str = _CONFIGURATION, *, is_root: bool | None = None) -> None:
    """Make sure that --allow-other is allowed.

    Raises:
        SetupError: it is not, for who is not root.
    """
    if os.geteuid() == 0 if is_root is None else is_root:
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            is_allowed = re.search(r"^\s*user_allow_other\s*$", file.read(), re.MULTILINE)
    except OSError:
        is_allowed = None
    if not is_allowed:
        raise StartupError(
            f"--allow-other is not allowed here: have root write user_allow_other into {path},"
            " or mount as root"
        )


def prepare_mountpoint(mountpoint: str) -> str:
    """Make sure that a folder can be mounted on, cleaning up after a dead daemon; return its path.

    Raises:
        SetupError: it cannot.
    """
    path = mount_table.canonical_mountpoint(mountpoint)
    mount = mount_table.find_mount(path)
    if mount is not None and mount.fstype.startswith("fuse"):
        _remove_stale_mount(path, mount)
    try:
        status = os.stat(path)
        entries = os.scandir(path) if stat.S_ISDIR(status.st_mode) else None
    except FileNotFoundError:
        raise StartupError(f"{mountpoint} does not exist: mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise StartupError(f"{mountpoint} is below a file: name a folder") from None
    except PermissionError:
        raise StartupError(
            f"{mountpoint} may not be read by you: name a folder of your own"
        ) from None
    except OSError as error:
        raise StartupError(
            f"{mountpoint} cannot be mounted on ({error.strerror}): name another folder"
        ) from None
    if entries is None:
        raise StartupError(f"{mountpoint} is no folder: name an empty folder")
    with entries:
        if next(entries, None) is not None:
            raise StartupError(
                f"{mountpoint} is not empty, and a mount would hide what is there:"
                " name an empty folder"
            )
    # fusermount's own rule for users: they must be able to write there, and in a sticky folder like
    # /tmp own it (fuse: util/fusermount.c, check_perm).
    is_sticky_of_others = status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid()
    if os.geteuid() != 0 and (not os.access(path, os.W_OK) or is_sticky_of_others):
        raise StartupError(
            f"{mountpoint} is not yours: name a folder of your own, or mount as root"
        )
    return path


def _remove_stale_mount(path: str, mount: mount_table.Mount) -> None:
    health = mount_table.check_health(path)
    if health == "dead":
        mount_table.unmount(path, lazy=True)
    elif mount.fstype == mount_table.FSTYPE:
        verb = "hangs" if health == "hangs" else "is mounted"
        raise StartupError(f"{path}: tinkerfs {verb} there already: tinkerfs umount {path}")
    elif health == "hangs":
        raise StartupError(f"{path}: a mount of {mount.fstype} hangs there: name another folder")
