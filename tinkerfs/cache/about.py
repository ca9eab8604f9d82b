"""The `about` file of a block cache directory: a description for users."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from tinkerfs.safe_open import open_regular, read_regular

#: Maximum number of bytes read: a server URL, a path and a length fit.
_MAX_ABOUT_BYTES = 64 << 10


def write_about(directory: str, content: bytes) -> None:
    """Write the `about` file atomically, unless it has that content already.

    Raises:
        OSError: the file cannot be written.
    """
    path = f"{directory}/about"
    with suppress(OSError):
        if read_regular(path, len(content) + 1) == content:
            return
    temporary = f"{directory}/.about.{secrets.token_hex(8)}"
    try:
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(content)
        os.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_about(directory: Path) -> tuple[str, int | None]:
    """Return the description of a directory's file, and its length if known.

    The description is "?" if the `about` file is missing, empty or not UTF-8.
    """
    try:
        text = read_regular(directory / "about", _MAX_ABOUT_BYTES).decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError):
        return "?", None
    description, newline, length = text.rpartition("\n")
    if not newline:
        return text or "?", None
    is_number = length.isascii() and length.isdigit() and len(length) < 20
    return description or "?", int(length) if is_number else None
