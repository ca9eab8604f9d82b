"""`tinkerfs path` and `tinkerfs url`, on a real mount."""

import os

import pytest

from tests.support.account import account, make_account
from tests.support.mount import run, tinkerfs

__all__ = ["account", "make_account"]


def mount_of(account):
    return f"--mount={account.root}"


def test_a_path_leads_to_its_checkpoint_and_back(account):
    wanted = account.server.account.runs()[0]
    for checkpoint in wanted.checkpoints:
        tinker_path = f"tinker://{wanted.id}/{checkpoint.id}"
        done = tinkerfs("path", mount_of(account), tinker_path)
        assert (done.returncode, done.stderr) == (0, "")
        folder = done.stdout.removesuffix("\n")
        assert (account.root / folder / "tinker_path").read_text() == f"{tinker_path}\n"
        for below in ("", "/info.json", "/archive_url"):
            assert tinkerfs("url", folder + below).stdout == f"{tinker_path}\n"
    assert account.server.journal.count("GET archive") == 0


def test_any_way_to_a_checkpoint_tells_its_path(account):
    view = account.path("checkpoints")
    name = os.listdir(view)[0]
    expected = (view / name / "tinker_path").read_text()
    assert tinkerfs("url", view / name).stdout == expected
    latest = next(account.root.glob("runs/*/latest"))
    assert tinkerfs("url", latest).stdout == (latest / "tinker_path").read_text()


def test_a_run(account):
    run_id = account.server.account.run_ids[0]
    folder = account.path(f"runs/{run_id}")
    assert tinkerfs("path", mount_of(account), f"tinker://{run_id}").stdout == f"{folder}\n"
    assert tinkerfs("url", folder).stdout == f"tinker://{run_id}\n"


def test_odd_names_and_paths_of_older_servers(account):
    run_id = account.new_run("weights/a b/c%2F\nd").removeprefix("runs/")
    odd = f"tinker://{run_id}/weights/a b/c%2F\nd"
    done = run(
        "bash",
        "-c",
        'cat "$(python -m tinkerfs path --mount="$1" "$2")/tinker_path"',
        "-",
        account.root,
        odd,
        env={**os.environ, "PATH": venv_path()},
    )
    assert done.stdout == f"{odd}\n", done
    for path in ("tinker://r/checkpoints/one", "tinker://r/one"):
        done = tinkerfs("path", mount_of(account), path)
        assert done.stdout == f"{account.root}/runs/r/checkpoints/one\n"


def venv_path():
    import sys

    return f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("path", "weights/0001"), "a tinker path starts with tinker://"),
        (("path", "tinker://"), "a tinker path is"),
        (("path", "tinker://r/weights/"), "a tinker path is"),
        (("path", "--mount=/", "tinker://r/weights/1"), "/ is no mount of tinkerfs"),
        (("url", "/"), "/ is not below a mount"),
        (("url", "/no/such/thing"), "No such file"),
    ],
)
def test_what_is_no_path_is_said_in_a_line(account, arguments, words):
    done = tinkerfs(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_is_in_no_checkpoint_has_no_path(account):
    for path in ("README.md", "runs", ".tinkerfs/errors", ""):
        done = tinkerfs("url", account.root / path)
        assert done.returncode == 1
        assert "is no checkpoint" in done.stderr
