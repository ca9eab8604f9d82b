import re

import pytest

from tinkerfs import journal as journal_module
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.journal import MAX_LOG_LINES, Journal
from tinkerfs.vfs.handles import JournalHandle


@pytest.fixture
def journal():
    return Journal(str)


def fill(journal, start, stop):
    for number in range(start, stop):
        journal.add(number)


def lines(*numbers):
    return "".join(f"{number}\n" for number in numbers).encode()


def test_journal_has_its_last_entries(journal):
    fill(journal, 0, MAX_LOG_LINES + 5)
    assert journal.text() == lines(*range(5, MAX_LOG_LINES + 5))
    assert journal.entries() == list(range(5, MAX_LOG_LINES + 5))


def test_open_text_only_grows(journal):
    fill(journal, 0, MAX_LOG_LINES)
    before = journal.text()
    journal.open()
    journal.add("new")
    assert journal.text() == before + lines("new")
    assert journal.read(100, len(before))[0] == lines("new")
    assert journal.read(100, len(before) + 4)[0] == b""
    journal.amend("newer")
    assert journal.read(100, len(before))[0] == lines("new", "newer")
    assert journal.entries() == [*range(1, MAX_LOG_LINES), "new"]


def test_last_close_resets_the_text_to_the_last_entries(journal):
    fill(journal, 0, MAX_LOG_LINES)
    journal.open()
    journal.open()
    journal.add("new")
    journal.close()
    assert journal.text() == lines(*range(MAX_LOG_LINES), "new")
    journal.close()
    assert journal.text() == lines(*range(1, MAX_LOG_LINES), "new")


def test_open_text_is_bounded_and_keeps_its_positions(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_BYTES", 2000)
    journal.open()
    fill(journal, 0, 5000)
    assert len(journal.text()) <= 2000
    assert journal.text().endswith(lines(*range(4900, 5000)))
    assert journal.size_bytes == len(lines(*range(5000)))
    data, first, dropped = journal.read(10, 0)
    assert data == journal.text()[:10]
    assert lines(*range(dropped)) == lines(*range(5000))[:first]
    assert journal.read(10, journal.size_bytes - 5) == (b"4999\n", journal.size_bytes - 5, dropped)


def test_growth_is_done_when_a_line_is_added(journal):
    journal.open()
    growth = journal.growth(0)
    assert not growth.done()
    journal.add("line")
    assert growth.done()
    assert journal.growth(4).done()
    assert not journal.growth(5).done()


def test_handle_reports_dropped_lines_once_in_order(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_BYTES", 2000)
    journal.add("first")
    handle = JournalHandle("/journal", journal, waits=False)
    text = handle.read(3, 0, BACKGROUND_CONTEXT)
    fill(journal, 0, 5000)
    while data := handle.read(100, len(text), BACKGROUND_CONTEXT):
        text += data
    start, notice, *rest = text.splitlines()
    assert (start, text[-1:]) == (b"fir", b"\n")
    dropped = int(re.fullmatch(rb"# (\d+) lines dropped", notice)[1])
    assert rest == lines(*range(dropped - 1, 5000)).splitlines()
    handle.close()
