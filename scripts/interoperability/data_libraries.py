"""Read a checkpoint with pandas, pyarrow, datasets, safetensors, dask and torch, by `tinker://`.

    python -m scripts.interoperability.data_libraries PYTHON TORCH_PYTHON

The interpreters run data_client.py and data_loader.py. This script counts the requests at the
server.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from scripts.interoperability.sdk import environment
from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.content import Content, Data

CLIENT = Path(__file__).with_name("data_client.py")
LOADER = Path(__file__).with_name("data_loader.py")
ROOT = Path(__file__).parents[2]
ROWS = 2000
#: Writes the table in the format of Parquet; runs in the environment.
WRITE_PARQUET = (
    "import io, sys; import pandas as pd;"
    " pd.read_csv(sys.stdin.buffer).to_parquet(sys.stdout.buffer, row_group_size=500)"
)


def files(python: str) -> dict[str, Content]:
    """Return the files of the checkpoint: weights, and one table in three formats."""
    csv = "x,y\n" + "".join(f"{i},{i % 7}\n" for i in range(ROWS))
    lines = "".join(f'{{"x": {i}, "y": {i % 7}}}\n' for i in range(ROWS))
    parquet = subprocess.run(
        [python, "-c", WRITE_PARQUET], input=csv.encode(), stdout=subprocess.PIPE, check=True
    ).stdout
    generator = np.random.default_rng(7)
    tensors = {f"layer.{i}": generator.random((256, 1024), np.float32) for i in range(12)}
    content = {
        "model.safetensors": safetensors.numpy.save(tensors),
        "rows.parquet": parquet,
        "rows.csv": csv.encode(),
        "rows.jsonl": lines.encode(),
    }
    return {name: Data(data) for name, data in content.items()}


def run(*command: str, **options: Any) -> list[str]:
    """Run a client; return its lines, and one more if it failed."""
    done = subprocess.run(
        ["timeout", "140", *command], stdout=subprocess.PIPE, text=True, check=False, **options
    )
    lines = done.stdout.splitlines() or ["FAIL no step ran"]
    return [*lines, f"FAIL exit {done.returncode}"] if done.returncode else lines


def main() -> int:
    """Run the clients, and check the requests that they sent."""
    python, with_torch = (str(Path(name).absolute()) for name in sys.argv[1:])
    with FaultyServer(runs=1, checkpoints=1) as server, tempfile.TemporaryDirectory() as home:
        run_id = server.account.run_ids[0]
        content = files(python)
        for name in ("data", "data-2"):
            server.account.add_checkpoint(run_id, f"external_weights/{name}", files=content)
        weights = content["model.safetensors"]
        data = weights.read(0, weights.size_bytes)
        expected = {
            "path": f"tinker://{run_id}/external_weights/data",
            "rows": ROWS,
            "total": ROWS * (ROWS - 1) // 2,
            "sha256": hashlib.sha256(data).hexdigest(),
            "tensors": sorted(safetensors.numpy.load(data)),
        }
        variables = environment(server, Path(home))
        lines = run(python, str(CLIENT), input=json.dumps(expected), env=variables)
        variables["PYTHONPATH"] = str(ROOT)  # the environment has the requirements only
        url = f"{expected['path']}/model.safetensors"
        lines += run(with_torch, str(LOADER), url, env=variables)
        sent = sum(entry.sent_bytes for entry in server.journal.entries("store"))
        total = sum(each.size_bytes for each in content.values())
        # All processes share one cache, so each byte is downloaded once; lengths cost a few more.
        total += content["rows.parquet"].size_bytes  # of the second checkpoint
        if sent > total + 1024:
            lines.append(f"FAIL the store sent {sent} bytes of {total}")
        if any(entry.had_key for entry in server.journal.entries("store")):
            lines.append("FAIL the key was sent to the store")
        calls = {name: server.journal.count(name) for name in ("api", "store")}
    for line in lines:
        print(f"data libraries: {line}")
    print(f"data libraries: requests {json.dumps(calls)}, {sent} bytes of {total}", flush=True)
    return 1 if any(line.startswith("FAIL") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
