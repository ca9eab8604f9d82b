"""Pages of directories for a browser, without scripts. They show values of the file system.

A listing sends the requests of the listing only. The page of a run, checkpoint or session also
shows its `info.json`, like `cat`.
"""

import base64
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

import jinja2
from markupsafe import Markup

from tinkerfs import errors
from tinkerfs.formatting import format_size
from tinkerfs.printable import escape_control_chars
from tinkerfs.vfs.followed_links import FollowedLinks
from tinkerfs.webdav.documents import Document, json_documents, text_document
from tinkerfs.webdav.paths import href
from tinkerfs.webdav.resources import DirectoryResource, FileResource

#: Maximum size of a JSON file that is shown as a table.
_MAX_DOCUMENT_BYTES: Final = 16 << 20

#: Maximum length of a query that is parsed.
_MAX_QUERY: Final = 1000

_INFO, _README = "info.json", "README.md"


class _Column(NamedTuple):
    """A column of a listing.

    Attributes:
        key: name in the query `?sort=`.
        kind: how its cells are shown.
        value: returns the value to sort by; None for an empty cell.
        text: returns the text of a value.
    """

    key: str
    label: str
    kind: str
    value: Callable[["_Member"], Any]
    text: Callable[[Any], str] = str


class _Member(NamedTuple):
    """A member of a directory, with what its page shows."""

    resource: DirectoryResource | FileResource
    facts: dict[str, str]
    size_bytes: int | None
    doc: str


def _fact(name: str, convert: Callable[[str], Any] = str) -> Callable[[_Member], Any]:
    def value(entry: _Member) -> Any:
        text = entry.facts.get(f"tinker.{name}")
        return None if text is None else convert(text)

    return value


def _size_bytes(entry: _Member) -> int | None:
    stored = entry.facts.get("tinker.size_bytes")
    return int(stored) if stored is not None else entry.size_bytes


def _time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _expiry_text(value: str) -> str:
    return value if value == "never" else value[:16].replace("T", " ")


_COLUMNS: Final = (
    _Column("name", "Name", "name", lambda e: e.resource.name, escape_control_chars),
    _Column("display_name", "Title", "text", _fact("display_name"), escape_control_chars),
    _Column("time", "Time (UTC)", "time", lambda e: e.resource.get_last_modified(), _time_text),
    _Column("model", "Base model", "text", _fact("base_model"), escape_control_chars),
    _Column("rank", "LoRA rank", "number", _fact("lora_rank", int)),
    _Column("size", "Size", "number", _size_bytes, format_size),
    _Column("expires", "Expires (UTC)", "time", _fact("expires_at"), _expiry_text),
    _Column(
        "public", "Public", "text", _fact("public", int), lambda value: "yes" if value else "no"
    ),
    _Column("path", "Tinker path", "copy", _fact("path"), escape_control_chars),
    _Column("doc", "Description", "text", lambda entry: entry.doc or None),
)


def has_page(resource: DirectoryResource | FileResource, environ: dict[str, Any]) -> bool:
    """Return whether a request is for a page: of a directory, or of a JSON file with `?view`."""
    if isinstance(resource, DirectoryResource):
        return True
    return resource.name.endswith(".json") and "view" in _query(environ)


def _query(environ: dict[str, Any]) -> dict[str, list[str]]:
    return parse_qs(environ.get("QUERY_STRING", "")[:_MAX_QUERY], keep_blank_values=True)


class Pages:
    """Renders pages. Thread-safe."""

    def __init__(self, links: FollowedLinks, *, is_read_only: bool) -> None:
        self._links = links
        self._is_read_only = is_read_only

    def render(self, resource: DirectoryResource | FileResource, environ: dict[str, Any]) -> bytes:
        """Return the page of a directory, or of a JSON file."""
        if isinstance(resource, DirectoryResource):
            page = self._directory(resource, _query(environ))
        else:
            page = {"documents": self._documents(resource)}
        template, style = _template()
        text = template.render(page={**_heading(resource), **page}, style=Markup(style))  # noqa: S704
        return text.encode("utf-8", "backslashreplace")

    def headers(self, page: bytes | None) -> list[tuple[str, str]]:
        """Return the headers of a page, which allow its style and nothing else; None for HEAD."""
        _, style = _template()
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'sha256-{digest}'; {_RESTRICTIONS}"
        length = [] if page is None else [("Content-Length", str(len(page)))]
        return [
            ("Content-Type", "text/html; charset=utf-8"),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", policy),
            *length,
        ]

    def _directory(
        self, directory: DirectoryResource, query: dict[str, list[str]]
    ) -> dict[str, Any]:
        entries = [self._entry(member) for member in directory.members()]
        facts = self._links.facts(directory.node, directory.ctx)
        columns = [c for c in _COLUMNS if any(c.value(e) is not None for e in entries)]
        has_facts = any(entry.facts for entry in entries)
        key = query.get("sort", ["time" if has_facts else ""])[0]
        is_reversed = query.get("order", ["desc" if has_facts and "sort" not in query else ""]) == [
            "desc"
        ]
        entries = _sorted(entries, key, is_reversed=is_reversed)
        count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
        files = {entry.resource.name: entry.resource for entry in entries}
        return {
            "summary": count + (", read-only" if self._is_read_only else ""),
            "tinker_path": escape_control_chars(facts.get("tinker.path", "")),
            "columns": [_header(c, key, is_reversed=is_reversed) for c in columns],
            "rows": [_row(entry, columns) for entry in entries],
            "documents": [
                document
                for name in (_INFO, _README)
                if isinstance(file := files.get(name), FileResource)
                for document in self._documents(file)
            ],
        }

    def _entry(self, member: DirectoryResource | FileResource) -> _Member:
        doc = self._links.doc(member.node, member.ctx)
        facts = self._links.facts(member.node, member.ctx)
        size_bytes = member.node.stored_bytes or None
        if isinstance(member, FileResource):
            try:
                size_bytes = self._links.validator(member.node, member.ctx).size_bytes
            except OSError:  # recorded in `.tinkerfs/errors`
                size_bytes = None
        return _Member(member, facts, size_bytes, doc)

    def _documents(self, file: FileResource) -> list[Document]:
        path = href(file.path, is_directory=False)
        try:
            data = self._read(file)
        except OSError as error:
            reason = f"{errors.errno_name(error)}: {errors.redact(error.strerror or '')}"
            return [Document(file.name, path, text=reason)]
        if data is None:
            return [Document(file.name, path, text="too large for a page")]
        if file.name.endswith(".json"):
            return json_documents(file.name, path, data)
        return [text_document(file.name, path, data)]

    def _read(self, file: FileResource) -> bytes | None:
        target = self._links.target(file.node, file.ctx)
        handle = self._links.filesystem.open(target, os.O_RDONLY, file.ctx)
        try:
            size_bytes = handle.size_bytes or 0
            if size_bytes > _MAX_DOCUMENT_BYTES:
                return None
            return handle.read(size_bytes, 0, file.ctx)
        finally:
            handle.close()


#: Restrictions of every response: neither framed, nor a base of links, nor a form.
_RESTRICTIONS: Final = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
#: The policy of files: their content is foreign, and runs nothing.
FILE_POLICY: Final = f"default-src 'none'; sandbox; {_RESTRICTIONS}"


@functools.cache
def _template() -> tuple[jinja2.Template, str]:
    loader = jinja2.PackageLoader("tinkerfs.webdav")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = loader.get_source(environment, "page.css")
    return environment.get_template("page.html"), style


def _heading(resource: DirectoryResource | FileResource) -> dict[str, Any]:
    names = [name for name in resource.path.split("/") if name]
    crumbs = [{"name": "tinkerfs", "href": "/"}]
    for index, name in enumerate(names[:-1], 1):
        path = "/" + "/".join(names[:index])
        crumbs.append({"name": escape_control_chars(name), "href": href(path, is_directory=True)})
    return {"title": escape_control_chars(names[-1]) if names else "tinkerfs", "crumbs": crumbs}


def _sorted(entries: list[_Member], key: str, *, is_reversed: bool) -> list[_Member]:
    column = next((column for column in _COLUMNS if column.key == key), None)
    if column is None:
        return entries
    filled = [entry for entry in entries if column.value(entry) is not None]
    empty = [entry for entry in entries if column.value(entry) is None]
    return [*sorted(filled, key=column.value, reverse=is_reversed), *empty]


def _header(column: _Column, key: str, *, is_reversed: bool) -> dict[str, Any]:
    is_current = column.key == key
    order = "&order=desc" if is_current and not is_reversed else ""
    return {
        "label": column.label,
        "arrow": (" ▾" if is_reversed else " ▴") if is_current else "",
        "href": f"?sort={column.key}{order}",
        "is_number": column.kind == "number",
    }


def _row(entry: _Member, columns: Iterable[_Column]) -> dict[str, Any]:
    resource = entry.resource
    is_table = isinstance(resource, FileResource) and resource.name.endswith(".json")
    cells = []
    for column in columns:
        value = column.value(entry)
        text = "" if value is None else column.text(value)
        if column.kind == "name" and resource.is_collection:
            text += "/"
        cells.append({"kind": column.kind, "text": text})
    return {"href": resource.get_href() + ("?view" if is_table else ""), "cells": cells}
