"""Reading the files of a run, and nothing that depends on how they are shown.

A report must never fail because one run of a sweep was killed or damaged, and must never hide that it was:
what cannot be read becomes a line in `Run.notes`, which every view prints.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixadv.errors import UserError
from mixadv.files import replacing
from mixadv.redaction import printable
from mixadv.report.names import all_printable, group_name, natural_key, number
from mixadv.runs.locks import LOCK, holder
from mixadv.shipped import refuse_aliases

BASELINE = "baseline"
_MARKERS = ("results.json", "metrics.csv", "DONE", "FAILED", LOCK)


class Interval(NamedTuple):
    """A fraction in [0, 1] with the ends of its 95 % interval; None for what the files do not say."""

    value: float | None
    low: float | None = None
    high: float | None = None


def stored_interval(entry: Any, key: str) -> Interval:
    """`entry[key]` and `entry["ci95"]` of the results, as far as they are there and numbers."""
    if not isinstance(entry, dict):
        return Interval(None)
    ends = entry.get("ci95")
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return Interval(number(entry.get(key)), number(low), number(high))


@dataclass(frozen=True, eq=False)
class Run:
    """What one run directory says.

    Attributes:
        path: the directory.
        state: "done", "running" (a process works on it), "failed" or "unfinished".
        reason: why it failed (the text of `FAILED`), or the process that works on it, else "".
        results: `results.json`, None while there is none.
        history: the columns of `metrics.csv`, each [rows] float64, nan where a row has no value.
        baseline: the run in `baseline/`, if there is one.
        config: the resolved configuration (from `results.json`, before that from `config.yaml`).
        notes: files that were there and could not be read, one line each.
    """

    path: Path
    state: str
    reason: str = ""
    results: dict[str, Any] | None = None
    history: dict[str, np.ndarray] = field(default_factory=dict)
    baseline: Run | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def get(self, *keys: str) -> Any:
        """`results[keys[0]][keys[1]]...`, or None where the files say nothing."""
        value: Any = self.results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def interval(self, measure: str) -> Interval:
        """The expected accuracy and 95 % interval of `measure`, "clean" or "robust"."""
        return stored_interval(self.get(measure), "expected_accuracy")

    @property
    def clean(self) -> Interval:
        return self.interval("clean")

    @property
    def robust(self) -> Interval:
        """Mean over examples of the worst case over attacks of the exact expected accuracy."""
        return self.interval("robust")

    @property
    def members(self) -> list[dict[str, Any]]:
        members = self.get("members")
        return [m for m in members if isinstance(m, dict)] if isinstance(members, list) else []

    @property
    def attacks(self) -> dict[str, Any]:
        """Name of each attack of the evaluation -> its entry (expected_accuracy, settings, seconds)."""
        attacks = self.get("attacks")
        return attacks if isinstance(attacks, dict) else {}

    @property
    def weights(self) -> list[float]:
        weights = self.get("weights")
        numbers = [number(w) for w in weights] if isinstance(weights, list) else []
        return [w for w in numbers if w is not None] if None not in numbers else []

    @property
    def num_members(self) -> int | None:
        return _whole(self.get("L"), self.config.get("L"))

    @property
    def num_examples(self) -> int | None:
        return _whole(self.get("num_examples"), self.get("data", "num_test"))

    @property
    def eps(self) -> float | None:
        """Radius of the ball, in units of the input."""
        return _first_number(self.get("threat_model", "eps"), self.config.get("eps"))

    @property
    def norm(self) -> str:
        value = self.get("threat_model", "norm")
        nested = self.config.get("threat_model")
        if value is None and isinstance(nested, dict):
            value = nested.get("norm")
        return str(value or "")

    @property
    def seed(self) -> int | None:
        return _whole(self.get("seed"), self.config.get("seed"))

    @property
    def was_only_measured(self) -> bool:
        """Whether the configuration is that of a measurement, and says nothing of how the members were trained."""
        return (self.get("task") or self.config.get("task")) in ("evaluate", "solve")

    @property
    def loss(self) -> str:
        return "" if self.was_only_measured else group_name(self.config.get("loss"))

    @property
    def solver(self) -> str:
        """What gave the weights; "" where that was another run."""
        evaluated = (self.get("task") or self.config.get("task")) == "evaluate"
        return "" if evaluated else group_name(self.config.get("lambda_solver"))

    @property
    def data(self) -> str:
        return str(self.get("data", "name") or group_name(self.config.get("data")))

    @property
    def training_seconds(self) -> float | None:
        """Wall seconds of the training, validation included, of all the processes that continued it together."""
        return _first_number(self.last("seconds"), self.get("seconds", "train"))

    def last(self, name: str) -> float | None:
        """The last value of a column of the history, None where it has none."""
        values = self.history.get(name, np.array([]))
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    @property
    def images(self) -> str:
        """On how many test images, and of how many, it was measured; "" where the files do not say."""
        whole = number(self.get("data", "num_test"))
        if self.num_examples is None:
            return ""
        of = f" of {whole:,.0f}" if whole is not None and whole > self.num_examples else ""
        return f"{self.num_examples:,}{of} test images"

    @property
    def has_history(self) -> bool:
        return any(len(column) for column in self.history.values())


def _first_number(*values: Any) -> float | None:
    """The first of the values that is a number."""
    return next((known for value in values if (known := number(value)) is not None), None)


def _whole(*values: Any) -> int | None:
    value = _first_number(*values)
    return None if value is None else int(value)


def read_history(path: Path) -> dict[str, np.ndarray]:
    """Columns of a `metrics.csv` [rows] float64, nan for empty cells.

    A last line without its line end is the mark of a killed writer and is ignored, whatever it holds: a
    number cut in the middle still reads as a number.

    Raises:
        ValueError: a complete line that does not fit the header; the message names its number.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if not lines:
        return {}
    rows = csv.reader(lines)
    header = next(rows)
    values = []
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} cells, its header {len(header)}")
        try:
            values.append([float(cell) if cell.strip() else math.nan for cell in row])
        except ValueError as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None
    table = np.array(values, dtype=np.float64).reshape(len(values), len(header))
    return {name: table[:, i] for i, name in enumerate(header)}


def read_run(path: str | Path) -> Run:
    """Read a run directory in whatever state it is.

    `DONE` without a readable `results.json` counts as failed. Damage elsewhere is listed in `notes`.

    Raises:
        UserError: `path` is not a directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give the directory of a run")
    notes: list[str] = []
    results, config, history = None, {}, {}
    with _noting(path / "results.json", notes):
        results = all_printable(json.loads((path / "results.json").read_text(encoding="utf-8")))
        if not isinstance(results, dict):
            results = None
            raise ValueError("not a JSON object")
    if results is not None and isinstance(results.get("config"), dict):
        config = results["config"]
    else:
        with _noting(path / "config.yaml", notes):
            config = all_printable(_read_yaml(path / "config.yaml"))
    with _noting(path / "metrics.csv", notes):
        history = read_history(path / "metrics.csv")

    state, reason = "unfinished", ""
    if (path / "DONE").exists():
        state = "done" if results is not None else "failed"
        reason = "" if results is not None else "marked DONE, but results.json is missing or damaged"
    elif (who := holder(path)) is not None:
        state, reason = "running", who
    elif (path / "FAILED").exists():
        state = "failed"
        with _noting(path / "FAILED", notes):
            reason = printable(" ".join((path / "FAILED").read_text(encoding="utf-8", errors="replace").split()))
        reason = reason or "no reason given"
    below = path / BASELINE
    baseline = read_run(below) if is_run(below) else None
    return Run(path, state, reason, results, history, baseline, config, tuple(notes))


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory; a folder of Hydra's own configuration is not one."""
    if any((path / name).is_file() for name in _MARKERS):
        return True
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^defaults:", text, flags=re.MULTILINE) is None


def find_runs(root: str | Path) -> list[Run]:
    """Every run in `root` and below, in natural order of path. A run's own folders, its baseline among them,
    and hidden folders are not searched.

    Raises:
        UserError: `root` is not a directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; give the directory of a run or of a sweep (runs=DIR)")
    found = []
    for folder, below, _ in os.walk(root):
        if is_run(Path(folder)):
            found.append(Path(folder))
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    return [read_run(path) for path in sorted(found, key=natural_key)]


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`mixadv.files.replacing` for a figure or a table.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _noting(path: Path, notes: list[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        notes.append(printable(f"{path} cannot be read: {' '.join(str(error).split())}"))


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        refuse_aliases(path)
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(str(error)) from error
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
