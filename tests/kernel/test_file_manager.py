"""A real file manager on a real mount: Thunar, on a screen that nobody sees.

With `TINKERFS_PHOTOGRAPHS` its windows are photographed into that folder, for the documentation.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.account import account, api_calls, make_account, needs
from tinkerfs.adapters import mounts

__all__ = ["account", "make_account"]

pytestmark = pytest.mark.parametrize("make_account", ["mfusepy3"], indirect=True, scope="module")

#: The newest last, and so in an order of their own.
NAMES = ("weights/warm-up", "weights/epoch-1", "weights/final")

#: What the server stores of each; sorted by size they stand in a third order.
SIZES_BYTES = (2_000_000, 3_000_000, 1_000_000)

WIDTH, HEIGHT = 900, 420
#: Where a list has the heads of its columns of times and sizes, and its first row, in a window that
#: fills the screen.
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
    """A screen without a window manager, and what is pressed on its keyboard."""

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
        with os.fdopen(reading) as told:
            display = told.readline().strip()
        assert display, "Xvfb does not start"
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "DISPLAY": f":{display}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            # No session bus: the desktop of whoever runs the tests stays out of this.
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
            "GIO_USE_VFS": "local",
            "NO_AT_BRIDGE": "1",
            "LC_ALL": "C.UTF-8",
        }

    def settle(self, quiet_s=0.5, timeout_s=5.0):
        """Wait until the screen stands still, or has had time enough: a cursor goes on blinking."""
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
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def open(self, folder):
        """Start the file manager in a folder; return its window."""
        # Thunar exits now and then before it has a window, under load: that is started again.
        for _ in range(5):
            process = self._start(["thunar", str(folder)], self._environ)
            self._started.append(process)
            mounts.wait_until(
                lambda process=process: (
                    self.windows(f"^{folder.name}") or process.poll() is not None
                ),
                60,
            )
            if process.poll() is None:
                break
        window = self.window(folder.name)
        self.xdotool("windowsize", "--sync", window, WIDTH, HEIGHT)
        self.show_list()
        return window

    def show_list(self):
        """Show a folder as a list, with sizes and times; each one is shown as icons at first."""
        self.settle()
        self.press("ctrl+2")
        self.settle()

    def xdotool(self, *words):
        done = subprocess.run(
            ["xdotool", *map(str, words)],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.split()

    def windows(self, title=".+"):
        """Return the visible windows whose title matches."""
        return self.xdotool("search", "--onlyvisible", "--name", title)

    def window(self, title, timeout_s=60):
        """Wait for a window with a title that begins so; give it the keyboard and return it."""
        found = []

        def is_there():
            found[:] = self.windows(f"^{title}")
            return bool(found)

        assert mounts.wait_until(is_there, timeout_s), (title, self.titles())
        self.xdotool("windowfocus", "--sync", found[-1])
        return found[-1]

    def titles(self):
        return [" ".join(self.xdotool("getwindowname", window)) for window in self.windows()]

    def press(self, *keys):
        self.xdotool("key", "--clearmodifiers", "--delay", "60", *keys)

    def click(self, place, times=1):
        self.xdotool("mousemove", "--sync", *place, "click", "--repeat", times, "--delay", 80, 1)
        self.settle()

    def write(self, text):
        self.xdotool("type", "--delay", "15", text)

    def select(self, name):
        """Select an entry by the beginning of its name."""
        self.write(name)
        self.settle()
        self.press("Escape")
        self.settle()

    def go(self, folder):
        """Go to a folder by the location bar."""
        self.press("ctrl+l")
        self.write(str(folder))
        self.press("Return")
        window = self.window(folder.name)
        self.show_list()
        return window

    def photograph(self, name):
        """Keep a picture of the screen, where pictures are wanted."""
        target = os.environ.get("TINKERFS_PHOTOGRAPHS")
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
    """The folder of a run whose checkpoints were saved a day apart, the last one first by name."""
    newest_s = 1_780_000_000
    folder = account.new_run()
    run_id = Path(folder).name
    for days, name in enumerate(reversed(NAMES)):
        saved_s = newest_s - 86_400 * days
        size_bytes = SIZES_BYTES[NAMES.index(name)]
        account.server.account.add_checkpoint(run_id, name, time_s=saved_s, size_bytes=size_bytes)
    account.refresh()
    account.server.journal.clear()
    return account.path(folder)


def test_browse_sort_by_date_see_properties_and_open_a_file(account, run, desktop):
    desktop.open(account.root)
    desktop.go(run / "checkpoints/weights")
    desktop.click(HEAD_OF_TIMES)
    desktop.photograph("file-manager")
    desktop.click(FIRST_ROW, times=2)
    desktop.window("warm-up -")  # what was saved first
    desktop.settle()
    desktop.select("info")
    desktop.press("Return")
    opened = desktop.home / "opened"
    assert mounts.wait_until(opened.exists, 20), desktop.titles()
    record = json.loads(opened.read_text())
    assert record["checkpoint_id"] == "weights/warm-up"
    assert record["lora_rank"] > 0
    desktop.press("alt+Return")
    desktop.window("info.json - Properties")
    desktop.settle()
    desktop.press("Escape")
    account.server.journal.wait_until_idle()
    calls = api_calls(account.server)
    # As the location is typed, each beginning of it is looked up, and may be a run.
    assert calls.pop("GET training_runs/{run}") <= len(run.name)
    assert 1 <= calls.pop("POST weights_info") <= len(NAMES)
    # The listing, and where such a beginning was looked up before it came: has the server any?
    assert 1 <= calls.pop("GET training_runs") <= 2
    assert calls == {"GET training_runs/{run}/checkpoints": 1}


def test_size_column_sorts_by_what_is_stored(run, desktop):
    desktop.open(run / "checkpoints/weights")
    desktop.click(HEAD_OF_SIZES)
    desktop.click(FIRST_ROW, times=2)
    desktop.window("final -")  # the smallest


def test_the_properties_of_a_folder_count_what_is_below_it(account, run, desktop):
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
        "POST weights_info": len(NAMES),  # of its siblings behind the first
    }


def test_delete_a_checkpoint_and_be_refused_a_run(account, run, desktop):
    # Thunar opens each file and reads each link of what it shows, to choose icons.
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
    run_folder = f"runs/{run.name}"
    remaining = {"weights/warm-up", "weights/epoch-1"}
    assert account.eventually(lambda: account.checkpoint_ids(run_folder) == remaining, 20)
    assert "/weights/final\tdelete\t" in account.changes()
    everything = account.checkpoint_ids()
    desktop.go(account.path("runs"))
    desktop.select(run.name[:8])
    desktop.press("shift+Delete")
    desktop.window("Attention")
    desktop.press("Return")
    progress = desktop.window("File Operation Progress")
    assert mounts.wait_until(lambda: len(desktop.windows("^Attention")) > 0, 20)
    desktop.xdotool("windowmove", progress, 0, HEIGHT - 80)
    desktop.settle()
    desktop.photograph("file-manager-refused")
    assert account.checkpoint_ids() == everything
    *_, last = account.errors().splitlines()
    first = rf"/{run_folder}/(info\.json|latest)\tunlink\tEPERM\tonly checkpoints can be removed"
    assert re.search(first, last)
    # To skip what is refused, again and again, loses nothing either.
    for _ in range(12):
        for window in desktop.windows("^Attention"):
            desktop.xdotool("windowfocus", "--sync", window)
            desktop.press("alt+s")
            desktop.settle()
    assert account.checkpoint_ids() == everything


def test_cut_and_paste_of_a_checkpoint_moves_nothing(account, run, desktop):
    target = desktop.home / "target"
    target.mkdir()
    everything = account.checkpoint_ids()
    desktop.open(run / "checkpoints/weights")
    desktop.select("final")
    desktop.press("ctrl+x")
    desktop.go(target)
    desktop.press("ctrl+v")
    desktop.window("Attention")
    for _ in range(10):  # to skip what is refused loses nothing either
        for window in desktop.windows("^Attention"):
            desktop.xdotool("windowfocus", "--sync", window)
            desktop.press("alt+s")
            desktop.settle()
    assert account.checkpoint_ids() == everything
    assert "(hint: tinkerfs get PATH DEST, then rm -r PATH" in account.errors()
    assert not [e for e in account.server.journal.entries("api") if e.method == "DELETE"]
    assert len(os.listdir(run / "checkpoints/weights/final")) == 8
