import pytest

from tinkerfs import journal as journal_module
from tinkerfs.journal import KEPT_LINES, Journal


@pytest.fixture
def journal():
    return Journal(str)


def fill(journal, start, stop):
    for number in range(start, stop):
        journal.add(number)


def lines(*numbers):
    return "".join(f"{number}\n" for number in numbers).encode()


def test_a_journal_has_its_last_entries(journal):
    fill(journal, 0, KEPT_LINES + 5)
    assert journal.text() == lines(*range(5, KEPT_LINES + 5))
    assert journal.entries() == list(range(5, KEPT_LINES + 5))


def test_a_text_that_is_read_only_grows(journal):
    fill(journal, 0, KEPT_LINES)
    before = journal.text()
    journal.open()
    journal.add("new")
    assert journal.text() == before + lines("new")
    assert journal.read(100, len(before)) == lines("new")
    assert journal.read(100, len(before) + 4) == b""
    journal.amend("newer")
    assert journal.read(100, len(before)) == lines("new", "newer")
    assert journal.entries() == [*range(1, KEPT_LINES), "new"]


def test_the_last_close_brings_back_the_last_entries(journal):
    fill(journal, 0, KEPT_LINES)
    journal.open()
    journal.open()
    journal.add("new")
    journal.close()
    assert journal.text() == lines(*range(KEPT_LINES), "new")
    journal.close()
    assert journal.text() == lines(*range(1, KEPT_LINES), "new")


def test_a_text_that_is_read_is_bounded(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_MAX_BYTES", 2000)
    journal.open()
    fill(journal, 0, 5000)
    assert len(journal.text()) <= 2000
    assert journal.text().endswith(lines(*range(5000 - KEPT_LINES, 5000)))
