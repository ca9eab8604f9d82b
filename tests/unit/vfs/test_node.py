import stat

import pytest
from msgspec.structs import replace

from tinkerfs.vfs.node import Attr

FILE = Attr(stat.S_IFREG | 0o444, 0, 0, 2, 1, 0, 0)


@pytest.mark.parametrize(
    ("size_bytes", "blocks"), [(0, 0), (1, 1), (512, 1), (513, 2), (2**63 - 1, 2**54)]
)
def test_attr_blocks_cover_every_byte(size_bytes, blocks):
    assert replace(FILE, size_bytes=size_bytes).blocks == blocks
    assert replace(FILE, size_bytes=size_bytes, mode=stat.S_IFDIR).blocks == blocks


def test_attr_blocks_of_a_symlink_are_zero():
    assert replace(FILE, size_bytes=30, mode=stat.S_IFLNK | 0o777).blocks == 0
