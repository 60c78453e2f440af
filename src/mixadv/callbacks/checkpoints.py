"""Writes the checkpoints of a training: best.ckpt, last.ckpt and previous.ckpt."""

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from mixadv.checkpoint_files import BEST, LAST, PREVIOUS, read_checkpoint, write_checkpoint
from mixadv.errors import UserError
from mixadv.files import remove_leftovers
from mixadv.signals import Signals, Stopped
from mixadv.training import MixtureTraining

# Of the checkpoint that is about to become last.ckpt; `remove_leftovers` knows such names.
NEXT = "00000000"
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint for a `MixtureTraining`, which can be resumed bitwise from any moment.

    After a validation, the best state by `monitor` is kept as best.ckpt, as in Lightning (with ``best_model_path``,
    ``best_model_score``, `save_top_k` and ``log_model`` of loggers). The current state is written as last.ckpt before
    every validation, after every epoch, at the intervals below, and when a signal stops the program; the earlier
    last.ckpt becomes previous.ckpt. A training resumed from last.ckpt ends bitwise equal to an uninterrupted one. The
    trainer needs ``plugins=[WholeFiles()]``.

    Lightning's own class does not suffice: with manual optimization it ignores `train_time_interval` and counts the
    steps of all optimizers.

    Args:
        dirpath: directory of the checkpoints.
        monitor, mode, save_top_k, filename, others: see ModelCheckpoint.
        train_time_interval: time between two last.ckpt inside an epoch; None for no limit.
        every_n_train_steps: batches t between two last.ckpt inside an epoch; None for no limit.

    Raises:
        ValueError: `every_n_train_steps` is below 1.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        monitor: str | None = "val/robust_accuracy",
        mode: str = "max",
        save_top_k: int = 1,
        filename: str | None = None,
        train_time_interval: timedelta | None = None,
        every_n_train_steps: int | None = None,
        **others: Any,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps} must be at least 1, or null")
        one = save_top_k == 1
        super().__init__(
            dirpath,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            filename=filename or (Path(BEST).stem if one else "best-{epoch}-{step}"),
            # Select the best state after the validation, not at the end of the epoch.
            save_on_train_epoch_end=False,
            enable_version_counter=not one,
            **others,
        )
        self.interval, self.every = train_time_interval, every_n_train_steps
        self._saved_at, self._saved_t = time.monotonic(), 0
        # Whether the state is that after whole batches: false before it is restored, and inside an update.
        self._is_whole = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return "mixadv.Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state with file names instead of paths, because a run directory may be moved."""
        state = super().state_dict()
        state |= {key: os.path.basename(state[key]) for key in PATHS}
        state["best_k_models"] = {os.path.basename(path): score for path, score in self.best_k_models.items()}
        return {**state, "dirpath": ""}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore Lightning's state; file names refer to `dirpath`."""

        def here(name: str) -> str:
            return os.path.join(str(self.dirpath), name) if name else ""

        kept = {here(name): score for name, score in state_dict["best_k_models"].items()}
        paths = {key: here(state_dict[key]) for key in PATHS}
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})
        # Lightning saves this score and does not load it.
        self.current_score = state_dict["current_score"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse modules other than `MixtureTraining`."""
        with warnings.catch_warnings():
            # A resumed training finds its own checkpoints there.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, MixtureTraining):
            raise UserError(f"Checkpoints are for MixtureTraining, not {type(pl_module).__name__}: use ModelCheckpoint")
        if pl_module.schedule.grows:
            # Scores of different stages are those of different mixtures. The last state is the one with a certificate.
            self.monitor, self.save_top_k = None, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: MixtureTraining) -> None:  # type: ignore[override]
        """Start the intervals, truncate the logs to this step, and replace Lightning's signal handlers.

        Raises:
            UserError: the processes resumed from different checkpoints.
        """
        super().on_train_start(trainer, pl_module)
        ranks, t = pl_module.ranks, pl_module.t
        if ranks.largest(t, pl_module.device) != -ranks.largest(-t, pl_module.device):
            raise UserError(
                "the processes found different checkpoints: the run directory must be on a disk that all machines share"
            )
        if trainer.is_global_zero:
            remove_leftovers(Path(str(self.dirpath)))
        for logger in trainer.loggers:
            if hasattr(logger, "truncate"):
                logger.truncate(t, validated=not pl_module.validation_is_due)
        self._is_whole = True
        if Signals.active is not None:
            Signals.active.install()
        self._saved_at, self._saved_t = time.monotonic(), t

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the state as that of an unfinished batch."""
        self._is_whole = False

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: MixtureTraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write last.ckpt if an interval is over; stop if any process received a signal."""
        self._is_whole = True
        by_clock = self.interval is not None and time.monotonic() - self._saved_at >= self.interval.total_seconds()
        by_count = self.every is not None and pl_module.t - self._saved_t >= self.every
        # Clocks differ and a signal may reach one process only, so all processes agree on what to do: the number of a
        # signal to stop, 0 to write a checkpoint, -1 to go on.
        signal = Signals.active.received if Signals.active is not None else None
        wanted = pl_module.ranks.largest(signal or -int(not (by_clock or by_count)), pl_module.device)
        if wanted > 0:
            raise Stopped(wanted)
        if wanted == 0:
            self._save_last(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: MixtureTraining) -> None:  # type: ignore[override]
        """Write last.ckpt, from which an interrupted validation is repeated.

        Nothing is written during a validation: a callback (EMA) may have replaced the members by their averages.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_last(trainer, pl_module)
            self._is_whole = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write best.ckpt if this state is among the best."""
        super().on_validation_end(trainer, pl_module)
        self._is_whole = trainer.state.fn == "fit"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: MixtureTraining) -> None:  # type: ignore[override]
        """Write last.ckpt."""
        self._save_last(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """If a signal stops the training inside a batch, write the state before that batch.

        Nothing is written during a validation or inside an update (which only a second SIGINT interrupts); the last
        checkpoint stays.
        """
        assert isinstance(pl_module, MixtureTraining)
        if not isinstance(exception, Stopped):
            super().on_exception(trainer, pl_module, exception)
            return
        if pl_module.abandon_batch():
            self._is_whole = True
        if self._is_whole:
            self._save_last(trainer, pl_module)

    def _save_last(self, trainer: pl.Trainer, module: MixtureTraining) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module.refuse_broken()
        last = Path(str(self.dirpath)) / LAST
        beside = last.with_name(f".{LAST}.{NEXT}.tmp")
        self.last_model_path = str(last)
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            if last.exists():
                os.replace(last, last.with_name(PREVIOUS))
            os.replace(beside, last)
        trainer.strategy.barrier()
        self._saved_at, self._saved_t = time.monotonic(), module.t


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoint I/O with atomic writes and a digest of the content in the file."""

    def __init__(self) -> None:
        super().__init__()
        self._held: tuple[Path, dict[str, Any]] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `write_checkpoint`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """See `read_checkpoint`; only tensors and plain containers are read, whatever `weights_only` is."""
        held, self._held = self._held, None
        return held[1] if held is not None and held[0] == Path(path) else read_checkpoint(Path(path))

    def read(self, path: Path, *, with_digest: bool = False) -> dict[str, Any]:
        """`read_checkpoint`; the content is held for the next `load_checkpoint`, so that a file is read once."""
        checkpoint = read_checkpoint(path, with_digest=with_digest)
        self._held = path, checkpoint
        return checkpoint
