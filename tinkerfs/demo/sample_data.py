"""Generated records of a sample account, identical in every process.

Each record depends only on the seed and its index. An account with 100,000 checkpoints therefore
starts at once, and generates only the requested records. `Account` stores changes of records.
"""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from tinkerfs.demo.content import Content

REFERENCE_TIME_S = 1_767_268_800.0
"""Default time of the latest activity in a sample account: 2026-01-01T12:00:00Z."""

_FAR_S = 2_208_988_800.0  # 2040-01-01: base of expiries with the default reference time
_DAY_S = 86_400.0
_HOUR_S = 3600.0

BASE_MODELS = (
    "Qwen/Qwen3-8B",
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-30B-A3B",
    "meta-llama/Llama-3.2-1B",
    "openai/gpt-oss-20b",
    "deepseek-ai/DeepSeek-V3.1",
)
_OWNER = "demo-user"
_PROJECTS = ("math-rl", "chat-sft", "tool-use", "distill")


@dataclass(slots=True)
class Checkpoint:
    """One checkpoint, to be accessed under the account's lock.

    Attributes:
        kind: `weights`, `sampler_weights` or `external_weights`; other kinds are served too.
        name: The last segment of its tinker path.
        time_s: Creation time, Unix time; None if the server does not report it.
        size_bytes: Total size of its files; None to omit it from listings.
        is_public: Whether all users may read it.
        expires_at_s: Expiry, Unix time; None for never.
        user_metadata: Metadata set by the user.
        is_pending: Whether it is being created: unlisted on SkyRL, 425 for its archive.
        building_polls: Remaining requests during which its archive is "being built"; None for
            unlimited.
        archive: Replaces the generated archive.
        files: Replace the generated files of external weights.
        generation: Increment it to change the content and ETag, as a new save does.
        extra: Additional fields of the API record.
    """

    kind: str
    name: str
    time_s: float | None
    size_bytes: int | None
    is_public: bool = False
    expires_at_s: float | None = None
    user_metadata: dict[str, str] | None = None
    is_pending: bool = False
    building_polls: int | None = 0
    archive: Content | None = None
    files: dict[str, Content] | None = None
    generation: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The checkpoint id in its long form, `<kind>/<name>`."""
        return f"{self.kind}/{self.name}"


@dataclass(slots=True)
class Run:
    """One training run with its checkpoints, oldest first.

    Access it under the account's lock.
    """

    id: str
    base_model: str
    owner: str
    lora_rank: int
    last_request_time_s: float
    checkpoints: list[Checkpoint]
    user_metadata: dict[str, str] | None = None
    is_corrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def newest(self, kind: str) -> Checkpoint | None:
        """Return the newest checkpoint of a kind, or None."""
        return next((c for c in reversed(self.checkpoints) if c.kind == kind), None)


@dataclass(slots=True)
class Session:
    """One session: a group of training runs and samplers.

    Attributes:
        id: Opaque token.
        created_at_s: Creation time, Unix time.
        run_ids: The ids of its training runs.
        samplers: Base model and tinker path (or None) by sampler id.
        display_name: Name set by the user.
        user_metadata: Metadata set by the user.
        status: Its status in the API's form.
        project_id: The project that it belongs to.
        trace: Replaces the generated trace.
        trace_generation: Increment it to change the trace, as further requests of the session do.
        trace_polls: Remaining requests during which its trace is "pending"; None for unlimited.
        trace_error: Message with which the build of its trace fails; None to succeed.
    """

    id: str
    created_at_s: float
    run_ids: list[str]
    samplers: dict[str, tuple[str, str | None]]
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    status: dict[str, Any] = field(
        default_factory=lambda: {"type": "client_finished", "reason": {"type": "success"}}
    )
    project_id: str = "demo-project"
    trace: Content | None = None
    trace_generation: int = 0
    trace_polls: int | None = 0
    trace_error: str | None = None


@dataclass(frozen=True, slots=True)
class SampleData:
    """Generator of a sample account's records.

    Attributes:
        runs: Number of training runs, 0 or more.
        checkpoints: Number of checkpoints per run.
        seed: Seed of all ids, names and numbers.
        reference_time_s: Time of the latest activity; None for a constant in the past.
        kinds: The kinds of checkpoints to generate.
        shares_names: Whether checkpoints of different kinds may have the same name.
        forgets_times: Whether every fourth checkpoint lacks a time.
        size_bytes: Size of every checkpoint; None for various sizes of 0.3 to 5 MB.
    """

    runs: int
    checkpoints: int
    seed: int = 0
    reference_time_s: float | None = None
    kinds: frozenset[str] = frozenset({"weights", "sampler_weights", "external_weights"})
    shares_names: bool = True
    forgets_times: bool = False
    size_bytes: int | None = None

    def run_ids(self) -> list[str]:
        """Return the ids of all runs, most recently used first."""
        return [self.run_id(index) for index in range(self.runs)]

    def run_id(self, index: int) -> str:
        """Return the id of the run at an index."""
        return f"{self._uuid('run', index)}:train:0"

    def index_at(self, time_s: float) -> int:
        """Return the index of the run with checkpoints around a time, in `[0, runs]`.

        Checkpoints of earlier runs are newer than the time, those of later runs are older.
        """
        index = (self._newest_s - time_s) // _HOUR_S
        return int(min(max(index, 0), self.runs))

    def run(self, index: int) -> Run:
        """Generate the run at an index; negative indices are other users' runs."""
        rng = random.Random(f"{self.seed}/run/{index}")
        last_s = self._newest_s - abs(index) * _HOUR_S - rng.randrange(300)
        rank = rng.choice((8, 16, 32, 64))
        project = rng.choice(_PROJECTS)
        is_own = index >= 0
        return Run(
            id=self.run_id(index),
            base_model=rng.choice(BASE_MODELS),
            owner=_OWNER if is_own else "somebody-else",
            lora_rank=rank,
            last_request_time_s=last_s,
            checkpoints=self._checkpoints(rng, index, last_s),
            user_metadata={"project": project, "seed": str(index)} if rng.random() < 0.7 else None,
        )

    def foreign_run(self, number: int) -> Run:
        """Generate a run of another user, with every second checkpoint public."""
        run = self.run(-1 - number)
        for position, checkpoint in enumerate(run.checkpoints):
            checkpoint.is_public = position % 2 == 0
        return run

    def session_id(self, number: int) -> str:
        """Return the id of a session; each has two runs."""
        return self._uuid("session", number)

    def session(self, number: int, runs: list[Run]) -> Session:
        """Generate a session with the given runs."""
        session_id = self.session_id(number)
        samplers: dict[str, tuple[str, str | None]] = {}
        for run in runs:
            checkpoint = run.newest("sampler_weights")
            path = f"tinker://{run.id}/{checkpoint.id}" if checkpoint else None
            samplers[f"{session_id}:sample:{len(samplers)}"] = (run.base_model, path)
        samplers[f"{session_id}:sample:{len(samplers)}"] = (BASE_MODELS[0], None)
        return Session(
            id=session_id,
            created_at_s=min(run.last_request_time_s for run in runs) - 4 * _HOUR_S,
            run_ids=[run.id for run in runs],
            samplers=samplers,
            display_name=f"{_PROJECTS[number % len(_PROJECTS)]} {number}" if number % 3 else None,
            user_metadata={"host": f"node-{number % 7}"} if number % 2 else None,
        )

    @property
    def _newest_s(self) -> float:
        now_s = REFERENCE_TIME_S if self.reference_time_s is None else self.reference_time_s
        return now_s - 600

    def _checkpoints(self, rng: random.Random, index: int, last_s: float) -> list[Checkpoint]:
        # All times are within the hour before the run's last request, and therefore after those of
        # the next run. The checkpoints of the account, newest first, are thus ordered by run.
        step_s = 2900.0 / (self.checkpoints + 1)
        checkpoints: list[Checkpoint] = []
        for number in range(self.checkpoints):
            kind = "weights" if number % 2 == 0 else "sampler_weights"
            name = f"{number // 2 + 1 if self.shares_names else number + 1:04d}"
            if number >= self.checkpoints - 2 and number > 0 and self.shares_names:
                name = "final"
            if number == 2 and index % 3 == 0 and "external_weights" in self.kinds:
                kind, name = "external_weights", "export"
            time_s = last_s - (self.checkpoints - number) * step_s
            time_s = round(time_s, 6) if number % 3 else float(round(time_s))
            has_no_time = self.forgets_times and number % 4 == 3
            checkpoints.append(
                Checkpoint(
                    kind=kind,
                    name=name,
                    time_s=None if has_no_time else time_s,
                    size_bytes=self._size(rng),
                    is_public=rng.random() < 0.125,
                    expires_at_s=self._expiry(rng),
                    user_metadata={"step": str(100 * (number + 1))} if number % 4 == 1 else None,
                )
            )
        return checkpoints

    def _size(self, rng: random.Random) -> int:
        size_bytes = 8 * rng.randrange(40_000, 600_000)
        return size_bytes if self.size_bytes is None else self.size_bytes

    def _expiry(self, rng: random.Random) -> float | None:
        is_permanent, ttl_s = rng.random() >= 0.2, rng.randrange(1, 60) * _DAY_S
        if is_permanent:
            return None
        return ttl_s + (_FAR_S if self.reference_time_s is None else self.reference_time_s)

    def _uuid(self, what: str, index: int) -> str:
        text = f"{self.seed}/{what}/{index}".encode()
        digits = hashlib.blake2b(text, digest_size=16).hexdigest()
        return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"
