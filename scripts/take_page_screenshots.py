"""Take pictures of the pages of `tinkerfs serve` with headless Chromium.

    python -m scripts.take_page_screenshots DIRECTORY

The sample account, the server and the browser are real.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tinkerfs.demo.server import DemoServer

MAX_BYTES = 150_000
#: Name of a picture -> width, height, the path, and whether it is dark.
PAGES = {
    "page-runs": (1120, 420, "runs/", False),
    "page-checkpoints": (1760, 420, "checkpoints/", False),
    "page-checkpoint": (1120, 760, "runs/{run}/checkpoints/weights/0001/", False),
    "page-tensors": (1120, 420, "runs/{run}/checkpoints/weights/0001/tensors.json?view", True),
}


@contextmanager
def _serving(environment: dict[str, str]) -> Iterator[str]:
    """Run the server, and yield its URL."""
    command = [sys.executable, "-m", "tinkerfs", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.terminate()


def take(url: str, image: Path, width: int, height: int, profile: str, *, is_dark: bool) -> None:
    """Take one picture."""
    command = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        f"--window-size={width},{height}",
        f"--screenshot={image}",
        *(["--blink-settings=preferredColorScheme=0"] if is_dark else []),
        url,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    subprocess.run(["mogrify", "-strip", "-colors", "128", image], check=True)
    assert image.stat().st_size < MAX_BYTES, image


def main() -> None:
    """Take all pictures."""
    target = Path(sys.argv[1])
    with (
        tempfile.TemporaryDirectory() as home,
        DemoServer(runs=12, checkpoints=5, reference_time_s=1_790_000_000.0) as server,
        _serving({**os.environ, **server.environment, "HOME": home}) as url,
    ):
        run_id = server.account.run_ids[0]
        for name, (width, height, path, is_dark) in PAGES.items():
            page = url + path.format(run=quote(run_id))
            take(page, target / f"{name}.png", width, height, home, is_dark=is_dark)


if __name__ == "__main__":
    main()
