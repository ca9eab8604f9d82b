"""A real file manager on a real mount: Thunar, on a virtual screen.

If `TINKERFS_SCREENSHOTS` is set, screenshots for the documentation are saved in that directory.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.account import account, api_calls, make_account, needs
from tinkerfs.fuse import mount_table

__all__ = ["account", "make_account"]

#: Oldest first, which is not the order of the names.
NAMES = ("weights/warm-up", "weights/epoch-1", "weights/final")

#: Stored size of each checkpoint; the order by size differs from both other orders.
SIZES_BYTES = (2_000_000, 3_000_000, 1_000_000)

WIDTH, HEIGHT = 900, 420
#: Positions of the column headers of times and sizes, and of the first row, in a window that fills
#: the screen.
HEAD_OF_TIMES, HEAD_OF_SIZES, FIRST_ROW = (820, 113), (660, 113), (260, 140)

READER = """[Desktop Entry]
Type=Application
Name=Reader
Exec=sh -c 'cat "$1" > "$HOME/opened.new" && mv "$HOME/opened.new" "$HOME/opened"' reader %f
MimeType=application/json;text/plain;
"""
ASSOCIATIONS = """[Default Applications]
application/json=reader.desktop
text/plain=reader.desktop
"""


class Desktop:
    """A virtual screen without a window manager, with a keyboard and a mouse."""

    def __init__(self, home):
        self.home = home
        applications = home / ".local/share/applications"
        applications.mkdir(parents=True)
        (applications / "reader.desktop").write_text(READER)
        config = home / ".config"
        config.mkdir()
        (config / "mimeapps.list").write_text(ASSOCIATIONS)
        (home / "run").mkdir(mode=0o700)
        self._frame = home / "Xvfb_screen0"
        screen = ("-screen", "0", f"{WIDTH}x{HEIGHT}x24")
        reading, writing = os.pipe()
        self._started = [
            self._start(
                ["Xvfb", *screen, "-displayfd", str(writing), "-fbdir", str(home)],
                os.environ,
                pass_fds=(writing,),
            )
        ]
        os.close(writing)
        with os.fdopen(reading) as pipe:
            display = pipe.readline().strip()
        assert display, "Xvfb does not start"
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "DISPLAY": f":{display}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            # No session bus, so that the desktop of the developer is not involved.
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
            "GIO_USE_VFS": "local",
            "NO_AT_BRIDGE": "1",
            "LC_ALL": "C.UTF-8",
        }

    def settle(self, quiet_s=0.5, timeout_s=5.0):
        """Wait until the screen is unchanged, or until the timeout, because a cursor may blink."""
        deadline = time.monotonic() + timeout_s
        before, since = b"", time.monotonic()
        while time.monotonic() < min(since + quiet_s, deadline):
            time.sleep(0.05)
            now = self._frame.read_bytes()
            if now != before:
                before, since = now, time.monotonic()

    def _start(self, command, environ, **options):
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            command,
            env=environ,
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
            **options,
        )

    def close(self):
        for process in reversed(self._started):
            with contextlib.suppress(ProcessLookupError):  # it exited before it had a window
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def open(self, directory):
        """Start the file manager in a directory; return its window."""
        # Thunar exits now and then before it has a window, under load: that is started again.
        for _ in range(5):
            process = self._start(["thunar", str(directory)], self._environ)
            self._started.append(process)
            mount_table.wait_until(
                lambda process=process: (
                    self.windows(f"^{directory.name}") or process.poll() is not None
                ),
                60,
            )
            if process.poll() is None:
                break
        window = self.window(directory.name)
        self.xdotool("windowsize", "--sync", window, WIDTH, HEIGHT)
        self.show_list()
        return window

    def show_list(self):
        """Switch from icons, the default, to a list with sizes and times."""
        self.settle()
        self.press("ctrl+2")
        self.settle()

    def xdotool(self, *arguments):
        done = subprocess.run(
            ["xdotool", *map(str, arguments)],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.split()

    def windows(self, title=".+"):
        """Return the visible windows with a matching title."""
        return self.xdotool("search", "--onlyvisible", "--name", title)

    def window(self, title, timeout_s=60):
        """Wait for a window with a title that starts so; focus and return it."""
        found = []

        def is_open():
            found[:] = self.windows(f"^{title}")
            return bool(found)

        assert mount_table.wait_until(is_open, timeout_s), (title, self.titles())
        self.xdotool("windowfocus", "--sync", found[-1])
        return found[-1]

    def titles(self):
        return [" ".join(self.xdotool("getwindowname", window)) for window in self.windows()]

    def press(self, *keys):
        self.xdotool("key", "--clearmodifiers", "--delay", "60", *keys)

    def click(self, position, times=1):
        self.xdotool("mousemove", "--sync", *position, "click", "--repeat", times, "--delay", 80, 1)
        self.settle()

    def write(self, text):
        self.xdotool("type", "--delay", "15", text)

    def select(self, name):
        """Select an entry by a prefix of its name."""
        self.write(name)
        self.settle()
        self.press("Escape")
        self.settle()

    def go(self, directory):
        """Go to a directory by the location bar."""
        self.press("ctrl+l")
        self.write(str(directory))
        self.press("Return")
        window = self.window(directory.name)
        self.show_list()
        return window

    def save_screenshot(self, name):
        """Save a screenshot, if `TINKERFS_SCREENSHOTS` is set."""
        target = os.environ.get("TINKERFS_SCREENSHOTS")
        if target:
            picture = Path(target).resolve() / f"{name}.png"
            subprocess.run(
                ["import", "-window", "root", "-colors", "64", f"PNG8:{picture}"],
                env=self._environ,
                check=True,
                timeout=30,
            )


@pytest.fixture
def desktop(tmp_path):
    needs(["Xvfb", "thunar", "xdotool"])
    desktop = Desktop(tmp_path)
    yield desktop
    desktop.close()


@pytest.fixture
def run(account):
    """Return a run's directory; one checkpoint was saved per day, in reverse name order."""
    newest_s = 1_780_000_000
    directory = account.new_run()
    run_id = Path(directory).name
    for days, name in enumerate(reversed(NAMES)):
        saved_s = newest_s - 86_400 * days
        size_bytes = SIZES_BYTES[NAMES.index(name)]
        account.server.account.add_checkpoint(run_id, name, time_s=saved_s, size_bytes=size_bytes)
    account.refresh()
    account.server.journal.clear()
    return account.path(directory)


def test_browse_sort_show_properties_and_open_a_file(account, run, desktop):
    desktop.open(account.root)
    desktop.go(run / "checkpoints/weights")
    desktop.click(HEAD_OF_TIMES)
    desktop.save_screenshot("file-manager")
    desktop.click(FIRST_ROW, times=2)
    desktop.window("warm-up -")  # the oldest checkpoint
    desktop.settle()
    desktop.select("info")
    desktop.press("Return")
    opened = desktop.home / "opened"
    assert mount_table.wait_until(opened.exists, 20), desktop.titles()
    record = json.loads(opened.read_text())
    assert record["checkpoint_id"] == "weights/warm-up"
    assert record["lora_rank"] > 0
    desktop.press("alt+Return")
    desktop.window("info.json - Properties")
    desktop.settle()
    desktop.press("Escape")
    account.server.journal.wait_until_idle()
    calls = api_calls(account.server)
    # While the location is typed, Thunar looks up each prefix of it, which may be a run.
    assert calls.pop("GET training_runs/{run}") <= len(run.name)
    assert 1 <= calls.pop("POST weights_info") <= len(NAMES)
    # The listing, and the lookup of such a prefix before the listing arrived.
    assert 1 <= calls.pop("GET training_runs") <= 2
    assert calls == {"GET training_runs/{run}/checkpoints": 1}


def test_size_column_sorts_by_stored_size(run, desktop):
    desktop.open(run / "checkpoints/weights")
    desktop.click(HEAD_OF_SIZES)
    desktop.click(FIRST_ROW, times=2)
    desktop.window("final -")  # the smallest


def test_directory_properties_count_its_content(account, run, desktop):
    desktop.open(run / "checkpoints/weights")
    desktop.select("epoch")
    desktop.press("alt+Return")
    desktop.window("epoch-1 - Properties")
    desktop.settle()
    account.server.journal.wait_until_idle()
    calls = api_calls(account.server)
    assert calls == {
        "GET training_runs/{run}": 1,
        "GET training_runs/{run}/checkpoints": 1,
        "POST weights_info": len(NAMES),  # for the siblings of the first one
    }


def test_delete_removes_a_checkpoint_and_not_a_run(account, run, desktop):
    # Thunar opens each visible file and reads each visible link, to choose icons.
    desktop.open(run / "checkpoints/weights/final")
    desktop.select("info")
    desktop.press("alt+Return")
    desktop.window("info.json - Properties")
    desktop.settle()
    desktop.press("Escape")
    desktop.go(run / "checkpoints/weights")
    desktop.select("final")
    desktop.press("shift+Delete")
    desktop.window("Attention")
    desktop.press("Return")
    run_directory = f"runs/{run.name}"
    remaining = {"weights/warm-up", "weights/epoch-1"}
    assert account.eventually(lambda: account.checkpoint_ids(run_directory) == remaining, 20)
    assert "/weights/final\tdelete\t" in account.changes()
    everything = account.checkpoint_ids()
    desktop.go(account.path("runs"))
    desktop.select(run.name[:8])
    desktop.press("shift+Delete")
    desktop.window("Attention")
    desktop.press("Return")
    progress = desktop.window("File Operation Progress")
    assert mount_table.wait_until(lambda: len(desktop.windows("^Attention")) > 0, 20)
    desktop.xdotool("windowmove", progress, 0, HEIGHT - 80)
    desktop.settle()
    desktop.save_screenshot("file-manager-refused")
    assert account.checkpoint_ids() == everything
    *_, last = account.errors().splitlines()
    first = rf"/{run_directory}/(info\.json|latest)\tunlink\tEPERM\tonly checkpoints can be removed"
    assert re.search(first, last)
    # Skipping every rejected removal deletes nothing either.
    for _ in range(12):
        for window in desktop.windows("^Attention"):
            desktop.xdotool("windowfocus", "--sync", window)
            desktop.press("alt+s")
            desktop.settle()
    assert account.checkpoint_ids() == everything


def test_cut_and_paste_of_checkpoint_moves_nothing(account, run, desktop):
    target = desktop.home / "target"
    target.mkdir()
    everything = account.checkpoint_ids()
    desktop.open(run / "checkpoints/weights")
    desktop.select("final")
    desktop.press("ctrl+x")
    desktop.go(target)
    desktop.press("ctrl+v")
    desktop.window("Attention")
    for _ in range(10):  # skipping every rejected removal deletes nothing either
        for window in desktop.windows("^Attention"):
            desktop.xdotool("windowfocus", "--sync", window)
            desktop.press("alt+s")
            desktop.settle()
    assert account.checkpoint_ids() == everything
    assert "(hint: tinkerfs get PATH DEST, then rm -r PATH" in account.errors()
    assert not [e for e in account.server.journal.entries("api") if e.method == "DELETE"]
    assert len(os.listdir(run / "checkpoints/weights/final")) == 9
