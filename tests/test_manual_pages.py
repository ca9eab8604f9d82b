"""The manual pages and completions that packages contain."""

import shutil
import subprocess

import click
import pytest

from scripts.manual_pages import escaped, files
from tinkerfs.cli.main import COMMANDS, cli

PAGES = dict(files())


@pytest.mark.parametrize("name", COMMANDS)
def test_page_names_every_option(name):
    page = PAGES[f"share/man/man1/tinkerfs-{name}.1"]
    command = cli.get_command(click.Context(cli), name)
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert escaped(param.opts[0]) in page
    assert page.startswith('.TH "TINKERFS')


def test_pages_are_formatted_without_warnings(tmp_path):
    pages = {path: text for path, text in PAGES.items() if path.endswith(".1")}
    (tmp_path / "pages").write_text("".join(pages.values()))
    groff = shutil.which("groff")
    assert groff, "run scripts/setup"
    done = subprocess.run(
        [groff, "-ww", "-man", "-Tascii", "-P-cbou", "pages"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    assert done.stdout.count(b"DESCRIPTION") == len(pages)


@pytest.mark.parametrize("text", [".start", "'start", r"a\b", "-x"])
def test_escaped_text_is_printed_as_it_is(tmp_path, text):
    (tmp_path / "page").write_text(f".TH X 1\n.SH NAME\n{escaped(text)}\n")
    groff = ["groff", "-ww", "-man", "-Tascii", "-P-cbou", "page"]
    done = subprocess.run(groff, cwd=tmp_path, capture_output=True, check=True, text=True)
    assert text in done.stdout
