"""Demo server: both origins, started and stopped together.

with DemoServer(runs=3) as server:
    httpx.get(f"{server.base_url}/api/v1/training_runs", headers={"X-API-Key": server.api_key})
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from tinkerfs.demo.account import Account
from tinkerfs.demo.api import Api, Behaviour
from tinkerfs.demo.content import Content
from tinkerfs.demo.http import Application, Listener
from tinkerfs.demo.profiles import PROFILES, Profile
from tinkerfs.demo.sample_data import SampleData
from tinkerfs.demo.signing import Signer
from tinkerfs.demo.store import Store

DEMO_KEY = "tml-demo-key"
"""The API key that a demo server accepts by default."""


class DemoServer:
    """A local server of the Tinker API with a sample account.

    The attributes let tests inspect and change the server; each stays the same object for the
    lifetime of the server. All methods are thread-safe.

    Subclasses may replace the transport: `listener_class` creates the listeners, and `scheme` is
    the scheme of every URL.

    Args:
        runs: Number of training runs.
        checkpoints: Number of checkpoints of each run.
        profile: The known server to behave as: a name in `PROFILES`, or a custom profile.
        seed: Seed of the sample account.
        host: Address to listen on.
        port: Port of the API; 0 for a free one.
        store_port: Port of the store; 0 for a free one.
        prefix: Path of the base URL, such as `/services/tinker-prod`.
        api_key: The accepted API key, `tml-...`.
        latency_s: Minimum time from a request to its response, at both origins.
        clock: Returns Unix time, by which URLs and checkpoints expire.
        reference_time_s: Unix time of the account's latest activity; None for a constant in the
            past. Pass `time.time()` for a realistic demo.
        size_bytes: Size of every checkpoint; None for various sizes of 0.3 to 5 MB.
        foreign_runs: Number of public runs of other users, which are found by id but not listed.
        building_polls: Number of requests for each archive or trace during which it is "being
            built".
        signed_url_lifetime_s: Lifetime of signed URLs.
        **behaviour: Further attributes of `Behaviour`: `archive_response`, `sends_expiry`,
            `building_status`, `retry_after`, `accepts_jwt`, `requires_token`, `token_lifetime_s`,
            `exports`.

    Attributes:
        account: The records; changes take effect at once.
        behaviour: Options that may be changed while the server runs.
        exports: The sessions that export checkpoints.
        signer: Signs URLs; its `lifetime_s` may be changed.
        latency_s: May be changed while the server runs.
    """

    listener_class: Callable[..., Listener] = Listener
    scheme = "http"

    def __init__(
        self,
        runs: int = 10,
        checkpoints: int = 5,
        profile: str | Profile = "official",
        seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        prefix: str = "",
        store_port: int = 0,
        api_key: str = DEMO_KEY,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        reference_time_s: float | None = None,
        size_bytes: int | None = None,
        foreign_runs: int = 2,
        building_polls: int = 0,
        signed_url_lifetime_s: float = 900.0,
        **behaviour: Any,
    ) -> None:
        self.profile = PROFILES[profile] if isinstance(profile, str) else profile
        self.api_key, self.latency_s = api_key, latency_s
        self.signer = Signer(clock, signed_url_lifetime_s)
        self.behaviour = Behaviour(api_keys={api_key}, **behaviour)
        sample = SampleData(
            runs=runs,
            checkpoints=checkpoints,
            seed=seed,
            reference_time_s=reference_time_s,
            kinds=self.profile.kinds,
            shares_names=self.profile.shares_names,
            forgets_times=self.profile.forgets_times,
            size_bytes=size_bytes,
        )
        self.account = Account(
            sample, clock, foreign_runs=foreign_runs, building_polls=building_polls
        )
        self._host, self._prefix = host, prefix.rstrip("/")
        self._store = Store(self.account, self.profile, self.signer)
        self._api = Api(
            self.account, self.profile, self.behaviour, self._store, self._prefix, clock
        )
        self.exports = self._api.exports
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # Guarded by _lock. The ports stay the same after stop_listening().
        self._ports = {"api": port, "store": store_port}
        self._listeners: dict[str, Listener] = {}

    def start(self) -> Self:
        """Start to listen and serve; return the server itself.

        Raises:
            OSError: The address is not available.
        """
        self.resume_listening()
        return self

    def close(self) -> None:
        """Stop at once, even with hanging requests. May be called again."""
        self._closing.set()
        self.stop_listening()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def base_url(self) -> str:
        """The value for `TINKER_BASE_URL`, without a trailing slash."""
        return f"{self._origin('api')}{self._prefix}"

    @property
    def store_url(self) -> str:
        """The origin of signed URLs: scheme, host and port."""
        return self._origin("store")

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that point API clients to this server."""
        return {"TINKER_BASE_URL": self.base_url, "TINKER_API_KEY": self.api_key}

    def files(self, run_id: str, checkpoint_id: str) -> dict[str, Content]:
        """Return the expected files of a checkpoint by name.

        Raises:
            KeyError: The checkpoint does not exist.
        """
        return self._store.files(*self.account.find(run_id, checkpoint_id))

    def archive(self, run_id: str, checkpoint_id: str) -> Content:
        """Return the expected archive of a checkpoint.

        Raises:
            KeyError: The checkpoint does not exist.
        """
        return self._store.archive(*self.account.find(run_id, checkpoint_id))

    def trace(self, session_id: str) -> Content:
        """Return the expected trace of a session.

        Raises:
            KeyError: The session does not exist.
        """
        session = self.account.session(session_id)
        if session is None:
            raise KeyError(session_id)
        return self._store.trace(session)

    def archive_url(self, run_id: str, checkpoint_id: str) -> str:
        """Return a new signed URL of a checkpoint's archive, without a request.

        Raises:
            KeyError: The checkpoint does not exist.
        """
        return self._store.sign_archive(*self.account.find(run_id, checkpoint_id))[0]

    def stop_listening(self, *origins: str) -> None:
        """Refuse new connections and close the open ones.

        Args:
            *origins: `api` or `store`; both by default.
        """
        with self._lock:
            for name in origins or ("api", "store"):
                listener = self._listeners.pop(name, None)
                if listener is not None:
                    listener.stop()

    def resume_listening(self) -> None:
        """Listen again on the same ports as before.

        Raises:
            OSError: Another process has taken a port.
        """
        with self._lock:
            apps: tuple[Application, ...] = (self._store, self._api)
            for app in apps:
                if app.name not in self._listeners:
                    listener = self._listen(app)
                    self._ports[app.name] = listener.server_port
                    self._listeners[app.name] = listener
        self._store.base_url, self._api.base_url = self.store_url, self.base_url

    def drop_connections(self) -> None:
        """Close all open connections, idle or not; new ones are accepted."""
        with self._lock:
            for listener in self._listeners.values():
                listener.drop_connections()

    def _listen(self, app: Application) -> Listener:
        return self.listener_class(
            (self._host, self._ports[app.name]),
            app,
            latency_s=lambda: self.latency_s,
            is_closing=self._closing.is_set,
        )

    def _origin(self, name: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self.scheme}://{host}:{self._ports[name]}"
