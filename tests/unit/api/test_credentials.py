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
from tinkerfs.adapters import mounts
from tinkerfs.api.credentials import Credentials
from tinkerfs.errors import SetupError, Unauthorized


def jwt(expires_at_s, mark="x"):
    claims = json.dumps({"exp": expires_at_s, "mark": mark}).encode()
    return "eyJhbGciOiJub25lIn0." + base64.urlsafe_b64encode(claims).decode().rstrip("=") + ".sig"


def refused():
    return Unauthorized("no such key", endpoint="GET x", status=401)


class Login:
    """A stored login in a home of its own."""

    def __init__(self, home):
        self.home = home
        self.path = home / ".tinker" / "credentials.json"
        self.path.parent.mkdir(mode=0o700)
        self._changes = 0

    def store(self, key=None, *, text=None, mode=0o600):
        keys = {"a": {"type": "manual", "key": key, "name": "n"}}
        self.path.write_text(text or json.dumps({"version": 1, "default": "a", "keys": keys}))
        self.path.chmod(mode)
        # Two changes within one tick of the file system's clock are still two.
        self._changes += 1
        os.utime(self.path, ns=(0, self._changes * 10**9))


class Command:
    """A credential command that counts how often it ran."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "output"
        self.runs = folder / "runs"
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


# --- where it comes from -------------------------------------------------------------------------


def test_the_first_source_that_is_set(make, login, command):
    login.store("tml-stored")
    command.output.write_text("tml-command")
    both = make(TINKER_API_KEY=" tml-variable\n", TINKER_CREDENTIAL_CMD=command.line)
    assert (both.get(), both.source) == ("tml-variable", "TINKER_API_KEY")
    assert command.count == 0
    one = make(TINKER_API_KEY=" ", TINKER_CREDENTIAL_CMD=command.line)
    assert (one.get(), one.source) == ("tml-command", "TINKER_CREDENTIAL_CMD")
    none = make(TINKER_API_KEY="")
    assert (none.get(), none.source) == ("tml-stored", "~/.tinker/credentials.json")


def test_nothing_shows_the_key(make):
    credentials = make(TINKER_API_KEY="tml-secret")
    credentials.get()
    assert "secret" not in repr(credentials)
    assert "secret" not in repr(credentials._key)


def test_no_key_at_all_names_the_cure(make):
    with pytest.raises(SetupError, match=r"TINKER_API_KEY.*tinker auth login"):
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
def test_a_login_without_a_default_key(make, login, text):
    login.store(text=text or " ")
    with pytest.raises(SetupError, match="tinker auth login"):
        make().get()


def test_a_login_that_is_no_file(make, login):
    os.mkfifo(login.path)
    with pytest.raises(SetupError, match="not a regular file"):
        make().get()


def test_a_login_that_others_may_read_is_told_once(make, login, expect_warnings, caplog):
    expect_warnings("can be read by other users")
    login.store("tml-stored", mode=0o640)
    credentials = make()
    credentials.get()
    credentials.rejected("tml-stored", refused())
    assert caplog.text.count("chmod 600") == 1
    assert "tml-stored" not in caplog.text


@pytest.mark.parametrize("key", ["tml-\x01a", "tml-é", "tml-a b", "tml-a\nX-Other: b", "tml-\x7f"])
def test_a_key_that_no_header_takes(make, key):
    with pytest.raises(SetupError, match="characters that no key has") as caught:
        make(TINKER_API_KEY=key).get()
    assert key not in str(caught.value)


# --- the command ---------------------------------------------------------------------------------


def test_a_command_runs_once(make, command):
    command.output.write_text("  tml-command \n")
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    assert [credentials.get() for _ in range(3)] == ["tml-command"] * 3
    assert command.count == 1


def test_many_threads_run_it_once(make, command):
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
    ("line", "words"),
    [
        ("echo tml-half; echo secret-words >&2; exit 3", "status 3"),
        ("true", "printed nothing"),
        ("no-such-command-anywhere", "status 127"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_a_command_that_fails_tells_no_secrets(make, capfd, line, words):
    with pytest.raises(SetupError, match=words) as caught:
        make(TINKER_CREDENTIAL_CMD=line).get()
    assert "secret" not in str(caught.value)
    assert "tml-half" not in str(caught.value)
    assert "secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("line", ["sleep 60", "sleep 60 & echo tml-a", "yes"])
def test_a_command_that_does_not_end_is_ended(tmp_path, line):
    credentials = Credentials(
        {"PATH": os.environ["PATH"], "TINKER_CREDENTIAL_CMD": line},
        home=str(tmp_path),
        command_timeout_s=0.2,
    )
    with pytest.raises(SetupError, match=r"did not end within 0\.2 s"):
        credentials.get()


def test_a_command_runs_where_a_mount_does(make):
    assert make(TINKER_CREDENTIAL_CMD="pwd").get() == "/"


@pytest.fixture
def blocked():
    """Blocks signals, as a process that serves a mount does."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_command_inherits_no_blocked_or_ignored_signal(make, blocked):
    line = "sed -n 's/^Sig\\(Blk\\|Ign\\):[[:space:]]*/\\1=/p' /proc/self/status | paste -sd,"
    ours = Path("/proc/self/status").read_text()
    ignored = int(re.search(r"^SigIgn:\s*(\w+)$", ours, re.MULTILINE)[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python itself ignores
        ignored &= ~(1 << (number - 1))
    assert make(TINKER_CREDENTIAL_CMD=line).get() == f"Blk={0:016x},Ign={ignored:016x}"
    # The words of the command reach the shell as they are.
    assert make(TINKER_CREDENTIAL_CMD='printf %s "tml-a\'b$((1 + 1))"').get() == "tml-a'b2"


def test_a_command_that_takes_too_long_is_dead_and_so_is_what_it_started(tmp_path, blocked):
    pids = tmp_path / "pids"
    line = f"trap '' TERM INT; sleep 60 & echo $$ $! > {pids}; wait"
    environ = {"PATH": os.environ["PATH"], "TINKER_CREDENTIAL_CMD": line}
    credentials = Credentials(environ, home=str(tmp_path), command_timeout_s=1.0)
    with pytest.raises(SetupError, match="did not end within 1 s"):
        credentials.get()
    shell, child = map(int, pids.read_text().split())
    assert not mounts.is_running(shell)
    assert mounts.wait_until(lambda: not mounts.is_running(child), 5)


def test_close_while_a_command_starts_ends_it(tmp_path, monkeypatch):
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
    with pytest.raises(SetupError, match="status -9"):
        credentials.get()


def test_a_failing_command_is_not_run_for_every_call(make, command, time):
    credentials = make(TINKER_CREDENTIAL_CMD=command.line + "; exit 1")
    for _ in range(5):
        with pytest.raises(SetupError):
            credentials.get()
    assert command.count == 1
    time.advance(5)
    with pytest.raises(SetupError):
        credentials.get()
    assert command.count == 2


def test_it_recovers_once_the_command_does(make, command, time):
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    with pytest.raises(SetupError):
        credentials.get()
    command.output.write_text("tml-command")
    time.advance(5)
    assert [credentials.get() for _ in range(3)] == ["tml-command"] * 3
    assert command.count == 2


# --- tokens that expire --------------------------------------------------------------------------


def test_a_token_is_renewed_a_minute_before_its_end(make, command, time):
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


def test_a_short_lived_token_is_not_renewed_for_every_call(make, command, time):
    command.output.write_text(jwt(time.now + 40))
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    for _ in range(5):
        credentials.get()
    assert command.count == 1
    time.advance(20)
    credentials.get()
    assert command.count == 2


def test_a_good_token_is_kept_while_the_command_fails(make, command, time):
    token = jwt(time.now + 600)
    command.output.write_text(token)
    credentials = make(TINKER_CREDENTIAL_CMD=f"{command.line} && test ! -e {command.folder}/off")
    credentials.get()
    (command.folder / "off").touch()
    time.advance(550)
    assert [credentials.get() for _ in range(3)] == [token] * 3
    assert command.count == 2
    time.advance(50)
    with pytest.raises(SetupError, match="status 1"):
        credentials.get()


@pytest.fixture(params=["TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "a login"])
def expired(request, make, login, time):
    """Credentials with a token that has expired by our clock, the token, and the source's name."""
    token = jwt(time.now - 1)
    if request.param == "a login":
        login.store(token)
        return make(), token, "credentials.json"
    value = token if request.param == "TINKER_API_KEY" else f"echo {token}"
    return make(**{request.param: value}), token, request.param


def test_token_expired_by_our_clock_is_sent_once(expired, time):
    credentials, token, source = expired
    assert credentials.get() == token
    refusal = Unauthorized("invalid token", status=401)
    assert not credentials.rejected(token, refusal)
    assert "invalid token (the token of " in refusal.message
    assert f"{source} expired at 2027-01-15" in refusal.message
    for _ in range(3):
        with pytest.raises(Unauthorized, match="expired at 2027-01-15") as caught:
            credentials.get()
        assert "eyJ" not in str(caught.value)
        time.advance(600)


def test_token_expired_by_our_clock_alone_goes_on(expired, time):
    credentials, token, _ = expired
    for _ in range(3):
        assert credentials.get() == token
        credentials.accepted(token)
        time.advance(600)


def test_token_expired_by_our_clock_gives_way_to_another(make, command, time):
    first, second = jwt(time.now - 600, "1"), jwt(time.now + 600, "2")
    command.output.write_text(first)
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    assert [credentials.get() for _ in range(3)] == [first] * 3
    assert command.count == 1
    command.output.write_text(second)
    assert credentials.rejected(first, Unauthorized("no", status=401))
    assert credentials.get() == second


def test_a_token_in_the_environment_expires(make, time):
    token = jwt(time.now + 30)
    credentials = make(TINKER_API_KEY=token)
    assert credentials.get() == token
    time.advance(30)
    assert credentials.get() == token
    assert not credentials.rejected(token, Unauthorized("no", status=401))
    with pytest.raises(Unauthorized, match="expired"):
        credentials.get()


@pytest.mark.parametrize(
    "token", ["eyJ.x.y", "eyJ.eyJ.sig", "eyJ." + "A" * 5 + ".s", "eyJ.bnVsbA.s", "eyJhYmM"]
)
def test_what_only_looks_like_a_token_is_a_key(make, token):
    assert make(TINKER_API_KEY=token).get() == token


# --- when it is refused --------------------------------------------------------------------------


def test_a_rotated_login_is_taken_without_a_refusal(make, login, time):
    login.store("tml-old")
    credentials = make()
    assert credentials.get() == "tml-old"
    login.store("tml-new")
    time.advance(1)
    assert credentials.get() == "tml-new"


def test_a_refused_key_is_read_again_once(make, login):
    login.store("tml-old")
    credentials = make()
    credentials.get()
    login.store("tml-new")
    assert credentials.rejected("tml-old", refused())
    assert credentials.get() == "tml-new"


def test_a_late_refusal_of_an_old_key_changes_nothing(make, login):
    login.store("tml-old")
    credentials = make()
    credentials.get()
    login.store("tml-new")
    assert credentials.rejected("tml-old", refused())
    assert credentials.rejected("tml-old", refused())
    assert credentials.get() == "tml-new"


def waits(credentials, time):
    """Return how long `get` answers from memory, seconds, and the key that it gives then."""
    span = 0
    while True:
        try:
            return span, credentials.get()
        except Unauthorized:
            time.advance(1)
            span += 1


def test_back_off_doubles_to_five_minutes_and_lets_one_call_through(make, time):
    credentials = make(TINKER_API_KEY="tml-wrong")
    key, spans = credentials.get(), []
    for _ in range(9):
        assert not credentials.rejected(key, refused())
        with pytest.raises(Unauthorized, match="no such key") as caught:
            credentials.get()
        assert caught.value.is_remembered
        span, key = waits(credentials, time)
        with pytest.raises(Unauthorized):
            credentials.get()  # the others wait for the outcome of the one
        spans.append(span)
    assert spans == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_refusals_of_calls_that_were_under_way_count_once(make, time):
    credentials = make(TINKER_API_KEY="tml-wrong")
    credentials.get()
    for _ in range(8):
        assert not credentials.rejected("tml-wrong", refused())
    assert waits(credentials, time)[0] == 5


def test_an_accepted_key_is_forgiven(make, time):
    credentials = make(TINKER_API_KEY="tml-key")
    credentials.get()
    credentials.rejected("tml-key", refused())
    time.advance(5)
    credentials.accepted(credentials.get())
    assert [credentials.get() for _ in range(3)] == ["tml-key"] * 3
    credentials.rejected("tml-key", refused())
    time.advance(5)
    assert credentials.get() == "tml-key"


def test_a_new_login_ends_the_back_off(make, login, time):
    login.store("tml-wrong")
    credentials = make()
    credentials.get()
    assert not credentials.rejected("tml-wrong", refused())
    time.advance(2)
    with pytest.raises(Unauthorized):
        credentials.get()
    login.store("tml-right")
    time.advance(1)
    assert credentials.get() == "tml-right"
    credentials.accepted("tml-right")
    assert credentials.get() == "tml-right"


def test_the_command_runs_once_a_back_off(make, command, time):
    command.output.write_text("tml-wrong")
    credentials = make(TINKER_CREDENTIAL_CMD=command.line)
    credentials.get()
    assert not credentials.rejected("tml-wrong", refused())
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


def test_a_command_that_prints_another_wrong_key_each_time_backs_off_too(make, command, time):
    credentials = make(TINKER_CREDENTIAL_CMD=f"date >> {command.runs}; wc -c < {command.runs}")
    key, spans = credentials.get(), []
    for _ in range(4):
        while credentials.rejected(key, refused()):
            key = credentials.get()
        span, key = waits(credentials, time)
        spans.append(span)
    assert spans == [5, 10, 20, 40]


def test_a_login_that_vanishes_and_comes_back(make, login, time):
    login.store("tml-stored")
    credentials = make()
    credentials.get()
    login.path.unlink()
    time.advance(1)
    with pytest.raises(SetupError, match="no API key"):
        credentials.get()
    login.store("tml-stored")
    time.advance(1)
    assert [credentials.get() for _ in range(3)] == ["tml-stored"] * 3
