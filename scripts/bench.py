"""Calls, waits and speed of real mounts on the embedded server, part by part.

Counts are compared with bounds and fail the run; times are medians, printed and never judged.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from bench_calls import count_calls, measure_memory, measure_mounting, measure_waits
from bench_harness import BINDINGS, Bench
from bench_outage import measure_outages
from bench_scale import measure_scale
from bench_speed import measure_speed
from bench_views import count_views
from bench_weights import measure_weights

PARTS = ("calls", "views", "waits", "memory", "weights", "outage", "scale", "speed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--binding", choices=BINDINGS, action="append", help="default: all three")
    parser.add_argument("--short", action="store_true", help="counts only")
    parser.add_argument("--outage-s", type=float, default=20.0, help="length of each (20)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parts = ("calls", "views") if options.short else options.parts or PARTS
    # Mounts are undone on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench()
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as folder:
        for binding in options.binding or BINDINGS:
            cache = Path(folder) / binding
            if "calls" in parts:
                count_calls(bench, binding, cache)
            if "views" in parts:
                count_views(bench, binding, cache)
            if "waits" in parts:
                measure_waits(bench, binding, cache)
                measure_mounting(bench, binding, cache)
        if "memory" in parts:
            measure_memory(bench, Path(folder) / "memory", 100, 10)
            measure_memory(bench, Path(folder) / "memory", 1000, 100)
        binding = (options.binding or ["auto"])[0]
        if "weights" in parts:
            measure_weights(bench, binding)
        if "outage" in parts:
            measure_outages(bench, binding, Path(folder) / "outage", options.outage_s)
        if "scale" in parts:
            measure_scale(bench, binding)
        if "speed" in parts:
            measure_speed(bench, options.binding or BINDINGS, Path(folder))
    if options.json:
        print(json.dumps(bench.rows, indent=2))
    return 0 if all(row["ok"] for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
