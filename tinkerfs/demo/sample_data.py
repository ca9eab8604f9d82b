"""The records of a sample account, made up from a seed: the same in every process.

Each record depends on its index alone, so an account of 100,000 checkpoints starts at once and
makes only what is asked for. Pure functions and plain data; `account` keeps and changes them.
"""

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from tinkerfs.demo.content import Content

REFERENCE_TIME_S = 1_767_268_800.0
"""The newest moment of a catalogue that is not told another: 2026-01-01T12:00:00Z."""

_FAR_S = 2_208_988_800.0  # 2040-01-01: an expiry of the fixed catalogue that no test outlives
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
_OWNERS = "demo-user"
_PROJECTS = ("math-rl", "chat-sft", "tool-use", "distill")


@dataclass(slots=True)
class Checkpoint:
    """One checkpoint, to be read and changed under the account's lock.

    Attributes:
        kind: `weights`, `sampler_weights` or `external_weights`; any other is served too.
        name: The last part of its tinker path.
        time_s: When it was saved, Unix time; None where the server does not say.
        size_bytes: What its files add up to; None hides it from listings.
        is_public: Whether anybody may read it.
        expires_at_s: Unix time, or None for never.
        user_metadata: What the user attached.
        is_pending: Whether it is still being written: unlisted on SkyRL, 425 on its archive.
        building_polls: How many more times its archive is "being built"; None for until changed.
        archive: Served instead of the archive that its record implies.
        files: Served instead of the files that its record implies (external weights).
        generation: Part of what its bytes and its ETag depend on: raise it to save it anew.
        extra: Further fields of the wire's record.
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
    """One training run with its checkpoints, oldest first; changed under the account's lock."""

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
        """Return the checkpoint of a kind that was saved last."""
        return next((c for c in reversed(self.checkpoints) if c.kind == kind), None)


@dataclass(slots=True)
class Session:
    """One session: who trained and sampled what together.

    Attributes:
        id: Opaque token.
        created_at_s: Unix time.
        run_ids: Training runs.
        samplers: Of each sampler's id: its base model, and the tinker path that it serves or None.
        display_name: What a person calls it.
        user_metadata: What the user attached.
    """

    id: str
    created_at_s: float
    run_ids: list[str]
    samplers: dict[str, tuple[str, str | None]]
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a sample account is made of.

    Attributes:
        runs: Number of training runs, 0 or more.
        checkpoints: Number of checkpoints of each.
        seed: Another seed gives other ids, names and numbers.
        reference_time_s: Everything happened before it; None for a fixed time in the past.
        kinds: The kinds of checkpoint to make.
        shares_names: Whether checkpoints of different kinds may have one name.
        forgets_times: Whether every fourth checkpoint has no time.
        size_bytes: Of every checkpoint; None for various, 0.3 to 5 MB.
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
        """Return the ids of all runs, in order of `last_request_time`, newest first."""
        return [self.run_id(index) for index in range(self.runs)]

    def run_id(self, index: int) -> str:
        """Return the id of the run of an index."""
        return f"{self._uuid('run', index)}:train:0"

    def index_at(self, time_s: float) -> int:
        """Return the index in `[0, runs]` before which all is newer than a time, after it older."""
        index = (self._newest_s - time_s) // _HOUR_S
        return int(min(max(index, 0), self.runs))

    def run(self, index: int) -> Run:
        """Make up the run of an index in `[0, runs)`; negative ones belong to somebody else."""
        rng = random.Random(f"{self.seed}/run/{index}")
        last_s = self._newest_s - abs(index) * _HOUR_S - rng.randrange(300)
        rank = rng.choice((8, 16, 32, 64))
        project = rng.choice(_PROJECTS)
        is_own = index >= 0
        return Run(
            id=self.run_id(index),
            base_model=rng.choice(BASE_MODELS),
            owner=_OWNERS if is_own else "somebody-else",
            lora_rank=rank,
            last_request_time_s=last_s,
            checkpoints=self._checkpoints(rng, index, last_s),
            user_metadata={"project": project, "seed": str(index)} if rng.random() < 0.7 else None,
        )

    def foreign_run(self, number: int) -> Run:
        """Make up a run of somebody else, with every second checkpoint public."""
        run = self.run(-1 - number)
        for position, checkpoint in enumerate(run.checkpoints):
            checkpoint.is_public = position % 2 == 0
        return run

    def session_id(self, number: int) -> str:
        """Return the id of a session, of which there is one for every two runs."""
        return self._uuid("session", number)

    def session(self, number: int, runs: list[Run]) -> Session:
        """Make up a session over given runs."""
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
        # All lie within the hour before the run's last request, and so after those of the next
        # run: newest first over the account is simply run by run.
        step_s = 2900.0 / (self.checkpoints + 1)
        made: list[Checkpoint] = []
        for number in range(self.checkpoints):
            kind = "weights" if number % 2 == 0 else "sampler_weights"
            name = f"{number // 2 + 1 if self.shares_names else number + 1:04d}"
            if number >= self.checkpoints - 2 and number > 0 and self.shares_names:
                name = "final"
            if number == 2 and index % 3 == 0 and "external_weights" in self.kinds:
                kind, name = "external_weights", "export"
            time_s = last_s - (self.checkpoints - number) * step_s
            time_s = round(time_s, 6) if number % 3 else float(round(time_s))
            is_forgotten = self.forgets_times and number % 4 == 3
            made.append(
                Checkpoint(
                    kind=kind,
                    name=name,
                    time_s=None if is_forgotten else time_s,
                    size_bytes=self._size(rng),
                    is_public=rng.random() < 0.125,
                    expires_at_s=self._expiry(rng),
                    user_metadata={"step": str(100 * (number + 1))} if number % 4 == 1 else None,
                )
            )
        return made

    def _size(self, rng: random.Random) -> int:
        size_bytes = 8 * rng.randrange(40_000, 600_000)
        return size_bytes if self.size_bytes is None else self.size_bytes

    def _expiry(self, rng: random.Random) -> float | None:
        is_kept, wait_s = rng.random() >= 0.2, rng.randrange(1, 60) * _DAY_S
        if is_kept:
            return None
        return wait_s + (_FAR_S if self.reference_time_s is None else self.reference_time_s)

    def _uuid(self, what: str, index: int) -> str:
        text = f"{self.seed}/{what}/{index}".encode()
        digits = hashlib.blake2b(text, digest_size=16).hexdigest()
        return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"
