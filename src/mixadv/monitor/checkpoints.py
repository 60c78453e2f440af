"""best.ckpt, last.ckpt and the one before it: written whole or not at all, and known to be whole when read."""

import errno
import os
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from mixadv.data.stream import BatchStream
from mixadv.errors import UserError
from mixadv.signals import Signals, Stopped
from mixadv.training import MixtureTraining

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
DIGEST = "digest"


class Checkpoints(Checkpoint):
    """Keeps the epoch with the best validation robust accuracy (ties: the better clean one), and the last state.

    The last state is written after every epoch, every `minutes`, every `member_updates`, and when the program is told
    to stop. A run that continues from it ends bitwise where the uninterrupted one ends: what a checkpoint holds is a
    function of the batches done. Lightning's own loop counters are left out, for a resumed epoch is a shorter one for
    it; it is told the epoch alone.

    Args:
        directory: where best.ckpt, last.ckpt and previous.ckpt (the last but one) go.
        mixture_config: what it takes to build the mixture again; stored in every checkpoint, so that a
            checkpoint alone can be evaluated.
        minutes: between two checkpoints inside an epoch; None for none by the clock.
        member_updates: between two checkpoints inside an epoch, summed over members; None for none by the count.
        signals: looked at after every batch, where the state is whole.
    """

    def __init__(
        self,
        directory: Path,
        mixture_config: dict[str, Any],
        *,
        minutes: float | None = None,
        member_updates: int | None = None,
        signals: Signals | None = None,
    ) -> None:
        self.directory = directory
        self.mixture_config = mixture_config
        self.minutes, self.member_updates, self.signals = minutes, member_updates, signals or Signals()
        self.best: dict[str, float] | None = None
        self._saved_at, self._saved_updates = time.monotonic(), 0
        # Whether the state is that of a number of whole batches: not before it is restored, nor inside an update.
        self._is_whole = False

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return "mixadv.Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """The score of best.ckpt."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the score of best.ckpt."""
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the recipe of the mixture; put our counters in the place of Lightning's."""
        assert isinstance(pl_module, MixtureTraining)
        checkpoint["mixture_config"] = self.mixture_config
        del checkpoint["loops"]
        checkpoint["epoch"] = _stream(trainer).epoch_under_way
        checkpoint["global_step"] = sum(pl_module.member_updates)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell the trainer the epoch to go on with."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.processed = checkpoint["epoch"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here; take signals back from Lightning, whose handler talks to other processes at any time."""
        assert isinstance(pl_module, MixtureTraining)
        ranks = pl_module.ranks
        if ranks.largest(pl_module.t, pl_module.device) != -ranks.largest(-pl_module.t, pl_module.device):
            raise UserError(
                "the processes found different checkpoints: the run directory must be on a disk that all machines share"
            )
        self._is_whole = True
        self.signals.install()
        self._saved_at, self._saved_updates = time.monotonic(), sum(pl_module.member_updates)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write last.ckpt where it is time to, or stop where a process was told to."""
        assert isinstance(pl_module, MixtureTraining)
        self._is_whole = True
        updates = sum(pl_module.member_updates)
        by_clock = self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes
        by_count = self.member_updates is not None and updates - self._saved_updates >= self.member_updates
        # Clocks differ, and a signal may reach one process alone: what one has to do, all do.
        wanted = self.signals.received or -int(not (by_clock or by_count))
        wanted = pl_module.ranks.largest(wanted, pl_module.device)
        if wanted > 0:
            raise Stopped(wanted)
        if wanted == 0:
            self._save_last(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on the state is that of a batch under way."""
        self._is_whole = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write best.ckpt where this epoch is the best so far."""
        assert isinstance(pl_module, MixtureTraining)
        score = {"epoch": pl_module.epochs_done, **pl_module.validation}

        def rank(s: dict[str, float]) -> tuple[float, float]:
            return s["val/robust_accuracy"], s["val/clean_accuracy"]

        if self.best is None or rank(score) > rank(self.best):
            self.best = score
            self._save(trainer, BEST)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write last.ckpt."""
        assert isinstance(pl_module, MixtureTraining)
        _stream(trainer).close_epoch()
        self._save_last(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Told to stop in the middle of a batch or of a validation, write the state before it.

        Of an update half made (a second SIGINT does not wait) nothing is written: the last checkpoint stays.
        """
        assert isinstance(pl_module, MixtureTraining)
        if not isinstance(exception, Stopped):
            return
        if pl_module.abandon_batch():
            _stream(trainer).take_back()
            self._is_whole = True
        if self._is_whole:
            self._save_last(trainer, pl_module)

    def _save_last(self, trainer: pl.Trainer, module: MixtureTraining) -> None:
        module.refuse_broken()
        self._save(trainer, LAST)
        self._saved_at, self._saved_updates = time.monotonic(), sum(module.member_updates)

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary, final = self.directory / f"{name}.tmp", self.directory / name
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            if name == LAST and final.exists():
                os.replace(final, self.directory / PREVIOUS)
            os.replace(temporary, final)
        trainer.strategy.barrier()


def _stream(trainer: pl.Trainer) -> BatchStream:
    return trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]


class WholeFiles(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints, with a digest of the content inside and the file on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` with its digest to `path`, and wait until the disk has it."""
        try:
            with open(path, "wb") as file:
                torch.save({**checkpoint, DIGEST: digest_of(checkpoint)}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # Half a file would take up what is left of a full disk.
            Path(path).unlink(missing_ok=True)
            # PyTorch's writer finds itself at another place than it has written to.
            if isinstance(error, RuntimeError) and "inline_container" in str(error):
                raise OSError(errno.ENOSPC, "the checkpoint was not written whole", str(path)) from error
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """See `read_checkpoint`; always tensors and plain containers."""
        return read_checkpoint(Path(path))


def digest_of(content: Any) -> str:
    """BLAKE2b of nested plain containers and tensors: of their types, keys, shapes and bytes."""
    digest = blake2b(digest_size=16)

    def take(value: Any) -> None:
        digest.update(type(value).__name__.encode())
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                take(key)
                take(part)
        elif isinstance(value, (list, tuple)):
            digest.update(str(len(value)).encode())
            for part in value:
                take(part)
        else:
            digest.update(repr(value).encode())

    take({key: value for key, value in content.items() if key != DIGEST})
    return digest.hexdigest()


def read_checkpoint(path: Path, *, with_digest: bool = False) -> dict[str, Any]:
    """Load a checkpoint as tensors and plain containers; nothing in it can run code.

    Args:
        path: the file.
        with_digest: refuse one that carries no digest of its content.

    Raises:
        UserError: the file is missing, torn, changed since it was written, or holds other kinds of objects.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: put it back, or start anew with resume=never") from None
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): "
            "it is torn or foreign; remove it, or start anew with resume=never"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} holds no state_dict: it is not a training checkpoint")
    if (with_digest or DIGEST in checkpoint) and checkpoint.get(DIGEST) != digest_of(checkpoint):
        raise UserError(
            f"{path} has changed since it was written (its digest does not fit): remove it, or start anew with "
            "resume=never"
        )
    return checkpoint


def newest(directory: Path, say: Callable[[str], None], *, first: bool = True) -> Path | None:
    """The checkpoint to go on from: last.ckpt, or the one before it where that cannot be read; None before the first.

    A last.ckpt that cannot be read is set aside as last.ckpt.torn, where nothing overwrites it, and said to be so; of
    several processes the `first` does that.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    last, previous = directory / LAST, directory / PREVIOUS
    if last.exists():
        try:
            read_checkpoint(last, with_digest=True)
            return last
        except UserError as error:
            if not previous.exists():
                raise
            read_checkpoint(previous, with_digest=True)
            if first:
                aside = last.with_name(f"{LAST}.torn")
                say(f"{error}. Set aside as {aside.name}; going on from {PREVIOUS}")
                os.replace(last, aside)
    if previous.exists():
        read_checkpoint(previous, with_digest=True)
        return previous
    return None
