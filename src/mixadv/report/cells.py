"""Tables: one model of rows and columns for the console, csv files and the page (`page.html.j2`).

A column returns fractions and seconds; its `form` rounds them for display. To add a column, add one `Column` to
`tables.RESULTS`, `attacks.ATTACKS` or `solve.SOLUTION`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mixadv.report.files import writing
from mixadv.results import Accuracy

NONE = "–"
Row = TypeVar("Row")


class Number(NamedTuple):
    """A number in a cell: its value in full precision, and its rounded text."""

    value: float
    text: str


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column of a table.

    Attributes:
        key: the name in csv files.
        heading: the name on the console and the page.
        of: row -> value: text, a number, an accuracy with its interval, a tuple of such values, or None (unknown).
        form: format of the numbers, as for `format`, or a function; percent signs are dropped (the heading has one).
        views: names of the views that show the column, separated by spaces; each list of columns has its own views.
        ends: whether csv files get the columns key_low and key_high for the interval.
        words: whether the text is aligned to the left.
        fold: the least width to which a console may wrap the cells; None: they are not wrapped.
        style: row -> rich style of its cell on a console.
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
        """The cell of a row: pieces of text and numbers."""
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
    """A value as text, formatted as in a cell; by default a percentage with one decimal."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in _pieces(value, form))


@dataclass(frozen=True)
class Table(Generic[Row]):
    """A table, independent of where it is printed.

    Attributes:
        title, columns, rows, caption: its content.
        bold: indices of rows in bold.
        sections: indices of rows with a line below.
    """

    title: str
    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    caption: str = ""
    bold: Collection[int] = ()
    sections: Collection[int] = ()

    def cells(self) -> list[list[list[str | Number]]]:
        """The cells of every row, see `Column.cell`."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]


def of_view(columns: Iterable[Column[Row]], view: str) -> list[Column[Row]]:
    """The columns of a view, in their order."""
    return [column for column in columns if view in column.views.split()]


# --- on a console ------------------------------------------------------------------------------------------


def on_console(table: Table[Row], **look: Any) -> RichTable:
    """The table for a console; `look` holds further arguments of `rich.table.Table`."""
    made = new_table(
        table.title,
        [column.heading for column in table.columns],
        words=[column.heading for column in table.columns if column.words],
        folds={column.heading: column.fold for column in table.columns if column.fold is not None},
        caption=table.caption,
        **look,
    )
    for i, row in enumerate(table.rows):
        cells = [
            Text(text_of(column.of(row), column.form), style=column.style(row) if column.style else "")
            for column in table.columns
        ]
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
    """An empty rich table; its title and caption are plain text, not markup.

    Args:
        title, headings, caption: plain text.
        words: the headings of columns that are aligned to the left.
        folds: heading -> least width, for columns whose cells may be wrapped.
        look: further arguments of `rich.table.Table`.
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
    """Add a row; its cells are plain text, not markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def print_whole(table: RichTable, console: Console) -> None:
    """Print a table with all its columns, even if that is wider than the console.

    Columns that may be wrapped share what the others leave, each at least its `Column.fold`: rich would cut others.
    """
    wide = console.options.update(width=10_000)
    widest = [
        max(console.measure(cell, options=wide).maximum for cell in (column.header, *column.cells))
        for column in table.columns
    ]
    between = console.measure(table, options=wide).maximum - sum(
        max(width, column.min_width or 0) for width, column in zip(widest, table.columns, strict=True)
    )
    least = [
        width if column.no_wrap else min(width, column.min_width or 1)
        for width, column in zip(widest, table.columns, strict=True)
    ]
    if sum(widest) + between > console.width:
        for _ in range(console.width - between - sum(least)):
            # To the narrowest of the columns that are wrapped.
            i = min(range(len(least)), key=lambda i: (least[i] == widest[i], least[i]))
            least[i] += 1
        for column, width in zip(table.columns, least, strict=True):
            column.width, column.min_width = width, None
        table.width = between + sum(least)
    console.print(table, crop=False)


def print_narrow(table: Table[Row], console: Console) -> None:
    """Print a table of several runs without a frame, so that many columns fit into 80 characters.

    Title and caption are as wide as the console, not as the table.
    """
    bare = on_console(replace(table, title="", caption=""), box=SIMPLE_HEAD, show_edge=False, padding=(0, 0))
    bare.title = bare.caption = None
    console.print(Text(table.title, style="bold"))
    print_whole(bare, console)
    if table.caption:
        console.print(Text(table.caption, style="dim"))
    console.print()


# --- in a file ---------------------------------------------------------------------------------------------


def write_csv(path: str | Path, table: Table[Row]) -> Path:
    """Write a table as csv, atomically: numbers in full precision, unknown values as empty cells.

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
    """Quote text that a spreadsheet would run as a formula, by an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value
