"""Settings from flags, `-o`, environment variables and TOML files.

The options are those of the fields of `Settings`. Precedence, highest first: flag, `-o`,
environment variable, file, default.
"""

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from tinkerfs.cli.mount_options import explain_unknown, is_ignored
from tinkerfs.config import OPTIONS, Option, Settings
from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

F = TypeVar("F", bound=Callable[..., Any])

#: The system-wide configuration file, for mounts at boot.
SYSTEM_FILE: Final = "/etc/tinkerfs.toml"

#: Names of mount(8) and libfuse for `-o` -> name of the flag.
_ALIASES: Final = {"ro": "read-only", "allow_other": "allow-other"}


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


def settings_options(*fields: str) -> Callable[[F], F]:
    """Return a decorator that adds the flags of settings to a command.

    Args:
        *fields: Attributes of `Settings`; without any, the flags of all settings are added.
    """

    def decorate(command: F) -> F:
        for option in reversed(OPTIONS):
            if not fields or option.field in fields:
                command = _flag(option)(command)
        return command

    return decorate


def _flag(option: Option) -> Callable[[F], F]:
    # Values stay strings here; `resolve` parses the values of all sources. click knows no defaults
    # and cannot show them, because an absent flag must not override the other sources.
    default = "" if option.is_switch else f"default: {option.default}; "
    help_ = f"{option.help}  [{default}env: {option.env_var}]"
    if option.is_switch:
        return click.option(
            f"--{option.flag}", option.field, is_flag=True, default=None, help=help_
        )
    return click.option(
        f"--{option.flag}", option.field, metavar=option.metavar, default=None, help=help_
    )


def resolve(
    flags: Mapping[str, str | bool | None],
    mount_options: Iterable[str] = (),
    *,
    config: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Merge the settings of all sources.

    Args:
        flags: Field of `Settings` -> value of its flag, None if absent.
        mount_options: The argument of each `-o`.
        config: A TOML file that must exist; None for the default files.
        environ: None for the environment of this process.

    Raises:
        StartupError: A value is invalid or an option is unknown; the message names the source.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, object] = {}
    by_flag = {option.flag: option for option in OPTIONS}
    for name, (text, file) in _file_values(config, environ).items():
        option = by_flag.get(name)
        if option is None:
            known = ", ".join(sorted(by_flag))
            raise StartupError(f"{file}: unknown option {name!r} (valid options: {known})")
        if option.is_path and text:  # relative to the file, from any working directory
            text = _absolute(text, os.path.dirname(os.path.abspath(file)))
        values[option.field] = _parse(option, text, f"{file}: {name}")
    for option in OPTIONS:
        for variable in _variables(option):
            if environ.get(variable):
                values[option.field] = _parse(option, environ[variable], variable)
                break
    for option, text in _mount_options(mount_options):
        values[option.field] = _parse(option, text, f"-o {option.flag}")
    for option in OPTIONS:
        value = flags.get(option.field)
        if isinstance(value, bool):
            values[option.field] = value
        elif value is not None:
            values[option.field] = _parse(option, value, f"--{option.flag}")
    return Settings(**values)  # type: ignore[arg-type]  # each option parses to its field's type


def as_arguments(
    settings: Settings,
    flags: Mapping[str, str | bool | None],
    mount_options: Iterable[str] = (),
    config: str | None = None,
) -> list[str]:
    """Return the equivalent command line for the daemon.

    It runs in another directory, so every path is passed as a flag, which precedes the other
    sources of the setting.
    """
    arguments = [argument for text in mount_options for argument in ("-o", text)]
    for option in (each for each in OPTIONS if each.field in flags):
        value = flags[option.field]
        if option.is_path and (path := getattr(settings, option.field)) is not None:
            value = _absolute(path)
        if value is True:
            arguments.append(f"--{option.flag}")
        elif value is not None:
            arguments.append(f"--{option.flag}={value}")
    if config is not None:
        arguments.append(f"--config={_absolute(config)}")
    return arguments


def _absolute(path: str, directory: str = "") -> str:
    """Return an absolute path, relative to `directory` or the working directory."""
    return os.path.abspath(os.path.join(directory, os.path.expanduser(path)))


def _variables(option: Option) -> tuple[str, ...]:
    # TINKER_BASE_URL is the variable of the official client, so that one setting serves both.
    return (option.env_var, "TINKER_BASE_URL") if option.field == "base_url" else (option.env_var,)


def _parse(option: Option, text: str, where: str) -> object:
    try:
        return option.parse(text)
    except ValueError as error:
        raise StartupError(f"{where}: {error}") from None


def _mount_options(arguments: Iterable[str]) -> Iterable[tuple[Option, str]]:
    by_flag = {option.flag: option for option in OPTIONS}
    for argument in arguments:
        for item in argument.split(","):
            if item == "rw":  # the last of ro and rw takes effect, as in mount(8)
                yield by_flag["read-only"], "no"
            if not item or is_ignored(item):
                continue
            name, equals, text = item.partition("=")
            option = by_flag.get(_ALIASES.get(name, name.replace("_", "-")))
            if option is None:
                raise StartupError(explain_unknown(item, by_flag))
            if not equals:
                if not option.is_switch:
                    raise StartupError(
                        f"-o {item}: missing value (hint: -o {name}={option.metavar})"
                    )
                text = "yes"
            yield option, text


def _file_values(config: str | None, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return option name -> (text, file) from the named or the default files."""
    config = config or environ.get("TINKERFS_CONFIG") or None
    if config is not None:
        return _read_file(config, must_exist=True)
    return {**_read_file(SYSTEM_FILE), **_read_file(_user_file(environ))}


def _user_file(environ: Mapping[str, str]) -> str:
    # See the XDG Base Directory Specification; tinkerfs supports Linux only.
    home = environ.get("XDG_CONFIG_HOME", "").strip()
    if not home:
        home = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return os.path.join(home, "tinkerfs", "config.toml")


def _read_file(path: str, *, must_exist: bool = False) -> dict[str, tuple[str, str]]:
    try:
        with open(open_regular(path, os.O_RDONLY, follow_symlinks=True), "rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError:
        if must_exist:
            raise StartupError(f"{path}: no such file") from None
        return {}
    except OSError as error:
        if not must_exist:  # e.g. a parent that is not a directory, or is not readable
            return {}
        raise StartupError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: not TOML: {error}") from None
    return {
        name.replace("_", "-"): (_text(value, path, name), path) for name, value in content.items()
    }


def _text(value: object, path: str, name: str) -> str:
    """Return a TOML value as text in the form of the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "umask" and not isinstance(value, str):
        # 22 and 0o22 are different numbers in TOML, and 22 is never intended.
        raise StartupError(f'{path}: umask: not a string (hint: umask = "022")')
    if isinstance(value, str | int | float):
        return str(value)
    raise StartupError(f"{path}: {name}: not a string, number or boolean")
