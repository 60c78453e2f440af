"""Reading the files of a run. Nothing here depends on how they are shown.

A killed or damaged run must not make the report of a sweep fail, and the damage must not be hidden: each unreadable
file becomes a line in `Run.notes`, which every view prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixadv import results
from mixadv.errors import UserError
from mixadv.files import read_arrays, replacing
from mixadv.metrics_file import FILE as METRICS
from mixadv.metrics_file import read_columns
from mixadv.records import RECORDS
from mixadv.redaction import all_printable, printable
from mixadv.report.names import group_name, natural_key, number
from mixadv.results import Accuracy, Results
from mixadv.runs.directory import read_config
from mixadv.runs.locks import LOCK, holder

BASELINE = "baseline"
_MARKERS = (results.FILE, METRICS, "DONE", "FAILED", LOCK)


@dataclass(frozen=True, eq=False)
class Run:
    """The content of a run directory. Each file is read once: pass the `Run` on, not its path.

    Attributes:
        path: the directory.
        state: "done", "running" (a process holds its lock), "failed" or "unfinished".
        reason: of a failed run, the text of `FAILED`; of a running one, its process; else "".
        results: the content of `results.json`; all unknown without a readable file.
        has_results: whether `results.json` exists and can be read.
        history: the columns of `metrics.csv`, each [rows] float64, nan for empty cells.
        baseline: the run in `baseline/`, or None.
        config: the resolved configuration, from `results.json`, else from `config.yaml`.
        notes: one line for each file or entry that cannot be read.
    """

    path: Path
    state: str
    reason: str = ""
    results: Results = field(default_factory=Results)
    has_results: bool = False
    history: dict[str, np.ndarray] = field(default_factory=dict)
    baseline: Run | None = None
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def _records(self) -> dict[str, np.ndarray] | ValueError | None:
        try:
            return read_arrays(self.path / RECORDS)
        except ValueError as error:
            return error

    @property
    def records(self) -> dict[str, np.ndarray]:
        """The arrays of `records.npz`, read at the first access.

        Raises:
            ValueError: the file is missing or cannot be read.
        """
        found = self._records
        if found is None:
            raise ValueError(f"{self.path / RECORDS} is missing")
        if isinstance(found, ValueError):
            raise found
        return found

    @property
    def clean(self) -> Accuracy:
        return self.results.clean

    @property
    def robust(self) -> Accuracy:
        """Mean over examples of the worst case over attacks of the exact expected accuracy."""
        return self.results.robust

    @property
    def task(self) -> str:
        return str(self.results.task or self.config.get("task") or "")

    @property
    def num_members(self) -> int | None:
        return self.results.L if self.results.L is not None else _whole(self.config.get("L"))

    @property
    def num_examples(self) -> int | None:
        known = self.results.num_examples
        return self.results.data.num_test if known is None else known

    @property
    def eps(self) -> float | None:
        """Radius of the ball, in units of the input."""
        return number(self.config.get("eps")) if self.results.eps is None else self.results.eps

    @property
    def norm(self) -> str:
        nested = self.config.get("threat_model")
        return str(self.results.norm or (nested.get("norm") if isinstance(nested, dict) else None) or "")

    @property
    def seed(self) -> int | None:
        return self.results.seed if self.results.seed is not None else _whole(self.config.get("seed"))

    @property
    def was_only_measured(self) -> bool:
        """Whether the run trained nothing: its configuration does not describe how its members were trained."""
        return self.task in ("evaluate", "solve")

    @property
    def loss(self) -> str:
        return "" if self.was_only_measured else group_name(self.config.get("loss"))

    @property
    def solver(self) -> str:
        """The solver of the weights; "" if another run chose them."""
        return "" if self.task == "evaluate" else group_name(self.config.get("lambda_solver"))

    @property
    def data(self) -> str:
        return self.results.data.name or group_name(self.config.get("data"))

    @property
    def training_seconds(self) -> float | None:
        """Wall seconds of the whole training with validation, summed over all sessions of a resumed run."""
        known = self.last("seconds")
        return self.results.seconds.get("train") if known is None else known

    def last(self, name: str) -> float | None:
        """The last finite value of a column of the history; None if there is none."""
        values = self.history.get(name, np.array([]))
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    @property
    def images(self) -> str:
        """The number of measured test images, and of the whole test set if that is larger; "" if unknown."""
        whole = self.results.data.num_test
        if self.num_examples is None:
            return ""
        of = f" of {whole:,}" if whole is not None and whole > self.num_examples else ""
        return f"{self.num_examples:,}{of} test images"

    @property
    def has_history(self) -> bool:
        return any(len(column) for column in self.history.values())


def _whole(value: Any) -> int | None:
    known = number(value)
    return None if known is None else int(known)


def read_run(path: str | Path) -> Run:
    """Read a run directory, in any state.

    `DONE` without a readable `results.json` counts as failed. All other damage is listed in `notes`.

    Raises:
        UserError: `path` is not a directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give the directory of a run")
    notes: list[str] = []
    found: Results | None = None
    config, history = {}, {}
    with _noting(path / results.FILE, notes):
        found, damaged = results.read(path / results.FILE)
        notes += [f"{path / results.FILE}: {line}" for line in damaged]
    if found is not None and found.config:
        config = found.config
    else:
        with _noting(path / "config.yaml", notes):
            config = all_printable(read_config(path / "config.yaml"))
    with _noting(path / METRICS, notes):
        history = read_columns(path / METRICS)

    state, reason = "unfinished", ""
    if (path / "DONE").exists():
        state = "done" if found is not None else "failed"
        reason = "" if found is not None else "marked DONE, but results.json is missing or damaged"
    elif (process := holder(path)) is not None:
        state, reason = "running", process
    elif (path / "FAILED").exists():
        state = "failed"
        with _noting(path / "FAILED", notes):
            reason = printable(" ".join((path / "FAILED").read_text(encoding="utf-8", errors="replace").split()))
        reason = reason or "no reason given"
    below = path / BASELINE
    baseline = read_run(below) if is_run(below) else None
    has_results = found is not None
    return Run(path, state, reason, found or Results(), has_results, history, baseline, config, tuple(notes))


def opened(run: Run | str | Path) -> Run:
    """The run itself, or the run read from a directory; raises as `read_run` does."""
    return run if isinstance(run, Run) else read_run(run)


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory. A folder of configuration files for Hydra is not one."""
    if any((path / name).is_file() for name in _MARKERS):
        return True
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^defaults:", text, flags=re.MULTILINE) is None


def find_runs(root: str | Path) -> list[Run]:
    """All runs in `root` and below, in natural order of their paths.

    Hidden folders and the folders inside a run (such as its baseline) are not searched.

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
    """`mixadv.files.replacing`, but an `OSError` becomes a `UserError`."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _noting(path: Path, notes: list[str]) -> Iterator[None]:
    """Turn a failure to read `path` into a line of `notes`; a missing file is no failure."""
    try:
        yield
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        notes.append(printable(f"{path} cannot be read: {' '.join(str(error).split())}"))
