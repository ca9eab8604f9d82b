import itertools
import re
from pathlib import Path

import pytest

from tinkerfs.vfs.layout import ROOT, render_layout_docs
from tinkerfs.vfs.node import inode_for_path
from tinkerfs.vfs.schema import Directory, DynamicEntries, GeneratedFile, RemovalPolicy

DOCS = Path(__file__).parents[3] / "docs"


def folders(folder, path=""):
    yield path or "/", folder
    for row in folder.rows:
        node = row.node if isinstance(row, DynamicEntries) else row
        if isinstance(node, Directory):
            yield from folders(node, f"{path}/{node.name}")


def test_the_documentation_is_made_from_the_table():
    assert (DOCS / "layout.md").read_text() == render_layout_docs(), "run scripts/docs"


def test_what_cannot_be_removed_is_first_and_last_wherever_checkpoints_lie_below():
    for path, folder in folders(ROOT):
        below = [f for p, f in folders(folder) if f.removal is RemovalPolicy.CHECKPOINT]
        if (
            folder.removal is RemovalPolicy.NEVER
            and below
            and not isinstance(folder.rows[0], DynamicEntries)
        ):
            ends = (folder.rows[0], folder.rows[-1])
            assert all(
                getattr(row, "removal", RemovalPolicy.NEVER) is RemovalPolicy.NEVER for row in ends
            ), path


def test_every_name_of_a_folder_is_there_once():
    for path, folder in folders(ROOT):
        literal = [row.name for row in folder.rows if not isinstance(row, DynamicEntries)]
        assert len(literal) == len(set(literal)), path


def test_what_only_open_resolves_is_told_longer_than_nothing_and_is_never_listed():
    costly = [
        (path, row)
        for path, folder in folders(ROOT)
        for row in folder.rows
        if isinstance(row, GeneratedFile) and row.size_hint is not None
    ]
    assert costly
    assert all(re.match("/.content/", path) for path, _row in costly)


@pytest.mark.parametrize("path", ["/", "/runs", "/runs/\udcff", "/" + "x" * 5000])
def test_inode_numbers_are_the_same_every_time_and_fit(path):
    assert inode_for_path(path) == inode_for_path(path)
    assert 2 <= inode_for_path(path) < 2**63


@pytest.mark.parametrize("seen", [lambda number: number, lambda number: number & 0xFFFFFFFF])
def test_inode_numbers_are_in_the_order_of_ranks(seen):
    numbers = [[seen(inode_for_path(f"/{n}", rank)) for n in range(1000)] for rank in range(4)]
    for lower, higher in itertools.pairwise(numbers):
        assert max(lower) < min(higher)
    assert max(map(max, numbers)) < (2**63 if seen(1 << 40) else 2**31), "GIO's are signed"


def test_inode_numbers_differ():
    assert len({inode_for_path(f"/runs/{number}") for number in range(10_000)}) == 10_000
