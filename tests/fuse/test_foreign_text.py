"""Output of text from a server and of process names, under one binding."""

import shutil

import pytest

from tests.support.mount import run, tinkerfs

EVIL = "no\x1b]0;owned\x07\x9b31m\u202e k_tml-c0ffee S3://b/k?X-Amz-Signature=c0ffee /k?sig=c0ffee"


@pytest.fixture
def binding():
    return "mfusepy3"


def test_text_from_server_is_printable_everywhere(mountpoint, env, server, tmp_path):
    log = tmp_path / "log"
    assert tinkerfs("mount", f"--log-file={log}", mountpoint, env=env).returncode == 0
    (checkpoint,) = list(mountpoint.glob("runs/*/checkpoints/weights/0001"))[:1]
    server.faults.add("*", status=403, body={"detail": EVIL}, times=None)
    # The name of the process is that of its file.
    evil = tmp_path / "c\x1b[2J\nat"
    shutil.copy("/bin/sh", evil)
    assert run(evil, "-c", f"echo 1 > {checkpoint}/published").returncode != 0
    outputs = {
        name: (mountpoint / ".tinkerfs" / name).read_bytes() for name in ("errors", "changes")
    }
    outputs["log"] = log.read_bytes()
    outputs["status"] = tinkerfs("status", mountpoint, env=env).stdout.encode()
    done = tinkerfs("doctor", env=env)
    outputs["doctor"] = done.stdout.encode()
    (tmp_path / "other").mkdir()
    outputs["mount"] = tinkerfs("mount", tmp_path / "other", env=env).stderr.encode()
    for source, content in outputs.items():
        text = content.decode()
        assert all(c.isprintable() or c in "\n\t" for c in text), (source, text)
        assert "c0ffee" not in text, source
        assert r"\x1b" in text, (source, text)
