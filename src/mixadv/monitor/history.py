"""metrics.csv: the history of a run, appended row by row; mirrors receive the same rows."""

import csv
import io
import os
import time
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
from torch import Tensor

from mixadv.training import MixtureTraining


class Mirror(Protocol):
    """Receives every row of the history; the file stays the truth."""

    def log(self, row: dict[str, float]) -> None:
        """Take one row: column name -> number, only the columns that have a value."""


class MetricsFile:
    """An append-only table with fixed columns.

    Opening an existing file keeps its complete rows; a line torn by a crash is dropped.

    Args:
        path: the file; columns: the header.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns
        if not path.exists():
            self._write([])

    def rows(self) -> list[dict[str, str]]:
        """All complete rows, as text."""
        text = self.path.read_text()
        complete = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(io.StringIO(complete)))

    def truncate(self, step: int, *, validated: bool = True) -> list[dict[str, str]]:
        """Forget what happened after batch `step`: a resumed run writes those rows anew.

        Args:
            step: t of the last batch done.
            validated: False where the validation after that batch, if any, is still to come.
        """

        def happened(row: dict[str, str]) -> bool:
            t = int(row["step"])
            return t < step or (t == step and (validated or not row["val/robust_accuracy"]))

        kept = [row for row in self.rows() if happened(row)]
        self._write(kept)
        return kept

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; columns without a value stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _write(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def columns(num_members: int) -> list[str]:
    """Header of metrics.csv for L members."""
    return [
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
    ]


class History(pl.Callback):
    """Writes the history on our own counters: `step` is t of Algorithm 2, `epoch` is per model.

    Rows come every `every` batches (training loss and accuracy of the attacked batch before its update), at
    every weights phase, and after every validation.

    Args:
        path: metrics.csv.
        num_members: L.
        every: batches between two training rows.
        mirrors: receive each row too.
    """

    def __init__(self, path: Path, num_members: int, every: int, mirrors: list[Mirror]) -> None:
        self.file = MetricsFile(path, columns(num_members))
        self.every, self.mirrors = every, mirrors
        self._before = 0.0
        self._started = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop rows of steps that a resumed run will make again, and go on with its clock."""
        assert isinstance(pl_module, MixtureTraining)
        stream = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        kept = self.file.truncate(pl_module.t, validated=stream.between_epochs)
        self._before = float(kept[-1]["seconds"]) if kept else 0.0
        self._started = time.monotonic()
        if not kept:
            self._add(pl_module, {})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a weights phase, or every now and then a members phase."""
        assert isinstance(pl_module, MixtureTraining)
        if outputs["phase"] == "weights":
            found = {"weights/value": outputs["value"]}
            if outputs["lower_bound"] is not None:
                found["weights/lower_bound"] = outputs["lower_bound"]
            self._add(pl_module, found)
        elif outputs["phase"] == "members" and pl_module.t % self.every == 0:
            self._add(
                pl_module,
                {
                    "train/loss": outputs["loss"],
                    "train/adversarial_accuracy": outputs["adversarial_accuracy"],
                    "train/lr": outputs["lr"],
                },
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the metrics of a validation pass."""
        assert isinstance(pl_module, MixtureTraining)
        self._add(pl_module, pl_module.validation)

    def _add(self, module: MixtureTraining, values: dict[str, Any]) -> None:
        row = {
            "epoch": module.epochs_done,
            "step": module.t,
            "member_updates": sum(module.member_updates),
            "seconds": self._before + time.monotonic() - self._started,
            **values,
            **{f"lambda/{k}": weight for k, weight in enumerate(module.mixture.weights.tolist())},
        }
        numbers = {name: float(value) if isinstance(value, Tensor) else value for name, value in row.items()}
        self.file.append({name: f"{v:.8g}" if isinstance(v, float) else v for name, v in numbers.items()})
        for mirror in self.mirrors:
            mirror.log(numbers)
