"""Controls with the tools that write files: each must see whether the server did it."""

import signal
import sys
import time

import pytest

from tests.support.account import account, make_account, needs

__all__ = ["account", "make_account"]

#: Scripts that publish, $P being the control.
PUBLISH = {
    "bash": "echo 1 > $P",
    "bash append": "echo 1 >> $P",
    "bash printf": "printf 1 > $P",
    "dash": "dash -c 'echo 1 > '$P",
    "busybox sh": "busybox sh -c 'echo 1 > '$P",
    "tee": "set -o pipefail; echo 1 | tee $P",
    "tee -a": "set -o pipefail; echo yes | tee -a $P",
    "dd": "echo true | dd of=$P status=none",
    "dd notrunc": "echo on | dd of=$P status=none conv=notrunc",
    "python": """$PYTHON -c 'open("'$P'", "w").write("1")'""",
    "python raw": """$PYTHON -c 'open("'$P'", "wb", 0).write(b"1")'""",
    "python with": """$PYTHON -c 'with open("'$P'", "w") as f: f.write("1")'""",
    "pathlib": "$PYTHON -c 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\"1\")' $P",
    "perl": """perl -e 'open(F, ">", $ARGV[0]) or die; print F 1; close(F) or die $!' $P""",
    "cp": "echo 1 > $TMP/one; cp $TMP/one $P",
    "cp -p": "echo 1 > $TMP/one; cp -p $TMP/one $P",
    "busybox cp": "echo 1 > $TMP/one; busybox cp $TMP/one $P",
    "cat": "echo 1 > $TMP/one; cat $TMP/one > $P",
    "rsync --inplace": "echo 1 > $TMP/one; rsync --inplace --ignore-times $TMP/one $P",
    "vim": "vi -es -u NONE -c 'set nobackup nowritebackup noswapfile' -c '%s/0/1/' -c 'wq' $P",
}

#: Editors and copiers that make a new file and rename it: they fail, and say so.
REPLACE = {
    "sed -i": "sed -i s/0/1/ $P",
    "mv": "echo 1 > $TMP/one; mv $TMP/one $P",
    "install": "echo 1 > $TMP/one; install $TMP/one $P",
    "cp --remove-destination": "echo 1 > $TMP/one; cp --remove-destination $TMP/one $P",
    "rsync": "echo 1 > $TMP/one; rsync --ignore-times $TMP/one $P",
    "ln": "ln -sf /tmp/x $P",
}
TOOLS = ("busybox", "dash", "perl", "rsync", "vi")

#: Whose exit status does not tell: vi -es never does, and Python keeps what it writes until the
#: file is closed, here by the garbage collector, whose errors it drops. `with` and `raw` tell.
SILENT = {"vim", "python"}
#: dash has these words for every write that fails.
OWN_WORDS = {"dash": "I/O error"}


@pytest.fixture
def control(account, tmp_path):
    """The path of the control `published`, the server's checkpoint, and how to run a script."""
    run = account.new_run("weights/1")
    path = f"{run}/checkpoints/weights/1/published"
    checkpoint = account.server.account.checkpoint(run.partition("/")[2], "weights/1")

    def script(text):
        needs(tool for tool in TOOLS if f"{tool} " in text)
        return account.sh(f"P={path} TMP={tmp_path} PYTHON={sys.executable}\n{text}")

    yield path, checkpoint, script
    account.server.faults.clear()


@pytest.mark.parametrize("name", PUBLISH)
def test_what_writes_publishes(account, control, name):
    path, checkpoint, script = control
    done = script(PUBLISH[name])
    assert done.returncode == 0, done
    assert checkpoint.is_public
    assert account.sh(f"cat {path}").stdout == "1\n"
    assert account.server.journal.count("POST publish") == 1


@pytest.mark.parametrize("name", PUBLISH)
def test_what_writes_sees_the_server_s_refusal(account, control, name):
    path, checkpoint, script = control
    account.server.faults.add(
        "POST publish", times=None, status=403, body={"detail": "not yours to show"}
    )
    done = script(PUBLISH[name])
    if name not in SILENT:
        assert done.returncode != 0, done
        assert OWN_WORDS.get(name, "ermission denied") in done.stderr, done
    assert not checkpoint.is_public
    assert account.sh(f"cat {path}").stdout == "0\n"
    assert account.server.journal.count("POST publish") >= 1
    told = [line for line in account.errors().splitlines() if f"/{path}\twrite\tEACCES" in line]
    assert "not yours to show" in told[-1]


@pytest.mark.parametrize("name", REPLACE)
def test_what_replaces_fails_clearly_and_changes_nothing(account, control, name):
    path, checkpoint, script = control
    done = script(REPLACE[name])
    assert done.returncode != 0, done
    assert "not permitted" in done.stderr.lower() or "denied" in done.stderr.lower(), done
    assert not checkpoint.is_public
    assert not account.server.journal.count("POST publish")
    assert account.server.journal.count("DELETE checkpoint") == 0
    assert account.sh(f"cat {path}").stdout == "0\n"  # though some unlink it first


@pytest.mark.parametrize(
    "text", ["touch $P", "chmod 600 $P", ": > $P", "truncate -s 0 $P", "true >> $P"]
)
def test_touching_changes_nothing(account, control, text):
    path, checkpoint, script = control
    done = script(text)
    assert done.returncode == 0, done
    assert not checkpoint.is_public
    assert account.sh(f"cat {path}").stdout == "0\n"
    assert not account.server.journal.count("POST publish")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo maybe > $P", "Invalid argument"),
        ("head -c 300000 /dev/zero > $P", "Invalid argument"),
        ("echo soon > ${P%published}expires_at", "Invalid argument"),
        ("echo 60 > ${P%published}expires_at", "Numerical result out of range"),
        ("echo 1 > ${P%published}tinker_path", "Operation not permitted"),
        ("echo 1 > ${P%published}info.json", "Operation not permitted"),
        ("echo 1 > ${P%published}new", "Operation not permitted"),
        ("mkdir ${P%published}new", "Operation not permitted"),
        ("mv $P ${P%published}new", "Operation not permitted"),
        ("ln $P ${P%published}new", "Operation not permitted"),
        ("ln -s x ${P%published}new", "Operation not permitted"),
        ("mkfifo ${P%published}new", "Operation not permitted"),
        ("chmod 777 ${P%published}info.json", "Operation not permitted"),
    ],
)
def test_the_words_of_a_shell_for_what_is_refused(account, control, text, words):
    _path, _checkpoint, script = control
    done = script(text)
    assert done.returncode == 1, done
    assert words in done.stderr
    assert not {"PUT", "DELETE"} & {e.method for e in account.server.journal.entries("api")}


def test_an_expiry_by_the_shell(account, control):
    path, checkpoint, _script = control
    expiry = path.replace("published", "expires_at")
    assert account.sh(f"cat {expiry}").stdout == "never\n"
    done = account.sh(f"echo 30d > {expiry} && cat {expiry} && cp {expiry} /dev/stdout")
    assert done.returncode == 0, done
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.endswith("Z")
    assert checkpoint.expires_at_s is not None
    assert account.sh(f"echo never > {expiry}; cat {expiry}").stdout == "never\n"
    assert checkpoint.expires_at_s is None


def test_a_copy_of_a_control_that_has_just_grown_is_whole(account, control, tmp_path):
    path, _checkpoint, _script = control
    expiry = path.replace("published", "expires_at")
    code = "import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])"
    done = account.sh(
        f"ls -l {expiry}; echo 30d > {expiry}; cp {expiry} {tmp_path}/a;"
        f" {sys.executable} -c '{code}' {expiry} {tmp_path}/b; rsync {expiry} {tmp_path}/c;"
        f" cat {expiry}"
    )
    text = done.stdout.splitlines()[-1] + "\n"
    for name in "abc":
        assert (tmp_path / name).read_text() == text, name


def test_the_flag_of_the_link_is_the_flag(account, control):
    path, checkpoint, _script = control
    run = path.partition("/checkpoints")[0]
    assert account.sh(f"echo 1 > {run}/latest/published").returncode == 0
    assert checkpoint.is_public
    assert account.sh(f"cat {path} {run}/latest/published").stdout == "1\n1\n"
    shown = account.sh(f"grep -c '\"public\": true' {run}/info.json {run}/latest/info.json").stdout
    assert [line[-1] for line in shown.splitlines()] == ["1", "1"]


def test_ctrl_c_ends_a_write_that_waits_and_changes_tells_how_it_ended(account, control):
    path, checkpoint, _script = control
    rule = account.server.faults.add("POST publish", hang=True)
    process = account.start("bash", "-c", f"echo 1 > {path}")
    rule.wait_for(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 1.0
    assert process.returncode != 0
    rule.release()
    assert account.eventually(lambda: checkpoint.is_public)
    assert account.eventually(
        lambda: [
            line
            for line in account.changes().splitlines()
            if path in line and line.endswith("done (its caller: EINTR)")
        ]
    )


def test_two_who_write_at_once_both_hear_the_truth(account, control):
    path, checkpoint, _script = control
    done = account.sh(
        f"for n in 1 0 1 0 1 0 1 0; do echo $n > {path} & done; wait; echo 1 > {path}; cat {path}"
    )
    assert done.stdout == "1\n", done
    assert checkpoint.is_public
