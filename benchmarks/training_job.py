"""A mixture in training for the benchmarks: as the package trains it, or in the loop of a research script.

Both are fed by the same batches, resident on the device, and mark what they do ("data", "attack") for the profiler.
"""

import argparse
import logging
import time
from functools import partial
from typing import Any

import harness  # noqa: F401 - puts the package of this checkout on the path
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from mixadv.attacks.pgd import PGD
from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.data.stream import BatchStream
from mixadv.lambda_solvers import Uniform
from mixadv.losses import AT
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.learning_rate import constant

EPS, CLASSES, SHAPE, LR = 8 / 255, 10, (3, 32, 32), 0.05
BALL = ThreatModel("linf", EPS)
FAST = {"precision": "bf16-mixed", "channels_last": True, "compile": "default"}
PLAIN = {"precision": "32-true", "channels_last": False, "compile": None}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, 32, 32] and labels: a pattern of the class, of a contrast in [0, 0.3], in noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(CLASSES, 3, 5, 5, generator=generator)
    patterns = F.interpolate(coarse, SHAPE[1:], mode="bilinear").clamp(-1, 1)
    generator.manual_seed(1 + seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    contrast = 0.3 * torch.rand(count, 1, 1, 1, generator=generator)
    x = 0.5 + contrast * patterns[y] + 0.1 * torch.randn(count, *SHAPE, generator=generator)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8), y


def mark(stream: BatchStream, first: int = 0) -> BatchStream:
    """`stream`, which makes its batches under the mark "data" and begins with batch number `first`."""
    make = stream._training_batch

    def marked(number: int) -> tuple[Tensor, Tensor]:
        with record_function("data"):
            return make(first + number)

    stream._training_batch = marked  # type: ignore[method-assign]
    return stream


class Patterns(ImageDataModule):
    """`count` images of `images`; an epoch is as long as the trainer says."""

    name = "patterns"

    def __init__(self, count: int, batch: int) -> None:
        super().__init__(batch_size=batch, num_train=count, num_val=CLASSES)
        self.count = count

    def load(self) -> ImageCorpus:
        return ImageCorpus(*images(self.count + CLASSES, 0), *images(CLASSES, 1), tuple("abcdefghij"))

    @property
    def batches_per_pass(self) -> int:
        """More than anybody asks for: the trainer's limit is the length of an epoch."""
        return 10**9

    def endless(self, device: torch.device) -> BatchStream:
        """The training batches on a device, for a loop without Lightning."""
        how = {"padding": self.padding, "flip": self.flip, "device": device}
        stream = BatchStream(self.train_images, self.train_labels, self.batch_size, **how, batches_per_epoch=10**9)
        return mark(stream)


class Watched(MixtureTraining):
    """Keeps the losses of its steps, without waiting for the device."""

    def _watch(self, loss: Tensor) -> None:
        self.last_loss = loss.detach()
        super()._watch(loss)


class MarkedPGD(PGD):
    """PGD under the mark "attack"."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `PGD`."""
        with record_function("attack"):
            return super().__call__(*args, **kwargs)


class Job:
    """One mixture in training; `steps(n)` makes n steps. `ours` is PLAIN, FAST or the like, None the research loop."""

    def __init__(self, args: argparse.Namespace, num_members: int, batch: int, ours: dict[str, Any] | None) -> None:
        self.args, self.ours, self.device, self.batch = args, ours, torch.device("cpu" if args.cpu else "cuda"), batch
        torch.manual_seed(0)
        kwargs = {"num_classes": CLASSES, "image_shape": SHAPE, "mean": [0.5] * 3, "std": [0.2] * 3}
        self.mixture = Mixture([build_member(args.model, **kwargs) for _ in range(num_members)]).to(self.device)
        wide = ours is not None and ours["channels_last"]
        self.mixture.to(memory_format=torch.channels_last if wide else torch.contiguous_format)
        self.data = Patterns(max(args.images, batch), batch)
        self.data.setup()
        self.losses: list[Tensor] = []
        self.profiler: profile | None = None
        self.started = self.took = 0.0
        self.served = 0
        if ours is None:
            self.optimizer = torch.optim.SGD(self.mixture.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
            self.batches = iter(self.data.endless(self.device))
            return
        logging.getLogger(pl.__name__).setLevel(logging.ERROR)
        if ours["compile"]:
            self.mixture.compile(**({} if ours["compile"] == "default" else {"mode": ours["compile"]}))
        self.module = Watched(
            self.mixture,
            BALL,
            loss=AT(),
            attack=MarkedPGD(args.steps),
            validation_attack=PGD(1),
            solver=Uniform(),
            kind="shared",
            optimizer=partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=5e-4),
            scheduler=constant,
        )

    def steps(self, count: int) -> float:
        """Train on the next `count` batches; seconds per step, from the end of the first to that of the last."""
        if self.ours is None:
            for index in range(count):
                self._done(index, count, self.plain_step(*next(self.batches)))
            return self.took / (count - 1)

        class Watch(pl.Callback):
            def on_train_start(_, trainer: Any, module: Any) -> None:
                mark(trainer.datamodule.train_dataloader(), self.served)

            def on_train_batch_end(_, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
                self._done(index, count, module.last_loss)

        trainer = pl.Trainer(
            accelerator="cpu" if self.args.cpu else "gpu",
            devices=1,
            max_epochs=1,
            precision=self.ours["precision"],
            limit_train_batches=count,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Watch()],
        )
        trainer.fit(self.module, datamodule=self.data)
        self.served += count
        return self.took / (count - 1)

    def _done(self, index: int, count: int, loss: Tensor) -> None:
        self.losses.append(loss)
        if index not in (0, count - 1):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if index == 0:
            if self.profiler is not None:
                self.profiler.start()
            self.started = time.perf_counter()
        else:
            self.took = time.perf_counter() - self.started
            if self.profiler is not None:
                self.profiler.stop()

    def plain_step(self, x: Tensor, y: Tensor) -> Tensor:
        """What a research script does with a batch."""
        self.mixture.eval()
        members, weights = self.mixture.members, self.mixture.weights
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(self.args.steps):
            x_adv.requires_grad_(True)
            loss = sum(w * F.cross_entropy(m(x_adv), y) for w, m in zip(weights, members, strict=True))
            (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + 0.25 * EPS * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        self.mixture.train()
        self.optimizer.zero_grad()
        loss = sum(F.cross_entropy(m(x_adv), y) for m in members)
        loss.backward()
        self.optimizer.step()
        return loss.detach() / len(members)

    def operations(self, count: int = 4) -> float:
        """Operations of the model for one image in one step: counted on one member, times K and L."""
        member = build_member(self.args.model, num_classes=CLASSES, image_shape=SHAPE).to(self.device).eval()
        x = torch.rand(count, *SHAPE, device=self.device)
        counted = []
        for parameters in (False, True):
            member.requires_grad_(parameters)
            x.requires_grad_(not parameters)
            with FlopCounterMode(display=False) as counter:
                member(x).sum().backward()
            counted.append(counter.get_total_flops() / count)
        return self.mixture.num_members * (self.args.steps * counted[0] + counted[1])
