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

from scripts.benchmarks.adapter_table import print_table
from scripts.benchmarks.adapters import measure_adapters
from scripts.benchmarks.calls import count_calls
from scripts.benchmarks.cold import measure_cold, measure_commands
from scripts.benchmarks.downloaders import measure_weights
from scripts.benchmarks.endurance import measure_endurance
from scripts.benchmarks.exports import measure_exports
from scripts.benchmarks.fleet import measure_fleet
from scripts.benchmarks.harness import BINDINGS, Bench
from scripts.benchmarks.latency import measure_speed
from scripts.benchmarks.metrics import measure_metrics
from scripts.benchmarks.other_mounts import measure_rivals
from scripts.benchmarks.outages import measure_outages
from scripts.benchmarks.parsing import measure_parsing
from scripts.benchmarks.passthrough import measure_passthrough
from scripts.benchmarks.report import write_into
from scripts.benchmarks.requests import count_requests
from scripts.benchmarks.scale import measure_scale
from scripts.benchmarks.throughput import measure_reads
from scripts.benchmarks.views import count_views
from scripts.benchmarks.waits import measure_waits
from scripts.benchmarks.webdav import measure_webdav
from tinkerfs.fuse.binding import load_binding

PARTS = (
    "calls",
    "views",
    "exports",
    "requests",
    "waits",
    "speed",
    "weights",
    "adapters",
    "passthrough",
    "metrics",
    "outage",
    "endurance",
    "scale",
    "webdav",
    "fleet",
)

SHORT_PARTS = ("calls", "views", "exports", "fleet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--binding", choices=BINDINGS, action="append", help="default: all three")
    parser.add_argument("--short", action="store_true", help="only the counts, of small loads")
    parser.add_argument("--queue-s", type=float, default=60.0, help="queue of an export (60)")
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
    parts = options.parts or (SHORT_PARTS if options.short else PARTS)
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
            if "exports" in parts:
                measure_exports(bench, binding, 0.0 if options.short else options.queue_s)
            if "weights" in parts:
                measure_weights(bench, binding)
                measure_adapters(bench, binding)
                measure_rivals(bench, binding)
            if "passthrough" in parts:
                measure_passthrough(bench, binding)
            if "metrics" in parts:
                measure_metrics(bench, binding)
            if "adapters" in parts:
                print_table(binding)
            if "outage" in parts:
                measure_outages(bench, binding, Path(directory) / "outage", options.outage_s)
            if "endurance" in parts:
                cache = Path(directory) / "endurance"
                measure_endurance(bench, binding, cache, options.walk_s, options.soak_s)
            if "scale" in parts:
                measure_scale(bench, binding)
            if "webdav" in parts:
                measure_webdav(bench, binding)
            if "fleet" in parts:
                measure_fleet(bench, binding, is_short=options.short)
    if options.json:
        print(json.dumps(bench.rows, indent=2))
    if options.markdown:
        write_into(options.markdown, bench.rows)
    return 0 if all(row["ok"] for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
