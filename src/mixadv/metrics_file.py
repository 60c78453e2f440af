"""The file metrics.csv: its writer and its readers."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixadv.files import replacing

if TYPE_CHECKING:
    import numpy as np

FILE = "metrics.csv"


def standard_columns(num_members: int = 0) -> tuple[str, ...]:
    """The first columns of metrics.csv; columns of other callbacks and loggers follow.

    Args:
        num_members: L, for the columns ``lambda/0`` to ``lambda/L-1``.
    """
    return (
        "epoch",
        "step",
        "member_updates",
        "seconds",
        "train/loss",
        "train/adversarial_accuracy",
        "train/lr",
        "val/clean_accuracy",
        "val/robust_accuracy",
        "val/ensemble_accuracy",
        "weights/value",
        "weights/lower_bound",
        *(f"lambda/{k}" for k in range(num_members)),
    )


class RowReader:
    """Reads each complete row of a metrics.csv once, also while another object appends rows.

    A last line without a line end is incomplete: it is still being written, or its writer was killed. If the file is
    replaced (new columns, dropped rows), the reader skips as many rows as it has read before.

    Args:
        path: the file; it need not exist yet.

    Attributes:
        count: rows read so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._mark: tuple[int, bytes] | None = None  # inode and header of the file that `_position` refers to
        self._position = self._index = 0

    def new(self) -> list[dict[str, str]]:
        """The rows added since the last call: column -> text, empty without a value.

        Raises:
            ValueError: a complete line has another number of cells than the header.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            state, header = os.fstat(file.fileno()), file.readline()
            if (state.st_ino, header) != self._mark or state.st_size < self._position:
                self._mark, self._position, self._index = (state.st_ino, header), len(header), 0
            file.seek(self._position)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        rows = _rows((header + added).decode(), self._index)
        num_old = max(0, self.count - self._index)
        self._position += len(added)
        self._index += len(rows)
        self.count = max(self.count, self._index)
        return rows[num_old:]


def _rows(text: str, before: int) -> list[dict[str, str]]:
    """The rows in a header and the lines below it; the file has `before` other rows between them."""
    lines = csv.reader(io.StringIO(text, newline=""))
    columns = next(lines, [])
    rows = []
    for number, cells in enumerate(filter(None, lines), before + 2):
        if len(cells) != len(columns):
            raise ValueError(f"line {number} has {len(cells)} cells, its header {len(columns)}")
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """All complete rows of a metrics.csv, column -> text; [] if the file does not exist.

    A last line without a line end is left out, because half a number may look like a number.

    Raises:
        ValueError: a complete line has another number of cells than the header.
    """
    return RowReader(path).new()


def read_columns(path: Path) -> "dict[str, np.ndarray]":
    """Column -> values [rows] float64, nan for empty cells; raises as `read_rows` does, and ValueError for text."""
    import numpy as np  # imported here because the loggers do not need it

    rows = read_rows(path)
    if not rows:
        return {}
    try:
        values = [[float(cell) if cell.strip() else math.nan for cell in row.values()] for row in rows]
    except ValueError as error:
        raise ValueError(f"a cell is not a number: {error}") from None
    table = np.array(values, dtype=np.float64)
    return {name: table[:, i] for i, name in enumerate(rows[0])}


def as_numbers(row: Mapping[str, str]) -> dict[str, float]:
    """The cells of a row that are not empty, as int or float.

    Raises:
        ValueError: a cell is not a number.
    """
    return {name: int(cell) if cell.isdecimal() else float(cell) for name, cell in row.items() if cell}


class MetricsFile:
    """A csv file to which rows are appended; rows may have new columns.

    An existing file keeps its complete rows and its columns. Nothing is written before the first row.

    Args:
        path: the file.
        columns: the first columns; others follow in the order of their first row.
    """

    def __init__(self, path: Path, columns: Sequence[str] = standard_columns()) -> None:
        self.path = path
        self.columns = list(columns)
        self._is_ready = False

    def rows(self) -> list[dict[str, str]]:
        """All complete rows, as text."""
        return read_rows(self.path)

    def truncate(self, step: int, *, validated: bool = True) -> list[dict[str, str]]:
        """Drop the rows after batch `step`, because a resumed run writes them again.

        Rows of callbacks at `step`, which have no ``member_updates``, are dropped too: they belong to the next batch,
        because Lightning increments its counter at the end of a batch.

        Args:
            step: number of finished batches; 0 drops all rows, because the training writes its first row again.
            validated: False if the validation after that batch will be repeated: its row and the rows after it are
                dropped.

        Returns:
            The remaining rows.
        """
        kept, is_over = [], False
        for row in self.rows():
            own = int(row["step"])
            if own == step and not validated:
                is_over |= any(name.startswith("val/") and cell for name, cell in row.items())
            of_callback = row.get("member_updates") == ""
            if own < step or (own == step > 0 and not is_over and not of_callback):
                kept.append(row)
        self._write(kept)
        return kept

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row; a row with a new column rewrites the file."""
        is_known = set(row) <= set(self.columns)
        if not self._is_ready or not is_known:
            self._write(self.rows(), row)
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _write(self, rows: list[dict[str, str]], *more: Mapping[str, Any]) -> None:
        """Replace the file atomically."""
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in (*rows, *more) for name in row)]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
            writer.writerows(more)
        self._is_ready = True
