import pytest

from tinkerfs import journal as journal_module
from tinkerfs.journal import MAX_LOG_LINES, Journal


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
    assert journal.read(100, len(before)) == lines("new")
    assert journal.read(100, len(before) + 4) == b""
    journal.amend("newer")
    assert journal.read(100, len(before)) == lines("new", "newer")
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


def test_open_text_is_bounded(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_BYTES", 2000)
    journal.open()
    fill(journal, 0, 5000)
    assert len(journal.text()) <= 2000
    assert journal.text().endswith(lines(*range(5000 - MAX_LOG_LINES, 5000)))
