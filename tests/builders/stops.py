"""Trainings that stop in the middle."""

import pytorch_lightning as pl


class Interrupted(Exception):
    """The power went out."""


class SaveAndStop(pl.Callback):
    """Writes a checkpoint after batch t, and that is all."""

    def __init__(self, path, t):
        self.path, self.t = path, t

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.t == self.t:
            trainer.save_checkpoint(self.path)
            raise Interrupted
