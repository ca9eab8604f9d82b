"""The table "Weights by server" of docs/weights.md, row by row on real mounts."""

import os
import re
from pathlib import Path

import pytest

from tests.support.account import api_calls, make_account
from tests.support.mount import tinkerfs
from tinkerfs.demo.profiles import KIND_TYPES, PROFILES

__all__ = ["make_account"]

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
REFUSED = "Operation not supported"

#: Words of the table for requests.
REQUESTS = {
    "archive": "GET archive",
    "URLs": "GET external_weights_urls",
    "listing": "GET training_runs/{run}/checkpoints",
    "download": "GET download",
}
KINDS = {kind_type: kind for kind, kind_type in KIND_TYPES.items()}


def table():
    """Return the cells of each row."""
    section = PAGE.read_text().partition("\n### Weights by server\n")[2]
    lines = re.search(r"^\|---.*\n((?:\|.*\n)+)", section, re.MULTILINE)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS = table()


@pytest.fixture(scope="module")
def account_of(make_account):
    """Return a function that returns the account of a profile."""
    accounts = {}

    def get(profile):
        if profile not in accounts:
            accounts[profile] = make_account(runs=1, checkpoints=1, profile=profile)
        return accounts[profile]

    return get


def test_table_has_every_kind_of_every_server():
    expected = {
        (name, KIND_TYPES[kind]) for name, profile in PROFILES.items() for kind in profile.kinds
    }
    assert {(row[0], row[1]) for row in ROWS} == expected | {
        ("official-0.36", "training, exported")
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_row_describes_a_mount(account_of, row, tmp_path):
    profile, checkpoint, files, adapters, requests, message = row
    account = account_of(profile)
    kind = KINDS[checkpoint.partition(",")[0]]
    run = account.new_run(f"{kind}/1")
    run_id = run.partition("/")[2]
    directory = f"{run}/checkpoints/{kind}/1"
    adapter = f"adapters/{run_id}@{kind}@1"
    if checkpoint.endswith(", exported"):
        assert account.sh(f"echo 1h > {directory}/export").returncode == 0
    account.sh(f"ls {directory}")
    account.server.journal.clear()
    before = len(account.errors().splitlines())

    listed = account.sh(f"ls {directory}/files/")
    calls = api_calls(account.server)
    assert calls == {
        REQUESTS[word]: int(count) for count, word in re.findall(r"(\d+) (\w+)", requests)
    }
    expected = account.server.files(run_id, f"{kind}/1")
    name = next(name for name in expected if name.endswith(".safetensors"))
    # The name is not listed first: a program may know it.
    read = account.sh(f"cat {directory}/files/{name} > {tmp_path}/{name}")
    env = {**os.environ, **account.server.environment, "HOME": str(tmp_path)}
    copied = tinkerfs("get", account.root / directory, tmp_path / "out", env=env)
    if files == "yes":
        assert set(listed.stdout.split()) == set(expected)
        for path in (tmp_path / name, tmp_path / "out" / name):
            assert path.read_bytes() == expected[name].read(0, expected[name].size_bytes)
    else:
        assert (listed.stdout, files) == ("", "no")
        assert REFUSED in listed.stderr
        assert REFUSED in read.stderr
        assert copied.returncode == 1
        assert message.replace("`", "") in copied.stderr.replace("`", "")

    loaded = account.sh(f"cat {adapter}/adapter_config.json {adapter}/adapter_model.safetensors")
    assert (loaded.returncode == 0, REFUSED in loaded.stderr) == {
        "yes": (True, False),
        "no": (False, True),
    }[adapters]
    lines = account.errors().splitlines()[before:]
    if message:
        assert message.replace("`", "") in "\n".join(lines).replace("`", "")
    else:
        assert lines == []
