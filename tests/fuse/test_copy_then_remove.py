"""Removing a checkpoint directory after copying it off the mount deletes nothing.

The copy contains the links and the small files, but not the weights. Removal after a mere listing
still deletes. Each script runs in a new session, like a command of an interactive shell.
"""

import sys

import pytest

from tests.support.account import account, deletes, make_account, needs, quoted
from tests.support.mount import BINDINGS
from tests.support.terminal import terminal

__all__ = ["account", "make_account"]

TOOLS = ("busybox", "gio", "jq", "perl", "rclone", "rsync", "zip")

#: $X is a checkpoint directory, $W and $CK are its parents, $OUT is outside the mount.
MOVES = {
    "mv": "mv $X $OUT/",
    "mv a kind": "mv $W $OUT/",
    "mv checkpoints": "mv $CK $OUT/",
    "mv several": "mv $W/* $OUT/",
    "mv names": "mv $X/* $OUT/; rmdir $X",
    "mv each name": 'for f in $X/*; do mv "$f" $OUT/; done; rmdir $X',
    "mv through the view": "mv checkpoints/*@weights@0001/ $OUT/; mv $(realpath $X) $OUT/",
    "busybox mv": "busybox mv $X $OUT/",
    "shutil.move": "$PYTHON -c 'import shutil, sys; shutil.move(*sys.argv[1:])' $X $OUT",
    "copytree and rmtree": (
        "$PYTHON -c 'import shutil, sys\n"
        'shutil.copytree(sys.argv[1], sys.argv[2] + "/x", symlinks=True)\n'
        "shutil.rmtree(sys.argv[1])' $X $OUT"
    ),
    "perl": (
        "perl -MFile::Copy=move -e '($x, $out) = @ARGV; opendir(D, $x); for (readdir D) {"
        ' next if /^\\./; $l = readlink("$x/$_");'
        ' if (defined $l) { symlink($l, "$out/$_") && unlink "$x/$_" }'
        ' else { move("$x/$_", "$out/$_") } } rmdir $x or die $!\' $X $OUT'
    ),
    "tar --remove-files": "tar -C $W --remove-files -cf $OUT/x.tar 0001",
    "tar --remove-files a run": "tar -C $CK/.. --remove-files -cf $OUT/x.tar checkpoints",
    "tar --atime-preserve": "tar -C $W --atime-preserve=system --remove-files -cf $OUT/x.tar 0001",
    "rsync": "rsync -a --remove-source-files $X $OUT/; find $CK -type d -empty -delete; rmdir $X",
    "rclone": "rclone --config /dev/null move $X $OUT/x",
    "rclone --links": ("rclone --config /dev/null move --links --delete-empty-src-dirs $X $OUT/x"),
    "zip -m": "cd $W && zip -qrmy $OUT/x.zip 0001; rmdir 0001",
    "zip -m, following": "cd $W && zip -qrm $OUT/x.zip 0001; rmdir 0001",
    "gio move": "for n in info.json published; do gio move $X/$n $OUT/; done; rm -r $X",
    "xargs": "ls -d $X | xargs -P4 -I{} sh -c 'cp -a {} $OUT/ && rm -r {}'",
    "cp && rm": "cp -a $X $OUT/ && rm -r $X",
    "cp && find": "cp -a $CK $OUT/ && find $CK -mindepth 1 -delete",
    "cp -P of each && rm": "cp -P $X/* $OUT/ && rm -r $X",
    "tar && rm": "tar -C $W -cf $OUT/x.tar 0001 && rm -r $X",
    "tar | tar && rm": "tar -C $W -c 0001 | tar -C $OUT -x && rm -r $X",
    "rsync && rm": "rsync -a $W $OUT/ && rm -r $X",
}

#: These run under every binding, the others under one.
REPRESENTATIVE_MOVES = ("mv", "mv each name", "shutil.move", "rsync", "cp && rm")
MOVES_OF_BINDINGS = [
    *((BINDINGS[-1], name) for name in MOVES),
    *((binding, name) for binding in BINDINGS[:-1] for name in REPRESENTATIVE_MOVES),
]

NAMES = ("weights/0001", "weights/0002", "sampler_weights/0001")


@pytest.fixture
def run(account):
    run = account.new_run(*NAMES)
    yield run
    account.server.account.remove_run(run.partition("/")[2])


def script(run, tmp_path, text):
    needs(tool for tool in TOOLS if tool in text)
    checkpoints = f"{run}/checkpoints"
    return (
        f"CK={quoted(checkpoints)} W={quoted(checkpoints)}/weights\n"
        f"X=$W/0001 OUT={quoted(tmp_path)} PYTHON={quoted(sys.executable)}\n{text}"
    )


@pytest.mark.parametrize(
    ("make_account", "name"), MOVES_OF_BINDINGS, indirect=["make_account"], scope="module"
)
def test_removal_after_copy_deletes_nothing(account, run, tmp_path, name):
    done = account.sh(script(run, tmp_path, MOVES[name]))
    assert done.returncode != 0, done
    assert deletes(account.server) == 0
    assert account.checkpoint_ids(run) == set(NAMES)
    assert "peration not permitted" in done.stderr or "PermissionError" in done.stderr, done
    logged = [line for line in account.errors().splitlines() if run in line]
    assert any("(hint: tinkerfs get PATH DEST, then rm -r PATH" in line for line in logged)
    # Nothing stays hidden, and deliberate removal still deletes.
    listed = account.sh(f"ls {run}/checkpoints/weights/0001").stdout.split()
    assert len(listed) == 9
    assert account.sh(f"rm -r {run}/checkpoints/weights/0001").returncode == 0
    assert account.checkpoint_ids(run) == {*NAMES} - {"weights/0001"}


LOOKS = {
    "ls and cat": "ls -l $X; cat $X/info.json; rm -r $X",
    "ls and grep": "ls -lR $CK; grep -r lora_rank $CK; rm -r $X",
    "grep | xargs rm": (
        'grep -rl \'"checkpoint_id": "weights/0001"\' $W | xargs dirname | xargs rm -r'
    ),
    "jq in a loop": (
        'for c in $W/*; do if [ "$(jq -r .checkpoint_id $c/info.json)" = weights/0001 ]; then'
        ' rm -r "$c"; fi; done'
    ),
    "cat of what rm -r takes": (
        "cat $X/info.json $X/published $X/expires_at $X/tinker_path; readlink $X/files; rm -r $X"
    ),
    "find": "find $X -printf '%p %l\\n'; find $X -mindepth 1 -delete; rmdir $X",
    "a script by what it reads": (
        "$PYTHON -c 'import json, pathlib, shutil, sys\n"
        "for c in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        '    if json.loads((c / "info.json").read_text())["checkpoint_id"] == "weights/0001":\n'
        "        shutil.rmtree(c)' $W"
    ),
    "a script that reads all": (
        "$PYTHON -c 'import pathlib, shutil, sys\n"
        "x = pathlib.Path(sys.argv[1])\n"
        'for name in ("info.json", "published", "expires_at", "tinker_path"):\n'
        "    (x / name).read_text()\n"
        "shutil.rmtree(x)' $X"
    ),
    "rm | while read": 'rm -rv $X | while read line; do [ -n "$line" ]; done',
    "another was copied": "cp -a $W/0002 $OUT/; rm -r $X",
    "tinkerfs get": (
        "export TINKER_API_KEY=$KEY HOME=$OUT\n"
        "$PYTHON -m tinkerfs get $X $OUT/x && test -s $OUT/x/adapter_model.safetensors && rm -r $X"
    ),
}


@pytest.mark.parametrize("name", LOOKS)
def test_removal_after_listing_deletes_the_checkpoint(account, run, tmp_path, name):
    key = f"KEY={quoted(account.server.api_key)}\n"
    done = account.sh(key + script(run, tmp_path, LOOKS[name]))
    assert done.returncode == 0, done
    assert account.checkpoint_ids(run) == {*NAMES} - {"weights/0001"}
    assert deletes(account.server) == 1


def test_copy_by_one_command_does_not_affect_another(account, run, tmp_path):
    assert account.sh(script(run, tmp_path, "cp -a $X $OUT/")).returncode == 0
    assert account.sh(script(run, tmp_path, "rm -r $X")).returncode == 0
    assert account.checkpoint_ids(run) == {*NAMES} - {"weights/0001"}


@pytest.mark.parametrize(
    "move", ["mv $X $W/0003", "mv $X $W/0002/", "mv $OUT/in $W/", "mv -f $OUT/in/* $X/"]
)
def test_move_within_or_onto_the_mount_changes_nothing(account, run, tmp_path, move):
    (tmp_path / "in").mkdir()
    for name in ("info.json", "published", "files"):
        (tmp_path / "in" / name).write_text("1\n")
    done = account.sh(script(run, tmp_path, move))
    assert "Operation not permitted" in done.stderr
    assert {e.method for e in account.server.journal.entries("api")} <= {"GET", "POST"}
    assert not account.server.account.checkpoint(run.partition("/")[2], "weights/0001").is_public
    assert len(account.sh(script(run, tmp_path, "ls $X")).stdout.split()) == 9
    assert account.checkpoint_ids(run) == set(NAMES)


def test_mc_moves_nothing_off_the_mount(account, run, tmp_path):
    needs(["mc"])
    out = tmp_path / "out"
    out.mkdir()
    panels = (account.path(f"{run}/checkpoints/weights"), out)
    command = ("mc", "--nosubshell", "--nomouse", *panels)
    with terminal(command, account.root, {"HOME": str(tmp_path)}) as program:
        program.wait_for("/0001")
        program.send("\x1bOB" + "\x1b[17~")  # Down, F6
        program.wait_for("Move directory")
        program.send("\r")
        program.wait_for("Operation not permitted")
    assert account.checkpoint_ids(run) == set(NAMES)
    assert deletes(account.server) == 0
    assert "tinkerfs get PATH DEST" in account.errors()
