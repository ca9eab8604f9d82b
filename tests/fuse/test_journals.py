"""`.tinkerfs/errors` and `changes` with `tail -f`."""

import subprocess

from tests.support.account import account, every_binding, make_account
from tinkerfs.journal import MAX_LOG_LINES

__all__ = ["account", "make_account"]

pytestmark = every_binding


def test_tail_f_shows_new_lines(account, tmp_path):
    run = account.new_run("weights/1")
    # Enough failures that each new one evicts an old one.
    account.python(
        "import os\n"
        f"for n in range({MAX_LOG_LINES}):\n"
        "    try:\n"
        "        os.mkdir(f'old-{n}')\n"
        "    except PermissionError:\n"
        "        pass"
    )
    assert len(account.errors().splitlines()) == MAX_LOG_LINES
    output_path = tmp_path / "shown"
    files = [account.path(f".tinkerfs/{name}") for name in ("errors", "changes")]
    with output_path.open("wb") as output:
        tail = subprocess.Popen(
            ["tail", "-q", "-n", "1", "-s", "0.1", "-f", *files], stdout=output, stderr=output
        )
    try:
        assert account.eventually(lambda: "old-99" in output_path.read_text())
        account.sh("mkdir new-1")
        account.sh("mkdir new-2")
        account.sh(f"echo 1 > {run}/checkpoints/weights/1/published")
        assert account.eventually(
            lambda: all(word in output_path.read_text() for word in ("new-1", "new-2", "done")), 20
        )
    finally:
        tail.kill()
        tail.wait()
    text = output_path.read_text()
    assert "truncated" not in text
    assert [text.count(word) for word in ("/old-", "/new-1\t", "/new-2\t")] == [1, 1, 1]
    assert text.index("/new-1\t") < text.index("/new-2\t")
    assert account.eventually(lambda: len(account.errors().splitlines()) == MAX_LOG_LINES)
