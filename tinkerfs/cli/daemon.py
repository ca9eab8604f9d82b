"""The command line and the environment of the process that serves a mount in the background.

The process runs in `/` and takes no module from the directory that the command was started in: a
`random.py` there would run in its place, as root under sudo. So every path that a user gave
relative to that directory is made absolute first.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from tinkerfs import config
from tinkerfs.config import OPTIONS

#: Variables that hold one path, read by tinkerfs or by a library of its own.
_PATH_VARIABLES: Final = (
    *(option.env_var for option in OPTIONS if option.is_path),
    "TINKERFS_CONFIG",
    "FUSE_LIBRARY_PATH",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
)

#: Variables that hold several paths, with colons between them.
_PATH_LIST_VARIABLES: Final = ("SSL_CERT_DIR", "PYTHONPATH")


def daemon_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs tinkerfs with `arguments`, as isolated as this process is.

    `-I` would ignore PYTHONPATH and the user's own site-packages, where tinkerfs may be installed.
    """
    if sys.flags.isolated:
        flags = ["-I"]
    else:
        flags = ["-P"]
        flags += ["-E"] if sys.flags.ignore_environment else []
        flags += ["-s"] if sys.flags.no_user_site else []
    return [sys.executable, *flags, "-m", "tinkerfs", *arguments]


def daemon_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` for a process that runs in `/`: its relative paths are absolute."""
    changed = dict(environ)
    for name in _PATH_VARIABLES:
        value = environ.get(name, "")
        # A library without a slash is a soname, which the dynamic linker looks for.
        if value and (name != "FUSE_LIBRARY_PATH" or "/" in value):
            changed[name] = os.path.abspath(os.path.expanduser(value))
    for name in _PATH_LIST_VARIABLES:
        if environ.get(name):
            # An empty entry is the working directory, and rarely meant.
            changed[name] = ":".join(map(os.path.abspath, filter(None, environ[name].split(":"))))
    root = os.path.dirname(os.path.dirname(os.path.abspath(config.__file__)))
    if root not in map(os.path.abspath, sys.path[1:]) and not sys.flags.safe_path:
        # `python -m tinkerfs` in a checkout that is not installed: this process runs from it too.
        changed["PYTHONPATH"] = ":".join(filter(None, (root, changed.get("PYTHONPATH"))))
    return changed
