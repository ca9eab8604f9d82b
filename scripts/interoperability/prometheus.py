"""Let a real Prometheus scrape a mount, and evaluate the queries of the dashboard.

    python -m scripts.interoperability.prometheus

promtool checks the names of the metrics. It needs the package `prometheus` of Debian.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.faulty_server import FaultyServer

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "tinkerfs/data/grafana/tinkerfs.json"
METRICS, PROMETHEUS = 19465, 19466

CONFIGURATION = f"""
global:
  scrape_interval: 1s
scrape_configs:
  - job_name: tinkerfs
    static_configs:
      - targets: ["127.0.0.1:{METRICS}"]
"""


def main() -> int:
    """Scrape a mount, evaluate each query, and print one line."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        print(f"prometheus: skipped, needs {' and '.join(missing)}")
        return 0
    with tempfile.TemporaryDirectory() as name, FaultyServer(runs=5, checkpoints=3) as server:
        directory = Path(name)
        with prometheus(directory):
            with mounted(server, directory) as mount:
                use(mount)
                check_names()
                wait_for("count_over_time(tinkerfs_build_info[1m]) >= 8", lambda _: use(mount))
                count = check_dashboard()
                check_stats(mount)
            wait_for("up == 0")  # the address is closed with the mount
    print(f"prometheus: {count} queries of the dashboard have a result, promtool has no complaint")
    return 0


@contextmanager
def mounted(server: FaultyServer, directory: Path) -> Iterator[Path]:
    """Mount the account of a server with --metrics."""
    mount = directory / "mount"
    mount.mkdir()
    tinkerfs = [sys.executable, "-m", "tinkerfs"]
    options = [f"--cache-dir={directory / 'cache'}", f"--metrics={METRICS}"]
    subprocess.run(
        [*tinkerfs, "mount", *options, str(mount)], env=os.environ | server.environment, check=True
    )
    try:
        yield mount
    finally:
        subprocess.run([*tinkerfs, "umount", str(mount)], check=True)


@contextmanager
def prometheus(directory: Path) -> Iterator[None]:
    """Run a Prometheus that scrapes the mount."""
    configuration = directory / "prometheus.yml"
    configuration.write_text(CONFIGURATION)
    subprocess.run(["promtool", "check", "config", configuration], check=True, capture_output=True)
    command = ["prometheus", f"--config.file={configuration}", "--log.level=error"]
    command += [f"--storage.tsdb.path={directory / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{PROMETHEUS}"])
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def use(mount: Path) -> None:
    """Walk the mount, read weights, and cause an error."""
    subprocess.run(["ls", "-lR", mount / "runs"], check=True, stdout=subprocess.DEVNULL)
    for files in sorted((mount / "runs").glob("*/checkpoints/weights/*/files"))[:2]:
        for file in files.iterdir():
            file.read_bytes()
    assert not (mount / "runs" / f"none-{time.monotonic_ns()}").exists()


def check_names() -> None:
    """Let promtool check the names, types and units of the metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics") as response:
        text = response.read()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b""), done


def check_dashboard() -> int:
    """Evaluate each query of the dashboard; return their number."""
    dashboard = json.loads(DASHBOARD.read_text())
    labels = [variable["definition"] for variable in dashboard["templating"]["list"][1:]]
    for definition in labels:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", definition).groups()  # type: ignore[union-attr]
        assert all(each["metric"][label] for each in query(metric.replace("$job", ".*")))
    queries = [query for queries in panel_queries().values() for query in queries]
    for each in queries:
        assert query(each), f"no result: {each}"
    return len(queries)


def panel_queries() -> dict[str, list[str]]:
    """Return the queries of each panel of the dashboard, for all mounts."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        queries = [target["expr"] for target in panel.get("targets", [])]
        queries = [each.replace("$__rate_interval", "1m") for each in queries]
        found[panel["title"]] = [re.sub(r"\$(job|instance)", ".*", each) for each in queries]
        assert not any("$" in each for each in found[panel["title"]]), queries
    return found


def check_stats(mount: Path) -> None:
    """Compare totals that Prometheus has with those of stats.json."""

    def agree(_result: object) -> bool:
        stats = json.loads((mount / ".tinkerfs/stats.json").read_text())
        total = stats["api_requests_total"]
        return bool(query("sum(tinkerfs_api_requests_total)")[0]["value"][1] == str(total))

    wait_for("up == 1", agree)


def query(expression: str, port: int = PROMETHEUS) -> list[dict[str, Any]]:
    """Return the result of an instant query."""
    url = f"http://127.0.0.1:{port}/api/v1/query?"
    with urllib.request.urlopen(url + urllib.parse.urlencode({"query": expression})) as response:
        reply = json.load(response)
    assert reply["status"] == "success", reply
    result: list[dict[str, Any]] = reply["data"]["result"]
    return result


def wait_for(expression: str, check: Any = lambda _result: None) -> None:
    """Wait until a query has a result, and `check` of it does not return False."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            result = query(expression)
        except OSError:  # Prometheus starts
            result = []
        if check(result) is not False and result:
            return
        time.sleep(0.5)
    raise AssertionError(f"no result in time: {expression}")


if __name__ == "__main__":
    sys.exit(main())
