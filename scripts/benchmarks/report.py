"""Format result rows as Markdown tables, and insert them into a page."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin of the bench's tables -->", "<!-- end of the bench's tables -->"
Row = dict[str, Any]


def write_into(page: Path, rows: list[Row]) -> None:
    """Replace the part of the page between the lines BEGIN and END."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{figures(rows)}\n\n{parts(rows)}\n\n{END}{after}")


def figures(rows: list[Row]) -> str:
    """Return a table with a row per measurement and a column per binding."""
    bindings = bindings_of(rows)
    lines = [f"| work | goal | {' | '.join(bindings)} |", "|---|---|" + "---|" * len(bindings)]
    for what, same in by_what(rows).items():
        goals = dict.fromkeys(goal for row in same if (goal := goal_of(row)))
        cells = [
            next((cell(row) for row in same if row["binding"] in (b, None)), "") for b in bindings
        ]
        lines.append(f"| {what} | {', '.join(goals)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(rows: list[Row]) -> str:
    """Return a table of the details of the figures that have details."""
    lines = ["| work | binding | made from |", "|---|---|---|"]
    for what, same in by_what(rows).items():
        for row in same:
            if "details" in row:
                found = ", ".join(
                    f"{name} {number(value)}" for name, value in row["details"].items()
                )
                lines.append(f"| {what} | {row['binding'] or ''} | {found} |")
    return "\n".join(lines)


def by_what(rows: list[Row]) -> dict[str, list[Row]]:
    """Group rows by label; a label that starts with "..." continues the previous."""
    found: dict[str, list[Row]] = {}
    subject = ""
    for row in rows:
        what = row["what"]
        if what.startswith("... "):
            what = f"{subject}: {what[4:]}"
        else:
            subject = what
        found.setdefault(what, []).append(row)
    return found


def bindings_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["binding"] for row in rows if row["binding"]))


def goal_of(row: Row) -> str:
    maximum = row.get("goal", row["bound"])
    return "" if maximum is None else f"{number(maximum)} {row['unit']}".strip()


def cell(row: Row) -> str:
    """Format a figure; it is bold if it misses its goal or bound."""
    text = f"{number(row['figure'])} {row['unit']}".strip()
    return text if row["ok"] and row.get("met", True) else f"**{text}**"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
