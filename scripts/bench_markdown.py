"""The rows of a bench as Markdown tables, put between two lines of a page."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin of the bench's tables -->", "<!-- end of the bench's tables -->"
Row = dict[str, Any]


def write_into(page: Path, rows: list[Row]) -> None:
    """Replace what stands between the two lines."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{figures(rows)}\n\n{parts(rows)}\n\n{END}{after}")


def figures(rows: list[Row]) -> str:
    """Return a row for each thing, with its goal and a column for each binding."""
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
    """Return what figures were made from, those that say so."""
    lines = ["| work | binding | made from |", "|---|---|---|"]
    for what, same in by_what(rows).items():
        for row in same:
            if "beside" in row:
                found = ", ".join(
                    f"{name} {number(value)}" for name, value in row["beside"].items()
                )
                lines.append(f"| {what} | {row['binding'] or ''} | {found} |")
    return "\n".join(lines)


def by_what(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows by what they are of; one that says "..." goes with the one before it."""
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
    most = row.get("goal", row["bound"])
    return "" if most is None else f"{number(most)} {row['unit']}".strip()


def cell(row: Row) -> str:
    """Return the figure; what misses its goal or bound is bold."""
    text = f"{number(row['figure'])} {row['unit']}".strip()
    return text if row["ok"] and row.get("met", True) else f"**{text}**"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
