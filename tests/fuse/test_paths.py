"""`tinkerfs path` and `tinkerfs url`, on a real mount."""

import os

import pytest

from tests.support.account import account, make_account
from tests.support.mount import run, tinkerfs

__all__ = ["account", "make_account"]


def mount_of(account):
    return f"--mount={account.root}"


def test_path_and_url_are_inverse(account):
    wanted = account.server.account.runs()[0]
    for checkpoint in wanted.checkpoints:
        tinker_path = f"tinker://{wanted.id}/{checkpoint.id}"
        done = tinkerfs("path", mount_of(account), tinker_path)
        assert (done.returncode, done.stderr) == (0, "")
        directory = done.stdout.removesuffix("\n")
        assert (account.root / directory / "tinker_path").read_text() == f"{tinker_path}\n"
        for below in ("", "/info.json", "/archive_url"):
            assert tinkerfs("url", directory + below).stdout == f"{tinker_path}\n"
    assert account.server.journal.count("GET archive") == 0


def test_url_accepts_every_path_of_a_checkpoint(account):
    view = account.path("checkpoints")
    name = os.listdir(view)[0]
    expected = (view / name / "tinker_path").read_text()
    assert tinkerfs("url", view / name).stdout == expected
    latest = next(account.root.glob("runs/*/latest"))
    assert tinkerfs("url", latest).stdout == (latest / "tinker_path").read_text()


def test_path_of_run_is_its_directory(account):
    run_id = account.server.account.run_ids[0]
    directory = account.path(f"runs/{run_id}")
    assert tinkerfs("path", mount_of(account), f"tinker://{run_id}").stdout == f"{directory}\n"
    assert tinkerfs("url", directory).stdout == f"tinker://{run_id}\n"


def test_path_accepts_odd_names_and_older_forms(account):
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
    ("arguments", "expected"),
    [
        (("path", "weights/0001"), "a tinker path must start with tinker://"),
        (("path", "tinker://"), "a tinker path must be"),
        (("path", "tinker://r/weights/"), "a tinker path must be"),
        (("path", "--mount=/", "tinker://r/weights/1"), "/ is not a tinkerfs mount"),
        (("url", "/"), "/ is not below a tinkerfs mount"),
        (("url", "/no/such/thing"), "No such file"),
    ],
)
def test_invalid_path_reports_error_in_one_line(account, arguments, expected):
    done = tinkerfs(*arguments)
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_url_of_path_outside_checkpoints_fails(account):
    for path in ("README.md", "runs", ".tinkerfs/errors", ""):
        done = tinkerfs("url", account.root / path)
        assert done.returncode == 1
        assert "is not a checkpoint" in done.stderr
