"""Interactive terminal programs: editors, ncdu and Midnight Commander."""

import os

import pytest

from tests.support.account import account, api_calls, make_account, needs
from tests.support.terminal import terminal

__all__ = ["account", "make_account"]

ENTER, ESCAPE, DOWN, LEFT = "\r", "\x1b", "\x1bOB", "\x1bOD"
CTRL_K, CTRL_O, CTRL_S, CTRL_X = "\x0b", "\x0f", "\x13", "\x18"
F3, F8, F10 = "\x1bOR", "\x1b[19~", "\x1b[21~"

CHANGED = {"GET training_runs/{run}/checkpoints": 1, "POST publish": 1}


@pytest.fixture
def checkpoint(account):
    """Return a checkpoint's path from the root, with cached weights info and an empty journal."""
    run = account.new_run("weights/1", "weights/2")
    account.sh(f"cat {run}/checkpoints/weights/*/info.json; ls runs")
    account.server.journal.clear()
    yield f"{run}/checkpoints/weights/1"
    account.server.account.remove_run(run.partition("/")[2])


def run_of(checkpoint):
    """Return the path of the run from the root."""
    return "/".join(checkpoint.split("/")[:2])


@pytest.fixture
def is_published(account, checkpoint):
    """Return a function that returns whether the checkpoint is published at the server."""
    run_id = checkpoint.split("/")[1]
    return lambda: account.server.account.checkpoint(run_id, "weights/1").is_public


@pytest.fixture
def start_program(account, tmp_path):
    """Return a function that starts a program at the mount's root, with an empty home."""

    def start(*command):
        needs(command[:1])
        return terminal(command, account.root, {"HOME": str(tmp_path)})

    return start


# --- editors -------------------------------------------------------------------------------------

FILES = {
    "README.md": "Your Tinker training runs",
    "runs/{run}/info.json": '"training_run_id"',
    "{place}/info.json": '"checkpoint_id"',
    "{place}/published": "0",
    "{place}/expires_at": "never",
    "{place}/tinker_path": "tinker://",
    ".tinkerfs/stats.json": '"uptime_s"',
}


@pytest.mark.parametrize("editor", ["vi", "nano"])
def test_editor_shows_every_file_without_requests(account, checkpoint, start_program, editor):
    leave = ":q" + ENTER if editor == "vi" else CTRL_X
    for pattern, expected in FILES.items():
        path = pattern.format(place=checkpoint, run=checkpoint.split("/")[1])
        with start_program(editor, path) as program:
            program.wait_for(expected)
            program.send(leave)
            assert program.end() == 0
    assert api_calls(account.server) == {}


def test_vi_publishes_without_configuration(account, checkpoint, start_program, is_published):
    with start_program("vi", f"{checkpoint}/published") as program:
        program.wait_for("0")
        program.send("cw1" + ESCAPE)
        program.send(":wq" + ENTER)
        program.wait_for("written")
        assert program.end() == 0
    assert is_published()
    assert api_calls(account.server) == CHANGED
    assert account.path(f"{checkpoint}/published").read_text() == "1\n"


def test_nano_publishes_without_configuration(account, checkpoint, start_program, is_published):
    with start_program("nano", f"{checkpoint}/published") as program:
        program.wait_for("Exit")
        program.send(CTRL_K)
        program.send("yes")
        program.send(CTRL_O)
        program.wait_for("File Name to Write")
        program.send(ENTER)
        program.wait_for("Wrote 1 line")
        program.send(CTRL_X)
        assert program.end() == 0
    assert is_published()
    assert api_calls(account.server) == CHANGED


def test_vi_reports_that_invalid_value_was_not_written(
    account, checkpoint, start_program, is_published
):
    with start_program("vi", f"{checkpoint}/published") as program:
        program.wait_for("0")
        program.send("cwmaybe" + ESCAPE)
        program.send(":w" + ENTER)
        program.wait_for("E")
        program.wait_for("rror")
        program.send(ENTER)
        program.send(":q!" + ENTER)
        assert program.end() == 0
    assert not is_published()
    assert "EINVAL" in account.errors()
    assert account.path(f"{checkpoint}/published").read_text() == "0\n"


def test_nano_reports_that_invalid_value_was_not_written(
    account, checkpoint, start_program, is_published
):
    with start_program("nano", f"{checkpoint}/published") as program:
        program.wait_for("Exit")
        program.send(CTRL_K)
        program.send("maybe")
        program.send(CTRL_O)
        program.wait_for("File Name to Write")
        program.send(ENTER)
        program.wait_for("Invalid argument")
        program.send(CTRL_X)
        program.wait_for("Save modified buffer?")
        program.send("n")
        program.end()
    assert not is_published()


@pytest.mark.parametrize("editor", ["vi", "nano"])
def test_editor_reports_that_file_is_not_writable(account, checkpoint, start_program, editor):
    with start_program(editor, f"{checkpoint}/info.json") as program:
        program.wait_for('"checkpoint_id"')
        if editor == "vi":
            program.send("ihello" + ESCAPE)
            program.send(":w" + ENTER)
            program.wait_for("E212: Can't open file for writing")
            program.send(ENTER)
            program.send(":q!" + ENTER)
        else:
            program.send("hello")
            program.send(CTRL_O)
            program.wait_for("File Name to Write")
            program.send(ENTER)
            program.wait_for("Operation not permitted")
            program.send(CTRL_X)
            program.wait_for("Save modified buffer?")
            program.send("n")
        program.end()
    assert "hello" not in account.path(f"{checkpoint}/info.json").read_text()
    assert api_calls(account.server) == {}


# --- terminal file managers ----------------------------------------------------------------------


def test_ncdu_shows_stored_size_without_archive_request(account, checkpoint, start_program):
    account.refresh()
    run_id = checkpoint.split("/")[1]
    with start_program("ncdu", "runs") as program:
        program.wait_for("Total disk usage")
        program.send("?")
        program.wait_for("ncdu help")
        program.send("q")
        program.send("q")
        assert program.end() == 0
    assert run_id in program.shown
    assert account.server.journal.count("GET archive") == 0


def test_ncdu_deletes_the_selected_checkpoint(account, checkpoint, start_program):
    with start_program("ncdu", os.path.dirname(checkpoint)) as program:
        program.wait_for("Total disk usage")
        chosen, other = (name for name in program.shown.split() if name in ("/1", "/2"))
        program.send("d")
        program.wait_for("Are you sure")
        program.send(LEFT + ENTER)
        left = {f"weights{other}"}
        assert account.eventually(lambda: account.checkpoint_ids(run_of(checkpoint)) == left), (
            chosen
        )


def test_ncdu_cannot_delete_the_record_of_a_run(account, checkpoint, start_program):
    with start_program("ncdu", run_of(checkpoint)) as program:
        program.wait_for("Total disk usage")
        program.send(DOWN + "d")
        program.wait_for('delete "info.json"')
        program.send(LEFT + ENTER)
        program.wait_for("Operation not permitted")
    assert account.checkpoint_ids(run_of(checkpoint)) == {"weights/1", "weights/2"}


@pytest.fixture
def commander(start_program):
    """Return a function that starts Midnight Commander with a directory in both panels."""
    return lambda directory: start_program("mc", "--nosubshell", "--nomouse", directory, directory)


def test_mc_shows_a_directory_and_a_file(account, checkpoint, commander):
    with commander(checkpoint) as program:
        program.wait_for("info.json")
        program.send(CTRL_S + "info")
        program.wait_for("info")
        program.send(ENTER + F3)
        program.wait_for('"tinker_path"')
        program.send(F10 + F10)
        program.end()
    assert account.server.journal.count("GET archive") == 0
    assert api_calls(account.server).keys() <= {"GET training_runs/{run}/checkpoints"}


def test_mc_deletes_the_selected_checkpoint(account, checkpoint, commander):
    with commander(os.path.dirname(checkpoint)) as program:
        program.wait_for("/1")
        program.send(DOWN + F8)
        program.wait_for("Delete directory")
        program.send("y")
        program.wait_for("Delete it recursively?")
        program.send("y")
        assert account.eventually(
            lambda: account.checkpoint_ids(run_of(checkpoint)) == {"weights/2"}
        )
    assert account.errors().count(checkpoint) == 0


def test_mc_cannot_delete_a_run(account, checkpoint, commander):
    before = account.checkpoint_ids()
    with commander("runs") as program:
        program.wait_for(run_of(checkpoint).removeprefix("runs"))
        program.send(DOWN + F8)
        program.wait_for("Delete directory")
        program.send("y")
        program.wait_for("Delete it recursively?")
        program.send("y")
        program.wait_for("Cannot remove file")
        program.wait_for("Operation not permitted")
        program.send("s")  # Skip: it continues, and every further removal is rejected
        program.wait_for("Operation not permitted")
    assert account.checkpoint_ids() == before
