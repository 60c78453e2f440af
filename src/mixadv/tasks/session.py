"""What the steps of a task share: configuration, directory, device, data, ball, console, choices."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from mixadv.config import parse_eps
from mixadv.console import Console
from mixadv.data.base import ImageDataModule
from mixadv.data.stream import BatchStream
from mixadv.report import Run, read_run
from mixadv.runs import processes
from mixadv.runs.choices import Choices
from mixadv.tasks import build
from mixadv.threat_model import ThreatModel
from mixadv.training.schedule import limited


def as_finished(run_dir: Path) -> Run:
    """The run in a directory as it is when DONE is written.

    Figures are drawn before that, while the directory is locked: a process that is killed meanwhile leaves a run that
    the same command continues.
    """
    return replace(read_run(run_dir), state="done", reason="")


@dataclass(frozen=True)
class Session:
    """What the steps of a task share.

    Attributes:
        cfg: the checked configuration.
        run_dir: the claimed directory of the run.
        device: of this process.
        data: loaded and split.
        threat_model: the ball, in the unit box.
        choices: automatic choices, kept in the directory.
        console: prints in the process of rank 0 only.
    """

    cfg: DictConfig
    run_dir: Path
    device: torch.device
    data: ImageDataModule
    threat_model: ThreatModel
    choices: Choices
    console: Console

    @classmethod
    def begin(cls, cfg: DictConfig, run_dir: Path) -> "Session":
        """Load the data and find the device; nothing is written.

        Raises:
            UserError: no such device, or data that are missing or damaged.
        """
        rank = processes.rank(cfg)
        device = build.resolve_device(cfg, processes.place(cfg))
        data = build.build_data(cfg.data)
        threat_model = build.build_threat_model(cfg.threat_model.norm, cfg.eps, data.image_shape)
        return Session(cfg, run_dir, device, data, threat_model, Choices(run_dir, rank), Console(quiet=rank > 0))

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0, which writes the files."""
        return processes.rank(self.cfg) == 0

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``trainer.limit_test_batches`` batches of the test set, on the device."""
        return self._first(self.data.test_dataloader(), self.cfg.trainer.limit_test_batches)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``trainer.limit_val_batches`` batches of the validation split, on the device."""
        return self._first(self.data.val_dataloader(), self.cfg.trainer.limit_val_batches)

    @property
    def num_test_images(self) -> int:
        """The number of images in `test_batches`."""
        count = limited(self.cfg.trainer.limit_test_batches, len(self.data.test_dataloader()))
        return min(self.data.num_test, count * self.data.eval_batch_size)

    def _first(self, loader: BatchStream, limit: int | float | None) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in itertools.islice(loader, limited(limit, len(loader))):
            yield x.to(self.device), y.to(self.device)

    def mixture_record(self) -> dict[str, Any]:
        """What an exported mixture records of the data and the ball it was made for."""
        return {
            "threat_model": {"norm": self.cfg.threat_model.norm, "eps": parse_eps(self.cfg.eps)},
            "eps": str(self.cfg.eps),
            "data": build.as_dict(self.cfg.data),
            "data_name": self.data.name,
            "class_names": list(self.data.class_names),
            "seed": self.cfg.seed,
        }
