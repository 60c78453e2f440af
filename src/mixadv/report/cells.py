"""What all tables are made of: the cells that people read, the frame on a console, and csv files."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixadv.report.files import Interval, writing

NONE = "–"


def percent(value: float | None) -> str:
    """An accuracy in per cent, with one decimal."""
    return NONE if value is None else f"{100 * value:.1f}"


def percent_with(at: Interval) -> str:
    """An accuracy in per cent and, where they are known, the ends of its interval."""
    ends = "" if at.low is None or at.high is None else f" [{percent(at.low)}, {percent(at.high)}]"
    return percent(at.value) + ends


def plain(value: Any, digits: str = "") -> str:
    """Anything else, a number with `digits` as in a format."""
    return NONE if value is None else format(value, digits)


def new_table(
    title: str,
    headings: Sequence[str],
    *,
    words: Collection[str] = (),
    folds: Mapping[str, int] | None = None,
    caption: str = "",
    **look: Any,
) -> Table:
    """An empty table; nothing in its title and caption is markup.

    words: headings of columns of words, which begin on the left.
    folds: headings of columns that may be broken into lines, each with its least width.
    look: further arguments of rich's table.
    """
    table = Table(title=Text(title), caption=Text(caption), title_justify="left", caption_justify="left", **look)
    folds = folds or {}
    for heading in headings:
        table.add_column(
            heading,
            justify="left" if heading in words else "right",
            overflow="fold",
            no_wrap=heading not in folds,
            min_width=folds.get(heading),
        )
    return table


def add_row(table: Table, cells: Iterable[str | Text], style: str = "") -> None:
    """Add a row, in which nothing is markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def print_whole(table: Table, console: Console) -> None:
    """Print a table; on a console that is too narrow for it, too wide rather than with columns lost."""
    needed = console.measure(table, options=console.options.update(width=10_000)).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a csv file, whole or not at all; what a row does not say is empty.

    Raises:
        UserError: `path` cannot be written.
    """
    path = Path(path)
    with writing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return path


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value
