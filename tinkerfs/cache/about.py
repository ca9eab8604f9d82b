"""What a directory of the block cache is of, in its file `about`, for people. Thread-safe."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from tinkerfs.safe_open import open_regular, read_regular

#: The most that is read of what a directory is of: a server URL, a path and a length.
_MAX_ABOUT_BYTES = 64 << 10


def write_about(directory: str, content: bytes) -> None:
    """Write the file beside and rename it: a reader finds all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    path = f"{directory}/about"
    with suppress(OSError):
        if read_regular(path, len(content) + 1) == content:
            return
    draft = f"{directory}/.about.{secrets.token_hex(8)}"
    try:
        with open(open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(content)
        os.rename(draft, path)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)
        raise


def read_about(directory: Path) -> tuple[str, int | None]:
    """Return what a directory is of, and the length of that in bytes if it was known.

    "?" stands for what the directory does not say, or not in words that can be read.
    """
    try:
        told = read_regular(directory / "about", _MAX_ABOUT_BYTES).decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError):
        return "?", None
    about, newline, length = told.rpartition("\n")
    if not newline:
        return told or "?", None
    is_number = length.isascii() and length.isdigit() and len(length) < 20
    return about or "?", int(length) if is_number else None
