"""Options of commands: the settings, from flags, environment variables and TOML files.

Each field of `Settings` is set by the option of its name. Precedence, highest first: flag, `-o`
(see `mount_options.py`), environment variable, TOML file, default. A command without the flag of a
setting has its other sources all the same.
"""

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from tinkerfs.cli.urls import (
    has_password,
    parse_base_url,
    parse_blob_proxy,
    parse_shared_cache,
)
from tinkerfs.config import (
    DEFAULT_BASE_URL,
    LOG_FORMATS,
    LOG_LEVELS,
    MAX_CONCURRENCY,
    MOE_LAYOUTS,
    RELOADABLE,
    SYSLOG,
    TTL_RANGE_S,
    Settings,
    parse_address,
    parse_duration_s,
)
from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

F = TypeVar("F", bound=Callable[..., Any])

#: The system-wide configuration file, for mounts at boot.
SYSTEM_FILE: Final = "/etc/tinkerfs.toml"
#: Start of the keys of `click.Context.meta` for the file that has the value of an option.
_FILE_OF: Final = "tinkerfs file of "

#: Key of `click.Context.meta`: the file that `--config` names, or None.
_CONFIG_FILE: Final = "tinkerfs.config_file"

#: Sources of a value that a changed configuration file may change.
_FROM_FILES: Final = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


class Parsed(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.5
    """A kind of value with a function that parses its text, or raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Return the value of a text; fail with the message of the ValueError."""
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _SharedCacheUrl(Parsed):
    """The URL of a server, with a password only where no other user sees it."""

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """Return the value of a text; fail if the password is on the command line."""
        url = super().convert(value, param, ctx)
        is_visible = (
            ctx is not None
            and param is not None
            and ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        )
        if is_visible and has_password(str(url)):
            message = "a password in it would be visible to other users"
            self.fail(f"{message} (hint: TINKERFS_SHARED_CACHE or a file)", param, ctx)
        return url


def _parse_timeout_s(text: str) -> float:
    seconds = parse_duration_s(text)
    if seconds <= 0:
        raise ValueError(f"not more than 0 seconds: {text!r}")
    return seconds


def _parse_trash_s(text: str) -> float:
    seconds = parse_duration_s(text)
    shortest_s, longest_s = TTL_RANGE_S
    if not shortest_s <= seconds <= longest_s:
        raise ValueError(f"not between 1h and 3650d: {text!r}")
    return seconds


def _parse_size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ValueError(f"not a size: {text!r} (hint: 500M, 20G or 0)")
    return int(float(match.group(1)) * 1024 ** " kmgt".index(match.group(2) or " "))


def _parse_umask(text: str) -> int:
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", text.strip()) or int(text, 8) > 0o777:
        raise ValueError(f"not an octal umask between 000 and 777: {text!r}")
    return int(text, 8)


def _parse_path(text: str) -> str:
    """Return an absolute path, because a mount is served in another directory.

    click.Path would call stat(), which hangs below a mount that hangs.
    """
    if not text or "\0" in text:
        raise ValueError(f"not a path: {text!r}")
    return os.path.abspath(os.path.expanduser(text))


def _parse_audit(text: str) -> str:
    return text if text == SYSLOG else _parse_path(text)


def _parse_address(text: str) -> str:
    parse_address(text)
    return text.strip()


_DURATION: Final = Parsed("duration", parse_duration_s)
TIMEOUT: Final = Parsed("duration", _parse_timeout_s)
PATH: Final = Parsed("path", _parse_path)
_AUDIT: Final = Parsed("destination", _parse_audit)
ADDRESS: Final = Parsed("address", _parse_address)
SIZE: Final = Parsed("size", _parse_size_bytes)
_UMASK: Final = Parsed("umask", _parse_umask)
_ID: Final = click.IntRange(0, 2**32 - 2)  # see chown(2): the next number means no change


class Setting(click.Option):
    """An option that has other sources than its flag, and only those if it is hidden."""

    @property
    def key(self) -> str:
        """The flag without its dashes, which is also the TOML key and the name for `-o`."""
        return self.opts[0].removeprefix("--")

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Accept the flag, unless it is hidden."""
        if not self.hidden:
            super().add_to_parser(parser, ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the source of an invalid value: the variable or the flag."""
        source = source_of(self, ctx) if ctx else ""
        return source if source in (self.envvar or ()) else self.opts[0]

    def convert(self, text: str, source: str, ctx: click.Context) -> Any:
        """Return the value of a text from a source that click does not know.

        Raises:
            BadParameter: The value is invalid; the message names the source.
        """
        try:
            return self.type(text, self, ctx)
        except click.BadParameter as error:
            error.param_hint = source
            raise


def settings_options(*names: str) -> Callable[[F], F]:
    """Return a decorator that adds the options of settings to a command.

    The command gets a keyword argument for each field of `Settings`.

    Args:
        *names: Options that have a flag; without any, all have one.
    """

    def decorate(command: F) -> F:
        for name, option in reversed(_OPTIONS.items()):
            command = option(name, hidden=bool(names) and name not in names)(command)
        return command

    return decorate


def settings_of(command: click.Command) -> dict[str, Setting]:
    """Return the options of a command that set a field of `Settings`, by their keys."""
    options = (option for option in command.params if isinstance(option, Setting))
    return {option.key: option for option in options if option.expose_value}


def _read_config(ctx: click.Context, _param: click.Parameter, path: str | None) -> None:
    """Make the values of the named file, or of the default files, the defaults of the options.

    Raises:
        UsageError: A file is invalid; the message names the file and the key.
    """
    ctx.meta[_CONFIG_FILE] = path
    ctx.default_map = _read_files(ctx, path)


def reload_settings(ctx: click.Context, current: Settings) -> tuple[Settings, list[str]]:
    """Read the configuration files again; return the settings that result for a running mount.

    Flags and variables are those of the start, because a process has them to its end. The second
    value has the names of the options that changed but need a new mount.

    Raises:
        StartupError: A file is invalid; the message names the file and the key.
    """
    try:
        texts = _read_files(ctx, ctx.meta[_CONFIG_FILE])
    except click.UsageError as error:
        raise StartupError(error.format_message()) from None
    adopted: dict[str, Any] = {}
    ignored: list[str] = []
    for key, option in settings_of(ctx.command).items():
        name = str(option.name)
        if ctx.get_parameter_source(name) not in _FROM_FILES:
            continue
        value = option.type_cast_value(ctx, texts.get(name, option.default))
        if name in RELOADABLE:
            adopted[name] = value
        elif value != getattr(current, name):
            ignored.append(key)
    return replace(current, **adopted), ignored


def _read_files(ctx: click.Context, path: str | None) -> dict[str, str]:
    """Return the text of each option by its name in the named file, or in the default files.

    Raises:
        UsageError: A file is invalid; the message names the file and the key.
    """
    options = settings_of(ctx.command)
    texts: dict[str, str] = {}
    for file in (path,) if path else (SYSTEM_FILE, _user_file()):
        for key, value in _read_file(file, must_exist=bool(path)).items():
            option, text, source = options.get(key.replace("_", "-")), str(value), f"{file}: {key}"
            if option is None:
                known = ", ".join(sorted(options))
                raise click.UsageError(f"{source}: unknown option (valid options: {known})")
            if not isinstance(value, str | int | float):
                raise click.UsageError(f"{source}: not a string, number or boolean")
            if option.type is _UMASK and not isinstance(value, str):
                # 22 and 0o22 are different numbers in TOML, and 22 is never intended.
                raise click.UsageError(f'{source}: not a string (hint: umask = "022")')
            is_path = option.type is PATH or (option.type is _AUDIT and text != SYSLOG)
            if is_path and text:  # relative to the file
                text = os.path.join(os.path.dirname(file), os.path.expanduser(text))
            option.convert(text, source, ctx)
            texts[str(option.name)] = text
            ctx.meta[f"{_FILE_OF}{option.name}"] = file
    return texts


def config_file_of(ctx: click.Context) -> str | None:
    """Return the configuration file that was named, None for the default files."""
    path: str | None = ctx.meta[_CONFIG_FILE]
    return path


def source_of(option: Setting, ctx: click.Context) -> str:
    """Return where the value of a setting is from: "default", "option", a variable or a file."""
    source = ctx.get_parameter_source(str(option.name))
    if source is ParameterSource.ENVIRONMENT:
        return next(name for name in option.envvar or () if os.environ.get(name))
    if source is ParameterSource.DEFAULT_MAP:
        return str(ctx.meta[f"{_FILE_OF}{option.name}"])
    return "option" if source is ParameterSource.COMMANDLINE else "default"


def _user_file() -> str:
    # See the XDG Base Directory Specification; tinkerfs supports Linux only.
    home = os.environ.get("XDG_CONFIG_HOME", "").strip() or os.path.expanduser("~/.config")
    return os.path.abspath(os.path.join(home, "tinkerfs", "config.toml"))


def _read_file(path: str, *, must_exist: bool) -> dict[str, object]:
    try:
        with open(open_regular(path, os.O_RDONLY, follow_symlinks=True), "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        if not must_exist:  # also if e.g. a parent is not a directory, or is not readable
            return {}
        raise click.UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path}: not TOML: {error}") from None


def _setting(
    usage: str, type_: Any, default: str | bool | None, help: str, **attributes: Any
) -> Callable[..., Callable[[F], F]]:
    flag, _, metavar = usage.partition(" ")
    key = flag.partition("/")[0].removeprefix("--")
    attributes = {
        "type": type_,
        "metavar": metavar or None,
        "envvar": ["TINKERFS_" + key.upper().replace("-", "_")],
        "show_envvar": True,
        "default": default,
        "show_default": True,
        "help": help,
        **attributes,
    }
    return partial(click.option, flag, cls=Setting, **attributes)


#: Name -> function of the name, which returns the option as a decorator.
_OPTIONS: Final = {
    "base_url": _setting(
        "--base-url URL",
        Parsed("url", parse_base_url),
        DEFAULT_BASE_URL,
        "URL of the API.",
        show_default="the official service",
        envvar=["TINKERFS_BASE_URL", "TINKER_BASE_URL"],  # the second is the official client's
    ),
    "api_key_file": _setting(
        "--api-key-file FILE",
        PATH,
        None,
        "File with the API key and mode 0600; without it, the key is searched elsewhere.",
        show_default="none",
        envvar=["TINKERFS_API_KEY_FILE", "TINKER_API_KEY_FILE"],
    ),
    "read_only": _setting("--read-only/--no-read-only", bool, False, "Reject every change."),
    "allow_other": _setting(
        "--allow-other/--no-allow-other",
        bool,
        False,
        "Allow other users, subject to permission checks.",
    ),
    "ttl_s": _setting("--ttl S", _DURATION, "30", "How long cached metadata is fresh."),
    "stale_if_error_s": _setting(
        "--stale S", _DURATION, "24h", "How long cached metadata is served while the API fails."
    ),
    "cache_dir": _setting(
        "--cache-dir DIR", PATH, None, "Directory of the cache.", show_default="~/.cache/tinkerfs"
    ),
    "cache_size_bytes": _setting(
        "--cache-size SIZE",
        SIZE,
        "10G",
        "Maximum size of the weights cached on disk; 0 caches none.",
    ),
    "blob_proxy": _setting(
        "--blob-proxy URL",
        Parsed("url", parse_blob_proxy),
        None,
        "Read weights through this caching proxy (see `tinkerfs proxy-config`): https, or http on"
        " this machine.",
        show_default="none",
    ),
    "shared_cache": _setting(
        "--shared-cache URL",
        _SharedCacheUrl("url", parse_shared_cache),
        None,
        "Share API responses with other hosts through this Redis or Valkey server: redis, rediss or"
        " unix. A URL with a password belongs in the variable or a file.",
        show_default="none",
    ),
    "concurrency": _setting(
        "--concurrency N",
        click.IntRange(1, MAX_CONCURRENCY),
        "8",
        "API requests at a time; archive builds are not counted.",
    ),
    "timeout_s": _setting(
        "--timeout S",
        TIMEOUT,
        "30",
        "Timeout of every wait, except for archives and traces.",
    ),
    "archive_timeout_s": _setting(
        "--archive-timeout S",
        TIMEOUT,
        "15m",
        "Timeout of the wait for an archive or a trace.",
    ),
    "archive_build_limit": _setting(
        "--archive-burst N",
        click.IntRange(0),
        "8",
        "Archives and traces that one process group may request per minute; 0 for no limit.",
    ),
    "trash_s": _setting(
        "--trash DURATION",
        Parsed("duration", _parse_trash_s),
        None,
        "Make removed checkpoints expire after this time, 1h to 3650d, instead of deleting them;"
        " `tinkerfs undelete` restores them.",
        show_default="none",
    ),
    "base_models": _setting(
        "--base-models DIR",
        PATH,
        None,
        "Directory of base models, which decide how the files in /adapters are named; without it,"
        " the local Hugging Face cache and a table of the service's models are used.",
        show_default="none",
    ),
    "moe_layout": _setting(
        "--moe-layout LAYOUT",
        click.Choice(MOE_LAYOUTS, case_sensitive=False),
        "peft",
        "Layout of experts in /adapters: peft, one tensor per expert; or packed, one for all of"
        " them, as vLLM loads it with --enable-moe-shared-loras.",
    ),
    "xattr": _setting(
        "--xattr/--no-xattr",
        bool,
        False,
        "Provide extended attributes (user.tinker.*); makes ls -l slower.",
    ),
    "uid": _setting(
        "--uid U", _ID, None, "Numeric owner of all files.", show_default="the mounting user"
    ),
    "gid": _setting(
        "--gid G", _ID, None, "Numeric group of all files.", show_default="the mounting user's"
    ),
    "umask": _setting("--umask M", _UMASK, "000", "Permission bits to clear, octal."),
    "log_file": _setting(
        "--log-file F", PATH, None, "Write the log to this file.", show_default="none"
    ),
    "log_format": _setting(
        "--log-format FORMAT",
        click.Choice(LOG_FORMATS, case_sensitive=False),
        "text",
        "Format of the log: text, or json with an object per line.",
    ),
    "log_level": _setting(
        "--log-level L",
        click.Choice(LOG_LEVELS, case_sensitive=False),
        "warning",
        f"Least severe level to log: {', '.join(LOG_LEVELS)}.",
    ),
    "metrics": _setting(
        "--metrics ADDRESS:PORT",
        ADDRESS,
        None,
        "Serve metrics for Prometheus over HTTP; without ADDRESS, at 127.0.0.1.",
        show_default="none",
    ),
    "audit": _setting(
        "--audit DEST",
        _AUDIT,
        None,
        "Write two lines per change to the system's log, if DEST is syslog, or to this file or"
        " datagram socket.",
        show_default="none",
    ),
    "config": _setting(
        "--config FILE",
        PATH,
        None,
        "Read options from this TOML file instead of /etc/tinkerfs.toml and"
        " ~/.config/tinkerfs/config.toml.",
        is_eager=True,  # before the settings
        expose_value=False,
        callback=_read_config,
    ),
}


def mountpoint_argument(*, required: bool = True) -> Callable[[F], F]:
    """Return a decorator that adds the argument MOUNTPOINT to a command.

    The path is not accessed while parsing, because a mount there may hang.
    """
    return click.argument(
        "mountpoint", required=required, callback=_require_name, shell_complete=_complete_directory
    )


def _require_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":  # e.g. from an unset variable; it would mean the working directory
        raise click.BadParameter("the name is empty", ctx, param)
    return value


def _complete_directory(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]
