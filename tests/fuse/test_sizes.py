"""Sizes and blocks as tools use them: sparse copies, backups, du, and sorting by size.

One binding is enough: attributes do not depend on it, which the tests in tests/vfs check.
"""

import os
import re
import shlex
import shutil

import pytest

from tests.support.account import account, make_account, needs

__all__ = ["account", "make_account"]

#: Tools that store a file with fewer blocks than bytes as a sparse file. `$FROM` is a directory of
#: the mount; the copy is `$TO` or below it. Tools that follow links also copy weights.
COPIERS = {
    "tar -S": "tar cS -C $FROM . | tar x -C $TO",
    "tar -S -h": "tar chS --exclude=archive_url -C $FROM . | tar x -C $TO",
    "tar --sparse-version": "tar chS --format=pax --sparse-version=1.0 -C $FROM . | tar x -C $TO",
    "cp -r --sparse=always": "cp -r --sparse=always $FROM/. $TO",
    "cp -rL --sparse=always": "cp -rL --sparse=always $FROM/. $TO",
    "cp -rL --sparse=auto": "cp -rL $FROM/. $TO",
    "rsync -S": "rsync -aS $FROM/ $TO",
    "rsync -LS": "rsync -rLS $FROM/ $TO",
    "busybox tar": "busybox tar c -h -C $FROM . | tar x -C $TO",
    "restic": (
        "export RESTIC_REPOSITORY=$OUT/restic RESTIC_PASSWORD=secret XDG_CACHE_HOME=$OUT/cache; "
        "restic init -q && cd $FROM && restic backup -q . && restic restore -q latest --target $TO"
    ),
}
FOLLOWS_LINKS = re.compile("-h|-rL|-LS|busybox")


def contents(root):
    """Return the content of every regular file below a directory, by path; follow no links."""
    found = {}
    for top, _directories, files in os.walk(root):
        for name in files:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, root)] = file.read()
    return found


@pytest.fixture(scope="module")
def weights(make_account):
    """Return an account of one run, without a limit of archive builds."""
    account = make_account(runs=0, settings={"archive_build_limit": 0})
    run = account.new_run("weights/0001", "sampler_weights/final")
    return account, run


@pytest.mark.parametrize("name", COPIERS)
def test_sparse_copy_is_complete(weights, name, tmp_path):
    account, run = weights
    needs([name] if name == "restic" else [])
    to = tmp_path / "to"
    to.mkdir()
    source = account.path(run)
    assignments = f"FROM={shlex.quote(str(source))} TO={to} OUT={tmp_path}\n"
    done = account.sh(assignments + COPIERS[name])
    assert (done.returncode, done.stderr) == (0, ""), done
    copied = contents(to)
    expected = contents(source)
    assert len(expected) == 1 + 5 + 4  # the run, its training and its sampler checkpoint
    if FOLLOWS_LINKS.search(name):
        run_id = run.partition("/")[2]
        for checkpoint in ("weights/0001", "sampler_weights/final"):
            for file, content in account.server.files(run_id, checkpoint).items():
                relative = f"checkpoints/{checkpoint}/files/{file}"
                expected[relative] = content.read(0, content.size_bytes)
            archive = account.server.archive(run_id, checkpoint)
            relative = f"checkpoints/{checkpoint}/archive.tar"
            expected[relative] = archive.read(0, archive.size_bytes)
    assert {path: copied.get(path) == data for path, data in expected.items()} == dict.fromkeys(
        expected, True
    )


def test_du_l_counts_files_behind_links(weights):
    account, run = weights
    relative = f"{run}/checkpoints/sampler_weights/final"
    done = account.sh(
        f"cat {relative}/archive.tar {relative}/tensors.json {relative}/archive_url > /dev/null; "
        f"du -sL --block-size=1 {relative}; du -sL --block-size=1 {relative}/files; "
        f"du -s --block-size=1 {relative}"
    )
    assert done.returncode == 0, done
    followed, files, stored = (int(line.split()[0]) for line in done.stdout.splitlines())
    names = os.listdir(account.path(f"{relative}/files"))
    sizes = [account.path(f"{relative}/files/{name}").stat().st_size for name in names]
    assert files == sum(-(-size // 512) * 512 for size in sizes)
    archive_bytes = account.path(f"{relative}/archive.tar").stat().st_size
    assert followed > stored + files + archive_bytes


SIZES = {"weights/small": 5_000, "weights/huge": 17 << 30, "weights/large": 1_100_000_000}


@pytest.fixture(scope="module")
def sized(account):
    """Return a directory with checkpoints of three sizes; their names have another order."""
    run = account.new_run()
    run_id = run.partition("/")[2]
    for name, size_bytes in SIZES.items():
        account.server.account.add_checkpoint(run_id, name, size_bytes=size_bytes)
    account.refresh()
    account.server.journal.clear()
    return f"{run}/checkpoints/weights"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ls -S {}", ["huge", "large", "small"]),
        ("ls -lhS {} | awk 'NR > 1 {{print $5}}'", ["17G", "1.1G", "4.9K"]),
        ("find {} -mindepth 1 -type d -size +1G -printf '%f\\n' | sort", ["huge", "large"]),
        ("find {} -mindepth 1 -type d -printf '%s %f\\n' | sort -n | head -1", ["5000 small"]),
        ("stat -c '%s %b' {}/small", ["5000 10"]),
    ],
)
def test_checkpoint_directories_sort_by_stored_size(account, sized, command, expected):
    done = account.sh(command.format(*[sized] * command.count("{}")))
    assert done.stdout.splitlines() == expected, done
    assert account.server.journal.count("GET archive") == 0


def test_df_works_after_cache_directory_is_removed(make_account):
    account = make_account(runs=0)
    run = account.new_run("sampler_weights/final")
    cache = account.root.parent / "cache"
    shutil.rmtree(cache)
    done = account.sh("df -P . && df -i . && stat -f .")
    assert (done.returncode, done.stderr) == (0, ""), done
    row = done.stdout.splitlines()[1].split()
    total, used, free = map(int, row[1:4])
    assert total == used + free > 0
    # Later reads are cached again.
    read = account.sh(f"cat {run}/checkpoints/sampler_weights/final/files/* > /dev/null")
    assert (read.returncode, read.stderr) == (0, ""), read
    assert (cache / "blocks").is_dir()
