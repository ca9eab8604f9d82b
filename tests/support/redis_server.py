"""A Redis server in a process of its own, for tests of the shared cache."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.mount import wait_until

#: The server; `scripts/interop` names that of Valkey.
PROGRAM = os.environ.get("TINKERFS_TEST_REDIS_SERVER", "redis-server")


class RedisProcess:
    """A server on a Unix socket, in a directory of its own.

    Args:
        options: further arguments of the server, such as `--requirepass`.
    """

    def __init__(self, *options):
        self._directory = tempfile.mkdtemp(prefix="redis-")  # short, as paths of sockets must be
        self.socket = f"{self._directory}/s"
        self.url = f"unix://{self.socket}"
        self._command = [PROGRAM, "--port", "0", "--unixsocket", self.socket, "--save", ""]
        self._command += ["--dir", self._directory, *options]
        self._log = Path(self._directory, "log")
        self._process = None
        self.start()

    def start(self):
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_until(self._is_ready)

    def _is_ready(self):
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self.client().ping()
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
            return True
        except redis.RedisError:
            return False

    def client(self, **options):
        options |= {"socket_timeout": 30, "retry": Retry(NoBackoff(), 0)}
        return redis.Redis(unix_socket_path=self.socket, **options)

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()
        self._process.wait(10)

    def dump(self):
        """Return every key and value."""
        client = self.client()
        return {key: client.get(key) for key in client.scan_iter()}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self._process.poll() is None:
            self.send_signal(signal.SIGCONT)
        self.kill()
        shutil.rmtree(self._directory)
