import base64
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.api.credentials import Credentials
from tinkerfs.errors import StartupError, Unauthorized
from tinkerfs.fuse import mount_table


def jwt(expires_at_s, mark="x"):
    claims = json.dumps({"exp": expires_at_s, "mark": mark}).encode()
    return "eyJhbGciOiJub25lIn0." + base64.urlsafe_b64encode(claims).decode().rstrip("=") + ".sig"


def rejection():
    return Unauthorized("no such key", endpoint="GET x", status=401)


class Login:
    """A stored login in a temporary home directory."""

    def __init__(self, home):
        self.home = home
        self.path = home / ".tinker" / "credentials.json"
        self.path.parent.mkdir(mode=0o700)
        self._changes = 0

    def store(self, key=None, *, text=None, mode=0o600):
        keys = {"a": {"type": "manual", "key": key, "name": "n"}}
        self.path.write_text(text or json.dumps({"version": 1, "default": "a", "keys": keys}))
        self.path.chmod(mode)
        # Distinct mtimes, even within one tick of the file system's clock.
        self._changes += 1
        os.utime(self.path, ns=(0, self._changes * 10**9))


class Command:
    """A credential command that counts its runs."""

    def __init__(self, directory):
        self.directory = directory
        self.output = directory / "output"
        self.runs = directory / "runs"
        self.line = f"echo x >> {self.runs}; cat {self.output}; echo secret-words >&2"

    @property
    def count(self):
        return len(self.runs.read_text().split()) if self.runs.exists() else 0


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


@pytest.fixture
def make(tmp_path, time):
    def make(**environ):
        environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | environ
        return Credentials(environ, clock=time.clock)

    return make


# --- sources -------------------------------------------------------------------------------------


def test_get_uses_first_source_that_is_set(make, login, command):
    login.store("tml-stored")
    command.output.write_text("tml-command")
    both = make(TINKER_API_KEY=" tml-variable\n", TINKER_CREDENTIAL_CMD=command.line)
    assert (both.get(), both.source) == ("tml-variable", "TINKER_API_KEY")
    assert command.count == 0
    one = make(TINKER_API_KEY=" ", TINKER_CREDENTIAL_CMD=command.line)
    assert (one.get(), one.source) == ("tml-command", "TINKER_CREDENTIAL_CMD")
    none = make(TINKER_API_KEY="")
    assert (none.get(), none.source) == ("tml-stored", "~/.tinker/credentials.json")


def test_repr_hides_key(make):
    credentials = make(TINKER_API_KEY="tml-secret")
    credentials.get()
    assert "secret" not in repr(credentials)
    assert "secret" not in repr(credentials._key)


def test_get_without_key_raises_error_with_hint(make):
    with pytest.raises(StartupError, match=r"TINKER_API_KEY.*tinker auth login"):
        make().get()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 10_000,
        '{"default": null, "keys": {}}',
        '{"default": "gone", "keys": {"a": {"key": "tml-a"}}}',
        '{"default": "a", "keys": {"a": {"key": null}}}',
        '{"default": "a", "keys": {"a": {"key": "  "}}}',
        '{"default": "a", "keys": []}',
        '{"default": ["a"], "keys": {"a": 1}}',
    ],
)
def test_get_with_damaged_login_raises_startup_error(make, login, text):
    login.store(text=text or " ")
    with pytest.raises(StartupError, match="tinker auth login"):
        make().get()


def test_get_with_login_that_is_not_a_file_raises(make, login):
    os.mkfifo(login.path)
    with pytest.raises(StartupError, match="not a regular file"):
        make().get()


def test_login_readable_by_others_warns_once(make, login, expect_warnings, caplog):
    expect_warnings("can be read by other users")
    login.store("tml-stored", mode=0o640)
    credentials = make()
    credentials.get()
    credentials.on_unauthorized("tml-stored", rejection())
    assert caplog.text.count("chmod 600") == 1
    assert "tml-stored" not in caplog.text


@pytest.mark.parametrize("key", ["tml-\x01a", "tml-é", "tml-a b", "tml-a\nX-Other: b", "tml-\x7f"])
def test_get_with_invalid_characters_raises_startup_error(make, key):
    with pytest.raises(StartupError, match="contains invalid characters") as caught:
        make(TINKER_API_KEY=key).get()
    assert key not in str(caught.value)


# --- credential command --------------------------------------------------------------------------


def test_command_runs_once(make, command):
    command.output.write_text("  tml-command \n")
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    assert [credentials.get() for _ in range(3)] == ["tml-command"] * 3
    assert command.count == 1


def test_command_runs_once_for_concurrent_threads(make, command):
    command.output.write_text("tml-command")
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    barrier, found = threading.Barrier(16), []

    def get():
        barrier.wait(10)
        found.append(credentials.get())

    threads = [threading.Thread(target=get) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["tml-command"] * 16
    assert command.count == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("echo tml-half; echo secret-words >&2; exit 3", "status 3"),
        ("true", "printed nothing"),
        ("no-such-command-anywhere", "status 127"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_failed_command_error_hides_secrets(make, capfd, line, message):
    with pytest.raises(StartupError, match=message) as caught:
        make(TINKER_CREDENTIAL_CMD=line).get()
    assert "secret" not in str(caught.value)
    assert "tml-half" not in str(caught.value)
    assert "secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("line", ["sleep 60", "sleep 60 & echo tml-a", "yes"])
def test_command_timeout_raises_startup_error(tmp_path, line):
    credentials = Credentials(
        {"PATH": os.environ["PATH"], "TINKER_CREDENTIAL_CMD": line},
        home=str(tmp_path),
        command_timeout_s=0.2,
    )
    with pytest.raises(StartupError, match=r"did not end within 0\.2 s"):
        credentials.get()


def test_command_runs_in_root_directory(make):
    assert make(TINKER_CREDENTIAL_CMD="pwd").get() == "/"


@pytest.fixture
def blocked():
    """Block signals like a mount process."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_command_inherits_no_blocked_or_ignored_signal(make, blocked):
    line = "sed -n 's/^Sig\\(Blk\\|Ign\\):[[:space:]]*/\\1=/p' /proc/self/status | paste -sd,"
    ours = Path("/proc/self/status").read_text()
    ignored = int(re.search(r"^SigIgn:\s*(\w+)$", ours, re.MULTILINE)[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python itself
        ignored &= ~(1 << (number - 1))
    assert make(TINKER_CREDENTIAL_CMD=line).get() == f"Blk={0:016x},Ign={ignored:016x}"
    # The shell receives the command unchanged.
    assert make(TINKER_CREDENTIAL_CMD='printf %s "tml-a\'b$((1 + 1))"').get() == "tml-a'b2"


def test_command_timeout_kills_command_and_its_children(tmp_path, blocked):
    pids = tmp_path / "pids"
    line = f"trap '' TERM INT; sleep 60 & echo $$ $! > {pids}; wait"
    environ = {"PATH": os.environ["PATH"], "TINKER_CREDENTIAL_CMD": line}
    credentials = Credentials(environ, home=str(tmp_path), command_timeout_s=1.0)
    with pytest.raises(StartupError, match="did not end within 1 s"):
        credentials.get()
    shell, child = map(int, pids.read_text().split())
    assert not mount_table.is_running(shell)
    assert mount_table.wait_until(lambda: not mount_table.is_running(child), 5)


def test_close_while_command_starts_kills_it(tmp_path, monkeypatch):
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TINKER_CREDENTIAL_CMD": "sleep 60",
    }
    credentials = Credentials(environ)
    popen = subprocess.Popen

    def start(*arguments, **options):
        process = popen(*arguments, **options)
        credentials.close()
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(StartupError, match="status -9"):
        credentials.get()


def test_failed_command_is_not_run_for_every_request(make, command, time):
    credentials = make(TINKER_CREDENTIAL_CMD=command.line + "; exit 1")
    for _ in range(5):
        with pytest.raises(StartupError):
            credentials.get()
    assert command.count == 1
    time.advance(5)
    with pytest.raises(StartupError):
        credentials.get()
    assert command.count == 2


def test_get_recovers_after_command_recovers(make, command, time):
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    with pytest.raises(StartupError):
        credentials.get()
    command.output.write_text("tml-command")
    time.advance(5)
    assert [credentials.get() for _ in range(3)] == ["tml-command"] * 3
    assert command.count == 2


# --- expiry of tokens ----------------------------------------------------------------------------


def test_token_is_renewed_a_minute_before_expiry(make, command, time):
    first, second = jwt(time.now + 600, "1"), jwt(time.now + 1200, "2")
    command.output.write_text(first)
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    assert credentials.get() == first
    command.output.write_text(second)
    time.advance(539)
    assert credentials.get() == first
    time.advance(1)
    assert credentials.get() == second
    assert command.count == 2


def test_short_lived_token_is_renewed_after_half_its_life(make, command, time):
    command.output.write_text(jwt(time.now + 40))
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    for _ in range(5):
        credentials.get()
    assert command.count == 1
    time.advance(20)
    credentials.get()
    assert command.count == 2


def test_valid_token_is_used_while_command_fails(make, command, time):
    token = jwt(time.now + 600)
    command.output.write_text(token)
    credentials = make(TINKER_CREDENTIAL_CMD=f"{command.line} && test ! -e {command.directory}/off")
    credentials.get()
    (command.directory / "off").touch()
    time.advance(550)
    assert [credentials.get() for _ in range(3)] == [token] * 3
    assert command.count == 2
    time.advance(50)
    with pytest.raises(StartupError, match="status 1"):
        credentials.get()


@pytest.fixture(params=["TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "a login"])
def expired(request, make, login, time):
    """Credentials with a token expired by the local clock, the token, and the source's name."""
    token = jwt(time.now - 1)
    if request.param == "a login":
        login.store(token)
        return make(), token, "credentials.json"
    value = token if request.param == "TINKER_API_KEY" else f"echo {token}"
    return make(**{request.param: value}), token, request.param


def test_token_expired_by_local_clock_is_sent_once(expired, time):
    credentials, token, source = expired
    assert credentials.get() == token
    error = Unauthorized("invalid token", status=401)
    assert not credentials.on_unauthorized(token, error)
    assert "invalid token; the token of " in error.message
    assert f"{source} expired at 2027-01-15" in error.message
    for _ in range(3):
        with pytest.raises(Unauthorized, match="expired at 2027-01-15") as caught:
            credentials.get()
        assert "eyJ" not in str(caught.value)
        time.advance(600)


def test_rejected_token_is_sent_once_after_it_expires(make, time):
    token = jwt(time.now + 3)
    credentials = make(TINKER_API_KEY=token)
    for _ in range(2):
        assert credentials.get() == token
        assert not credentials.on_unauthorized(token, Unauthorized("no", status=401))
        time.advance(10)
    for _ in range(3):
        with pytest.raises(Unauthorized, match="expired at"):
            credentials.get()
        time.advance(600)


def test_token_expired_by_local_clock_but_accepted_stays(expired, time):
    credentials, token, _ = expired
    for _ in range(3):
        assert credentials.get() == token
        credentials.on_authorized(token)
        time.advance(600)


def test_token_expired_by_local_clock_is_replaced(make, command, time):
    first, second = jwt(time.now - 600, "1"), jwt(time.now + 600, "2")
    command.output.write_text(first)
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    assert [credentials.get() for _ in range(3)] == [first] * 3
    assert command.count == 1
    command.output.write_text(second)
    assert credentials.on_unauthorized(first, Unauthorized("no", status=401))
    assert credentials.get() == second


def test_token_in_environment_expires(make, time):
    token = jwt(time.now + 30)
    credentials = make(TINKER_API_KEY=token)
    assert credentials.get() == token
    time.advance(30)
    assert credentials.get() == token
    assert not credentials.on_unauthorized(token, Unauthorized("no", status=401))
    with pytest.raises(Unauthorized, match="expired"):
        credentials.get()


@pytest.mark.parametrize(
    "token", ["eyJ.x.y", "eyJ.eyJ.sig", "eyJ." + "A" * 5 + ".s", "eyJ.bnVsbA.s", "eyJhYmM"]
)
def test_key_resembling_a_jwt_is_used(make, token):
    assert make(TINKER_API_KEY=token).get() == token


# --- rejected keys -------------------------------------------------------------------------------


def test_rotated_login_is_used_without_rejection(make, login, time):
    login.store("tml-old")
    credentials = make()
    assert credentials.get() == "tml-old"
    login.store("tml-new")
    time.advance(1)
    assert credentials.get() == "tml-new"


def test_rejected_key_is_reloaded_once(make, login):
    login.store("tml-old")
    credentials = make()
    credentials.get()
    login.store("tml-new")
    assert credentials.on_unauthorized("tml-old", rejection())
    assert credentials.get() == "tml-new"


def test_late_rejection_of_old_key_is_ignored(make, login):
    login.store("tml-old")
    credentials = make()
    credentials.get()
    login.store("tml-new")
    assert credentials.on_unauthorized("tml-old", rejection())
    assert credentials.on_unauthorized("tml-old", rejection())
    assert credentials.get() == "tml-new"


def wait_for_backoff(credentials, time):
    """Return the time until `get` stops failing, seconds, and the key that it returns then."""
    elapsed_s = 0
    while True:
        try:
            return elapsed_s, credentials.get()
        except Unauthorized:
            time.advance(1)
            elapsed_s += 1


def test_backoff_doubles_and_allows_one_retry(make, time):
    credentials = make(TINKER_API_KEY="tml-wrong")
    key, backoffs_s = credentials.get(), []
    for _ in range(9):
        assert not credentials.on_unauthorized(key, rejection())
        with pytest.raises(Unauthorized, match="no such key") as caught:
            credentials.get()
        assert caught.value.is_local
        backoff_s, key = wait_for_backoff(credentials, time)
        with pytest.raises(Unauthorized):
            credentials.get()  # one request retries the key, and others still fail
        backoffs_s.append(backoff_s)
    assert backoffs_s == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_rejections_of_requests_in_flight_count_once(make, time):
    credentials = make(TINKER_API_KEY="tml-wrong")
    credentials.get()
    for _ in range(8):
        assert not credentials.on_unauthorized("tml-wrong", rejection())
    assert wait_for_backoff(credentials, time)[0] == 5


def test_accepted_key_resets_backoff(make, time):
    credentials = make(TINKER_API_KEY="tml-key")
    credentials.get()
    credentials.on_unauthorized("tml-key", rejection())
    time.advance(5)
    credentials.on_authorized(credentials.get())
    assert [credentials.get() for _ in range(3)] == ["tml-key"] * 3
    credentials.on_unauthorized("tml-key", rejection())
    time.advance(5)
    assert credentials.get() == "tml-key"


def test_new_login_ends_backoff(make, login, time):
    login.store("tml-wrong")
    credentials = make()
    credentials.get()
    assert not credentials.on_unauthorized("tml-wrong", rejection())
    time.advance(2)
    with pytest.raises(Unauthorized):
        credentials.get()
    login.store("tml-right")
    time.advance(1)
    assert credentials.get() == "tml-right"
    credentials.on_authorized("tml-right")
    assert credentials.get() == "tml-right"


def test_command_runs_once_per_backoff(make, command, time):
    command.output.write_text("tml-wrong")
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    credentials.get()
    assert not credentials.on_unauthorized("tml-wrong", rejection())
    assert command.count == 2
    for _ in range(4):
        time.advance(1)
        with pytest.raises(Unauthorized):
            credentials.get()
    assert command.count == 2
    command.output.write_text("tml-right")
    time.advance(1)
    assert credentials.get() == "tml-right"
    assert command.count == 3


def test_command_with_changing_wrong_keys_backs_off(make, command, time):
    credentials = make(TINKER_CREDENTIAL_CMD=f"date >> {command.runs}; wc -c < {command.runs}")
    key, backoffs_s = credentials.get(), []
    for _ in range(4):
        while credentials.on_unauthorized(key, rejection()):
            key = credentials.get()
        backoff_s, key = wait_for_backoff(credentials, time)
        backoffs_s.append(backoff_s)
    assert backoffs_s == [5, 10, 20, 40]


def test_login_deleted_and_restored_is_used_again(make, login, time):
    login.store("tml-stored")
    credentials = make()
    credentials.get()
    login.path.unlink()
    time.advance(1)
    with pytest.raises(StartupError, match="no API key"):
        credentials.get()
    login.store("tml-stored")
    time.advance(1)
    assert [credentials.get() for _ in range(3)] == ["tml-stored"] * 3


# A file with the key.


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_text("tml-of-file\n")
    path.chmod(0o600)
    return path


def test_key_file_precedes_all_other_sources(key_file, time):
    environ = {"TINKER_API_KEY": "tml-of-variable", "TINKER_CREDENTIAL_CMD": "echo tml-of-command"}
    credentials = Credentials(environ, key_file=str(key_file), clock=time.clock)
    assert credentials.get() == "tml-of-file"
    assert credentials.source == str(key_file)


def test_changed_key_file_is_read_again(key_file, time):
    credentials = Credentials({}, key_file=str(key_file), clock=time.clock)
    credentials.get()
    key_file.write_text("tml-rotated\n")
    os.utime(key_file, ns=(0, 0))
    time.advance(1)
    assert credentials.get() == "tml-rotated"


@pytest.mark.parametrize(
    ("owner", "mode", "is_allowed"),
    [
        (0, 0o600, True),
        (0, 0o400, True),
        (0, 0o440, True),  # a secret of Kubernetes with fsGroup
        (0, 0o644, False),
        (0, 0o660, False),
        (1, 0o600, True),
        (1, 0o440, False),
        (1, 0o604, False),
    ],
)
def test_key_file_of_others_is_refused(key_file, owner, mode, is_allowed, needs_root):
    os.chown(key_file, owner, owner)
    key_file.chmod(mode)
    credentials = Credentials({}, key_file=str(key_file))
    if is_allowed:
        assert credentials.get() == "tml-of-file"
        return
    with pytest.raises(StartupError) as refusal:
        credentials.get()
    assert str(refusal.value) == (
        f"{key_file} can be read by other users: mode {mode:03o} (hint: chmod 600 {key_file})"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (" \n", "is empty"), ("a b", "invalid characters")],
)
def test_key_file_without_key_raises_error(key_file, content, message):
    if content is None:
        key_file.unlink()
    else:
        key_file.write_text(content)
    with pytest.raises(StartupError, match=message):
        Credentials({}, key_file=str(key_file)).get()


def test_credential_of_systemd_precedes_stored_login(tmp_path, login):
    login.store("tml-stored")
    (tmp_path / "tinker-api-key").write_text("tml-credential")
    (tmp_path / "tinker-api-key").chmod(0o400)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "HOME": str(tmp_path)}
    assert Credentials(environ).get() == "tml-credential"
    assert Credentials(environ | {"TINKER_API_KEY": "tml-k"}).get() == "tml-k"
    (tmp_path / "tinker-api-key").unlink()
    assert Credentials(environ).get() == "tml-stored", "a service may have other credentials"


def test_missing_key_under_sudo_names_the_searched_home(tmp_path):
    environ = {"HOME": str(tmp_path), "SUDO_USER": "alice"}
    with pytest.raises(StartupError) as failure:
        Credentials(environ).get()
    message = str(failure.value)
    assert f"under sudo TINKER_API_KEY and TINKER_CREDENTIAL_CMD are not set, and {tmp_path}" in (
        message
    )
    assert "home of alice" in message
    assert "--api-key-file" in message


def test_reload_reads_the_source_before_the_backoff_ends(make, command, time):
    command.output.write_text("tml-wrong")
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    key = credentials.get()
    assert credentials.describe_state() == "TINKER_CREDENTIAL_CMD in use"
    credentials.on_unauthorized(key, rejection())
    assert credentials.describe_state() == "TINKER_CREDENTIAL_CMD rejected"
    with pytest.raises(Unauthorized):
        credentials.get()
    command.output.write_text("tml-right")
    credentials.reload()
    assert credentials.get() == "tml-right"
    assert credentials.get() == "tml-right"
    assert command.count == 3
