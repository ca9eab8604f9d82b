"""Sources of settings, their precedence, and their values."""

import os
from dataclasses import fields

import click
import pytest

from tinkerfs.cli import options
from tinkerfs.cli.cache import info
from tinkerfs.cli.get import get
from tinkerfs.cli.main import _as_command
from tinkerfs.cli.mount import mount
from tinkerfs.cli.options import settings_of
from tinkerfs.concurrency import run_in_thread
from tinkerfs.config import DEFAULT_BASE_URL, Settings


@pytest.fixture(autouse=True)
def environ(monkeypatch, tmp_path):
    """Yield the environment of this process, which click reads; it is restored afterwards."""
    monkeypatch.setattr(options, "SYSTEM_FILE", str(tmp_path / "system.toml"))
    for name in [name for name in os.environ if name.startswith("TINKER")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved = dict(os.environ)
    yield os.environ
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def user_file(tmp_path):
    directory = tmp_path / ".config/tinkerfs"
    directory.mkdir(parents=True)
    return directory / "config.toml"


def parse(*arguments, command=mount, path=("m",)):
    """Return the settings of a command line."""
    params = command.make_context(command.name, [*arguments, *path]).params
    return Settings(**{field.name: params[field.name] for field in fields(Settings)})


def error_of(*arguments, command=mount):
    """Return the message of the error of a command line, which exits with 2."""
    with pytest.raises(click.UsageError) as failure:
        parse(*arguments, command=command)
    assert failure.value.exit_code == 2
    return failure.value.format_message()


def test_parse_without_sources_returns_defaults():
    assert parse() == Settings()
    assert len(settings_of(mount)) == len(fields(Settings))


def test_parse_prefers_flag_then_o_environment_file_default(environ, user_file, tmp_path):
    (tmp_path / "system.toml").write_text("ttl = 1\n")
    assert parse().ttl_s == 1
    user_file.write_text('ttl = "2s"\n')
    assert parse().ttl_s == 2
    environ["TINKERFS_TTL"] = "3"
    assert parse().ttl_s == 3
    assert parse("-o", "ttl=4").ttl_s == 4
    assert parse("--ttl", "5m", "-o", "ttl=4").ttl_s == 300
    assert parse("-ottl=4,ttl=6", "-o", "ro").ttl_s == 6


def test_command_without_flag_has_the_other_sources(environ, user_file):
    user_file.write_text("umask = '077'\n")
    environ["TINKERFS_CONCURRENCY"] = "3"
    settings = parse("tinker://r/weights/1", command=get)
    assert (settings.umask, settings.concurrency) == (0o77, 3)
    assert "--umask" in error_of("--umask", "022", command=get)
    assert parse("--cache-size", "1k", command=info).cache_size_bytes == 1024


def test_named_file_is_the_only_one_that_is_read(environ, user_file, tmp_path):
    user_file.write_text("ttl = 2\n")
    named = tmp_path / "named.toml"
    named.write_text('read-only = true\ntimeout = 1.5\ncache_dir = "/x"\nxattr = false\n')
    settings = parse("--config", "named.toml")
    assert settings == Settings(read_only=True, timeout_s=1.5, cache_dir="/x")
    environ["TINKERFS_CONFIG"] = "named.toml"
    assert parse() == settings
    assert f"{tmp_path}/none.toml: No such file" in error_of("--config", "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tll = 3", ": tll: unknown option (valid options: allow-other, "),
        ("config = 'x'", ": config: unknown option"),
        ("ttl = 'soon'", ": ttl: not a duration"),
        ("ttl = true", ": ttl: not a duration"),
        ("concurrency = 1.5", ": concurrency: '1.5' is not a valid integer"),
        ("ttl = [3]", ": ttl: not a string, number or boolean"),
        ("umask = 22", ': umask: not a string (hint: umask = "022")'),
        ("cache-dir = ''", ": cache-dir: not a path"),
        ("ttl", ": not TOML"),
    ],
)
def test_error_in_file_names_file_and_key(user_file, text, message):
    user_file.write_text(text)
    assert f"{user_file}{message}" in error_of()
    assert f"{user_file}{message}" in error_of("--ttl", "3", "--umask", "0")


def test_error_names_flag_or_variable(environ):
    assert "for --ttl: not a duration" in error_of("--ttl", "x")
    environ["TINKERFS_TTL"] = "x"
    assert "for TINKERFS_TTL: not a duration" in error_of()
    assert "for --ttl: not a duration: 'y'" in error_of("--ttl", "y")
    environ["TINKERFS_TTL"] = ""
    environ["TINKER_BASE_URL"] = "https://user:secret@host"
    message = error_of()
    assert "for TINKER_BASE_URL: " in message
    assert "secret" not in message


def test_own_base_url_variable_beats_official_variable(environ):
    assert parse().base_url == DEFAULT_BASE_URL
    environ["TINKER_BASE_URL"] = "http://official"
    assert parse().base_url == "http://official"
    environ["TINKERFS_BASE_URL"] = "http://own/"
    assert parse().base_url == "http://own"


def test_empty_variables_are_ignored(environ):
    names = {name for option in settings_of(mount).values() for name in option.envvar}
    environ |= dict.fromkeys(names, "") | {"TINKERFS_CONFIG": ""}
    assert {"TINKERFS_TTL", "TINKERFS_BASE_URL", "TINKER_BASE_URL"} < names
    assert parse() == Settings()


def test_switch_can_be_turned_off_by_higher_precedence(environ, user_file):
    user_file.write_text("read-only = true\n")
    assert parse().read_only
    environ["TINKERFS_READ_ONLY"] = "no"
    assert not parse().read_only
    environ["TINKERFS_READ_ONLY"] = "yes"
    assert parse().read_only
    for items in ("read-only=no", "rw", "ro,rw"):
        assert not parse("-o", items).read_only
    assert parse("-o", "rw,ro").read_only
    assert not parse("-o", "ro", "--no-read-only").read_only


def test_generic_mount_options_are_accepted():
    ignored = (
        "rw,noauto,_netdev,user,users,nofail,dev,suid,exec,relatime,x-systemd.automount,user=me"
    )
    assert parse("-o", ignored, "-o", "defaults,,") == Settings()
    own = "ro,allow_other,archive_timeout=5m,uid=1000,umask=022"
    assert parse("-o", own) == Settings(
        read_only=True, allow_other=True, archive_timeout_s=300, uid=1000, umask=0o22
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("nonsense", "-o nonsense: unknown option"),
        ("ttl", "-o ttl: missing value (hint: -o ttl=S)"),
        ("ttl=x", "for -o ttl: not a duration"),
        ("read_only=x", "for -o read_only: 'x' is not a valid boolean"),
    ],
)
def test_error_of_o_option_names_item(item, message):
    assert message in error_of("-o", item)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("rw,default_permissions,_netdev,users,noauto,x-systemd.automount,nofail", {}),
        ("allow_other,umask=022,reconnect,kernel_cache", {"allow_other": True, "umask": 0o22}),
        ("ro,exec,big_writes,max_read=131072,fsname=x,max_threads=4", {"read_only": True}),
    ],
)
def test_o_option_of_other_fuse_program_is_ignored(items, expected):
    assert parse("-o", items) == Settings(**expected)


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
        ("alow_other", "did you mean allow-other"),
        ("cache_sizes=3", "did you mean cache-size"),
        ("xyzzy", "valid options: allow-other, "),
    ],
)
def test_unknown_o_option_has_hint(item, hint):
    message = error_of("-o", f"ro,{item}")
    assert message.startswith(f"-o {item.partition('=')[0]}: unknown option (hint: ")
    assert hint in message


def test_remount_is_refused_whatever_else_is_given():
    message = error_of("-o", "rw,user_id=0,nosuid,remount,xyzzy")
    assert message.startswith("-o remount: a mounted file system has the options of its start")
    assert "tinkerfs umount" in message


def test_sloppy_ignores_unknown_o_options():
    assert parse("-o", "ro,xyzzy=3,sloppy") == Settings(read_only=True)


def test_unknown_o_option_hides_its_value():
    assert "c0ffee" not in error_of("-o", "passwd=c0ffee")


def test_paths_are_absolute(environ, tmp_path):
    environ["TINKERFS_LOG_FILE"] = "~/l"
    settings = parse("-o", "cache_dir=c", "--base-models", "a,b")
    assert settings.cache_dir == f"{tmp_path}/c"
    assert settings.base_models == f"{tmp_path}/a,b"
    assert settings.log_file == f"{tmp_path}/l"


def test_relative_path_in_file_is_relative_to_file(user_file, tmp_path):
    user_file.write_text('cache-dir = "c"\nlog-file = "~/l"\n')
    assert parse().cache_dir == f"{user_file.parent}/c"
    assert parse().log_file == f"{tmp_path}/l"
    named = tmp_path / "below" / "c.toml"
    named.parent.mkdir()
    named.write_text('cache-dir = "../c"\n')
    assert parse("--config", "below/c.toml").cache_dir == f"{tmp_path}/c"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["tinker", "/mnt", "-o", "ro"], ["mount", "--source", "tinker", "/mnt", "-o", "ro"]),
        (
            ["https://x/y", "/mnt"],
            ["mount", "--source", "https://x/y", "--base-url", "https://x/y", "/mnt"],
        ),
        (["mount", "/mnt"], ["mount", "/mnt"]),
        (["nonsense", "/mnt"], ["nonsense", "/mnt"]),
        (["tinker"], ["tinker"]),
        ([], []),
    ],
)
def test_source_and_mountpoint_become_mount_command(arguments, command):
    assert _as_command(arguments) == command


def test_config_that_is_fifo_fails_without_blocking(user_file):
    os.mkfifo(user_file)
    assert run_in_thread(parse, "x").result(10) == Settings()
    named = run_in_thread(lambda: error_of("--config", str(user_file)), "x")
    assert "not a regular file" in named.result(10).lower()


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("ttl", "soon"),
        ("ttl", "-1"),
        ("ttl", "1e999"),
        ("timeout", "0"),
        ("base-url", "ftp://x"),
        ("base-url", "https://"),
        ("base-url", "https://user:secret@host"),
        ("base-url", "https://host:port"),
        ("base-url", "https://host/?x=1"),
        ("archive-burst", "-1"),
        ("archive-burst", "1.5"),
        ("concurrency", "0"),
        ("concurrency", "65"),
        ("concurrency", "many"),
        ("uid", "root"),
        ("uid", "4294967295"),
        ("umask", "888"),
        ("umask", "1777"),
        ("read-only", "perhaps"),
        ("log-level", "loud"),
        ("moe-layout", "dense"),
        ("blob-proxy", "http://cache.example.com"),
        ("shared-cache", "http://host"),
        ("shared-cache", "redis://"),
        ("shared-cache", "redis://host:port"),
        ("shared-cache", "redis://host/x"),
        ("shared-cache", "redis://host?db=1"),
        ("shared-cache", "redis://host/1#x"),
        ("shared-cache", "unix://run/redis.sock"),
        ("shared-cache", "unix:///run/redis.sock?db=x"),
        ("shared-cache", "unix:///run/redis.sock?timeout=1"),
        ("cache-dir", ""),
        ("trash", "59m"),
        ("trash", "3650.1d"),
        ("trash", "always"),
    ],
)
def test_convert_with_invalid_text_fails(flag, text):
    option = settings_of(mount)[flag]
    with pytest.raises(click.BadParameter, match=r"\w+ \w+"):
        option.convert(text, "here", click.Context(mount))


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("base-url", "https://host/path/", "https://host/path"),
        ("umask", "022", 0o22),
        ("umask", "0o077", 0o77),
        ("cache-size", "1.5 KiB", 1536),
        ("cache-size", "2g", 2 << 30),
        ("cache-size", "0", 0),
        ("read-only", "Yes", True),
        ("read-only", "0", False),
        ("uid", "0", 0),
        ("log-level", "DEBUG", "debug"),
        ("moe-layout", "Packed", "packed"),
        ("blob-proxy", "http://localhost:8080/", "http://localhost:8080"),
        ("blob-proxy", "https://cache.example.com", "https://cache.example.com"),
        ("shared-cache", "redis://host:6379/1", "redis://host:6379/1"),
        ("shared-cache", "rediss://user:word@host", "rediss://user:word@host"),
        ("shared-cache", "unix://:word@/run/redis.sock?db=2", "unix://:word@/run/redis.sock?db=2"),
        ("archive-burst", "0", 0),
        ("concurrency", "1", 1),
        ("concurrency", "64", 64),
    ],
)
def test_convert_with_valid_text_returns_value(flag, text, value):
    assert settings_of(mount)[flag].convert(text, "here", click.Context(mount)) == value


def test_password_of_shared_cache_is_refused_where_it_is_visible(environ, user_file):
    url = "redis://user:secret@host"
    for arguments in (["--shared-cache", url], ["-o", f"shared_cache={url}"]):
        message = error_of(*arguments)
        assert "visible to other users" in message
        assert "secret" not in message
    environ["TINKERFS_SHARED_CACHE"] = url
    assert parse().shared_cache == url
    assert "secret" not in repr(parse())
    del environ["TINKERFS_SHARED_CACHE"]
    user_file.write_text(f'shared-cache = "{url}"')
    assert parse().shared_cache == url
    user_file.write_text('shared-cache = "redis://user:secret@host/x"')
    assert "secret" not in error_of()
