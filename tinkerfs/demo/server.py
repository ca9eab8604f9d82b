"""A demo server: both origins, started and stopped together.

with DemoServer(runs=3) as server:
    httpx.get(f"{server.base_url}/api/v1/training_runs", headers={"X-API-Key": server.api_key})
    assert server.journal.count("GET training_runs") == 1
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from tinkerfs.demo.account import Account
from tinkerfs.demo.api import Api, Behaviour
from tinkerfs.demo.content import Content
from tinkerfs.demo.faults import FaultPlan
from tinkerfs.demo.http import Listener, Origin
from tinkerfs.demo.profiles import PROFILES, Profile
from tinkerfs.demo.request_log import Journal
from tinkerfs.demo.sample_data import Catalogue
from tinkerfs.demo.signing import Signer
from tinkerfs.demo.store import Store

DEMO_KEY = "tml-demo-key"
"""The key that a demo server takes when it is told no other."""


class DemoServer:
    """A server of the Tinker API on this machine, with a sample account.

    Everything that tests may want to look at or to change is an attribute, and stays the same
    object from construction to the end. All methods are thread-safe.

    A subclass may listen in another way: `listener_class` makes the listeners, `scheme` begins
    every URL.

    Args:
        runs: Number of training runs.
        checkpoints: Number of checkpoints of each run.
        profile: Which known server it behaves as: a name of `PROFILES`, or one's own.
        seed: Another seed gives another account.
        host: Address to listen on.
        port: Port of the API; 0 for any. The store's is always any.
        faults: What goes wrong; nothing by default.
        prefix: Path of the base URL, such as `/services/tinker-prod`.
        api_key: The key that is taken, `tml-...`.
        latency_s: How long after a request its answer begins at the earliest, the store's too.
        clock: Returns Unix time: for expiries.
        reference_time_s: Unix time of the account's newest moment; None for one in the past that
            is always the same; `time.time()` for a lively demo.
        size_bytes: Of every checkpoint; None for various, 0.3 to 5 MB.
        foreign_runs: Number of public runs of somebody else: resolved by id, not listed.
        building_polls: How often every archive is "being built" before it is there.
        signed_url_lifetime_s: How long signed URLs are good for.
        **behaviour: Further attributes of `Behaviour`: `archive_answer`, `tells_expiry`,
            `building_status`, `retry_after`, `accepts_jwt`.

    Attributes:
        account: What there is; changes show at once.
        behaviour: Manners that may be changed while it serves.
        journal: The requests so far.
        faults: What shall go wrong.
        signer: Of the signed URLs: `lifetime_s`, `revoke_all()`.
        latency_s: May be changed while it serves.
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
        faults: FaultPlan | None = None,
        *,
        prefix: str = "",
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
        self.journal, self.faults = Journal(), faults or FaultPlan()
        self.signer = Signer(clock, signed_url_lifetime_s)
        self.behaviour = Behaviour(api_keys={api_key}, **behaviour)
        catalogue = Catalogue(
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
            catalogue, clock, foreign_runs=foreign_runs, building_polls=building_polls
        )
        self._host, self._prefix = host, prefix.rstrip("/")
        self._store = Store(self.account, self.profile, self.signer)
        self._api = Api(
            self.account, self.profile, self.behaviour, self._store, self._prefix, clock
        )
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # Guarded by _lock. The ports, once known, are kept over stop_listening().
        self._ports = {"api": port, "store": 0}
        self._listeners: dict[str, Listener] = {}

    def start(self) -> Self:
        """Listen and serve; return the server itself.

        Raises:
            OSError: The address cannot be had.
        """
        self.resume_listening()
        return self

    def close(self) -> None:
        """End everything at once, also requests that hang. May be called again."""
        self._closing.set()
        self.stop_listening()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def base_url(self) -> str:
        """What `TINKER_BASE_URL` is to be, without a slash at the end."""
        return f"{self._origin('api')}{self._prefix}"

    @property
    def store_url(self) -> str:
        """The origin of the signed URLs."""
        return self._origin("store")

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make any client of the API use this server."""
        return {"TINKER_BASE_URL": self.base_url, "TINKER_API_KEY": self.api_key}

    def files(self, run_id: str, checkpoint_id: str) -> dict[str, Content]:
        """Return the true files of a checkpoint by name, for comparison.

        Raises:
            KeyError: There is no such checkpoint.
        """
        return self._store.files(*self.account.find(run_id, checkpoint_id))

    def archive(self, run_id: str, checkpoint_id: str) -> Content:
        """Return the true archive of a checkpoint, for comparison.

        Raises:
            KeyError: There is no such checkpoint.
        """
        return self._store.archive(*self.account.find(run_id, checkpoint_id))

    def archive_url(self, run_id: str, checkpoint_id: str) -> str:
        """Return a fresh signed URL of a checkpoint's archive, without a request.

        Raises:
            KeyError: There is no such checkpoint.
        """
        return self._store.sign_archive(*self.account.find(run_id, checkpoint_id))[0]

    def stop_listening(self, *origins: str) -> None:
        """Refuse connections from now on, and end those that are open.

        Args:
            *origins: `api`, `store`; both by default.
        """
        with self._lock:
            for name in origins or ("api", "store"):
                listener = self._listeners.pop(name, None)
                if listener is not None:
                    listener.stop()

    def resume_listening(self) -> None:
        """Serve again, on the same ports as before.

        Raises:
            OSError: Somebody else has taken a port meanwhile.
        """
        with self._lock:
            served: tuple[Origin, ...] = (self._store, self._api)
            for origin in served:
                if origin.name not in self._listeners:
                    listener = self._listen(origin)
                    self._ports[origin.name] = listener.server_port
                    self._listeners[origin.name] = listener
        self._store.base_url, self._api.base_url = self.store_url, self.base_url

    def drop_connections(self) -> None:
        """End all open connections, idle or not; new ones are served."""
        with self._lock:
            for listener in self._listeners.values():
                listener.drop_connections()

    def _listen(self, origin: Origin) -> Listener:
        return self.listener_class(
            (self._host, self._ports[origin.name]),
            origin,
            self.journal,
            self.faults,
            latency_s=lambda: self.latency_s,
            is_closing=self._closing.is_set,
        )

    def _origin(self, name: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self.scheme}://{host}:{self._ports[name]}"
