"""Tests of `trash_paths`: the link in the trash for a path."""

import pytest

from tinkerfs import name_encoding
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs.trash import trash_paths

RUN = "79db3d29:train:0"
LINK = f"/.tinkerfs/trash/{RUN}@weights@0001"


@pytest.mark.parametrize(
    "path",
    [
        LINK,
        f"{LINK}/",
        f"{LINK}/expires_at",
        f"{LINK}@1767265630000000000/info.json",
        f"/checkpoints/{RUN}@weights@0001",
        f"/published/{RUN}@weights@0001/files",
        f"/expiring/{RUN}@weights@0001",
        f"/runs/{RUN}/checkpoints/weights/0001",
        f"/runs/{RUN}/checkpoints/weights/0001/info.json",
        f"/.content/{RUN}/weights/0001/1767265630000000000/files",
        f"/adapters/.content/{RUN}/weights/0001/1767265630000000000",
    ],
)
def test_trash_paths_of_a_checkpoint_is_its_link(path):
    assert trash_paths(path) == [LINK]


@pytest.mark.parametrize("tail", ["0001", "checkpoints/0001"])
def test_trash_paths_without_a_kind_has_one_per_kind(tail):
    links = trash_paths(f"/runs/{RUN}/checkpoints/{tail}")
    assert links == [f"/.tinkerfs/trash/{RUN}@{kind}@0001" for kind in KINDS]


def test_trash_paths_of_odd_names_are_encoded():
    run, name = "a@b", "x/..@"
    path = f"/runs/{name_encoding.encode(run)}/checkpoints/weights/{name_encoding.encode(name)}"
    assert trash_paths(path) == [
        f"/.tinkerfs/trash/{name_encoding.encode_composite((run, 'weights', name))}"
    ]


def test_trash_paths_of_a_truncated_link_is_itself():
    name = name_encoding.encode_composite((RUN, "weights", "x" * 300))
    for directory in ("checkpoints", ".tinkerfs/trash"):
        assert trash_paths(f"/{directory}/{name}") == [f"/.tinkerfs/trash/{name}"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/runs",
        f"/runs/{RUN}",
        f"/runs/{RUN}/checkpoints",
        f"/runs/{RUN}/latest",
        "/checkpoints",
        "/checkpoints/a@b",
        "/.tinkerfs/trash",
        "/.tinkerfs/errors",
        f"/runs/{RUN}/checkpoints/weights/{name_encoding.encode('x' * 300)}",
    ],
)
def test_trash_paths_of_anything_else_raises(path):
    with pytest.raises(ValueError, match="not"):
        trash_paths(path)
