"""The progress display in the terminal."""

from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mixadv.training import MixtureTraining


class ConsoleProgress(pl.Callback):
    """A live bar in a terminal, one line per validated epoch anywhere: phase, loss, robust accuracy, lambda.

    Args:
        console: where to draw.
        title: what is being trained.
        every: batches between two refreshes of the numbers (each waits for the device).
        enabled: False for silence.
    """

    def __init__(self, console: Console, title: str, every: int = 10, enabled: bool = True) -> None:
        self.console, self.title, self.every, self.enabled = console, title, every, enabled
        self._bar: Progress | None = None
        self._seen: dict[str, str] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar, at the place a resumed run continues from."""
        assert isinstance(pl_module, MixtureTraining)
        if not self.enabled or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(self.title, total=pl_module.total_batches, completed=pl_module.t, numbers="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; now and then refresh the numbers."""
        assert isinstance(pl_module, MixtureTraining)
        if self._bar is None or outputs["phase"] == "none":
            return
        if outputs["phase"] == "weights":
            self._seen["phase"] = "weights"
            self._seen["lambda"] = _weights(pl_module)
        else:
            self._seen["phase"] = "members"
            if pl_module.t % self.every == 0:
                self._seen["loss"] = f"{float(outputs['loss']):.3f}"
        numbers = "  ".join(f"{name} {value}" for name, value in self._seen.items())
        self._bar.update(self._task, completed=pl_module.t, numbers=numbers)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One line for the epoch."""
        assert isinstance(pl_module, MixtureTraining)
        found = pl_module.validation
        self._seen["robust"] = f"{found['val/robust_accuracy']:.3f}"
        if not self.enabled:
            return
        line = (
            f"{self.title}  epoch {pl_module.epochs_done:.1f}/{trainer.max_epochs}"
            f"  clean {found['val/clean_accuracy']:.3f}  robust {found['val/robust_accuracy']:.3f}"
            f"  lambda {_weights(pl_module)}"
        )
        self.console.print(Text(line, style="dim"), soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave a clean terminal behind."""
        self._stop()


def _weights(module: MixtureTraining) -> str:
    return "(" + ", ".join(f"{weight:.2f}" for weight in module.mixture.weights.tolist()) + ")"
