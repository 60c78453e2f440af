"""The file metrics.csv: its one writer and its one reader."""

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
    """The columns with which metrics.csv begins; others follow when somebody logs them.

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
    """Reads the complete rows of a metrics.csv, each once, while somebody else writes it.

    A last line without its line end is not complete: its writer is not done, or was killed.
    If the file is replaced (a new column, dropped rows), as many rows as were read before are passed over.

    Args:
        path: the file; it need not exist yet.

    Attributes:
        count: rows read so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._mark: tuple[int, bytes] | None = None  # of the file whose rows up to `_position` are read
        self._position = self._index = 0

    def new(self) -> list[dict[str, str]]:
        """The rows that were added since the last call: column -> text, empty where the row has no value.

        Raises:
            ValueError: a complete line that does not fit the header; the message has its number.
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
        seen_before = max(0, self.count - self._index)
        self._position += len(added)
        self._index += len(rows)
        self.count = max(self.count, self._index)
        return rows[seen_before:]


def _rows(text: str, before: int) -> list[dict[str, str]]:
    """The rows of a header and the lines below it, in front of which the file has `before` others."""
    lines = csv.reader(io.StringIO(text, newline=""))
    columns = next(lines, [])
    rows = []
    for number, cells in enumerate(filter(None, lines), before + 2):
        if len(cells) != len(columns):
            raise ValueError(f"line {number} has {len(cells)} cells, its header {len(columns)}")
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """All complete rows of a metrics.csv: column -> text; none where there is no file.

    A last line that a crash has torn is left out, whatever it holds: half a number still reads as a number.

    Raises:
        ValueError: a complete line that does not fit the header; the message has its number.
    """
    return RowReader(path).new()


def read_columns(path: Path) -> "dict[str, np.ndarray]":
    """The columns of a metrics.csv, [rows] float64, nan for empty cells; raises as `read_rows` does, also for text."""
    import numpy as np  # the logger of a training starts without it

    rows = read_rows(path)
    if not rows:
        return {}
    try:
        values = [[float(cell) if cell.strip() else math.nan for cell in row.values()] for row in rows]
    except ValueError as error:
        raise ValueError(f"a cell is no number: {error}") from None
    table = np.array(values, dtype=np.float64)
    return {name: table[:, i] for i, name in enumerate(rows[0])}


def as_numbers(row: Mapping[str, str]) -> dict[str, float]:
    """The cells of a row that hold a value, as int or float.

    Raises:
        ValueError: a cell is not a number.
    """
    return {name: int(cell) if cell.isdecimal() else float(cell) for name, cell in row.items() if cell}


class MetricsFile:
    """A table to which rows are appended; new columns may come.

    An existing file keeps its complete rows and its columns. Nothing is written before the first row.

    Args:
        path: the file.
        columns: the first columns, in their order; others follow in the order in which they come.
    """

    def __init__(self, path: Path, columns: Sequence[str] = standard_columns()) -> None:
        self.path = path
        self.columns = list(columns)
        self._is_ready = False

    def rows(self) -> list[dict[str, str]]:
        """All complete rows, as text."""
        return read_rows(self.path)

    def truncate(self, step: int, *, validated: bool = True) -> list[dict[str, str]]:
        """Drop the rows of what happened after batch `step`: a resumed run makes them again.

        Args:
            step: number of the last batch done; 0 keeps nothing, for the training writes its first row again.
            validated: False where the validation after that batch, if any, is still to come: its row goes too, and
                what follows it. Rows of callbacks at `step`, which have no ``member_updates``, belong to the next
                batch: Lightning counts a batch when it is done.

        Returns:
            The rows that stay.
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
        """Add one row; columns without a value stay empty. A new column rewrites the file once."""
        is_known = set(row) <= set(self.columns)
        if not self._is_ready or not is_known:
            self._write(self.rows(), row)
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _write(self, rows: list[dict[str, str]], *more: Mapping[str, Any]) -> None:
        """Write the whole file beside the old one, then put it in its place."""
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in (*rows, *more) for name in row)]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
            writer.writerows(more)
        self._is_ready = True
