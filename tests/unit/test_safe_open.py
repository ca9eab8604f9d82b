import os
import socket
from pathlib import Path

import pytest

from tinkerfs.concurrency import run_in_thread
from tinkerfs.errors import StartupError
from tinkerfs.safe_open import is_regular, open_regular, read_regular
from tinkerfs.tls import trusting_context

#: Long enough for any open that does not wait for another process.
WAIT_S = 10.0


def make_fifo(path):
    os.mkfifo(path)


def make_directory(path):
    path.mkdir()


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_link_to_fifo(path):
    os.mkfifo(f"{path}.fifo")
    path.symlink_to(f"{path}.fifo")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT])
@pytest.mark.parametrize("make", [make_fifo, make_directory, make_socket, make_link_to_fifo])
def test_open_regular_of_another_type_fails_immediately(tmp_path, make, flags):
    path = tmp_path / "name"
    make(path)
    opened = run_in_thread(lambda: open_regular(path, flags, follow_symlinks=True), "open")
    with pytest.raises(OSError, match="not a regular file"):
        opened.result(WAIT_S)
    assert not is_regular(path)


def test_open_regular_of_a_link_follows_only_on_request(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    link = tmp_path / "link"
    link.symlink_to("file")
    with pytest.raises(OSError, match="symbolic"):
        open_regular(link, os.O_RDONLY)
    assert read_regular(link, 100, follow_symlinks=True) == b"content"
    assert is_regular(tmp_path / "file")
    assert not is_regular(link)


def test_open_regular_of_a_device_raises():
    with pytest.raises(OSError, match="not a regular file"):
        open_regular("/dev/null", os.O_RDONLY)


def test_open_regular_creates_a_private_file_in_dir_fd(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = open_regular("new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=directory)
        os.write(fd, b"0123456789")
        assert not os.get_inheritable(fd)
        os.close(fd)
    finally:
        os.close(directory)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert read_regular(tmp_path / "new", 4) == b"0123"


def test_open_regular_of_another_type_leaks_no_descriptor(tmp_path):
    make_fifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "fifo", os.O_RDONLY)
    paths = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    assert str(tmp_path / "fifo") not in paths


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_in_a_fifo_are_rejected_immediately(tmp_path, variable):
    os.mkfifo(tmp_path / "bundle")
    environ = {variable: str(tmp_path / "bundle")}
    made = run_in_thread(lambda: trusting_context(environ), "certificates")
    with pytest.raises(StartupError, match=rf"{variable}: .*not a regular file"):
        made.result(WAIT_S)
