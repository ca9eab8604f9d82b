"""Checks before mounting; each failure is one line with a hint.

`tinkerfs mount` and `tinkerfs doctor` run the same checks.
"""

import os
import re
import stat
from typing import Final

from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.operating_system import CAN_MOUNT

_DEVICE: Final = "/dev/fuse"
_FUSE_CONF: Final = "/etc/fuse.conf"
_MTAB: Final = "/etc/mtab"
_DEVICE_HINT: Final = (
    "start a container with --device /dev/fuse --cap-add SYS_ADMIN; elsewhere: modprobe fuse"
)


def check_system() -> None:
    """Check that the operating system is Linux.

    Raises:
        StartupError: it is another one.
    """
    if not CAN_MOUNT:
        raise StartupError(
            "only Linux can mount tinkerfs (hint: use tinkerfs serve, tinkerfs get, or tinker://"
            " with fsspec)"
        )


def check_device(path: str = _DEVICE) -> None:
    """Check that /dev/fuse can be opened.

    Raises:
        StartupError: it cannot be opened, or the system is not Linux.
    """
    check_system()
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise StartupError(f"{path} not found (hint: {_DEVICE_HINT})") from None
    except PermissionError:
        raise StartupError(
            f"permission denied: {path} (hint: as root, chmod 666 {path}, as udev does;"
            f" or {_DEVICE_HINT})"
        ) from None
    except OSError as error:
        raise StartupError(f"cannot open {path}: {error.strerror} (hint: {_DEVICE_HINT})") from None


def check_fusermount(major: int, *, is_root: bool | None = None) -> None:
    """Check that fusermount is installed and can unmount; root does not need it.

    Args:
        major: major version of the libfuse that will call it.
        is_root: None to check the effective user.

    Raises:
        StartupError: it is missing, or could not unmount.
    """
    if os.geteuid() == 0 if is_root is None else is_root:
        return
    if mount_table.fusermount(major) is None:
        name = "fusermount3" if major == 3 else "fusermount"
        raise StartupError(
            f"{name} not found, which mounts for users other than root (hint: apt install fuse3 |"
            " dnf install fuse3 | apk add fuse3; or mount as root)"
        )
    # fusermount can mount without it, but not unmount. A root made by debootstrap has none.
    if not os.path.exists(_MTAB):
        raise StartupError(
            f"{_MTAB} not found, without which users cannot unmount (hint: as root,"
            f" ln -s /proc/self/mounts {_MTAB})"
        )


def may_be_apparmor(root: str = "/") -> bool:
    """Return whether an AppArmor profile of fusermount3 may deny a mount.

    Ubuntu has such a profile since 24.10. It does not apply to a process that is itself confined,
    as in a container: then that process's own profile denies the mount.
    """
    for name in ("apparmor/current", "current"):
        try:
            with open(os.path.join(root, "proc/self/attr", name), "rb") as file:
                if not file.read(32).startswith(b"unconfined"):
                    return False
            break
        except OSError:  # EINVAL if no security module provides the file
            continue
    try:
        with open(os.path.join(root, "sys/module/apparmor/parameters/enabled"), "rb") as file:
            return file.read(1) == b"Y"
    except OSError:
        return os.path.exists(os.path.join(root, "etc/apparmor.d/fusermount3"))


def check_allow_other(path: str = _FUSE_CONF, *, is_root: bool | None = None) -> None:
    """Check that users other than root may mount with --allow-other.

    Raises:
        StartupError: /etc/fuse.conf does not allow it.
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
            f"--allow-other is not allowed (hint: as root, add user_allow_other to {path},"
            " or mount as root)"
        )


def prepare_mountpoint(mountpoint: str) -> str:
    """Check that a directory can be mounted on, and remove a dead mount; return its path.

    Raises:
        StartupError: the directory cannot be mounted on.
    """
    path = mount_table.canonical_mountpoint(mountpoint)
    mount = mount_table.find_mount(path)
    if mount is not None and mount.fstype.startswith("fuse"):
        _remove_stale_mount(path, mount)
    try:
        status = os.stat(path)
        entries = os.scandir(path) if stat.S_ISDIR(status.st_mode) else None
    except FileNotFoundError:
        raise StartupError(f"{mountpoint} does not exist (hint: mkdir -p {mountpoint})") from None
    except NotADirectoryError:
        raise StartupError(f"{mountpoint} is below a file (hint: use a directory)") from None
    except PermissionError:
        raise StartupError(
            f"permission denied: {mountpoint} (hint: use a directory of your own)"
        ) from None
    except OSError as error:
        raise StartupError(
            f"cannot mount on {mountpoint}: {error.strerror} (hint: use another directory)"
        ) from None
    if entries is None:
        raise StartupError(f"{mountpoint} is not a directory (hint: use an empty directory)")
    with entries:
        if next(entries, None) is not None:
            raise StartupError(
                f"{mountpoint} is not empty, and a mount would hide its content"
                " (hint: use an empty directory)"
            )
    # The rule of fusermount for users other than root: the directory must be writable, and owned by
    # the user if it is sticky like /tmp (fuse: util/fusermount.c, check_perm).
    if os.geteuid() != 0 and os.statvfs(path).f_flag & os.ST_RDONLY:
        raise StartupError(
            f"{mountpoint} is on a read-only file system, where only root can mount"
            " (hint: use a directory of a writable volume)"
        )
    is_sticky_of_others = status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid()
    if os.geteuid() != 0 and (not os.access(path, os.W_OK) or is_sticky_of_others):
        raise StartupError(
            f"{mountpoint} is not yours (hint: use a directory of your own, or mount as root)"
        )
    return path


def _remove_stale_mount(path: str, mount: mount_table.Mount) -> None:
    health = mount_table.check_health(path)
    if health == "dead":
        mount_table.unmount(path, lazy=True)
    elif mount.fstype == mount_table.FSTYPE:
        state = "is already mounted" if health == "responsive" else "is mounted but unresponsive"
        raise StartupError(f"tinkerfs {state} on {path} (hint: tinkerfs umount {path})")
    elif health == "unresponsive":
        raise StartupError(
            f"an unresponsive mount of {mount.fstype} is on {path} (hint: use another directory)"
        )
