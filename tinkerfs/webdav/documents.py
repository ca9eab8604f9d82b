"""JSON and text of the tree, as tables for a page (pure)."""

import json
from typing import Any, NamedTuple

from tinkerfs.formatting import format_size

#: Maximum number of rows; a page with more is slow to show.
_MAX_ROWS = 20_000


class Document(NamedTuple):
    """The content of a file on a page: a table with or without a header, or text.

    Attributes:
        title: the name of the file.
        href: of the file itself.
        header: names of the columns; empty for a table of names and values.
        rows: the cells.
        text: shown as it is.
    """

    title: str
    href: str
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] | None = None
    text: str = ""


def json_documents(title: str, href: str, data: bytes) -> list[Document]:
    """Return the tables of a JSON file: its values, and one for each member with many objects."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    tables = {title: value} if _is_table(value) else _tables(value)
    rows: list[tuple[str, ...]] = []
    if isinstance(value, dict) and title not in tables:
        rows = [(name, _cell(name, each)) for name, each in value.items() if name not in tables]
    if not tables and not rows:
        return [text_document(title, href, data)]
    values = [Document(title, href, rows=rows)] if rows else []
    return values + [_table(name, href, table) for name, table in tables.items()]


def text_document(title: str, href: str, data: bytes) -> Document:
    """Return the text of a file."""
    return Document(title, href, text=data.decode("utf-8", "replace"))


def _is_table(value: Any) -> bool:
    """Return whether a value consists of more than one object."""
    members = list(value.values()) if isinstance(value, dict) else value
    return (
        isinstance(members, list)
        and len(members) > 1
        and all(isinstance(member, dict) for member in members)
    )


def _tables(value: Any) -> dict[str, Any]:
    members = value.items() if isinstance(value, dict) else ()
    return {name: member for name, member in members if _is_table(member)}


def _table(title: str, href: str, value: Any) -> Document:
    if len(value) > _MAX_ROWS:
        return Document(title, href, text=f"{len(value)} entries, too many for a page")
    members = value if isinstance(value, dict) else dict(enumerate(value, 1))
    keys = list(dict.fromkeys(key for member in members.values() for key in member))
    rows = [
        (str(name), *(_cell(key, member.get(key, "")) for key in keys))
        for name, member in members.items()
    ]
    return Document(title, href, ("name", *keys), rows)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and name.endswith("bytes"):
        return f"{value:,} ({format_size(value)})"
    if isinstance(value, dict | list) and len(json.dumps(value)) > 100:
        return json.dumps(value, indent=2, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)
