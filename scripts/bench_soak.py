"""Many processes at once that look, read and change, for a while: what fails, and what it calls.

Run as a script it is one of those processes: FOLDER SEED SECONDS OWN_RUN.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench_harness import Bench, daemon_of, mounted, resident_mb
from bench_server import Server

PROCESSES = 16
RUNS, CHECKPOINTS = 40, 10
TTL_S = 10
#: A change asks the server first how things are, and the listing anew afterwards.
CALLS_OF_A_CHANGE = 2


def soak(bench: Bench, binding: str, seconds: float) -> None:
    """Let them all at one mount."""
    options = ("--ttl", str(TTL_S), "--archive-burst", "0")
    with (
        Server(runs=RUNS, checkpoints=CHECKPOINTS) as server,
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        mounted(server, binding, Path(cache), *options) as folder,
    ):
        server.ask("clear")
        began = time.monotonic()
        outcomes = [
            json.loads(worker.communicate(timeout=seconds + 120)[0])
            for worker in [
                subprocess.Popen(
                    [sys.executable, __file__, str(folder), str(seed), str(seconds)],
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                for seed in range(PROCESSES)
            ]
        ]
        lasted_s = time.monotonic() - began
        calls = [call for call in server.ask("entries") if call["origin"] == "api"]
        memory_mb = resident_mb(daemon_of(folder))
    done = sum((Counter(outcome["done"]) for outcome in outcomes), Counter[str]())
    errors = [error for outcome in outcomes for error in outcome["errors"]]
    for error in errors[:10]:
        print(error, file=sys.stderr)
    name = f"{PROCESSES} processes for {lasted_s:.0f} s"
    bench.add(f"{name}: errors", len(errors), "errors", 0)
    bench.add("... things done", done.total(), "", beside=done)
    endpoints = Counter(call["endpoint"] for call in calls)
    bench.add("... calls made", len(calls), "calls", beside=endpoints)
    excess = beyond_single_flight(calls, lasted_s)
    bench.add("... calls beyond single flight", excess.total(), "calls", 0)
    for each, count in excess.most_common(5):
        print(f"    {count} of {each}", file=sys.stderr)
    bench.add("... the same call twice at a time", at_once(calls), "calls", 0)
    bench.add("... resident memory", memory_mb, "MB")


def beyond_single_flight(calls: list[dict[str, Any]], lasted_s: float) -> Counter[str]:
    """Return how many calls more were made of each kind than when all share what one has asked.

    A listing is asked for once in a TTL, and by each change of what it lists; weights info once at
    all.
    """
    changes = changes_by_run(calls)
    made = Counter(what(call) for call in calls if not is_change(call))
    run_by_what = {what(call): run_of(call) for call in calls}
    of_ttl = math.ceil(lasted_s / TTL_S) + 1
    return +Counter(
        {
            each: count
            - (1 if "weights_info" in each else of_ttl)
            - CALLS_OF_A_CHANGE * changes[run_by_what[each]]
            for each, count in made.items()
        }
    )


def at_once(calls: list[dict[str, Any]]) -> int:
    """Return how many calls began while the same was on its way, where no change called for it."""
    changes, under_way = changes_by_run(calls), dict[str, float]()
    count = 0
    for call in sorted(calls, key=lambda call: call["start_s"]):
        if not is_change(call) and not changes[run_of(call)]:
            count += call["start_s"] < under_way.get(what(call), 0.0)
            under_way[what(call)] = call["end_s"]
    return count


def changes_by_run(calls: list[dict[str, Any]]) -> Counter[str]:
    """Return how many changes there were of each run; of all under "", for what lists them all."""
    changes = Counter(run_of(call) for call in calls if is_change(call))
    changes[""] = changes.total()
    return changes


def what(call: dict[str, Any]) -> str:
    return f"{call['method']} {call['path']} {call['query']} {call['body']}"


def run_of(call: dict[str, Any]) -> str:
    return next((part for part in call["path"].split("/") if ":train:" in part), "")


def is_change(call: dict[str, Any]) -> bool:
    return call["method"] != "GET" and "weights_info" not in call["endpoint"]


class Worker:
    """One process: each thing it does is one that a person or a program would."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._runs = sorted(os.listdir(folder / "runs"))
        self._own = self._runs[seed]
        self._is_public: dict[Path, bool] = {}

    def _run(self) -> Path:
        return self._folder / "runs" / self._random.choice(self._runs)

    def _checkpoint(self, run: Path) -> Path:
        kind = self._random.choice(os.listdir(run / "checkpoints"))
        names = os.listdir(run / "checkpoints" / kind)
        return run / "checkpoints" / kind / self._random.choice(names)

    def ls_of_runs(self) -> None:
        command("ls", "-l", str(self._folder / "runs"))

    def ls_of_checkpoints(self) -> None:
        command("ls", "-l", str(self._folder / "checkpoints"))

    def walk(self) -> None:
        command("ls", "-lR", str(self._run()))

    def cat(self) -> None:
        run = self._run()
        command("cat", *(str(path) for path in run.glob("checkpoints/*/*/info.json")))

    def stat(self) -> None:
        for _ in range(100):
            os.stat(self._run())
            assert not (self._run() / "nothing").exists()

    def weights(self) -> None:
        files = self._checkpoint(self._run()) / "files"
        for name in os.listdir(files):
            with open(files / name, "rb") as file:
                assert len(file.read()) == os.fstat(file.fileno()).st_size, name

    def change(self) -> None:
        path = self._checkpoint(self._folder / "runs" / self._own) / "published"
        wanted = "0" if path.read_text().strip() == "1" else "1"
        path.write_text(wanted)
        told = path.read_text().strip()
        assert told == wanted, f"{path} is {told!r}, not {wanted!r}"

    def expire(self) -> None:
        path = self._checkpoint(self._folder / "runs" / self._own) / "expires_at"
        days = self._random.randrange(1, 1000)
        path.write_text(time.strftime("%FT%TZ", time.gmtime(time.time() + days * 86400)))

    def work(self, seconds: float) -> dict[str, Any]:
        """Do things for so long; return how often each was done, and what failed."""
        things = (self.ls_of_runs, self.ls_of_checkpoints, self.walk, self.cat, self.stat)
        things += (self.weights, self.change, self.expire)
        done: Counter[str] = Counter()
        errors = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            thing = self._random.choice(things)
            done[thing.__name__] += 1
            try:
                thing()
            except Exception as error:  # noqa: BLE001  (whatever it is, it is told)
                errors.append(f"{thing.__name__}: {type(error).__name__}: {error}")
        return {"done": done, "errors": errors}


def command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{words[0]}: {done.returncode} {done.stderr}")


if __name__ == "__main__":
    place, number, span = sys.argv[1:]
    print(json.dumps(Worker(Path(place), int(number)).work(float(span))))
