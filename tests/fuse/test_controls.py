"""Controls written by common tools, which must report whether the server made the change."""

import signal
import sys
import time

import pytest

from tests.support.account import account, every_binding, make_account, needs

__all__ = ["account", "make_account"]

#: Scripts that publish; $P is the path of the control.
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

#: Editors and copiers that create a new file and rename it: they fail with an error.
REPLACE = {
    "sed -i": "sed -i s/0/1/ $P",
    "mv": "echo 1 > $TMP/one; mv $TMP/one $P",
    "install": "echo 1 > $TMP/one; install $TMP/one $P",
    "cp --remove-destination": "echo 1 > $TMP/one; cp --remove-destination $TMP/one $P",
    "rsync": "echo 1 > $TMP/one; rsync --ignore-times $TMP/one $P",
    "ln": "ln -sf /tmp/x $P",
}
TOOLS = ("busybox", "dash", "perl", "rsync", "vi")

#: Tools with an exit status that does not report the error. vi -es never does. Python buffers the
#: data until the garbage collector closes the file, which ignores errors, unlike `with` and `raw`.
SILENT = {"vim", "python"}
#: Error messages that do not depend on the errno: dash has one for every failed write.
OWN_MESSAGES = {"dash": "I/O error"}


@pytest.fixture
def control(account, tmp_path):
    """Return the path of `published`, the server's checkpoint, and a function to run a script."""
    run = account.new_run("weights/1")
    path = f"{run}/checkpoints/weights/1/published"
    checkpoint = account.server.account.checkpoint(run.partition("/")[2], "weights/1")

    def script(text):
        needs(tool for tool in TOOLS if f"{tool} " in text)
        return account.sh(f"P={path} TMP={tmp_path} PYTHON={sys.executable}\n{text}")

    yield path, checkpoint, script
    account.server.faults.clear()


@pytest.mark.parametrize("name", PUBLISH)
def test_writing_tool_publishes(account, control, name):
    path, checkpoint, script = control
    done = script(PUBLISH[name])
    assert done.returncode == 0, done
    assert checkpoint.is_public
    assert account.sh(f"cat {path}").stdout == "1\n"
    assert account.server.journal.count("POST publish") == 1


@pytest.mark.parametrize("name", PUBLISH)
def test_writing_tool_reports_the_server_error(account, control, name):
    path, checkpoint, script = control
    account.server.faults.add(
        "POST publish", times=None, status=403, body={"detail": "not yours to show"}
    )
    done = script(PUBLISH[name])
    if name not in SILENT:
        assert done.returncode != 0, done
        assert OWN_MESSAGES.get(name, "ermission denied") in done.stderr, done
    assert not checkpoint.is_public
    assert account.sh(f"cat {path}").stdout == "0\n"
    assert account.server.journal.count("POST publish") >= 1
    lines = [line for line in account.errors().splitlines() if f"/{path}\twrite\tEACCES" in line]
    assert "not yours to show" in lines[-1]


@pytest.mark.parametrize("name", REPLACE)
def test_replacing_tool_fails_and_changes_nothing(account, control, name):
    path, checkpoint, script = control
    done = script(REPLACE[name])
    assert done.returncode != 0, done
    assert "not permitted" in done.stderr.lower() or "denied" in done.stderr.lower(), done
    assert not checkpoint.is_public
    assert not account.server.journal.count("POST publish")
    assert account.server.journal.count("DELETE checkpoint") == 0
    assert account.sh(f"cat {path}").stdout == "0\n"  # although some tools unlink it first


@every_binding
@pytest.mark.parametrize(
    "text", ["touch $P", "chmod 600 $P", ": > $P", "truncate -s 0 $P", "true >> $P"]
)
def test_touch_and_truncate_change_nothing(account, control, text):
    path, checkpoint, script = control
    done = script(text)
    assert done.returncode == 0, done
    assert not checkpoint.is_public
    assert account.sh(f"cat {path}").stdout == "0\n"
    assert not account.server.journal.count("POST publish")


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_shell_reports_errno_of_rejected_change(account, control, text, expected):
    _path, _checkpoint, script = control
    done = script(text)
    assert done.returncode == 1, done
    assert expected in done.stderr
    assert not {"PUT", "DELETE"} & {e.method for e in account.server.journal.entries("api")}


@every_binding
def test_shell_sets_and_clears_expiry(account, control):
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


def test_copy_of_control_that_has_grown_is_complete(account, control, tmp_path):
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


def test_control_behind_link_is_the_same_control(account, control):
    path, checkpoint, _script = control
    run = path.partition("/checkpoints")[0]
    assert account.sh(f"echo 1 > {run}/latest/published").returncode == 0
    assert checkpoint.is_public
    assert account.sh(f"cat {path} {run}/latest/published").stdout == "1\n1\n"
    output = account.sh(f"grep -c '\"public\": true' {run}/info.json {run}/latest/info.json").stdout
    assert [line[-1] for line in output.splitlines()] == ["1", "1"]


@every_binding
def test_ctrl_c_interrupts_write_and_changes_records_outcome(account, control):
    path, checkpoint, _script = control
    rule = account.server.faults.add("POST publish", hang=True)
    process = account.start("bash", "-c", f"echo 1 > {path}")
    rule.wait_for(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 5.0
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


def test_concurrent_writes_report_their_outcomes(account, control):
    path, checkpoint, _script = control
    done = account.sh(
        f"for n in 1 0 1 0 1 0 1 0; do echo $n > {path} & done; wait; echo 1 > {path}; cat {path}"
    )
    assert done.stdout == "1\n", done
    assert checkpoint.is_public
