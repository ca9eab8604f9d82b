"""Take the features away that Linux has and macOS lacks; a subprocess has it on PYTHONPATH.

`sys.platform` is "darwin". Files below /proc and /sys cannot be opened or listed.
"""

import errno
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time
import types

REMOVED = {
    os: """
        O_DIRECT O_LARGEFILE O_NOATIME O_PATH O_RSYNC O_TMPFILE POSIX_FADV_DONTNEED
        POSIX_FADV_NOREUSE POSIX_FADV_NORMAL POSIX_FADV_RANDOM POSIX_FADV_SEQUENTIAL
        POSIX_FADV_WILLNEED RWF_APPEND RWF_DSYNC RWF_HIPRI RWF_NOWAIT RWF_SYNC copy_file_range
        eventfd eventfd_read eventfd_write fdatasync getrandom getresgid getresuid getxattr
        listxattr memfd_create pidfd_open posix_fadvise posix_fallocate removexattr
        sched_getaffinity sched_getparam sched_setaffinity setresgid setresuid setxattr splice
    """,
    fcntl: """
        F_ADD_SEALS F_GETLEASE F_GETPIPE_SZ F_GET_SEALS F_NOTIFY F_OFD_GETLK F_OFD_SETLK
        F_OFD_SETLKW F_SETLEASE F_SETPIPE_SZ
    """,
    resource: "RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_SIGPENDING prlimit",
    select: "epoll POLLRDHUP",
    signal: "SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT sigtimedwait sigwaitinfo",
    socket: "AF_NETLINK AF_PACKET SO_BINDTODEVICE SO_PEERCRED TCP_KEEPIDLE TCP_USER_TIMEOUT",
    time: "CLOCK_BOOTTIME CLOCK_TAI",
    errno: """
        EADV EBADE EBADFD EBADR EBADRQC EBADSLT EBFONT ECHRNG ECOMM EDOTDOT EISNAM EKEYEXPIRED
        EKEYREJECTED EKEYREVOKED EL2HLT EL2NSYNC EL3HLT EL3RST ELIBACC ELIBBAD ELIBEXEC ELIBMAX
        ELIBSCN ELNRNG EMEDIUMTYPE ENAVAIL ENOANO ENOCSI ENOKEY ENOMEDIUM ENONET ENOPKG ENOTNAM
        ENOTUNIQ EREMCHG EREMOTEIO ERESTART ESRMNT ESTRPIPE EUCLEAN EUNATCH EXFULL
    """,
}

for module, names in REMOVED.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

#: macOS has this option instead of TCP_KEEPIDLE; here it is the option of Linux.
socket.TCP_KEEPALIVE = 4


def refuse(event, arguments):
    """Refuse to open what only Linux has."""
    if event in ("open", "os.listdir", "os.scandir"):
        path = arguments[0]
        path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        if path.startswith(("/proc", "/sys/")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


sys.addaudithook(refuse)
sys.platform = "darwin"
# The proxies of the system's settings, which urllib imports on macOS.
sys.modules["_scproxy"] = scproxy = types.ModuleType("_scproxy")
scproxy._get_proxies = dict
scproxy._get_proxy_settings = dict
