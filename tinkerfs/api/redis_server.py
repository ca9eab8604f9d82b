"""Commands of a Redis or Valkey server, each with a bound on its time and on what it returns.

Connections are made as to the API: one deadline for the lookup and every address, and the same
trusted certificates. The commands exist in every Redis since 2.6.12. No scripts are used, so a
user with an access list needs few rights.
"""

import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tinkerfs import errors, network, tls
from tinkerfs.printable import hide_secret

T = TypeVar("T")

#: Maximum size of what is stored beside values: generations and claims.
_MAX_MARK_BYTES: Final = 64

_DEFAULT_PORT: Final = 6379


class ServerFailedError(Exception):
    """A command failed; the message is the reason, without secrets."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the server has for a response.

    Attributes:
        now_us: its clock, microseconds since 1970.
        generation: the current generation; empty if there is none.
        value: the stored value, or its start; empty if there is none.
    """

    now_us: int
    generation: bytes
    value: bytes


class RedisServer:
    """A server. Thread-safe.

    Args:
        url: redis, rediss or unix URL, already validated.
        timeout_s: bound on the connection and on each wait for a reply, seconds.

    Raises:
        StartupError: the trusted certificates cannot be read.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        parts = urlsplit(url)
        options: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,  # servers before Redis 6 have no other
            "username": unquote(parts.username) if parts.username else None,
            "password": unquote(parts.password) if parts.password else None,
        }
        for secret in (parts.password, options["password"]):
            if secret:
                hide_secret(secret, "redis")
        if parts.scheme == "unix":
            options["connection_class"] = redis.UnixDomainSocketConnection
            options["path"] = unquote(parts.path)
            options["db"] = int(parse_qs(parts.query).get("db", ["0"])[0])
            self.name = options["path"]
        else:
            options["connection_class"] = _TimedConnection
            if parts.scheme == "rediss":
                options["connection_class"] = _TimedTlsConnection
                options["context"] = tls.trusting_context()
            options["host"], options["port"] = parts.hostname, parts.port or _DEFAULT_PORT
            options["db"] = int(parts.path.strip("/") or 0)
            self.name = parts.netloc.rpartition("@")[2]
        self._client = redis.Redis(connection_pool=redis.ConnectionPool(**options))

    def close(self) -> None:
        """Close every connection; commands in flight fail."""
        self._client.connection_pool.disconnect()

    def read(self, generation_key: str, value_key: str, max_bytes: int) -> Reading:
        """Return what the server has for a response, at one instant.

        Args:
            max_bytes: how much of the value is returned, at most.

        Raises:
            ServerFailedError: the command failed.
        """

        def read() -> Reading:
            with self._client.pipeline() as pipeline:
                pipeline.time()
                # GETRANGE limits the size of the reply, whatever is stored.
                pipeline.getrange(generation_key, 0, _MAX_MARK_BYTES)
                pipeline.getrange(value_key, 0, max_bytes - 1)
                moment, *texts = pipeline.execute(raise_on_error=False)
            if isinstance(moment, Exception):
                raise moment
            seconds, microseconds = moment
            # Values of another type are an error; they are as good as absent.
            found = [each if isinstance(each, bytes) else b"" for each in texts]
            return Reading(seconds * 1_000_000 + microseconds, *found)

        return _guarded(read)

    def begin(self, generation_key: str, generation: bytes, life_s: float) -> bytes:
        """Return the current generation, which is `generation` if there was none.

        Raises:
            ServerFailedError: the command failed, also if the server accepts no writes.
        """

        def begin() -> bytes:
            life_ms = int(life_s * 1000)
            with self._client.pipeline() as pipeline:
                pipeline.set(generation_key, generation, px=life_ms, nx=True)
                pipeline.pexpire(generation_key, life_ms)
                pipeline.getrange(generation_key, 0, _MAX_MARK_BYTES)
                return bytes(pipeline.execute()[2])

        return _guarded(begin)

    def claim(self, key: str, claim: bytes, life_s: float) -> bytes:
        """Store a claim unless there is one; return the one that the server has.

        Raises:
            ServerFailedError: the command failed.
        """

        def attempt() -> bytes:
            with self._client.pipeline() as pipeline:
                pipeline.set(key, claim, px=int(life_s * 1000), nx=True)
                pipeline.getrange(key, 0, _MAX_MARK_BYTES)
                return bytes(pipeline.execute()[1])

        return _guarded(attempt)

    def extend(self, keys: Iterable[str], life_s: float) -> None:
        """Let claims live longer.

        Raises:
            ServerFailedError: the command failed.
        """

        def extend() -> None:
            with self._client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.pexpire(key, int(life_s * 1000))
                pipeline.execute()

        _guarded(extend)

    def mark(self, key: str, claim: bytes, life_s: float) -> None:
        """Replace a claim.

        Raises:
            ServerFailedError: the command failed.
        """
        _guarded(lambda: self._client.set(key, claim, px=max(int(life_s * 1000), 1)))

    def store(self, key: str, value: bytes, life_s: float, claim_key: str) -> None:
        """Store a value, and remove its claim.

        Raises:
            ServerFailedError: the command failed.
        """

        def store() -> None:
            with self._client.pipeline() as pipeline:
                pipeline.set(key, value, px=max(int(life_s * 1000), 1))
                pipeline.delete(claim_key)
                pipeline.execute()

        _guarded(store)

    def announce(
        self, generation_key: str, generation: bytes, life_s: float, channel: str, message: bytes
    ) -> None:
        """Begin a generation, and send a message to a channel, at one instant.

        Raises:
            ServerFailedError: the command failed.
        """

        def announce() -> None:
            with self._client.pipeline() as pipeline:
                pipeline.set(generation_key, generation, px=int(life_s * 1000))
                pipeline.publish(channel, message)
                pipeline.execute()

        _guarded(announce)

    def subscribe(self, channel: str) -> "Subscription":
        """Subscribe to a channel; return when the server has confirmed it.

        Raises:
            ServerFailedError: the command failed.
        """
        return _guarded(lambda: Subscription(self._client, channel))


class Subscription:
    """The messages of a channel. Not thread-safe."""

    def __init__(self, client: "redis.Redis", channel: str) -> None:
        self._pubsub = client.pubsub()  # type: ignore[no-untyped-call]
        timeout_s = client.connection_pool.connection_kwargs["socket_timeout"]
        try:
            self._pubsub.subscribe(channel)
            _require_reply(self._pubsub.get_message(timeout=timeout_s))
        except BaseException:
            self._pubsub.close()
            raise
        self._replied_at = time.monotonic()

    def next(self, timeout_s: float) -> bytes | None:
        """Return the next message; None if none arrives in time.

        Raises:
            ServerFailedError: the connection failed.
        """

        def receive() -> bytes | None:
            message = self._pubsub.get_message(timeout=timeout_s)
            if message is None:
                return None
            self._replied_at = time.monotonic()
            data = message["data"]
            is_message = message["type"] == "message" and isinstance(data, bytes)
            return data if is_message else None

        return _guarded(receive)

    def ping(self, timeout_s: float) -> None:
        """Ask for a sign of life; `next` receives it.

        Raises:
            ServerFailedError: the connection failed, or the server was silent for `timeout_s`.
        """

        def ping() -> None:
            _require_reply(time.monotonic() - self._replied_at <= timeout_s)
            self._pubsub.ping()

        _guarded(ping)

    def __enter__(self) -> Self:
        """Return the subscription itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the connection."""
        self._pubsub.close()


def _require_reply(reply: object) -> None:
    if not reply:
        raise redis.TimeoutError("no reply in time")


def _guarded(command: Callable[[], T]) -> T:
    """Run a command.

    Raises:
        ServerFailedError: the command failed.
    """
    try:
        return command()
    except Exception as error:  # noqa: BLE001
        # redis-py raises errors of many kinds for replies of other protocols, and no operation may
        # fail because of any of them.
        reason = errors.redact(str(error)) or type(error).__name__
        raise ServerFailedError(reason) from None


class _TimedConnection(redis.Connection):
    """A TCP connection with one deadline for the lookup and every address."""

    def _connect(self) -> Any:
        deadline = time.monotonic() + (self.socket_connect_timeout or 0.0)
        found = network.connect(str(self.host), int(self.port), deadline)
        found.settimeout(self.socket_timeout)
        return found


class _TimedTlsConnection(_TimedConnection):
    """The same with TLS."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._context = context

    def _connect(self) -> Any:
        with closing(super()._connect()) as plain:
            # The new socket takes over the descriptor of the plain one.
            return self._context.wrap_socket(plain, server_hostname=str(self.host))
