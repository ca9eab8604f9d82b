"""Settings from the command line, the environment and a TOML file, by the one table of options.

Flag beats `-o`, `-o` beats environment, environment beats file, file beats default.
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

#: The system's own file, for mounts that root makes at boot.
SYSTEM_FILE: Final = "/etc/tinkerfs.toml"

#: Other names that `-o` takes, as mount(8) and libfuse spell them.
_ALIASES: Final = {"ro": "read-only", "allow_other": "allow-other"}


def mountpoint_argument(*, required: bool = True) -> Callable[[F], F]:
    """Return a decorator that gives a command its MOUNTPOINT.

    It is not looked at here: what is mounted there may hang.
    """
    return click.argument(
        "mountpoint", required=required, callback=_named, shell_complete=_complete_folder
    )


def _named(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":  # an unset variable's; it would mean the folder where we are
        raise click.BadParameter("its name is empty", ctx, param)
    return value


def _complete_folder(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


def settings_options(*fields: str) -> Callable[[F], F]:
    """Return a decorator that gives a command the settings' flags.

    Args:
        *fields: the attributes of `Settings` wanted; all of them where none is named.
    """

    def decorate(command: F) -> F:
        for option in reversed(OPTIONS):
            if not fields or option.field in fields:
                command = _flag(option)(command)
        return command

    return decorate


def _flag(option: Option) -> Callable[[F], F]:
    # Values stay text here: `resolve` parses what comes from anywhere in one place.
    # Nor can click show the defaults: it has none, as what was not said leaves room for the rest.
    default = f"default: {option.default}; " if option.default else ""
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
    """Return the settings.

    Args:
        flags: field -> what the command line said, None for nothing.
        mount_options: the arguments of each `-o`.
        config: a TOML file that must be there; None for the usual places.
        environ: the environment; None for the process's.

    Raises:
        SetupError: a value that means nothing, or an option there is not; the message names where
            it stands.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, object] = {}
    by_flag = {option.flag: option for option in OPTIONS}
    for name, (text, file) in _file_values(config, environ).items():
        option = by_flag.get(name)
        if option is None:
            known = ", ".join(sorted(by_flag))
            raise StartupError(f"{file}: there is no option {name!r}; there are {known}")
        if option.is_path and text:  # a file is read from any directory
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
        given = flags.get(option.field)
        if isinstance(given, bool):
            values[option.field] = given
        elif given is not None:
            values[option.field] = _parse(option, given, f"--{option.flag}")
    return Settings(**values)  # type: ignore[arg-type]  # each parsed by its own option


def as_arguments(
    flags: Mapping[str, str | bool | None], mount_options: Iterable[str], config: str | None
) -> list[str]:
    """Return the command line that says the same again, for the process that will serve.

    That process runs in another directory, so paths are absolute in it.
    """
    arguments, items = [], []
    paths: dict[str, str] = {}
    for item in (item for each in mount_options for item in each.split(",")):
        name, _, text = item.partition("=")
        option = _option_of(name)
        if option is not None and option.is_path:
            paths[option.field] = text  # not by -o again: the directory's name may hold a comma
        else:
            items.append(item)
    for option in OPTIONS:
        given = flags.get(option.field)
        if given is None:
            given = paths.get(option.field)
        if given is True:
            arguments.append(f"--{option.flag}")
        elif isinstance(given, str):
            given = _absolute(given) if option.is_path and given else given
            arguments.append(f"--{option.flag}={given}")
    if items:
        arguments += ["-o", ",".join(items)]
    if config is not None:
        arguments.append(f"--config={_absolute(config)}")
    return arguments


def _absolute(path: str, directory: str = "") -> str:
    """Return a path that means the same wherever the process runs."""
    return os.path.abspath(os.path.join(directory, os.path.expanduser(path)))


def _option_of(name: str) -> Option | None:
    """Return the option that `-o` calls `name`."""
    wanted = _ALIASES.get(name, name.replace("_", "-"))
    return next((option for option in OPTIONS if option.flag == wanted), None)


def _variables(option: Option) -> tuple[str, ...]:
    # The official client's own variable, so that one setting serves both.
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
            if item == "rw":  # the last of ro and rw counts, as with mount(8)
                yield by_flag["read-only"], "no"
            if not item or is_ignored(item):
                continue
            name, equals, text = item.partition("=")
            option = _option_of(name)
            if option is None:
                raise StartupError(explain_unknown(item, by_flag))
            if not equals:
                if not option.is_switch:
                    raise StartupError(f"-o {item}: it takes a value: -o {name}={option.metavar}")
                text = "yes"
            yield option, text


def _file_values(config: str | None, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return option name -> (text, file), of the file named, else the user's over the system's."""
    config = config or environ.get("TINKERFS_CONFIG") or None
    if config is not None:
        return _read_file(config, must_exist=True)
    return {**_read_file(SYSTEM_FILE), **_read_file(_user_file(environ))}


def _user_file(environ: Mapping[str, str]) -> str:
    # XDG Base Directory Specification; tinkerfs is for Linux alone.
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
            raise StartupError(f"{path}: there is no such file") from None
        return {}
    except OSError as error:
        if not must_exist:  # e.g. a parent that is no folder, or not ours to read
            return {}
        raise StartupError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: not TOML: {error}") from None
    return {
        name.replace("_", "-"): (_text(value, path, name), path) for name, value in content.items()
    }


def _text(value: object, path: str, name: str) -> str:
    """Return a TOML value as it would be written on the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "umask" and not isinstance(value, str):
        # 22 and 0o22 are different numbers in TOML, and nobody means the first.
        raise StartupError(f'{path}: umask: write it as a text: umask = "022"')
    if isinstance(value, str | int | float):
        return str(value)
    raise StartupError(f"{path}: {name}: neither a text nor a number nor true or false")
