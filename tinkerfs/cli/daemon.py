"""Start the daemon of a background mount: its command line and its environment.

The daemon parses the arguments of its caller again, in the same working directory, and then runs in
`/`. It imports no module from the former: otherwise a `random.py` there would replace the standard
module, and run as root under sudo. Relative paths in variables that libraries read are made
absolute before the daemon starts.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import click

from tinkerfs import config
from tinkerfs.fuse import daemonize, mounted_fd

#: Variables with one path as value, which are read after the options.
_PATH_VARIABLES: Final = (
    "FUSE_LIBRARY_PATH",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
)

#: Variables with a colon-separated list of paths as value.
_PATH_LIST_VARIABLES: Final = ("SSL_CERT_DIR", "PYTHONPATH")


serve_option = click.option("--serve", metavar="MOUNTPOINT", hidden=True)


def start_in_background(mountpoint: str) -> None:
    """Start the current command again, with `--serve MOUNTPOINT`, and wait until it is ready.

    Raises:
        StartupError: The other process failed; the message is its own.
    """
    # Other commands find the daemon by this argument, so it must be absolute. Symlinks are resolved
    # only by the checks of the daemon: resolving one that leads to a dead mount would fail here.
    path = os.path.abspath(mountpoint)
    fd = mounted_fd.parse_fd(path)
    if fd is not None:
        mounted_fd.check_fd(fd)  # before the pipe is opened, which may get the number
    command, *arguments = click.get_current_context().find_root().obj
    full_command = daemon_command([command, "--serve", path, *arguments])
    daemonize.start_in_background(
        full_command, daemon_environment(os.environ), pass_fds=() if fd is None else (fd,)
    )


def daemon_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs tinkerfs with `arguments` in a new interpreter.

    The interpreter gets this interpreter's isolation flags, and at least `-P`. Not always `-I`: it
    ignores PYTHONPATH and the user's site-packages, where tinkerfs may be installed.
    """
    if sys.flags.isolated:
        flags = ["-I"]
    else:
        flags = ["-P"]
        flags += ["-E"] if sys.flags.ignore_environment else []
        flags += ["-s"] if sys.flags.no_user_site else []
    return [sys.executable, *flags, "-m", "tinkerfs", *arguments]


def daemon_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `environ` in which relative paths are made absolute."""
    changed = dict(environ)
    for name in _PATH_VARIABLES:
        value = environ.get(name, "")
        # A library name without a slash is a soname, which the dynamic linker resolves.
        if value and (name != "FUSE_LIBRARY_PATH" or "/" in value):
            changed[name] = os.path.abspath(os.path.expanduser(value))
    for name in _PATH_LIST_VARIABLES:
        if environ.get(name):
            # An empty entry means the working directory, rarely on purpose; drop it.
            changed[name] = ":".join(map(os.path.abspath, filter(None, environ[name].split(":"))))
    root = os.path.dirname(os.path.dirname(os.path.abspath(config.__file__)))
    if root not in map(os.path.abspath, sys.path[1:]) and not sys.flags.safe_path:
        # `python -m tinkerfs` in a checkout that is not installed: run the daemon from it too.
        changed["PYTHONPATH"] = ":".join(filter(None, (root, changed.get("PYTHONPATH"))))
    return changed
