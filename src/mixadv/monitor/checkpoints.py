"""best.ckpt and last.ckpt, written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from mixadv.errors import UserError
from mixadv.training import MixtureTraining


class Checkpoints(Checkpoint):
    """Keeps the epoch with the best validation robust accuracy (ties: the better clean one) and the last epoch.

    A file is written beside its place and renamed, so a crash leaves the previous one.

    Args:
        directory: where best.ckpt and last.ckpt go.
        mixture_config: what it takes to build the mixture again; stored in every checkpoint, so that a
            checkpoint alone can be evaluated.
    """

    def __init__(self, directory: Path, mixture_config: dict[str, Any]) -> None:
        self.directory = directory
        self.mixture_config = mixture_config
        self.best: dict[str, float] | None = None

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
        """Add the recipe of the mixture."""
        checkpoint["mixture_config"] = self.mixture_config

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write best.ckpt where this epoch is the best so far."""
        assert isinstance(pl_module, MixtureTraining)
        score = {"epoch": pl_module.epochs_done, **pl_module.validation}

        def rank(s: dict[str, float]) -> tuple[float, float]:
            return s["val/robust_accuracy"], s["val/clean_accuracy"]

        if self.best is None or rank(score) > rank(self.best):
            self.best = score
            self._save(trainer, "best.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write last.ckpt."""
        assert isinstance(pl_module, MixtureTraining)
        pl_module.refuse_broken()
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f"{name}.tmp"
        trainer.save_checkpoint(temporary)
        os.replace(temporary, self.directory / name)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint as tensors and plain containers; nothing in it can run code.

    Raises:
        UserError: the file is missing, torn, or holds other kinds of objects.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): "
            "it is torn or foreign; remove it, or start anew with resume=never"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} holds no state_dict: it is not a training checkpoint")
    return checkpoint
