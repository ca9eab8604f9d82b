"""A virtual screen with a keyboard, a mouse, and a file manager: Thunar."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tinkerfs.fuse import mount_table


def is_any_child_running() -> bool:
    """Return whether a thread of a child process is running or waits for a processor or a disk.

    The children of a test are the programs on its screen, and its mounts.
    """
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for pid in children.read_text().split():
                for status in Path(f"/proc/{pid}/task").glob("*/stat"):
                    with contextlib.suppress(OSError):
                        if status.read_text().rpartition(")")[2].split()[0] in "RD":
                            return True
    return False


class Desktop:
    """A virtual screen, and the programs on it.

    Args:
        home: An empty directory for the settings of the programs.
        size: Width and height of the screen and of the file manager's window, pixels.
        environ: Additional variables of the programs.
    """

    def __init__(
        self, home: Path, size: tuple[int, int], environ: dict[str, str] | None = None
    ) -> None:
        self.width, self.height = size
        runtime_directory = home / "run"
        runtime_directory.mkdir(mode=0o700)
        self._frame = runtime_directory / "Xvfb_screen0"
        self._started: list[subprocess.Popen[bytes]] = []
        self._environ = dict(os.environ)
        reading, writing = os.pipe()
        screen = ("-screen", "0", f"{self.width}x{self.height}x24", "-fbdir", runtime_directory)
        self.start("Xvfb", *screen, "-displayfd", writing, pass_fds=(writing,))
        os.close(writing)
        with os.fdopen(reading) as pipe:
            display = pipe.readline().strip()
        assert display, "Xvfb does not start"
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "DISPLAY": f":{display}",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(runtime_directory),
            # No session bus, so that the desktop of the developer is not involved.
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
            "GIO_USE_VFS": "local",
            "NO_AT_BRIDGE": "1",
            "LC_ALL": "C.UTF-8",
            **(environ or {}),
        }

    def start(self, *command: object, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """Start a program, which ends with the desktop."""
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            [str(each) for each in command],
            env=self._environ,
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """End the programs."""
        screen, *programs = self._started
        for process in reversed(programs):
            with contextlib.suppress(ProcessLookupError):  # it exited before it had a window
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        screen.terminate()  # it removes its socket and its lock file
        screen.wait(10)

    def settle(
        self, quiet_s: float = 0.5, timeout_s: float = 5.0, busy_timeout_s: float = 60.0
    ) -> None:
        """Wait until the screen is unchanged and no program is running or waiting for a processor.

        On a busy machine the screen is unchanged also before a program has handled a key.

        Args:
            quiet_s: How long both have to last.
            timeout_s: Bound on the wait for the screen, because a cursor may blink.
            busy_timeout_s: Bound on the whole wait.
        """
        began = time.monotonic()
        before, changed, busy = b"", began, began
        while (now := time.monotonic()) < began + busy_timeout_s:
            if now >= max(min(changed, began + timeout_s), busy) + quiet_s:
                break
            time.sleep(0.05)
            frame = self._frame.read_bytes()
            if frame != before:
                before, changed = frame, time.monotonic()
            if is_any_child_running():
                busy = time.monotonic()

    def open(self, directory: Path) -> str:
        """Start the file manager in a directory; return its window."""
        # Thunar exits now and then before it has a window, under load: that is started again.
        for _ in range(5):
            process = self.start("thunar", directory)
            mount_table.wait_until(
                lambda process=process: (  # type: ignore[misc]
                    self.windows(f"^{directory.name}") or process.poll() is not None
                ),
                60,
            )
            if process.poll() is None:
                break
        window = self.window(directory.name)
        self.xdotool("windowsize", "--sync", window, self.width, self.height)
        self.show_list()
        return window

    def show_list(self) -> None:
        """Switch from icons, the default, to a list with sizes and times."""
        self.settle()
        self.press("ctrl+2")
        self.settle()

    def xdotool(self, *arguments: object) -> list[str]:
        """Run xdotool; return the words that it prints."""
        done = subprocess.run(
            ["xdotool", *map(str, arguments)],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.split()

    def windows(self, title: str = ".+") -> list[str]:
        """Return the visible windows with a matching title."""
        return self.xdotool("search", "--onlyvisible", "--name", title)

    def window(self, title: str, timeout_s: float = 60) -> str:
        """Wait for a window with a title that starts so; focus and return it."""
        found: list[str] = []

        def is_open() -> bool:
            found[:] = self.windows(f"^{title}")
            return bool(found)

        assert mount_table.wait_until(is_open, timeout_s), (title, self.titles())
        self.xdotool("windowfocus", "--sync", found[-1])
        return found[-1]

    def titles(self) -> list[str]:
        """Return the titles of the visible windows."""
        return [" ".join(self.xdotool("getwindowname", window)) for window in self.windows()]

    def press(self, *keys: str) -> None:
        """Press keys one after the other, such as `ctrl+2`."""
        self.xdotool("key", "--clearmodifiers", "--delay", "60", *keys)

    def click(self, position: tuple[int, int], times: int = 1) -> None:
        """Click on a position of the screen."""
        self.xdotool("mousemove", "--sync", *position, "click", "--repeat", times, "--delay", 80, 1)
        self.settle()

    def write(self, text: str) -> None:
        """Type a text."""
        self.xdotool("type", "--delay", "15", text)

    def select(self, name: str) -> None:
        """Select an entry by a prefix of its name."""
        self.write(name)
        self.settle()
        self.press("Escape")
        self.settle()

    def go(self, directory: Path) -> str:
        """Go to a directory by the location bar."""
        self.press("ctrl+l")
        self.write(str(directory))
        self.press("Return")
        window = self.window(directory.name)
        self.show_list()
        return window

    def save_screenshot(self, picture: Path) -> None:
        """Save a picture of the screen as a PNG with 64 colors."""
        subprocess.run(
            ["import", "-window", "root", "-colors", "64", f"PNG8:{picture}"],
            env=self._environ,
            check=True,
            timeout=30,
        )
