"""Check the documentation against the code: nothing missing, nothing outdated."""

import errno
import os
import re
import shlex
from pathlib import Path

import click
import pytest

from tinkerfs.cli.mount import mount
from tinkerfs.cli.options import settings_of
from tinkerfs.clock import Clock
from tinkerfs.config import Settings
from tinkerfs.errors import ERRNO_OF_API_ERROR
from tinkerfs.telemetry import Telemetry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
ALL_TEXT = "\n".join(page.read_text() for page in PAGES)

#: The form that mount(8) uses: a source and a mountpoint instead of a subcommand.
_SOURCE_AND_MOUNTPOINT = re.compile(r"tinkerfs (tinker|https?://\S+) \S+ -o ")


def commands():
    """Return every command by its name: "", "mount", "cache info", ..."""
    from tinkerfs.cli.main import cli

    def walk(command, names):
        found = {" ".join(names): command}
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found |= walk(command.get_command(context, name), (*names, name))
        return found

    return walk(cli, ())


def options_of(command):
    """Return the long options of a command, including `--help`."""
    options = command.get_params(click.Context(command))
    return {
        flag
        for option in options
        if not getattr(option, "hidden", False)
        for flag in [*option.opts, *option.secondary_opts]
        if "--" in flag
    }


def rows(page):
    """Return the cells of every table row of a page, without backquotes."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]


def code_lines(text):
    """Return the lines of a page's code blocks, with continuation lines joined."""
    lines = []
    is_fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            lines.append(line.strip())
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def invocations(text, program):
    """Return the arguments of each invocation of `program` in code blocks."""
    prompts = re.compile(r"^([$#] |sudo )+")
    lines = (prompts.sub("", line) for line in code_lines(text))
    parts = (part.strip() for line in lines for part in re.split(r"[;|&]+|\$\(", line))
    return [
        shlex.split(re.sub("[\"']", "", part), comments=True)[1:]
        for part in parts
        if re.match(rf"{program}(\s|$)", part)
    ]


# --- the documentation is complete ---------------------------------------------------------------


def test_every_command_is_documented():
    missing = [f"tinkerfs {name}" for name in commands() if f"tinkerfs {name}" not in ALL_TEXT]
    assert missing == [], "neither in README.md nor in docs/"


def test_every_option_is_documented():
    missing = [
        f"tinkerfs {name} {option}"
        for name, command in commands().items()
        for option in sorted(options_of(command) - {"--help"})
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", ALL_TEXT)
    ]
    assert missing == [], "neither in README.md nor in docs/"


@pytest.mark.parametrize("option", settings_of(mount).values(), ids=lambda option: option.key)
def test_every_setting_has_a_configuration_row(option):
    flag = f"--{option.key} {option.metavar or ''}".strip()
    found = [row for row in rows("configuration.md") if row[0] == flag]
    assert len(found) == 1, f"docs/configuration.md: one row for {flag}"
    _, variable, default, meaning = found[0]
    assert variable.split(", ") == option.envvar
    assert meaning
    shown = "no" if option.is_flag else option.get_help_extra(click.Context(mount))["default"]
    assert default == shown.strip("()"), "as in the help"
    value = getattr(Settings(), option.name)
    if value is not None and option.name != "base_url":
        assert option.convert(default, "docs", click.Context(mount)) == value


def test_documented_variables_exist():
    known = {name for option in settings_of(mount).values() for name in option.envvar}
    documented = set(re.findall(r"TINKERFS_[A-Z_]*[A-Z]", ALL_TEXT))
    other = {"TINKERFS_CONFIG", "TINKERFS_FUSE_BINDING", "TINKERFS_VENV"}
    other |= {"TINKERFS_REQUIRE_KERNEL_TESTS"}
    assert documented - known - other == set()


def test_every_api_error_has_a_troubleshooting_row():
    rows_by_kind = {row[1]: row[2:] for row in rows("troubleshooting.md") if len(row) > 2}
    for kind, number in ERRNO_OF_API_ERROR.items():
        assert kind.__name__ in rows_by_kind, "no row in docs/troubleshooting.md"
        name, message = rows_by_kind[kind.__name__]
        assert name.split()[0] == errno.errorcode[number].replace("ENOTSUP", "EOPNOTSUPP")
        assert message == os.strerror(number)


def test_every_documented_errno_has_its_message():
    for row in rows("troubleshooting.md"):
        number = getattr(errno, row[-2].split()[0], None)
        if number is not None:
            assert row[-1] == os.strerror(number), row


def test_every_counter_has_a_metrics_row():
    sources = [path.read_text() for path in (ROOT / "tinkerfs").rglob("*.py")]
    pattern = r"telemetry\.count\(\s*([^)]*)"
    calls = [call for text in sources for call in re.findall(pattern, text)]
    counters = {name for call in calls for name in re.findall(r'"(\w+)"', call)}
    assert len(counters) > 5
    assert counters - {row[0] for row in rows("metrics.md")} == set()


def test_every_statistic_has_a_metrics_row():
    keys = set(Telemetry(Clock()).snapshot())
    assert keys - {row[0] for row in rows("metrics.md")} == set()


def test_layout_page_is_generated_from_the_code():
    from tinkerfs.vfs import layout

    page = ROOT / "docs" / "layout.md"
    text = page.read_text() if page.exists() else ""
    assert text.rstrip() == layout.render_layout_docs().rstrip(), "run scripts/docs"


# --- the documentation is correct ----------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_examples_exist(page):
    known = commands()
    for arguments in invocations(page.read_text(), "tinkerfs"):
        line = " ".join(["tinkerfs", *arguments])
        if not arguments or _SOURCE_AND_MOUNTPOINT.match(line):
            continue
        two = " ".join(arguments[:2])
        name = two if two in known else arguments[0]
        command = known.get("" if name.startswith("-") else name)
        assert command is not None, f"tinkerfs {name}"
        options = {each.partition("=")[0] for each in arguments if each.startswith("--")}
        assert options - options_of(command) <= {"--help"}, f"tinkerfs {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_scripts_exist(page):
    for script in re.findall(r"(?<![\w/.-])(?:\.ci|scripts)/[\w.-]*\w", page.read_text()):
        mode = os.R_OK if script.endswith(".py") else os.X_OK
        assert os.access(ROOT / script, mode), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = re.findall(r"`((?:tinkerfs|tests|docs)/[\w./-]+\.(?:py|md))`", page.read_text())
    layers = "api|cache|catalog|cli|demo|fuse|vfs|weights"
    modules = re.findall(rf"`((?:{layers})/\w+\.py)`", page.read_text())
    named += [f"tinkerfs/{module}" for module in modules]
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


def test_readme_names_the_two_commands():
    text = README.read_text()
    assert "scripts/demo" in text
    assert "scripts/test" in text


def test_every_image_is_small_and_shown():
    for image in (ROOT / "docs/images").iterdir():
        assert f"images/{image.name})" in ALL_TEXT, "in no page"
        assert image.stat().st_size < 150_000, image.name


def test_glossary_has_at_most_20_own_terms_in_order():
    text = (ROOT / "docs" / "development" / "architecture.md").read_text()
    own = text.partition("| own term | meaning |")[2].partition("\n\n")[0]
    terms = re.findall(r"^\| ([a-z ]+) \|", own, re.MULTILINE)
    assert 10 < len(terms) <= 20
    assert terms == sorted(terms)
