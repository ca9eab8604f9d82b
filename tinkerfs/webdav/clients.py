"""The client of a request, in place of the process that calls a mount."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tinkerfs import errors
from tinkerfs.context import Caller


@dataclass(frozen=True, slots=True)
class WebDavClient(Caller):
    """A program on one host: the same address, user and User-Agent.

    All of them share a group, because a program removes files over several connections. So the
    deletion guard and the limit of archive builds apply to the program as to a process group.

    Attributes:
        name: the program and the address, for `.tinkerfs/changes`.
    """

    name: str = "?"

    def command(self) -> str:
        """Return the program and the address."""
        return self.name

    @classmethod
    def from_environ(cls, environ: Mapping[str, Any]) -> Self:
        """Return the client of a WSGI request."""
        address, agent = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_USER_AGENT", "")
        user = environ.get("wsgidav.auth.user_name", "")
        identity = "\0".join((address, user, agent)).encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(identity, digest_size=7).digest()
        program = errors.redact(agent, limit=60) or "?"
        return cls(
            0, os.getuid(), int.from_bytes(digest, "big"), name=f"{program} at {address or '?'}"
        )
