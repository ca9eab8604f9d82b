"""Benchmark of real mounts on the embedded server: request counts, delays, speed.

Counts have bounds; a count that exceeds its bound fails the benchmark. Times are medians and may
have goals, which do not fail the benchmark.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from bench_calls import count_calls, measure_waits
from bench_cold import measure_cold, measure_commands
from bench_endurance import measure_endurance
from bench_harness import BINDINGS, Bench
from bench_markdown import write_into
from bench_outage import measure_outages
from bench_reads import measure_reads
from bench_requests import count_requests
from bench_rivals import measure_rivals
from bench_scale import measure_parsing, measure_scale
from bench_speed import measure_speed
from bench_views import count_views
from bench_weights import measure_weights

from tinkerfs.fuse.binding import load_binding

PARTS = (
    "calls",
    "views",
    "requests",
    "waits",
    "speed",
    "weights",
    "outage",
    "endurance",
    "scale",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--binding", choices=BINDINGS, action="append", help="default: all three")
    parser.add_argument("--short", action="store_true", help="only the counts")
    parser.add_argument("--outage-s", type=float, default=20.0, help="length of each outage (20)")
    parser.add_argument(
        "--walk-s", type=float, default=60.0, help="time of walking in endurance (60)"
    )
    parser.add_argument(
        "--soak-s", type=float, default=60.0, help="time of the soak in endurance (60)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="write the tables into a page"
    )
    options = parser.parse_args()
    parts = ("calls", "views") if options.short else options.parts or PARTS
    bindings = options.binding or BINDINGS
    # Unmount on SIGTERM, by unwinding the stack.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench()
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as directory:
        for binding in bindings:
            cache = Path(directory) / binding
            with bench.under(binding):
                if "calls" in parts:
                    count_calls(bench, binding, cache)
                if "views" in parts:
                    count_views(bench, binding, cache)
                if "requests" in parts:
                    count_requests(bench, binding, cache)
                if "waits" in parts:
                    measure_waits(bench, binding, cache)
                if "speed" in parts:
                    measure_cold(bench, binding)
        if "speed" in parts:
            measure_speed(bench, bindings, Path(directory))
            measure_reads(bench, bindings)
            measure_commands(bench, bindings, Path(directory) / "commands")
        if "scale" in parts:
            measure_parsing(bench)
        binding = bindings[0] if options.binding else load_binding().name
        with bench.under(binding):
            if "weights" in parts:
                measure_weights(bench, binding)
                measure_rivals(bench, binding)
            if "outage" in parts:
                measure_outages(bench, binding, Path(directory) / "outage", options.outage_s)
            if "endurance" in parts:
                cache = Path(directory) / "endurance"
                measure_endurance(bench, binding, cache, options.walk_s, options.soak_s)
            if "scale" in parts:
                measure_scale(bench, binding)
    if options.json:
        print(json.dumps(bench.rows, indent=2))
    if options.markdown:
        write_into(options.markdown, bench.rows)
    return 0 if all(row["ok"] for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
