"""archive_url on real mounts: with curl, and with tools that must not request an archive."""

import hashlib
import os
import shutil
import sys

import pytest

from tests.support.account import account, every_binding, make_account, needs

__all__ = ["account", "make_account"]

#: Scripts that do not follow links, or only stat their targets.
LOOKS = {
    "ls": "ls -laR .",
    "ls -L": "ls -laL $CK/*/*",
    "ls --color": "ls --color=always -la $CK/*/*",
    "stat": "find . -exec stat {} +",
    "stat -L": "stat -L $CK/*/*/archive_url sessions/*/trace.pftrace",
    "find": "find . -ls",
    "grep": "grep -r lora_rank runs",
    "du": "du -a .",
    "cp -r": "cp -r runs sessions $OUT/",
    "cp -a": "cp -a runs $OUT/copy",
    "tar": "tar cf $OUT/tar runs",
    "rsync": "rsync -a runs $OUT/",
    "file": "test -e $CK/weights/0001/archive_url && test -s $CK/weights/0001/archive_url",
    "readlink": "readlink -f $CK/*/*/archive_url",
    "python": "$PYTHON -c 'import pathlib; [p.stat() for p in pathlib.Path().rglob(\"*\")]'",
    # Thunar and Nautilus do this for an icon: GIO opens a file of unknown type with O_NOATIME.
    "gio": "gio info $CK/weights/0001/archive_url && gio list -l $CK/weights/0001",
    "busybox": "busybox ls -laR . && busybox find .",  # its grep -r follows links
}


@pytest.mark.parametrize("name", LOOKS)
def test_metadata_operations_request_no_archive(account, name, tmp_path):
    needs(tool for tool in ("busybox", "gio", "rsync") if tool in name)
    run = account.server.account.run_ids[0]
    account.server.journal.clear()
    done = account.sh(
        f"CK=runs/{run}/checkpoints OUT={tmp_path} PYTHON={sys.executable}\n{LOOKS[name]}"
    )
    assert done.returncode == 0, done
    assert account.server.journal.count("GET archive") == 0
    assert account.server.journal.count("GET trace_export") == 0
    assert account.server.journal.count("store") == 0
    endpoints = {e.endpoint for e in account.server.journal.entries("api") if e.method != "GET"}
    assert endpoints <= {"POST weights_info", "POST sessions/search"}


@every_binding
def test_open_with_noatime_fails_and_plain_open_succeeds(account):
    checkpoint = f"runs/{account.server.account.run_ids[0]}/checkpoints/weights/0001"
    with pytest.raises(OSError, match="Operation not supported"):
        os.open(account.path(f"{checkpoint}/archive_url"), os.O_RDONLY | os.O_NOATIME)
    os.close(os.open(account.path(f"{checkpoint}/info.json"), os.O_RDONLY | os.O_NOATIME))
    assert account.sh(f"cat {checkpoint}/archive_url").stdout.startswith("http")


def test_removal_requests_no_archive(account):
    run = account.new_run("weights/1")
    assert account.sh(f"rm -r {run}/checkpoints/weights/1").returncode == 0
    assert account.server.journal.count("GET archive") == 0
    account.server.account.remove_run(run.partition("/")[2])


@pytest.mark.parametrize("response", ["redirect", "json"])
def test_curl_of_archive_url_downloads_the_tar(account, response, tmp_path):
    account.server.behaviour.archive_response = response
    run = account.new_run("sampler_weights/1")
    run_id = run.partition("/")[2]
    fetch = 'curl -sf -o "$1" "$2"'
    if shutil.which("curl") is None:
        code = "import sys, urllib.request as u; u.urlretrieve(sys.argv[2], sys.argv[1])"
        fetch = f'{sys.executable} -c \'{code}\' "$1" "$2"'
    done = account.sh(f'set -- {tmp_path}/tar "$(cat {run}/latest_sampler/archive_url)"; {fetch}')
    account.server.behaviour.archive_response = "redirect"
    assert done.returncode == 0, done
    expected = account.server.archive(run_id, "sampler_weights/1")
    data = (tmp_path / "tar").read_bytes()
    assert len(data) == expected.size_bytes
    assert hashlib.sha256(data).digest() == hashlib.sha256(expected.read(0, len(data))).digest()
    listed = account.sh(f"tar tf {tmp_path}/tar").stdout.split()
    assert "adapter_model.safetensors" in listed
    store = account.server.journal.entries("store")
    assert store
    assert not any(entry.had_key for entry in store)
    account.server.account.remove_run(run_id)


COPIES = {
    "cat": "cat $U > $OUT",
    "cp": "cp $U $OUT",
    "cp -L": "cp -L $U $OUT",
    "dd": "dd if=$U of=$OUT status=none",
    "dd bs=1": "dd if=$U of=$OUT bs=1 status=none",
    "head": "head -c 100000 $U > $OUT",
    "read": 'read -r line < $U; echo "$line" > $OUT',
    "python": "$PYTHON -c 'print(open(\"'$U'\").read(), end=\"\")' > $OUT",
    "copyfile": "$PYTHON -c 'import shutil; shutil.copyfile(\"'$U'\", \"'$OUT'\")'",
    "busybox cp": "busybox cp $U $OUT",
    "busybox cat": "busybox cat $U > $OUT",
    "perl": "perl -pe 1 $U > $OUT",
}


@pytest.mark.parametrize("name", COPIES)
def test_copy_of_archive_url_contains_only_the_url(account, name, tmp_path):
    needs(tool for tool in ("busybox", "perl", "rsync") if tool in name)
    run = account.new_run("weights/1")
    url = f"{run}/checkpoints/weights/1/archive_url"
    out = tmp_path / "out"
    done = account.sh(f"U={url} OUT={out} PYTHON={sys.executable}\n{COPIES[name]}")
    assert done.returncode == 0, done
    text = out.read_bytes()
    assert text == account.sh(f"cat {url}").stdout.encode()
    assert text.startswith(b"http")
    assert text.endswith(b"\n")
    assert b"\0" not in text
    assert account.server.journal.count("GET archive") == 1
    account.server.account.remove_run(run.partition("/")[2])


@every_binding
@pytest.mark.parametrize(
    "script", ["rsync -L $U $OUT", "tar chf - $U | tar xOf - > $OUT"], ids=["rsync", "tar"]
)
def test_copy_with_outdated_size_is_complete_or_fails(account, script, tmp_path):
    # Here open does not wait until the kernel drops the size hint.
    run = account.new_run("weights/1")
    url = f"{run}/checkpoints/weights/1/archive_url"
    out = tmp_path / "out"
    assignments = f"set -o pipefail; U={url} OUT={out}\n"
    assert account.sh(assignments + script).returncode != 0
    size = len(account.sh(f"cat {url}").stdout)
    assert account.eventually(lambda: account.path(url).stat().st_size == size)
    assert account.sh(assignments + script).returncode == 0
    assert out.read_text() == account.sh(f"cat {url}").stdout
    account.server.account.remove_run(run.partition("/")[2])


def test_concurrent_readers_share_one_archive_build(account):
    run = account.new_run()
    account.server.account.add_checkpoint(run.partition("/")[2], "weights/1", building_polls=2)
    account.server.behaviour.retry_after = "0.1"
    account.refresh()
    processes = [account.start("cat", f"{run}/checkpoints/weights/1/archive_url") for _ in range(8)]
    outputs = {process.communicate(timeout=30)[0] for process in processes}
    account.server.behaviour.retry_after = "1"
    assert len(outputs) == 1
    assert outputs.pop().startswith("http")
    assert account.server.journal.count("GET archive") == 3
    account.server.account.remove_run(run.partition("/")[2])


def test_waiting_for_an_archive_blocks_nothing_else(account):
    run = account.new_run("weights/1", "weights/2")
    fault = account.server.faults.add("GET archive", hang=True, times=None)
    process = account.start("cat", f"{run}/checkpoints/weights/1/archive_url")
    try:
        fault.wait_for(1)
        done = account.sh(
            f"ls -l {run}/checkpoints/weights/1 {run}/checkpoints/weights/2;"
            f" cat {run}/checkpoints/weights/1/info.json; echo 1 > {run}/latest/published;"
            " cat .tinkerfs/stats.json",
            timeout_s=5,
        )
        assert done.returncode == 0, done
        assert f"archive /.content/{run[5:]}" in done.stdout
    finally:
        fault.remove()
        process.communicate(timeout=10)
    assert process.returncode == 0
    account.server.account.remove_run(run.partition("/")[2])


def test_link_following_walk_fails_after_eight_archives(make_account):
    account = make_account(runs=0)
    account.new_run(*(f"weights/{n}" for n in range(12)))
    done = account.sh("cat runs/*/checkpoints/*/*/archive_url; true")
    assert account.server.journal.count("GET archive") == 8
    assert done.stdout.count("http") == 8
    assert done.stderr.count("Device or resource busy") == 4
    assert "this looks like a walk that follows links" in account.errors()
    # Another process group has its own burst.
    assert account.sh("cat runs/*/checkpoints/weights/11/archive_url").returncode == 0


def test_archive_url_is_readable_only_by_its_owner(account):
    run = account.server.account.run_ids[0]
    done = account.sh(f"stat -L -c '%a %F' runs/{run}/latest/archive_url")
    assert done.stdout == "400 regular file\n"
