"""Soak test: many processes list, read and change; count errors and requests.

Run as the main module, this is one of the processes: DIRECTORY SEED SECONDS.
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

from scripts.benchmarks.harness import Bench, daemon_of, mounted, resident_mb
from scripts.benchmarks.server import Server

PROCESSES = 16
RUNS, CHECKPOINTS = 40, 10
TTL_S = 10
#: A change reads the current state first, and the listing afterwards.
REQUESTS_PER_CHANGE = 2


def soak(bench: Bench, binding: str, seconds: float) -> None:
    """Run all processes on one mount; add the rows."""
    options = ("--ttl", str(TTL_S), "--archive-burst", "0")
    with (
        Server(runs=RUNS, checkpoints=CHECKPOINTS) as server,
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        mounted(server, binding, Path(cache), *options) as directory,
    ):
        server.ask("clear")
        began = time.monotonic()
        outcomes = [
            json.loads(worker.communicate(timeout=seconds + 120)[0])
            for worker in [
                subprocess.Popen(
                    [sys.executable, "-m", __name__, str(directory), str(seed), str(seconds)],
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                for seed in range(PROCESSES)
            ]
        ]
        lasted_s = time.monotonic() - began
        calls = [call for call in server.ask("entries") if call["origin"] == "api"]
        memory_mb = resident_mb(daemon_of(directory))
    done = sum((Counter(outcome["done"]) for outcome in outcomes), Counter[str]())
    errors = [error for outcome in outcomes for error in outcome["errors"]]
    for error in errors[:10]:
        print(error, file=sys.stderr)
    name = f"{PROCESSES} processes for {lasted_s:.0f} s"
    bench.add(f"{name}: errors", len(errors), "errors", 0)
    bench.add("... actions done", done.total(), "", details=done)
    endpoints = Counter(call["endpoint"] for call in calls)
    bench.add("... requests sent", len(calls), "calls", details=endpoints)
    excess = beyond_single_flight(calls, lasted_s)
    bench.add("... requests beyond single-flight", excess.total(), "calls", 0)
    for each, count in excess.most_common(5):
        print(f"    {count} of {each}", file=sys.stderr)
    bench.add("... concurrent identical requests", count_duplicates(calls), "calls", 0)
    bench.add("... resident memory", memory_mb, "MB")


def beyond_single_flight(calls: list[dict[str, Any]], lasted_s: float) -> Counter[str]:
    """Count the requests of each kind beyond those of single-flight loading.

    A listing is requested once per TTL, and by each change of a listed record. Weights info is
    requested once.
    """
    changes = changes_by_run(calls)
    sent = Counter(what(call) for call in calls if not is_change(call))
    run_by_what = {what(call): run_of(call) for call in calls}
    per_ttl = math.ceil(lasted_s / TTL_S) + 1
    return +Counter(
        {
            each: count
            - (1 if "weights_info" in each else per_ttl)
            - REQUESTS_PER_CHANGE * changes[run_by_what[each]]
            for each, count in sent.items()
        }
    )


def count_duplicates(calls: list[dict[str, Any]]) -> int:
    """Count requests that started while an identical one was in flight."""
    changes, end_by_what = changes_by_run(calls), dict[str, float]()
    count = 0
    for call in sorted(calls, key=lambda call: call["start_s"]):
        if not is_change(call) and not changes[run_of(call)]:
            count += call["start_s"] < end_by_what.get(what(call), 0.0)
            end_by_what[what(call)] = call["end_s"]
    return count


def changes_by_run(calls: list[dict[str, Any]]) -> Counter[str]:
    """Return the number of changes per run; the key "" has the total."""
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
    """One process; its methods are the actions of a user or a program."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._random = directory, random.Random(seed)
        self._runs = sorted(os.listdir(directory / "runs"))
        self._own_run = self._runs[seed]
        self._is_public: dict[Path, bool] = {}

    def _run(self) -> Path:
        return self._directory / "runs" / self._random.choice(self._runs)

    def _checkpoint(self, run: Path) -> Path:
        kind = self._random.choice(os.listdir(run / "checkpoints"))
        names = os.listdir(run / "checkpoints" / kind)
        return run / "checkpoints" / kind / self._random.choice(names)

    def ls_of_runs(self) -> None:
        command("ls", "-l", str(self._directory / "runs"))

    def ls_of_checkpoints(self) -> None:
        command("ls", "-l", str(self._directory / "checkpoints"))

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
        path = self._checkpoint(self._directory / "runs" / self._own_run) / "published"
        wanted = "0" if path.read_text().strip() == "1" else "1"
        path.write_text(wanted)
        found = path.read_text().strip()
        assert found == wanted, f"{path} is {found!r}, not {wanted!r}"

    def expire(self) -> None:
        path = self._checkpoint(self._directory / "runs" / self._own_run) / "expires_at"
        days = self._random.randrange(1, 1000)
        path.write_text(time.strftime("%FT%TZ", time.gmtime(time.time() + days * 86400)))

    def work(self, seconds: float) -> dict[str, Any]:
        """Run random actions for some seconds; return the count of each, and the errors."""
        actions = (
            self.ls_of_runs,
            self.ls_of_checkpoints,
            self.walk,
            self.cat,
            self.stat,
            self.weights,
            self.change,
            self.expire,
        )
        done: Counter[str] = Counter()
        errors = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            action = self._random.choice(actions)
            done[action.__name__] += 1
            try:
                action()
            except Exception as error:  # noqa: BLE001  (reported as a result)
                errors.append(f"{action.__name__}: {type(error).__name__}: {error}")
        return {"done": done, "errors": errors}


def command(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{arguments[0]}: {done.returncode} {done.stderr}")


if __name__ == "__main__":
    root, seed, duration = sys.argv[1:]
    print(json.dumps(Worker(Path(root), int(seed)).work(float(duration))))
