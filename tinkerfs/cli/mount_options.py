"""`-o` options of mount(8) and fstab: settings, ignored ones, and hints for the others.

An fstab line is often adapted from a line for another FUSE program. An option is ignored if it
requests what tinkerfs does anyway, if it only tunes performance, or if mount(8) or systemd acts on
it. Any other option is an error with a hint: the option to use instead.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Final

import click

from tinkerfs.cli.options import settings_of

#: Options of mount(8), fstab and systemd for any filesystem, which act on them themselves.
_MOUNT_OPTIONS: Final = """
    defaults auto noauto user nouser users owner group nofail _netdev _rnetdev dev nodev suid
    nosuid exec noexec async sync dirsync atime noatime diratime nodiratime relatime norelatime
    strictatime nostrictatime lazytime nolazytime silent loud iversion noiversion mand nomand
    symfollow nosymfollow comment bg fg sloppy
"""

#: Options of libfuse, fusermount and other FUSE programs, with or without a value.
_FUSE_OPTIONS: Final = """
    default_permissions nonempty fsname subtype blkdev blksize max_read max_write max_readahead
    max_background congestion_threshold max_threads max_idle_threads clone_fd big_writes large_read
    async_read sync_read async_dio no_async_dio atomic_o_trunc no_remote_lock no_remote_flock
    no_remote_posix_lock splice_read splice_write splice_move no_splice_read no_splice_write
    no_splice_move kernel_cache auto_cache noauto_cache direct_io hard_remove use_ino readdir_ino
    intr nointr intr_signal noforget remember auto_unmount
    reconnect delay_connect transform_symlinks follow_symlinks streams_interface windows_names
    enable_noobj_cache permissions acl noacl xattr_disabled args2env
"""
#: Options of mount(8) -> item with the name of a flag; the last of both takes effect.
_ALIASES: Final = {"ro": "read-only=yes", "rw": "read-only=no"}

_BARE: Final = frozenset(_MOUNT_OPTIONS.split())
_WITH_VALUE: Final = frozenset(_FUSE_OPTIONS.split())
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")

_TTL_HINT: Final = "ttl=S sets how long metadata is fresh; the kernel adds at most 1 s"
_UMASK_HINT: Final = "umask=M applies to files and directories: files have no execute bits"
_OWNER_HINT: Final = "uid=U,gid=G set the owner and group of everything"
_KEY_HINT: Final = "the key is not an option; api_key_file=FILE names a file with it"

#: Option of another program -> what to use instead.
_HINTS: Final = {
    "allow_root": "allow_other,umask=077 admits root and the owner, and no other user",
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
        _TTL_HINT,
    ),
    **dict.fromkeys(
        ("fmask", "dmask", "mp_umask", "mode", "dir_perms", "file_perms", "dir_mode", "file_mode"),
        _UMASK_HINT,
    ),
    **dict.fromkeys(("owner", "group", "idmap", "user_id", "group_id"), _OWNER_HINT),
    **dict.fromkeys(
        ("passwd_file", "IdentityFile", "password", "pass", "iam_role", "key", "api_key"), _KEY_HINT
    ),
    "url": "base_url=URL, or the URL as the source, the first field of the line",
    "config": "the file is /etc/tinkerfs.toml, or the one that TINKERFS_CONFIG names",
    "use_cache": "cache_dir=DIR",
    "vfs_cache_mode": "weights are always cached on disk; cache_size=SIZE limits the cache",
    "vfs_cache_max_size": "cache_size=SIZE",
    "vfs_cache_max_age": "cache_size=SIZE limits the cache, by evicting the least recently used",
    "parallel_count": "concurrency=N",
    "transfers": "concurrency=N",
    "debug": "log_level=debug,log_file=F",
    "dbglevel": "log_level=debug,log_file=F",
    "foreground": "use the flag --foreground, for a service manager",
    "bind": "mount --bind an existing mount",
    "setuid": "uid=U,gid=G set the owner of everything; to drop privileges, mount as that user",
    "drop_privileges": "mount as another user; no privileges are needed",
}


class MountCommand(click.Command):
    """A command with an option `-o`: its items become flags, before those of the command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with flags in place of the items of `-o`."""
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        items = ",".join(given.get("mount_options") or ()).split(",")
        flags = [] if ctx.resilient_parsing else list(_flags(ctx, items))
        return super().parse_args(ctx, [*flags, *args])


def _flags(ctx: click.Context, items: list[str]) -> Iterator[str]:
    settings = settings_of(ctx.command)
    if "remount" in items:  # first, because mount(8) adds all options of the mount
        raise click.UsageError(
            "-o remount: a mounted file system has the options of its start, and stays mounted"
            " (hint: tinkerfs umount, then mount it again)",
            ctx,
        )
    for item in items:
        if not item or _is_ignored(item):
            continue
        name, equals, text = _ALIASES.get(item, item).partition("=")
        option = settings.get(name.replace("_", "-"))
        if option is None and "sloppy" in items:
            continue
        if option is None:
            raise click.UsageError(_explain_unknown(item, settings), ctx)
        if not equals and not option.is_flag:
            hint = f"(hint: -o {name}={option.metavar})"
            raise click.UsageError(f"-o {name}: missing value {hint}", ctx)
        value = option.convert(text if equals else "yes", f"-o {name}", ctx)
        if option.is_flag:
            yield option.opts[0] if value else option.secondary_opts[0]
        else:
            yield f"{option.opts[0]}={text}"


def _is_ignored(item: str) -> bool:
    """Return whether an item of `-o`, a name or NAME=VALUE, has no effect."""
    # The flags `owner` and `group` restrict mounting, which mount(8) does. With a value they
    # would set an owner, so they are not ignored then.
    is_known = item in _BARE or item.partition("=")[0] in _WITH_VALUE
    return is_known or item.startswith(_IGNORED_PREFIXES)


def _explain_unknown(item: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown item of `-o`, with a hint.

    Args:
        item: a name or NAME=VALUE; the value may be a secret and is not repeated.
        known: the names of the valid options.
    """
    name = item.partition("=")[0]
    hint = _HINTS.get(name)
    if hint is None:
        choices = sorted(known)
        near = difflib.get_close_matches(name.replace("_", "-"), choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"valid options: {', '.join(choices)}"
    return f"-o {name}: unknown option (hint: {hint})"
