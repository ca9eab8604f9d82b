"""The documentation against the code: what is missing from it, and what is there no more."""

import errno
import os
import re
import shlex
from pathlib import Path

import click
import pytest

from tinkerfs.config import OPTIONS, Settings
from tinkerfs.errors import ERRNO_OF_API_ERROR

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EVERYTHING = "\n".join(page.read_text() for page in PAGES)

#: Words before a subcommand in an example.
_SOURCE_AND_MOUNTPOINT = re.compile(r"tinkerfs (tinker|https?://\S+) \S+ -o ")


def commands():
    """Return every command of the command line by its words: "", "mount", "cache info", ..."""
    from tinkerfs.cli.main import cli

    def walk(command, words):
        found = {" ".join(words): command}
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found |= walk(command.get_command(context, name), (*words, name))
        return found

    return walk(cli, ())


def options_of(command):
    """Return the long options of a command, `--help` among them."""
    options = command.get_params(click.Context(command))
    return {
        flag
        for option in options
        for flag in [*option.opts, *option.secondary_opts]
        if "--" in flag
    }


def rows(page):
    """Return the cells of every table row of a page, without the backquotes."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]


def code_of(text):
    """Return the lines of a page's code blocks, fenced or indented, joined where they go on."""
    lines = []
    is_fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            lines.append(line.strip())
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def calls_of(text, program):
    """Return the words after `program` of each shell line that calls it."""
    prompts = re.compile(r"^([$#] |sudo )+")
    lines = (prompts.sub("", line) for line in code_of(text))
    parts = (part.strip() for line in lines for part in re.split(r"[;|&]+|\$\(", line))
    return [
        shlex.split(re.sub("[\"']", "", part), comments=True)[1:]
        for part in parts
        if re.match(rf"{program}(\s|$)", part)
    ]


# --- the code is documented ----------------------------------------------------------------------


def test_every_command_is_documented():
    missing = [f"tinkerfs {words}" for words in commands() if f"tinkerfs {words}" not in EVERYTHING]
    assert missing == [], "neither in README.md nor in docs/"


def test_every_option_is_documented():
    missing = [
        f"tinkerfs {words} {option}"
        for words, command in commands().items()
        for option in sorted(options_of(command) - {"--help"})
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", EVERYTHING)
    ]
    assert missing == [], "neither in README.md nor in docs/"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_every_setting_stands_in_operations(option):
    flag = f"--{option.flag} {option.metavar}".strip()
    found = [row for row in rows("operations.md") if row[0] == flag]
    assert len(found) == 1, f"docs/operations.md: one row for {flag}"
    _, variable, default, meaning = found[0]
    assert option.env_var in variable.split(", ")
    assert meaning
    value = getattr(Settings(), option.field)
    assert default == (option.default or "no"), "as the help says"
    if value is not None and option.field != "base_url":
        assert option.parse(default) == value


def test_no_setting_is_documented_that_is_none():
    known = {option.env_var for option in OPTIONS}
    told = set(re.findall(r"TINKERFS_[A-Z_]*[A-Z]", EVERYTHING))
    elsewhere = {"TINKERFS_CONFIG", "TINKERFS_FUSE_BINDING", "TINKERFS_VENV"}
    elsewhere |= {"TINKERFS_REQUIRE_KERNEL_TESTS"}
    assert told - known - elsewhere == set()


def test_every_api_error_stands_in_errors():
    rows_by_kind = {row[1]: row[2:] for row in rows("errors.md") if len(row) > 2}
    for kind, number in ERRNO_OF_API_ERROR.items():
        assert kind.__name__ in rows_by_kind, "docs/errors.md has no row for it"
        name, words = rows_by_kind[kind.__name__]
        assert name.split()[0] == errno.errorcode[number].replace("ENOTSUP", "EOPNOTSUPP")
        assert words == os.strerror(number)


def test_every_errno_of_errors_has_its_words():
    for row in rows("errors.md"):
        number = getattr(errno, row[-2].split()[0], None)
        if number is not None:
            assert row[-1] == os.strerror(number), row


def test_layout_is_what_the_code_says():
    from tinkerfs.vfs import layout

    page = ROOT / "docs" / "layout.md"
    told = page.read_text() if page.exists() else ""
    assert told.rstrip() == layout.render_layout_docs().rstrip(), "run scripts/docs"


# --- the documentation is true -------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_examples_exist(page):
    known = commands()
    for words in calls_of(page.read_text(), "tinkerfs"):
        if not words or _SOURCE_AND_MOUNTPOINT.match(" ".join(["tinkerfs", *words])):
            continue
        two = " ".join(words[:2])
        name = two if two in known else words[0]
        command = known.get("" if name.startswith("-") else name)
        assert command is not None, f"tinkerfs {name}"
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options - options_of(command) <= {"--help"}, f"tinkerfs {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_are_named_exist(page):
    for script in re.findall(r"(?<![\w/.-])(?:\.ci|scripts)/[\w.-]*\w", page.read_text()):
        mode = os.R_OK if script.endswith(".py") else os.X_OK
        assert os.access(ROOT / script, mode), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:tinkerfs|tests|docs)/[\w./-]+\.(?:py|md))`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def anchors(text):
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_the_readme_tells_the_two_commands():
    told = README.read_text()
    assert "scripts/demo" in told
    assert "scripts/test" in told
