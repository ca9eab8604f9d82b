"""A real file manager on a real mount: Thunar, on a virtual screen."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.support.account import api_calls, make_account, needs
from tests.support.desktop import Desktop
from tinkerfs.fuse import mount_table

__all__ = ["make_account"]

#: Oldest first, which is not the order of the names.
NAMES = ("weights/warm-up", "weights/epoch-1", "weights/final")

#: Stored size of each checkpoint; the order by size differs from both other orders.
SIZES_BYTES = (2_000_000, 3_000_000, 1_000_000)

SIZE = (900, 420)
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


@pytest.fixture(scope="module")
def account(make_account):
    """An account of which no listing expires during a test, however slow the machine is."""
    return make_account(runs=3, checkpoints=4, settings={"ttl_s": 86_400.0})


@pytest.fixture
def desktop(tmp_path):
    needs(["Xvfb", "thunar", "xdotool"])
    applications = tmp_path / ".local/share/applications"
    applications.mkdir(parents=True)
    (applications / "reader.desktop").write_text(READER)
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config/mimeapps.list").write_text(ASSOCIATIONS)
    desktop = Desktop(tmp_path, SIZE)
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


def test_browse_sort_show_properties_and_open_a_file(account, run, desktop, tmp_path):
    desktop.open(account.root)
    desktop.go(run / "checkpoints/weights")
    desktop.click(HEAD_OF_TIMES)
    desktop.click(FIRST_ROW, times=2)
    desktop.window("warm-up -")  # the oldest checkpoint
    desktop.settle()
    desktop.select("info")
    desktop.press("Return")
    opened = tmp_path / "opened"
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
    desktop.window("File Operation Progress")
    assert mount_table.wait_until(lambda: len(desktop.windows("^Attention")) > 0, 20)
    desktop.settle()
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


def test_cut_and_paste_of_checkpoint_moves_nothing(account, run, desktop, tmp_path):
    target = tmp_path / "target"
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
