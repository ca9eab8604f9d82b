"""Walks that follow links: at most a burst of archives, told in `errors`; and the same without."""

import re
import sys

import pytest

from tests.support.account import make_account, needs

__all__ = ["make_account"]

pytestmark = pytest.mark.parametrize("make_account", ["mfusepy3"], indirect=True, scope="module")

#: Fewer than by default, as each first `open` waits until its file's length is known.
BURST = 2

#: What reads what is behind every link, or follows links to folders; 12 checkpoints are there.
FOLLOW = {
    "diff -r": "diff -r runs/$ONE runs/$TWO; diff -r runs/$THREE runs/$TWO",
    "zip -r": "zip -qr $OUT/x.zip runs",
    "zip -r of a view": "zip -qr $OUT/x.zip checkpoints",
    "cat *": "cat runs/*/checkpoints/*/*/* > /dev/null",
    "cat * of a view": "cat checkpoints/*/* > /dev/null",
    "cp -rL": "cp -rL runs $OUT/copy",
    "rsync -aL": "rsync -aL runs $OUT/",
    # The far end is this machine: what takes the place of ssh runs the command that it is given.
    "scp -r": "printf '#!/bin/sh\\nfor last; do :; done; exec sh -c \"$last\"' > $OUT/ssh; "
    "chmod +x $OUT/ssh; scp -O -q -r -S $OUT/ssh runs far:$OUT/copy",
    "tar -h": "tar chf $OUT/x.tar runs",
    "grep -R": "grep -R lora_rank checkpoints > /dev/null",
    "rg -L": "rg -L lora_rank > /dev/null",
    "md5sum": "find -L runs -type f -exec md5sum {} + > /dev/null",
    "glob and read": (
        "$PYTHON -c 'import glob, pathlib\n"
        'for name in glob.glob("**", recursive=True):\n'
        "    try: pathlib.Path(name).read_bytes()\n"
        "    except OSError: pass'"
    ),
    "du -L": "du -sL .",
    "find -L": "find -L . -name info.json",
    "glob": "$PYTHON -c 'import glob; print(len(glob.glob(\"**\", recursive=True)))'",
    "ls -LR": "ls -LlR runs",
    "tree -l": "tree -l",
    "fd -L": "$(command -v fdfind || command -v fd) -L info.json",
    "xargs -P8": "ls -d runs/*/checkpoints/*/*/* | xargs -P8 -n1 cat > /dev/null",
}


@pytest.mark.parametrize("name", FOLLOW)
def test_a_walk_that_follows_links_starts_a_burst_and_is_told_why(make_account, name, tmp_path):
    # A mount of its own for each: what one has fetched serves the next.
    account = make_account(runs=3, checkpoints=4, settings={"archive_burst": BURST})
    one, two, three = account.server.account.run_ids
    needs(tool for tool in ("rg", "rsync", "scp", "tree", "zip") if name.startswith(tool))
    words = f"ONE={one} TWO={two} THREE={three} OUT={tmp_path} PYTHON={sys.executable}\n"
    done = account.sh(words + FOLLOW[name])
    assert account.server.journal.count("GET archive") == BURST
    told = [line for line in account.errors().splitlines() if "--archive-burst" in line]
    assert told
    assert all("\tEBUSY\t" in line for line in told)
    if not re.match("fd|glob|tree|xargs", name):
        assert "Device or resource busy" in done.stderr


#: The same without following links, as docs/recipes.md names it; each sees a checkpoint's files.
STAY = {
    "rg": "rg -l lora_rank",
    "fd": "$(command -v fdfind || command -v fd) info.json",
    "find": "find . -name info.json",
    "tree": "tree",
    "ls -lR": "ls -lR .",
    "du": "du -a .",
    "grep -r": "grep -rl lora_rank .",
    "diff -r --no-dereference": "diff -r --no-dereference runs/$ONE runs/$TWO",
    "zip -ry": "zip -qry $OUT/x.zip runs && $PYTHON -m zipfile -l $OUT/x.zip",
    "cp -a": "cp -a runs $OUT/copy && find $OUT/copy",
    "rsync -a": "rsync -a runs $OUT/ && find $OUT/runs",
    "tar": "tar c runs | tar t",
    "restic": (
        "export RESTIC_REPOSITORY=$OUT/restic RESTIC_PASSWORD=x XDG_CACHE_HOME=$OUT/cache; "
        "restic init -q; restic backup -q runs && restic ls -q latest"
    ),
    "rclone": "rclone --config $OUT/conf copy -q runs $OUT/copy && find $OUT/copy",
    "bash's **": "shopt -s globstar; printf '%s\\n' **",
    "os.walk": "$PYTHON -c 'import os; print(list(os.walk(\".\")))'",
    "Path.rglob": "$PYTHON -c 'import pathlib; print(*pathlib.Path().rglob(\"*\"))'",
}


@pytest.fixture(scope="module")
def unread(make_account):
    """An account of which nobody asks for an archive."""
    return make_account(runs=3, checkpoints=4, settings={"archive_burst": BURST})


@pytest.mark.parametrize("name", STAY)
def test_walk_that_follows_no_links_starts_no_archive(unread, name, tmp_path):
    needs(tool for tool in ("rclone", "restic", "rg", "rsync", "tree", "zip") if tool in name)
    one, two, _three = unread.server.account.run_ids
    words = f"ONE={one} TWO={two} OUT={tmp_path} PYTHON={sys.executable}\n"
    done = unread.sh(words + STAY[name])
    assert "Device or resource busy" not in done.stderr
    assert "info.json" in done.stdout, done
    assert unread.server.journal.count("GET archive") == 0


def test_eight_archives_a_minute_unless_told_otherwise(make_account):
    account = make_account(runs=3, checkpoints=4)
    account.sh("cat runs/*/checkpoints/*/*/archive_url")
    assert account.server.journal.count("GET archive") == 8


#: What lists the `files` F of a checkpoint whose archive is refused; PYTHON says what it prints.
PYTHON = "exec {python} -c 'import glob, os, pathlib; print({what})'"
SHOWN = "REFUSED-see-.tinkerfs-errors"
#: Listers that say nothing of an error: what is refused stands among their names.
SILENT = {
    "glob": PYTHON.format(python="$PYTHON", what='glob.glob("F/**", recursive=True)'),
    "glob of a pattern": PYTHON.format(
        python="$PYTHON", what='glob.glob("F/**/*.safetensors", recursive=True)'
    ),
    "glob of another": PYTHON.format(python="$PYTHON", what='glob.glob("F/*.json")'),
    "fd": "$(command -v fdfind || command -v fd) -L . F",
    "fd of a pattern": "$(command -v fdfind || command -v fd) -L -e safetensors . F",
    "tree": "tree -l F",
    "perl": 'perl -e \'print join " ", glob("F/*")\'',
    "bash": "echo F/*.json",
    "bash, read": "! cat F/* || exit 1; echo F/*",
}
#: And those that fail, with its words.
FAILING = {
    "ls": "ls F/",
    "ls -l": "ls -l F/",
    "find": "find F/ -name x",
    "find -L": "find -L F",
    "du": "du -s F/",
    "du -L": "du -sL F",
    "cp": "cp -rL F $OUT/copy",
    "cat": "cat F/*",
    "tar": "tar chf $OUT/x.tar F",
    "rsync": "rsync -aL F $OUT/",
    "zip": "zip -qr $OUT/x.zip F",
    "rg": "rg -L --no-ignore lora F",
    "grep": "grep -R lora F",
    "diff": "diff -r F $OUT",
    "os.listdir": PYTHON.format(python="$PYTHON", what='os.listdir("F")'),
    "pathlib": PYTHON.format(python="$PYTHON", what='list(pathlib.Path("F/").rglob("*"))'),
    "os.walk": PYTHON.format(
        python="$PYTHON", what='list(os.walk("F", onerror=lambda e: exit(str(e))))'
    ),
}


@pytest.fixture(scope="module")
def refusing(make_account):
    return make_account(runs=0, settings={"archive_burst": 1})


def refused(account, command, tmp_path):
    """Run a command whose process group has had its burst, on the files of a checkpoint."""
    run = account.new_run("weights/one", "weights/two")
    script = command.replace("F", f"{run}/checkpoints/weights/two/files")
    words = f"OUT={tmp_path} PYTHON={sys.executable}; cat {run}/checkpoints/weights/one/archive_url"
    done = account.sh(f"{words} > /dev/null\n{script}", timeout_s=20)
    assert account.server.journal.count("GET archive") == 1
    return done


@pytest.mark.parametrize("name", SILENT)
def test_refused_listing_shows_in_names(refusing, name, tmp_path):
    needs(tool for tool in ("tree", "perl") if name == tool)
    done = refused(refusing, SILENT[name], tmp_path)
    assert SHOWN in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("name", FAILING)
def test_refused_listing_is_an_error(refusing, name, tmp_path):
    needs(tool for tool in ("rg", "rsync", "zip") if name == tool)
    done = refused(refusing, FAILING[name], tmp_path)
    assert "Device or resource busy" in done.stderr
    assert done.returncode != 0
    last = refusing.errors().splitlines()[-1]
    assert "\tEBUSY\t" in last


def test_refused_listing_is_whole_for_another_group(refusing, tmp_path):
    run = refusing.new_run("weights/one", "weights/two")
    files = f"{run}/checkpoints/weights/two/files"
    one = f"cat {run}/checkpoints/weights/one/archive_url > /dev/null"
    assert SHOWN in refusing.sh(f"{one}; ls {files}/").stdout
    done = refusing.sh(f"ls {files}/ && ls {files}/{SHOWN}.json")
    assert SHOWN not in done.stdout
    assert "adapter_config.json" in done.stdout
    assert "No such file" in done.stderr
