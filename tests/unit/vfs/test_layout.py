import itertools
import re
from pathlib import Path

import pytest

from tinkerfs.vfs import directory_cache
from tinkerfs.vfs.layout import ROOT, render_layout_docs
from tinkerfs.vfs.node import inode_for_path
from tinkerfs.vfs.schema import Directory, DynamicEntries, GeneratedFile, RemovalPolicy

DOCS = Path(__file__).parents[3] / "docs"


def directories(directory, path=""):
    yield path or "/", directory
    for child in directory.specs:
        spec = child.spec if isinstance(child, DynamicEntries) else child
        if isinstance(spec, Directory):
            yield from directories(spec, f"{path}/{spec.name}")


def test_layout_docs_are_up_to_date():
    assert (DOCS / "layout.md").read_text() == render_layout_docs(), "run scripts/docs"


def test_first_and_last_spec_above_checkpoints_cannot_be_removed():
    for path, directory in directories(ROOT):
        below = [d for _path, d in directories(directory) if d.removal is RemovalPolicy.CHECKPOINT]
        if (
            directory.removal is RemovalPolicy.NEVER
            and below
            and not isinstance(directory.specs[0], DynamicEntries)
        ):
            ends = (directory.specs[0], directory.specs[-1])
            assert all(
                getattr(spec, "removal", RemovalPolicy.NEVER) is RemovalPolicy.NEVER
                for spec in ends
            ), path


def test_names_of_a_directory_are_unique():
    for path, directory in directories(ROOT):
        literal = [spec.name for spec in directory.specs if not isinstance(spec, DynamicEntries)]
        assert len(literal) == len(set(literal)), path


def test_files_with_size_hints_are_below_content():
    hinted = [
        (path, spec)
        for path, directory in directories(ROOT)
        for spec in directory.specs
        if isinstance(spec, GeneratedFile) and spec.size_hint is not None
    ]
    assert hinted
    assert all(re.match("/.content/", path) for path, _spec in hinted)


@pytest.mark.parametrize("path", ["/", "/runs", "/runs/\udcff", "/" + "x" * 5000])
def test_inode_for_path_is_stable_and_fits_63_bits(path):
    assert inode_for_path(path) == inode_for_path(path)
    assert 2 <= inode_for_path(path) < 2**63


@pytest.mark.parametrize("compared", [lambda number: number, lambda number: number & 0xFFFFFFFF])
def test_inode_for_path_sorts_by_rank(compared):
    numbers = [[compared(inode_for_path(f"/{n}", rank)) for n in range(1000)] for rank in range(4)]
    for lower, higher in itertools.pairwise(numbers):
        assert max(lower) < min(higher)
    assert max(map(max, numbers)) < (2**63 if compared(1 << 40) else 2**31), (
        "GIO compares signed numbers"
    )


def test_inode_for_path_is_unique():
    assert len({inode_for_path(f"/runs/{number}") for number in range(10_000)}) == 10_000


def test_listings_of_1000_runs_with_10_checkpoints_fit_the_cache():
    """A walk in order over more entries than the cache holds finds none of them again."""
    counts = {path: len(directory.specs) for path, directory in directories(ROOT)}
    # Of each also its name in the directory above, and of a run the three kinds.
    per_checkpoint = counts["/runs/<run_id>/checkpoints/<kind>/<name>"] + 1
    per_run = counts["/runs/<run_id>"] + 3 + 1
    assert 1000 * (10 * per_checkpoint + per_run) <= directory_cache._MAX_ENTRIES
