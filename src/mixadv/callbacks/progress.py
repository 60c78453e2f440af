"""The progress display in the terminal."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from mixadv.training import MixtureTraining


class ProgressBar(RichProgressBar):
    """Lightning's RichProgressBar, plus one line after every validation, also without a terminal.

    In a narrow terminal only the metrics are wrapped, not the bar, the batches and the times.

    Args:
        title: the name of the model in the lines; None: "mixture of L" or "single model".
        others: see RichProgressBar.
    """

    def __init__(self, title: str | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.title = title

    @property
    def is_enabled(self) -> bool:
        """Whether the bar is enabled and the output is a terminal."""
        return super().is_enabled and get_console().is_terminal

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """The description, the bar, the batches, the elapsed time and the remaining time."""

        def column() -> Column:
            return Column(no_wrap=True)

        return [
            TextColumn("{task.description}", table_column=column()),
            BarColumn(bar_width=12, table_column=column()),
            MofNCompleteColumn(table_column=column()),
            TimeElapsedColumn(table_column=column()),
            TimeRemainingColumn(table_column=column()),
        ]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The metrics that the module logs with ``prog_bar=True``, under the last part of their names, and lambda."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        numbers = {name.rpartition("/")[2].removesuffix("_accuracy"): value for name, value in shown.items()}
        lam = _lambda(trainer)
        return {**numbers, "lambda": lam} if lam else numbers

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print one line after every stage of a mixture that grows."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if isinstance(pl_module, MixtureTraining) and pl_module.stage_ended:
            get_console().print(Text(str(pl_module.stages[-1]), style="dim"), soft_wrap=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print one line: epoch, accuracies, lambda."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        found = trainer.callback_metrics
        lam = _lambda(trainer)
        members = lam.count(",") + 1
        title = self.title or (f"mixture of {members}" if members > 1 else "single model")
        line = (
            f"{title}  epoch {float(found['epoch']):.1f}/{trainer.max_epochs}"
            f"  clean {float(found['val/clean_accuracy']):.3f}  robust {float(found['val/robust_accuracy']):.3f}"
            f"  lambda {lam}"
        )
        get_console().print(Text(line, style="dim"), soft_wrap=True)


def _lambda(trainer: pl.Trainer) -> str:
    """The latest logged weights, as (0.50, 0.20, 0.30); empty if none were logged."""
    found = trainer.callback_metrics
    weights: list[str] = []
    while f"lambda/{len(weights)}" in found:
        weights.append(f"{float(found[f'lambda/{len(weights)}']):.2f}")
    return f"({', '.join(weights)})" if weights else ""
