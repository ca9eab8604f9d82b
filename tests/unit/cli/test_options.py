"""Sources of settings, and their precedence."""

import os

import pytest

from tinkerfs.cli import options
from tinkerfs.cli.main import _as_command
from tinkerfs.concurrency import run_in_thread
from tinkerfs.config import DEFAULT_BASE_URL, OPTIONS, Settings
from tinkerfs.errors import StartupError


@pytest.fixture(autouse=True)
def _no_system_file(monkeypatch, tmp_path):
    monkeypatch.setattr(options, "SYSTEM_FILE", str(tmp_path / "system.toml"))


@pytest.fixture
def environ(tmp_path):
    return {"HOME": str(tmp_path)}


@pytest.fixture
def user_file(tmp_path):
    directory = tmp_path / ".config/tinkerfs"
    directory.mkdir(parents=True)
    return directory / "config.toml"


def test_resolve_without_sources_returns_defaults(environ):
    assert options.resolve({}, environ=environ) == Settings()


def test_resolve_prefers_flag_then_o_environment_file_default(environ, user_file, tmp_path):
    def ttl(flags, mount_options):
        return options.resolve(flags, mount_options, environ=environ).ttl_s

    (tmp_path / "system.toml").write_text("ttl = 1\n")
    assert ttl({}, ()) == 1
    user_file.write_text('ttl = "2s"\n')
    assert ttl({}, ()) == 2
    environ["TINKERFS_TTL"] = "3"
    assert ttl({}, ()) == 3
    assert ttl({}, ["ttl=4"]) == 4
    assert ttl({"ttl_s": "5m"}, ["ttl=4"]) == 300
    assert ttl({"ttl_s": None}, ["ttl=4,ttl=6"]) == 6


def test_resolve_with_named_file_reads_only_that_file(environ, user_file, tmp_path):
    user_file.write_text("ttl = 2\n")
    named = tmp_path / "named.toml"
    named.write_text('read-only = true\ntimeout = 1.5\ncache_dir = "/x"\n')
    settings = options.resolve({}, environ=environ, config=str(named))
    assert settings == Settings(read_only=True, timeout_s=1.5, cache_dir="/x")
    assert options.resolve({}, environ={**environ, "TINKERFS_CONFIG": str(named)}) == settings
    with pytest.raises(StartupError, match="no such file"):
        options.resolve({}, environ=environ, config=str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tll = 3", "unknown option 'tll'"),
        ("ttl = 'soon'", "ttl: not a duration"),
        ("ttl = [3]", "not a string, number or boolean"),
        ("umask = 22", 'umask = "022"'),
        ("ttl", "not TOML"),
    ],
)
def test_resolve_with_invalid_file_names_file(environ, user_file, text, message):
    user_file.write_text(text)
    with pytest.raises(StartupError, match=message) as failure:
        options.resolve({}, environ=environ)
    assert str(user_file) in str(failure.value)


def test_own_base_url_variable_beats_official_variable(environ):
    assert options.resolve({}, environ=environ).base_url == DEFAULT_BASE_URL
    environ["TINKER_BASE_URL"] = "http://official"
    assert options.resolve({}, environ=environ).base_url == "http://official"
    environ["TINKERFS_BASE_URL"] = "http://own/"
    assert options.resolve({}, environ=environ).base_url == "http://own"


def test_resolve_ignores_empty_variables(environ):
    environ |= {option.env_var: "" for option in OPTIONS} | {"TINKERFS_CONFIG": ""}
    assert options.resolve({}, environ=environ) == Settings()


def test_switch_can_be_turned_off_by_higher_precedence(environ):
    environ["TINKERFS_READ_ONLY"] = "yes"
    assert options.resolve({}, environ=environ).read_only
    assert not options.resolve({}, ["read-only=no"], environ=environ).read_only
    assert not options.resolve({}, ["rw"], environ=environ).read_only


def test_generic_mount_options_are_accepted(environ):
    ignored = (
        "rw,noauto,_netdev,user,users,nofail,dev,suid,exec,relatime,x-systemd.automount,user=me"
    )
    assert options.resolve({}, [ignored, "defaults,,"], environ=environ) == Settings()
    own = "ro,allow_other,archive_timeout=5m,uid=1000,umask=022"
    assert options.resolve({}, [own], environ=environ) == Settings(
        read_only=True, allow_other=True, archive_timeout_s=300, uid=1000, umask=0o22
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("nonsense", "unknown option"),
        ("ttl", "missing value .hint: -o ttl=S"),
        ("ttl=x", "-o ttl: not a duration"),
    ],
)
def test_invalid_o_option_is_error(environ, item, message):
    with pytest.raises(StartupError, match=message):
        options.resolve({}, [item], environ=environ)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("rw,default_permissions,_netdev,users,noauto,x-systemd.automount,nofail", {}),
        ("allow_other,umask=022,reconnect,kernel_cache", {"allow_other": True, "umask": 0o22}),
        ("ro,exec,big_writes,max_read=131072,fsname=x,max_threads=4", {"read_only": True}),
    ],
)
def test_o_option_of_other_fuse_program_is_ignored(environ, items, expected):
    assert options.resolve({}, [items], environ=environ) == Settings(**expected)


@pytest.mark.parametrize(
    ("item", "hint"),
    [
        ("allow_root", "allow_other,umask=077"),
        ("attr_timeout=60", "ttl=S"),
        ("fmask=0133", "umask=M"),
        ("owner=me", "uid=U,gid=G"),
        ("idmap=user", "uid=U,gid=G"),
        ("dmask=022", "umask=M"),
        ("vfs_cache_mode=full", "cache_size=SIZE"),
        ("url=https://x", "base_url=URL"),
        ("remount", "umount"),
        ("alow_other", "did you mean allow-other"),
        ("cache_sizes=3", "did you mean cache-size"),
        ("xyzzy", "valid options: allow-other, "),
    ],
)
def test_unknown_o_option_has_hint(environ, item, hint):
    with pytest.raises(StartupError) as refusal:
        options.resolve({}, [f"ro,{item}"], environ=environ)
    message = str(refusal.value)
    assert message.startswith(f"-o {item.partition('=')[0]}: unknown option (hint: ")
    assert hint in message


def test_unknown_o_option_hides_its_value(environ):
    with pytest.raises(StartupError) as refusal:
        options.resolve({}, ["passwd=c0ffee"], environ=environ)
    assert "c0ffee" not in str(refusal.value)


def test_as_arguments_returns_equivalent_command_line(environ):
    flags = {"ttl_s": "5m", "read_only": True, "allow_other": None, "base_url": "http://x"}
    arguments = options.as_arguments(Settings(), flags, ["uid=1", "rw"], "/c.toml")
    assert arguments == ["-o", "uid=1", "-o", "rw", "--base-url=http://x", "--read-only",
                         "--ttl=5m", "--config=/c.toml"]  # fmt: skip


def test_as_arguments_makes_paths_of_any_source_absolute(environ, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = {"log_file": None, "cache_dir": "a,b"}
    mount_options = ["log_file=x,cache_dir=c,uid=1"]
    settings = options.resolve(flags, mount_options, environ=environ)
    arguments = options.as_arguments(settings, flags, mount_options, "d")
    here = f"={tmp_path}/"
    assert arguments == ["-o", mount_options[0], f"--cache-dir{here}a,b", f"--log-file{here}x",
                         f"--config{here}d"]  # fmt: skip


def test_as_arguments_has_only_flags_of_the_command():
    assert options.as_arguments(Settings(cache_dir="/c"), {"log_file": None}) == []


def test_relative_path_in_file_is_relative_to_file(environ, user_file):
    user_file.write_text('cache-dir = "c"\nlog-file = "~/l"\n')
    settings = options.resolve({}, environ=environ)
    assert settings.cache_dir == f"{user_file.parent}/c"
    assert settings.log_file == os.path.expanduser("~/l")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["tinker", "/mnt", "-o", "ro"], ["mount", "/mnt", "-o", "ro"]),
        (["https://x/y", "/mnt"], ["mount", "--base-url", "https://x/y", "/mnt"]),
        (["mount", "/mnt"], ["mount", "/mnt"]),
        (["nonsense", "/mnt"], ["nonsense", "/mnt"]),
        (["tinker"], ["tinker"]),
        ([], []),
    ],
)
def test_source_and_mountpoint_become_mount_command(arguments, command):
    assert _as_command(arguments) == command


def test_config_that_is_fifo_fails_without_blocking(environ, user_file, tmp_path):
    os.mkfifo(user_file)
    assert run_in_thread(lambda: options.resolve({}, environ=environ), "x").result(10) == Settings()
    named = run_in_thread(lambda: options.resolve({}, environ=environ, config=str(user_file)), "x")
    with pytest.raises(StartupError, match="not a regular file"):
        named.result(10)
