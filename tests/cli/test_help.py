"""Help texts and completion of the command line, and their imports."""

import subprocess
import sys

import click
import pytest

from tests.support.mount import run, tinkerfs
from tinkerfs import __version__
from tinkerfs.cli.main import COMMANDS, cli
from tinkerfs.cli.options import settings_of

#: Modules that are slow to import, or that fail to import if a library is missing.
HEAVY = {"httpx", "fuse", "mfusepy", "sqlite3", "cachetools", "msgspec", "asyncio"}


def modules_after(*arguments):
    code = (
        "import sys\n"
        "from tinkerfs.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_no_heavy_module(arguments):
    assert not modules_after(*arguments) & HEAVY


def test_no_arguments_print_help():
    done = tinkerfs()
    assert done.returncode == 2
    assert done.stderr == tinkerfs("--help").stdout


def test_group_help_imports_no_command():
    loaded = modules_after("--help")
    assert {name for name in loaded if name.startswith("tinkerfs.cli.")} == {"tinkerfs.cli.main"}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_table_has_short_help_of_command(name):
    command = cli.get_command(click.Context(cli), name)
    assert command.name == name
    assert command.get_short_help_str(100) == COMMANDS[name][2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    command = cli.get_command(click.Context(cli), name)
    assert len(command.help) > 40
    for parameter in command.get_params(click.Context(command)):
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.hidden, parameter.name


@pytest.mark.parametrize("command", ["mount", "demo"])
def test_help_shows_default_and_variable_of_each_setting(command):
    text = " ".join(tinkerfs(command, "--help").stdout.split())
    options = settings_of(cli.get_command(None, command)).values()
    shown = [option for option in options if not option.hidden]
    assert len(shown) > 5
    for option in shown:
        assert f"[env var: {', '.join(option.envvar)}; default: " in text
    assert "--config FILE" in text if command == "mount" else "--config" not in text
    assert "default: 24h]" in text if command == "mount" else "--stale" not in text


def test_help_lists_exit_codes():
    text = tinkerfs("--help").stdout
    for code in ("0  success", "1  failure", "2  invalid command line", "130  interrupted"):
        assert code in text


def test_version_option_prints_version():
    assert tinkerfs("--version").stdout == f"tinkerfs {__version__}\n"


def test_invalid_command_line_prints_one_line():
    for arguments in (["nonsense"], ["mount"], ["mount", "--nonsense", "x"], ["umount", "a", "b"]):
        done = tinkerfs(*arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("tinkerfs: ")
        assert "--help)" in line


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete"), ("zsh", "#compdef"), ("fish", "complete")]
)
def test_completion_prints_script_of_shell(shell, word):
    done = tinkerfs("completion", shell)
    assert done.returncode == 0
    assert word in done.stdout
    assert "_TINKERFS_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("tinkerfs mou", "plain,mount\n"),
        ("tinkerfs mount ~/ti", "dir,~/ti\n"),
        ("tinkerfs umount ti", "dir,ti\n"),
    ],
)
def test_completion_completes_commands_and_directories(typed, completed):
    env = {"_TINKERFS_COMPLETE": "bash_complete", "COMP_WORDS": typed}
    env["COMP_CWORD"] = str(typed.count(" "))
    code = "from tinkerfs.cli.main import main; main()"
    done = run(sys.executable, "-c", code, env=env)
    assert done.stdout == completed


@pytest.mark.parametrize("command", ["mount", "umount", "status", "demo"])
def test_empty_mountpoint_is_invalid(command):
    done = tinkerfs(command, "")
    assert done.returncode == 2
    assert "the name is empty" in done.stderr


def test_closed_standard_output_prints_no_traceback():
    done = run("sh", "-c", f"{sys.executable} -m tinkerfs completion bash | true")
    assert done.stderr == ""
