"""A mixture in training for the benchmarks: as the package trains it, or in the loop of a research script.

Both are fed by the same batches, resident on the device, and mark what they do ("data", "attack") for the profiler.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from typing import Any

import harness  # noqa: F401 - puts the package of this checkout on the path
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from mixadv.attacks.pgd import PGD
from mixadv.data.stream import BatchStream
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel

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


class Marked:
    """A stream's next `count` batches, each fetched under the mark "data"."""

    def __init__(self, stream: BatchStream, count: int) -> None:
        self.stream, self.count = stream, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.stream)
        for _ in range(self.count):
            with record_function("data"):
                batch = next(batches)
            yield batch


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
        x, y = images(max(args.images, batch), 0)
        self.stream = BatchStream(
            x, y, batch, padding=4, flip=True, device=self.device, batches_in_epoch=lambda e: 10**9
        )
        self.losses: list[Tensor] = []
        self.profiler: profile | None = None
        self.started = self.took = 0.0
        if ours is None:
            self.optimizer = torch.optim.SGD(self.mixture.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
            return
        import pytorch_lightning as pl

        from mixadv.lambda_solvers import Uniform
        from mixadv.losses import AT
        from mixadv.training import LearningRate, MemberOptimizer, MixtureTraining

        logging.getLogger(pl.__name__).setLevel(logging.ERROR)
        if ours["compile"]:
            self.mixture.compile(**({} if ours["compile"] == "default" else {"mode": ours["compile"]}))
        self.module = MixtureTraining(
            self.mixture,
            loss=AT(),
            threat_model=BALL,
            attack=MarkedPGD(args.steps),
            validation_attack=PGD(1),
            solver=Uniform(),
            kind="shared",
            optimizer=MemberOptimizer(LR, learning_rate=LearningRate("constant")),
            updates_per_member=10**6,
            total_batches=10**6,
            check_every=50,
        )

    def steps(self, count: int) -> float:
        """Train on the next `count` batches; seconds per step, from the end of the first to that of the last."""
        batches = Marked(self.stream, count)
        if self.ours is None:
            for index, (x, y) in enumerate(batches):
                self._done(index, count, self.plain_step(x, y))
            return self.took / (count - 1)
        import pytorch_lightning as pl

        class Watch(pl.Callback):
            def on_train_batch_end(_, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
                self._done(index, count, outputs["loss"].detach())

        trainer = pl.Trainer(
            accelerator="cpu" if self.args.cpu else "gpu",
            devices=1,
            max_epochs=1,
            precision=self.ours["precision"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[Watch()],
        )
        trainer.fit(self.module, train_dataloaders=batches)
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
