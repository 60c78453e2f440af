"""Tables: one model of rows and columns, shown on a console, written as csv, or shown on a page (`page.html.j2`).

Columns hold fractions and seconds as they are; how they are shown is the column's business. A new column is one
`Column` in the list of its table: `tables.RESULTS`, `attacks.ATTACKS` or `solve.SOLUTION`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mixadv.report.files import writing
from mixadv.results import Accuracy

NONE = "–"
Row = TypeVar("Row")


class Number(NamedTuple):
    """A number in a cell: in full precision, and as it is shown."""

    value: float
    text: str


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column of a table.

    Attributes:
        key: its name in csv files.
        heading: its name elsewhere.
        of: the value of a row: text, a number, an accuracy with its interval, a tuple of such values, or None.
        form: how numbers are shown, as for `format`; per cent come without their sign (it stands in the heading).
        views: where the column is shown; the table's module says which views there are.
        ends: whether csv files have columns key_low and key_high for the ends of an interval.
        words: whether it begins on the left. fold: None, or the least width to which a console may break its lines.
        style: of a row's cell on a console.
    """

    key: str
    heading: str
    of: Callable[[Row], Any]
    form: str | Callable[[Any], str] = ""
    views: str = ""
    ends: bool = False
    words: bool = False
    fold: int | None = None
    style: Callable[[Row], str] | None = None

    def cell(self, row: Row) -> list[str | Number]:
        """What is shown of a row, in pieces."""
        return _pieces(self.of(row), self.form)


def _pieces(value: Any, form: str | Callable[[Any], str]) -> list[str | Number]:
    if value is None:
        return [NONE]
    if isinstance(value, str):
        return [value]
    if isinstance(value, Accuracy):
        ends = value.ends
        between = [] if ends is None else [" [", *_pieces(ends[0], form), ", ", *_pieces(ends[1], form), "]"]
        return [*_pieces(value.value, form), *between]
    if isinstance(value, tuple):
        return [piece for part in value for piece in (" ", *_pieces(part, form))][1:] or [NONE]
    return [Number(value, form(value) if callable(form) else format(value, form).removesuffix("%"))]


def text_of(value: Any, form: str | Callable[[Any], str] = ".1%") -> str:
    """A value as a cell shows it; by default in per cent, with one decimal."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in _pieces(value, form))


@dataclass(frozen=True)
class Table(Generic[Row]):
    """A table that can be shown anywhere.

    bold: rows that stand out. sections: rows after which a line is drawn.
    """

    title: str
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    caption: str = ""
    bold: Collection[int] = ()
    sections: Collection[int] = ()

    def cells(self) -> list[list[list[str | Number]]]:
        """Rows of cells, each in pieces."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]


def seen(columns: Iterable[Column[Row]], view: str) -> list[Column[Row]]:
    """The columns of a view, in their order."""
    return [column for column in columns if view in column.views.split()]


def without_ends(column: Column[Row]) -> Column[Row]:
    """A column of accuracies without their intervals."""
    return replace(column, of=lambda row: column.of(row).value)


def plain(value: Any, form: str = "") -> str:
    """A value in the form of `format`; a dash for None."""
    return text_of(value, form)


# --- on a console ------------------------------------------------------------------------------------------


def on_console(table: Table[Row], **look: Any) -> RichTable:
    """The table for a console; `look` are further arguments of rich's table."""
    made = new_table(
        table.title,
        [column.heading for column in table.columns],
        words=[column.heading for column in table.columns if column.words],
        folds={column.heading: column.fold for column in table.columns if column.fold is not None},
        caption=table.caption,
        **look,
    )
    for i, row in enumerate(table.rows):
        styles = (column.style(row) if column.style else "" for column in table.columns)
        words = (text_of(column.of(row), column.form) for column in table.columns)
        cells = [Text(text, style=style) for text, style in zip(words, styles, strict=True)]
        add_row(made, cells, style="bold" if i in table.bold else "")
        if i in table.sections:
            made.add_section()
    return made


def new_table(
    title: str,
    headings: Sequence[str],
    *,
    words: Collection[str] = (),
    folds: Mapping[str, int] | None = None,
    caption: str = "",
    **look: Any,
) -> RichTable:
    """An empty table; nothing in its title and caption is markup.

    words: headings of columns of words, which begin on the left.
    folds: headings of columns that may be broken into lines, each with its least width.
    look: further arguments of rich's table.
    """
    table = RichTable(title=Text(title), caption=Text(caption), title_justify="left", caption_justify="left", **look)
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


def add_row(table: RichTable, cells: Iterable[str | Text], style: str = "") -> None:
    """Add a row, in which nothing is markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def print_whole(table: RichTable, console: Console) -> None:
    """Print a table; on a console that is too narrow for it, too wide rather than with columns lost."""
    needed = console.measure(table, options=console.options.update(width=10_000)).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


# --- in a file ---------------------------------------------------------------------------------------------


def write_csv(path: str | Path, table: Table[Row]) -> Path:
    """Write a table as csv in full precision, whole or not at all; what is not known is empty.

    Raises:
        UserError: `path` cannot be written.
    """
    path = Path(path)
    header = [key for column in table.columns for key in _keys(column)]
    with writing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in table.rows:
            writer.writerow(_harmless(value) for column in table.columns for value in _values(column, row))
    return path


def _keys(column: Column[Row]) -> tuple[str, ...]:
    return (column.key, f"{column.key}_low", f"{column.key}_high") if column.ends else (column.key,)


def _values(column: Column[Row], row: Row) -> tuple[Any, ...]:
    value = column.of(row)
    return tuple(value) if column.ends else (value,)


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value
