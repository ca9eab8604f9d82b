"""Names of `-o` that are not options of tinkerfs: which are ignored, and what to use for others.

An fstab line is often written after one for another FUSE program. Taken are names that say what
tinkerfs does anyway, that only set how fast something is, or that mount(8) and systemd act upon. A
name that asks for something else is refused, with the option that serves.
"""

import difflib
from collections.abc import Iterable
from typing import Final

#: What mount(8), fstab and systemd say about any file system: it is theirs to act upon, not ours.
_OF_MOUNT: Final = """
    defaults rw auto noauto user nouser users owner group nofail _netdev _rnetdev dev nodev suid
    nosuid exec noexec async sync dirsync atime noatime diratime nodiratime relatime norelatime
    strictatime nostrictatime lazytime nolazytime silent loud iversion noiversion mand nomand
    symfollow nosymfollow comment bg fg
"""

#: What libfuse, fusermount and other FUSE programs take, by name alone or with a value.
_OF_FUSE: Final = """
    default_permissions nonempty fsname subtype blkdev blksize max_read max_write max_readahead
    max_background congestion_threshold max_threads max_idle_threads clone_fd big_writes large_read
    async_read sync_read async_dio no_async_dio atomic_o_trunc no_remote_lock no_remote_flock
    no_remote_posix_lock splice_read splice_write splice_move no_splice_read no_splice_write
    no_splice_move kernel_cache auto_cache noauto_cache direct_io hard_remove use_ino readdir_ino
    intr nointr intr_signal noforget remember auto_unmount
    reconnect delay_connect transform_symlinks follow_symlinks streams_interface windows_names
    enable_noobj_cache permissions acl noacl xattr_disabled args2env
"""
_BARE: Final = frozenset(_OF_MOUNT.split())
_WITH_VALUE: Final = frozenset(_OF_FUSE.split())
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")

_OF_CACHING: Final = "ttl=S sets for how long metadata is fresh; the kernel adds 1 s at most"
_OF_MODES: Final = "umask=M serves for files and directories: no file has execute bits"
_OF_OWNER: Final = "uid=U,gid=G set the owner and group of everything"
_OF_KEY: Final = "the key is not an option: TINKER_API_KEY, TINKER_CREDENTIAL_CMD, or a login"

#: Name of another program's option -> what serves here.
_HINTS: Final = {
    "allow_root": "allow_other,umask=077 lets in root and the owner, and no one else",
    **dict.fromkeys(
        (
            "attr_timeout",
            "entry_timeout",
            "negative_timeout",
            "ac_attr_timeout",
            "dir_cache_time",
            "dcache_timeout",
            "cache_timeout",
            "poll_interval",
            "stat_cache_expire",
        ),
        _OF_CACHING,
    ),
    **dict.fromkeys(
        ("fmask", "dmask", "mp_umask", "mode", "dir_perms", "file_perms", "dir_mode", "file_mode"),
        _OF_MODES,
    ),
    **dict.fromkeys(("owner", "group", "idmap", "user_id", "group_id"), _OF_OWNER),
    **dict.fromkeys(
        ("passwd_file", "IdentityFile", "password", "pass", "iam_role", "key", "api_key"), _OF_KEY
    ),
    "url": "base_url=URL, or the URL as the source, the line's first field",
    "config": "the file is /etc/tinkerfs.toml, or what TINKERFS_CONFIG names",
    "use_cache": "cache_dir=DIR",
    "vfs_cache_mode": "weights are always cached on disk; cache_size=SIZE bounds them",
    "vfs_cache_max_size": "cache_size=SIZE",
    "vfs_cache_max_age": "cache_size=SIZE bounds the cache; what is least recently used goes first",
    "parallel_count": "concurrency=N",
    "transfers": "concurrency=N",
    "debug": "log_level=debug,log_file=F",
    "dbglevel": "log_level=debug,log_file=F",
    "foreground": "it is --foreground, for a service manager",
    "remount": "tinkerfs umount, then mount it again",
    "bind": "mount --bind of what is mounted already",
    "setuid": "uid=U,gid=G set the owner of everything; run the mount as that user for the rest",
    "drop_privileges": "run the mount as another user, who needs no privileges",
}


def is_ignored(item: str) -> bool:
    """Tell whether one item of `-o` is taken without effect: a name, perhaps with a value."""
    # `owner` and `group` say who may mount; with a value they would mean what is not done.
    is_known = item in _BARE or item.partition("=")[0] in _WITH_VALUE
    return is_known or item.startswith(_IGNORED_PREFIXES)


def explain_unknown(item: str, known: Iterable[str]) -> str:
    """Return why an item of `-o` is refused, with a hint at what serves.

    Args:
        item: a name, perhaps with a value, which may be a secret and is not repeated.
        known: the options there are.
    """
    name = item.partition("=")[0]
    hint = _HINTS.get(name)
    if hint is None:
        choices = sorted(known)
        near = difflib.get_close_matches(name.replace("_", "-"), choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(choices)}"
    return f"-o {name}: no such option (hint: {hint})"
