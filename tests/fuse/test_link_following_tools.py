"""Walks that follow links request at most a burst of archives; other walks request none."""

import re
import sys

import pytest

from tests.support.account import make_account, needs

__all__ = ["make_account"]

#: Less than the default, because each first `open` waits until the size of its file is known.
BURST = 2

#: Commands that read the targets of links, or follow links to directories, of 12 checkpoints.
FOLLOW = {
    "diff -r": "diff -r runs/$ONE runs/$TWO; diff -r runs/$THREE runs/$TWO",
    "zip -r": "zip -qr $OUT/x.zip runs",
    "zip -r of a view": "zip -qr $OUT/x.zip checkpoints",
    "cat *": "cat runs/*/checkpoints/*/*/* > /dev/null",
    "cat * of a view": "cat checkpoints/*/* > /dev/null",
    "cp -rL": "cp -rL runs $OUT/copy",
    "rsync -aL": "rsync -aL runs $OUT/",
    # The remote host is this machine: the replacement of ssh runs its command locally.
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
def test_link_following_walk_requests_a_burst_of_archives(make_account, name, tmp_path):
    # Each command has a mount of its own, because it could use files cached by another one.
    account = make_account(runs=3, checkpoints=4, settings={"archive_build_limit": BURST})
    one, two, three = account.server.account.run_ids
    needs(tool for tool in ("rg", "rsync", "scp", "tree", "zip") if name.startswith(tool))
    assignments = f"ONE={one} TWO={two} THREE={three} OUT={tmp_path} PYTHON={sys.executable}\n"
    done = account.sh(assignments + FOLLOW[name])
    assert account.server.journal.count("GET archive") == BURST
    lines = [line for line in account.errors().splitlines() if "--archive-burst" in line]
    assert lines
    assert all("\tEBUSY\t" in line for line in lines)
    if not re.match("fd|glob|tree|xargs", name):
        assert "Device or resource busy" in done.stderr


#: The same without following links, as in docs/examples.md; each lists a checkpoint's files.
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
    """Return an account for tests that request no archives."""
    return make_account(runs=3, checkpoints=4, settings={"archive_build_limit": BURST})


@pytest.mark.parametrize("name", STAY)
def test_walk_without_following_links_requests_no_archive(unread, name, tmp_path):
    needs(tool for tool in ("rclone", "restic", "rg", "rsync", "tree", "zip") if tool in name)
    one, two, _three = unread.server.account.run_ids
    assignments = f"ONE={one} TWO={two} OUT={tmp_path} PYTHON={sys.executable}\n"
    done = unread.sh(assignments + STAY[name])
    assert "Device or resource busy" not in done.stderr
    assert "info.json" in done.stdout, done
    assert unread.server.journal.count("GET archive") == 0


def test_default_burst_is_eight_archives_per_minute(make_account):
    account = make_account(runs=3, checkpoints=4)
    account.sh("cat runs/*/checkpoints/*/*/archive_url")
    assert account.server.journal.count("GET archive") == 8


#: Code that lists the `files` F of a checkpoint after its archive request was rejected.
PYTHON = "exec {python} -c 'import glob, os, pathlib; print({what})'"
NOTICE = "REFUSED-see-.tinkerfs-errors"
#: Commands that ignore errors of listing: the notice is among the listed names.
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
#: Commands that fail with the error message.
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
def limited_account(make_account):
    return make_account(runs=0, settings={"archive_build_limit": 1})


def run_rejected(account, command, tmp_path):
    """Run a command on a checkpoint's files, after its process group has used its burst."""
    run = account.new_run("weights/one", "weights/two")
    script = command.replace("F", f"{run}/checkpoints/weights/two/files")
    assignments = (
        f"OUT={tmp_path} PYTHON={sys.executable}; cat {run}/checkpoints/weights/one/archive_url"
    )
    done = account.sh(f"{assignments} > /dev/null\n{script}", timeout_s=20)
    assert account.server.journal.count("GET archive") == 1
    return done


@pytest.mark.parametrize("name", SILENT)
def test_rejected_listing_has_an_entry_that_names_errors(limited_account, name, tmp_path):
    needs(tool for tool in ("tree", "perl") if name == tool)
    done = run_rejected(limited_account, SILENT[name], tmp_path)
    assert NOTICE in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("name", FAILING)
def test_rejected_listing_fails(limited_account, name, tmp_path):
    needs(tool for tool in ("rg", "rsync", "zip") if name == tool)
    done = run_rejected(limited_account, FAILING[name], tmp_path)
    assert "Device or resource busy" in done.stderr
    assert done.returncode != 0
    last = limited_account.errors().splitlines()[-1]
    assert "\tEBUSY\t" in last


def test_listing_is_complete_for_another_process_group(limited_account, tmp_path):
    run = limited_account.new_run("weights/one", "weights/two")
    files = f"{run}/checkpoints/weights/two/files"
    one = f"cat {run}/checkpoints/weights/one/archive_url > /dev/null"
    assert NOTICE in limited_account.sh(f"{one}; ls {files}/").stdout
    done = limited_account.sh(f"ls {files}/ && ls {files}/{NOTICE}.json")
    assert NOTICE not in done.stdout
    assert "adapter_config.json" in done.stdout
    assert "No such file" in done.stderr
