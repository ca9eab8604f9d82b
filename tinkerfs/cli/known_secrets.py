"""Find the secrets of this machine's user that a debug bundle must not contain.

They are hidden by their value, so that also a message that repeats one is redacted. The bundle is
searched for them afterwards.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from tinkerfs.errors import TinkerfsError
from tinkerfs.printable import MIN_SECRET_CHARS, forms_of_secret

#: Environment variables with a secret, or a command that may contain one, as value.
_SECRET_VARIABLE: Final = re.compile(r"key|token|secret|passw|credential|auth(?!or)", re.IGNORECASE)
#: Variables with a path as value, not a secret.
_PATH_VARIABLE: Final = re.compile(r"_(file|dir|directory|path|sock)$", re.IGNORECASE)
#: The key file in the arguments of a daemon, as a flag or an item of `-o`.
_KEY_FILE_ARGUMENT: Final = re.compile(r"api[-_]key[-_]file[=\0]([^\0,]+)")


def find_secrets(
    environments: Iterable[Mapping[str, str]], key_files: Iterable[str]
) -> dict[str, str]:
    """Return the secrets by their value, with a description for users.

    Args:
        environments: variables of this process, and of the daemons.
        key_files: values of `--api-key-file`, of this process and of the daemons.
    """
    found: dict[str, str] = {}
    for environ in environments:
        for name, value in environ.items():
            if _SECRET_VARIABLE.search(name) and not _PATH_VARIABLE.search(name):
                found.setdefault(value.strip(), name)
            if name.endswith("_HEADERS"):  # of OpenTelemetry: name=value,name=value
                for pair in value.split(","):
                    secret = unquote(pair.partition("=")[2]).rpartition(" ")[2]
                    found.setdefault(secret.strip(), f"a header of {name}")
            if name.lower().endswith("_proxy") or "://" in value:
                for password in _passwords(value):
                    found.setdefault(password, f"the password of {name}")
    for key_file in (None, *key_files):
        key, source = _current_key(key_file)
        if key:
            found[key] = f"the key of {source}"
    return {secret: about for secret, about in found.items() if len(secret) >= MIN_SECRET_CHARS}


def _current_key(key_file: str | None) -> tuple[str, str]:
    """Return the API key and its source; an empty key if there is none.

    Args:
        key_file: None for the source that applies without a key file.
    """
    from tinkerfs.api.credentials import Credentials  # lazy: imports HTTP

    credentials = Credentials(key_file=key_file)
    try:
        return credentials.get(), credentials.source
    except TinkerfsError:
        return "", credentials.source


def _passwords(url: str) -> Iterable[str]:
    try:
        password = urlsplit(url if "://" in url else f"http://{url}").password
    except ValueError:
        return ()
    return (password, unquote(password)) if password else ()


def key_files_of(pid: int) -> list[str]:
    """Return the key files that a daemon's arguments and environment name."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = os.fsdecode(file.read())
        directory = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return []
    environ = environment_of(pid)
    named = [environ.get(name, "") for name in ("TINKERFS_API_KEY_FILE", "TINKER_API_KEY_FILE")]
    named += _KEY_FILE_ARGUMENT.findall(arguments)
    return [os.path.join(directory, os.path.expanduser(path)) for path in named if path]


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment of a process, empty if it may not be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}


def found_in(content: bytes, secrets: Mapping[str, str]) -> list[str]:
    """Return the descriptions of the secrets that a file contains in any form."""
    return sorted(
        about
        for secret, about in secrets.items()
        if any(os.fsencode(form) in content for form in forms_of_secret(secret))
    )
