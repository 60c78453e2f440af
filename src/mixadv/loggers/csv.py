"""metrics.csv as a logger of Lightning's Trainer."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning.loggers as pl_loggers
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from mixadv.loggers.metrics_file import FILE, MetricsFile, standard_columns


class CSVLogger(pl_loggers.CSVLogger):
    """Writes ``save_dir/metrics.csv``, one row at each call of `log_metrics`, at once.

    Lightning's own logger begins a file anew in every session. This one goes on with the file that is there, so that
    a resumed run has one history. There are no folders for names and versions. Column ``step`` is the step that the
    Trainer gives, column ``seconds`` the wall time of the training in all sessions. Only the first process writes.

    Args:
        save_dir: the run's directory.
        columns: the first columns, in their order; other metrics get columns behind them when they come.
    """

    def __init__(self, save_dir: str | Path, columns: Sequence[str] = standard_columns()) -> None:
        super().__init__(save_dir, name=None, version="")
        self.file = MetricsFile(Path(save_dir) / FILE, columns)
        self._started = time.monotonic()
        self._before: float | None = None  # seconds of earlier sessions; None: not looked up yet
        self._awaits_validation = False
        self._of_mixtures = False  # whether rows are those of a `MixtureTraining`

    @property
    def log_dir(self) -> str:
        """The run's directory itself."""
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The table in the first process, a dummy in the others."""
        return self.file

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: config.yaml holds the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: name -> number.
            step: for the column ``step``; by default the number of rows so far.
        """
        if self._awaits_validation and "member_updates" not in metrics:
            # Of a callback, at the batch without examples that brings about the validation.
            return
        self._awaits_validation = False
        self._of_mixtures |= "member_updates" in metrics
        if self._of_mixtures and "member_updates" not in metrics:
            # Lightning adds its own count of epochs to what callbacks log; ours counts epochs per model.
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
        """Begin a session after batch `step`: drop the rows of what it makes again, and go on with their clock.

        Args:
            step: number of the last batch done, 0 for a new run.
            validated: False where the validation after that batch is still to come.

        Returns:
            How many rows stay; 0 in all processes but the first.
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
    """The clock of the last row; 0 where there is none."""
    return float(rows[-1].get("seconds") or 0) if rows else 0.0
