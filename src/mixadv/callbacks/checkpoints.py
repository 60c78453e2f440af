"""When a training writes which checkpoint: best.ckpt, last.ckpt and the one before it."""

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

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint for a `MixtureTraining`, which continues bitwise from any moment.

    After a validation it keeps the best by `monitor` as Lightning does (``best_model_path``, ``best_model_score``,
    `save_top_k`, ``log_model`` of loggers), as best.ckpt. The last state, last.ckpt, is written before every
    validation, after every epoch, every `train_time_interval`, every `every_n_train_steps`, and when the program is
    told to stop; the one before it stays as previous.ckpt. A training that goes on from last.ckpt ends bitwise where
    the uninterrupted one ends. The trainer needs ``plugins=[WholeFiles()]``.

    Lightning cannot do this itself: with manual optimization it ignores `train_time_interval` and counts the steps of
    all optimizers.

    Args:
        dirpath: where the files go. monitor, mode, save_top_k, filename, others: see ModelCheckpoint.
        train_time_interval: between two last.ckpt inside an epoch; None for none by the clock.
        every_n_train_steps: batches t between two last.ckpt inside an epoch; None for none by the count.
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
            # Validation ends before the epoch does, and the best is known then.
            save_on_train_epoch_end=False,
            enable_version_counter=not one,
            **others,
        )
        self.interval, self.every = train_time_interval, every_n_train_steps
        self._saved_at, self._saved_t = time.monotonic(), 0
        # Whether the state is that of a number of whole batches: not before it is restored, nor inside an update.
        self._is_whole = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return "mixadv.Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, with the names of files in the place of paths: a run directory may be moved."""
        state = super().state_dict()
        state |= {key: os.path.basename(state[key]) for key in PATHS}
        state["best_k_models"] = {os.path.basename(path): score for path, score in self.best_k_models.items()}
        return {**state, "dirpath": ""}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores of the files in `dirpath`."""

        def here(name: str) -> str:
            return os.path.join(str(self.dirpath), name) if name else ""

        kept = {here(name): score for name, score in state_dict["best_k_models"].items()}
        paths = {key: here(state_dict[key]) for key in PATHS}
        super().load_state_dict({**state_dict, **paths, "best_k_models": kept, "dirpath": self.dirpath})
        # Lightning saves this score and does not load it.
        self.current_score = state_dict["current_score"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse another module, whose state this class does not know."""
        with warnings.catch_warnings():
            # A training that goes on finds its own checkpoints there.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, MixtureTraining):
            raise UserError(f"Checkpoints are for MixtureTraining, not {type(pl_module).__name__}: use ModelCheckpoint")

    def on_train_start(self, trainer: pl.Trainer, pl_module: MixtureTraining) -> None:  # type: ignore[override]
        """Count from here; have loggers forget what comes again; take signals back from Lightning's handlers.

        Raises:
            UserError: processes have found different checkpoints.
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
        """From here on the state is that of a batch under way."""
        self._is_whole = False

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, pl_module: MixtureTraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write last.ckpt where it is time to, or stop where a process was told to."""
        self._is_whole = True
        by_clock = self.interval is not None and time.monotonic() - self._saved_at >= self.interval.total_seconds()
        by_count = self.every is not None and pl_module.t - self._saved_t >= self.every
        # Clocks differ, and a signal may reach one process alone: what one has to do, all do.
        signal = Signals.active.received if Signals.active is not None else None
        wanted = pl_module.ranks.largest(signal or -int(not (by_clock or by_count)), pl_module.device)
        if wanted > 0:
            raise Stopped(wanted)
        if wanted == 0:
            self._save_last(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: MixtureTraining) -> None:  # type: ignore[override]
        """Write last.ckpt: a validation that is interrupted is repeated from here.

        Not in the middle of it, for a callback may have put averaged members in the place of the trained ones.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_last(trainer, pl_module)
            self._is_whole = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep this state where it is among the best."""
        super().on_validation_end(trainer, pl_module)
        self._is_whole = trainer.state.fn == "fit"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: MixtureTraining) -> None:  # type: ignore[override]
        """Write last.ckpt."""
        self._save_last(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Told to stop in the middle of a batch, write the state before it.

        Of an update half made (a second SIGINT does not wait) and of a validation nothing is written: the last
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
        beside = last.with_name(f".{LAST}.next.tmp")
        self.last_model_path = str(last)
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            if last.exists():
                os.replace(last, last.with_name(PREVIOUS))
            os.replace(beside, last)
        trainer.strategy.barrier()
        self._saved_at, self._saved_t = time.monotonic(), module.t


class WholeFiles(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints: whole or not at all, with a digest of the content inside."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See `write_checkpoint`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """See `read_checkpoint`; always tensors and plain containers."""
        return read_checkpoint(Path(path))
