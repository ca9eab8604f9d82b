"""Parsing of a response with many checkpoints."""

import json

from scripts.benchmarks.harness import Bench, timed
from tinkerfs.api.parsing import parse_checkpoints

PARSED_RECORDS, PARSING_GOAL_S = 10_000, 0.1


def measure_parsing(bench: Bench) -> None:
    """Measure parsing a response with many checkpoints, compared with `json.loads`.

    `json.loads` does less: it neither saves the text of each record nor parses timestamps.
    """
    records = [
        {
            "checkpoint_id": f"weights/{number:05}",
            "checkpoint_type": "training",
            "time": "2026-11-23T10:20:30Z",
            "tinker_path": f"tinker://run/weights/{number:05}",
            "size_bytes": number,
            "public": False,
            "expires_at": None,
        }
        for number in range(PARSED_RECORDS)
    ]
    body = json.dumps({"checkpoints": records}).encode()
    own_s, json_s = timed(lambda: parse_checkpoints(body)), timed(lambda: json.loads(body))
    bench.add(
        f"parsing {PARSED_RECORDS:,} checkpoints",
        own_s,
        "s",
        goal=PARSING_GOAL_S,
        details={"tinkerfs": own_s, "json.loads": json_s},
    )
