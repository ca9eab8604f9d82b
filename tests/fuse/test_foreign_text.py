"""What a server says, and what a process is called, where people read it; one binding will do."""

import shutil

import pytest

from tests.support.mount import run, tinkerfs

EVIL = "no\x1b]0;owned\x07\x9b31m\u202e k_tml-c0ffee S3://b/k?X-Amz-Signature=c0ffee /k?sig=c0ffee"


@pytest.fixture
def binding():
    return "mfusepy3"


def test_text_of_a_server_is_printable_wherever_shown(mountpoint, env, server, tmp_path):
    log = tmp_path / "log"
    assert tinkerfs("mount", f"--log-file={log}", mountpoint, env=env).returncode == 0
    (checkpoint,) = list(mountpoint.glob("runs/*/checkpoints/weights/0001"))[:1]
    server.faults.add("*", status=403, body={"detail": EVIL}, times=None)
    # The process is named by its file.
    evil = tmp_path / "c\x1b[2J\nat"
    shutil.copy("/bin/sh", evil)
    assert run(evil, "-c", f"echo 1 > {checkpoint}/published").returncode != 0
    shown = {name: (mountpoint / ".tinkerfs" / name).read_bytes() for name in ("errors", "changes")}
    shown["log"] = log.read_bytes()
    shown["status"] = tinkerfs("status", mountpoint, env=env).stdout.encode()
    done = tinkerfs("doctor", env=env)
    shown["doctor"] = done.stdout.encode()
    (tmp_path / "other").mkdir()
    shown["mount"] = tinkerfs("mount", tmp_path / "other", env=env).stderr.encode()
    for place, content in shown.items():
        text = content.decode()
        assert all(c.isprintable() or c in "\n\t" for c in text), (place, text)
        assert "c0ffee" not in text, place
        assert r"\x1b" in text, (place, text)
