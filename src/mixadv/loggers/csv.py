"""metrics.csv as a logger of Lightning's Trainer."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning.loggers as pl_loggers
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from mixadv.metrics_file import FILE, MetricsFile, standard_columns


class CSVLogger(pl_loggers.CSVLogger):
    """Writes ``save_dir/metrics.csv``: each call of `log_metrics` appends one row.

    Lightning's own logger overwrites the file in every session; this one appends to it, so that a resumed run has one
    history. There are no folders for names and versions. Column ``step`` is the Trainer's step, and column ``seconds``
    is the wall time of the training over all sessions. Only rank 0 writes.

    Args:
        save_dir: the run directory.
        columns: the first columns in order; a new metric adds a column at the end.
    """

    def __init__(self, save_dir: str | Path, columns: Sequence[str] = standard_columns()) -> None:
        super().__init__(save_dir, name=None, version="")
        self.file = MetricsFile(Path(save_dir) / FILE, columns)
        self._started = time.monotonic()
        self._before: float | None = None  # seconds of earlier sessions; None: not read yet
        self._awaits_validation = False  # whether the session begins with the validation of the last batch
        self._of_mixtures = False  # whether a `MixtureTraining` logs the rows

    @property
    def log_dir(self) -> str:
        """The run directory itself."""
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file in rank 0, a dummy in other ranks."""
        return self.file

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: name -> number.
            step: value of the column ``step``; by default the number of earlier rows.
        """
        if self._awaits_validation and "member_updates" not in metrics:
            # A callback logs at the empty batch that starts this validation; an uninterrupted run has no such row.
            return
        self._awaits_validation = False
        self._of_mixtures |= "member_updates" in metrics
        if self._of_mixtures and "member_updates" not in metrics:
            # Lightning adds its own epoch to the metrics of callbacks, but this column counts epochs per model.
            metrics = {name: value for name, value in metrics.items() if name != "epoch"}
        if self._before is None:
            self._before = _seconds(self.file.rows())
        row = {
            "step": len(self.file.rows()) if step is None else step,
            "seconds": self._before + time.monotonic() - self._started,
            **{name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()},
        }
        self.file.append({name: f"{v:.8g}" if isinstance(v, float) else v for name, v in row.items()})

    def truncate(self, step: int, *, validated: bool = True) -> int:
        """Begin a session after batch `step`: drop later rows, which the session writes again, and resume the clock.

        Args:
            step: number of the last finished batch, 0 for a new run.
            validated: False if the validation after that batch has not finished.

        Returns:
            The number of rows that stay; 0 in ranks other than 0.
        """
        return rank_zero_only(self._truncate, default=0)(step, validated)

    def _truncate(self, step: int, validated: bool) -> int:
        kept = self.file.truncate(step, validated=validated)
        self._awaits_validation = not validated
        self._of_mixtures = any(row.get("member_updates") for row in kept)
        self._before, self._started = _seconds(kept), time.monotonic()
        return len(kept)

    @rank_zero_only
    def save(self) -> None:
        """Write nothing: rows are written as they come."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write nothing: rows are written as they come."""


def _seconds(rows: list[dict[str, str]]) -> float:
    """Column ``seconds`` of the last row; 0 without rows."""
    return float(rows[-1].get("seconds") or 0) if rows else 0.0
