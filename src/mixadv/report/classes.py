"""The accuracies of a mixture on the images of each class, and one line for each image as csv."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixadv import records
from mixadv.report.cells import Column, Table, write_csv
from mixadv.report.files import Run
from mixadv.report.records import measured
from mixadv.results import Accuracy, ClassResult

IMAGES = "images.csv"
# Classes in a table on the console.
_SHOWN = 10

_COLUMNS: tuple[Column[ClassResult], ...] = (
    Column("class", "class", lambda row: row.name, words=True, fold=8),
    Column("num_examples", "images", lambda row: row.num_examples, ",d"),
    Column("clean", "clean % [95 %]", lambda row: Accuracy.of(row.clean, row.num_examples), ".1%"),
    Column("robust", "robust % [95 %]", lambda row: Accuracy.of(row.robust, row.num_examples), ".1%"),
)


def classes_table(run: Run, most: int | None = _SHOWN) -> Table[ClassResult]:
    """The expected accuracies on the images of each class; if there are more than `most`, the least robust of them."""
    rows = list(run.results.classes)
    title = "By class"
    if most is not None and len(rows) > most:
        title = f"The {most} least robust of {len(rows)} classes"
        rows = sorted(rows, key=lambda row: (row.robust is None, row.robust))[:most]
    return Table(title, _COLUMNS, rows)


def write_images(run: Run) -> Path:
    """Write `images.csv`, one line for each measured image, from `records.npz`; docs/files.md lists its columns.

    Raises:
        ValueError: the records are missing or damaged, or do not match the results.
        UserError: the directory cannot be written.
    """
    labels, arrays = measured(run).labels, run.records
    present, known = np.unique(labels), [row.name for row in run.results.classes]
    names = dict(zip(present.tolist(), known, strict=True)) if len(present) == len(known) else {}
    lists: dict[str, list[Any]] = {
        "image": _column(arrays, records.INDICES, labels),
        "label": labels.tolist(),
        "class": [names.get(label) for label in labels.tolist()],
    }
    for name in (records.CLEAN, records.ROBUST, records.FOUND_BY, records.TWIN_ROBUST, records.VOTE_ROBUST):
        lists[name] = _column(arrays, name, labels)
    for k, right in enumerate(arrays.get(records.MEMBERS_ROBUST, ())):
        lists[f"member_{k}_robust"] = right.tolist()
    lists |= {name: array.tolist() for name, array in arrays.items() if name.startswith(records.ATTACK)}
    if len({len(values) for values in lists.values()}) > 1:
        raise ValueError(f"{run.path / records.RECORDS} has arrays of different lengths")
    columns = [Column(name, name, partial(_entry, values)) for name, values in lists.items()]
    return write_csv(run.path / IMAGES, Table("", columns, range(len(labels))))


def _column(arrays: dict[str, np.ndarray], name: str, labels: np.ndarray) -> list[Any]:
    return arrays[name].tolist() if name in arrays else [None] * len(labels)


def _entry(values: list[Any], row: int) -> Any:
    return values[row]
