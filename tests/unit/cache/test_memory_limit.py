"""The bound on memory for weights follows the limits of cgroups."""

import pytest

from tinkerfs.cache.memory_limit import DEFAULT_BYTES, memory_limit_bytes, weights_memory_bytes

MIB = 1 << 20


@pytest.fixture
def make_root(tmp_path):
    """Return a function that writes /proc/self/cgroup and files below /sys/fs/cgroup."""

    def make(cgroup, files):
        for path, text in {"proc/self/cgroup": cgroup, **files}.items():
            name = path if path.startswith("proc/") else f"sys/fs/cgroup/{path}"
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return str(tmp_path)

    return make


CASES = {
    "container of version 2": ("0::/", {"memory.max": 512 * MIB}, 512 * MIB),
    "parent of version 2": (
        "0::/pods/one",
        {"pods/memory.max": 300 * MIB, "pods/one/memory.max": "max", "memory.stat": "x"},
        300 * MIB,
    ),
    "throttled in version 2": ("0::/a", {"a/memory.max": 9000, "a/memory.high": 8000}, 8000),
    "path of the host": ("0::/../other/deep", {"memory.max": 512 * MIB}, 512 * MIB),
    "version 1": (
        "5:cpu:/x\n4:memory:/docker/id\n0::/",
        {"memory/docker/id/memory.limit_in_bytes": 200 * MIB, "cpu/x/memory.max": 1},
        200 * MIB,
    ),
    "container of version 1": (
        "4:hugetlb,memory:/docker/id",
        {"memory/memory.limit_in_bytes": 200 * MIB},
        200 * MIB,
    ),
    "no limit": ("0::/a", {"a/memory.max": "max"}, None),
    "no cgroup": ("", {}, None),
    "invalid": ("nonsense\n0::/a", {"a/memory.max": "-1"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_limit_is_the_smallest_of_all_cgroups(case, make_root):
    cgroup, files, expected = CASES[case]
    assert memory_limit_bytes(make_root(cgroup, files)) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max", DEFAULT_BYTES),
        (8 << 30, DEFAULT_BYTES),
        (192 * MIB, 48 * MIB),
        (1 * MIB, 8 * MIB),
        (9223372036854771712, DEFAULT_BYTES),  # no limit in version 1
    ],
)
def test_weights_use_a_quarter_of_the_limit(limit, expected, make_root):
    assert weights_memory_bytes(make_root("0::/", {"memory.max": limit})) == expected
