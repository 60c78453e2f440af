"""One epoch of adversarial training (AT): ours by schedule and L, compiled and plain, against a plain eager loop.

Ours is `MixtureTraining` in a Lightning trainer, on random images of CIFAR-10's shape. Each round times every run for
--batches batches that update members and one weights phase; an epoch of --images images for each member follows from
the mean of the former, and weights phases are added as often as --T-theta makes them due. Of a network alone, with K
attack steps, a batch costs 2K + 3 passes; of L members 2KL + 3L (shared, once in an epoch's batch) or 2KL + 3 (sampled,
L times). The column `formula` is the cost of an epoch over that of L = 1 by these counts, `epoch/1` as measured.

    python benchmarks/epoch.py [--models small_resnet] [--batch-sizes 128] [--members 1 2 3 4] [--steps 10]
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from functools import partial
from typing import Any

import harness
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from mixadv.attacks.pgd import PGD
from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.instantiate import instantiate
from mixadv.lambda_solvers import Uniform
from mixadv.losses import AT
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.learning_rate import constant

EPS = 8 / 255
SETTING = ("model", "batch", "run", "L", "schedule")
COLUMNS = {key: key for key in SETTING} | {
    "epoch_s": "epoch s",
    "epoch/1": "epoch/1",
    "formula": "formula",
    "loop/it": "L x loop/it",
    "with_phases_s": "with phases s",
    "phases_share": "share of phases",
    "spread": "spread",
    "warm_up_s": "warm-up s",
}


class Noise(ImageDataModule):
    """Random images."""

    name = "noise"

    def load(self) -> ImageCorpus:
        def part(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            generator = torch.Generator().manual_seed(n)
            return torch.randint(256, (n, 3, 32, 32), generator=generator).to(torch.uint8), torch.arange(n) % 10

        return ImageCorpus(*part(3000), *part(100), tuple("abcdefghij"))

    @property
    def batches_per_pass(self) -> int:
        """More than anybody asks for: the trainer's limit is the length of an epoch."""
        return 10**6


class Clock(pl.Callback):
    """Seconds of every batch of an epoch, by phase, with all that happens between batches."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"members": [], "weights": []}

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        phase = "weights" if module.schedule.is_weights_phase(module.t) else "members"
        self.seconds[phase].append(now - self.last)
        self.last = now


class Ours:
    """A module, its data, and rounds: as many batches as asked for, then one weights phase."""

    def __init__(self, model: str, num_members: int, kind: str, compiled: bool, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        shape = {"num_classes": 10, "image_shape": (3, 32, 32)}
        mixture = Mixture([build_member(model, **shape) for _ in range(num_members)])
        per_member = max(1, args.batches // num_members) if kind == "sampled" else args.batches
        self.batches = per_member * (num_members if kind == "sampled" else 1) + (num_members > 1)
        settings = OmegaConf.load(harness.ROOT / "conf" / "lambda_solver" / f"{args.solver}.yaml")
        solver = instantiate(dict(settings), "lambda_solver")
        self.data = Noise(batch_size=args.batch)
        self.module = MixtureTraining(
            mixture,
            loss=AT(),
            threat_model=ThreatModel("linf", EPS),
            attack=PGD(args.steps),
            validation_attack=PGD(args.steps),
            solver=solver if num_members > 1 else Uniform(),
            kind=kind,
            T_theta=per_member,
            optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
            scheduler=constant,
        )
        if compiled:
            mixture.compile()
        self.device = args.device

    def __call__(self) -> dict[str, list[float]]:
        clock = Clock()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            precision="32-true",
            limit_train_batches=self.batches,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(self.module, datamodule=self.data)
        return clock.seconds


class Loop:
    """Adversarial training of one network as a research script writes it, on the same batches."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        net = build_member(model, num_classes=10, image_shape=(3, 32, 32))
        # As a script has it: in PyTorch's own layout of weights.
        self.net = net.to(memory_format=torch.contiguous_format).to(args.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        self.data, self.steps, self.device = Noise(batch_size=args.batch), args.steps, args.device
        self.data.batches_per_epoch = args.batches
        self.data.setup("fit")

    def __call__(self) -> dict[str, list[float]]:
        seconds, last = [], time.perf_counter()
        stream = self.data.train_dataloader()
        for x, y in stream:
            x, y = x.to(self.device), y.to(self.device)
            self._update(self.net, x, y)
            if self.device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        stream.close_epoch()
        return {"members": seconds, "weights": []}

    def _update(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        net.eval()
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(self.steps):
            x_adv.requires_grad_(True)
            (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
            x_adv = x_adv.detach() + 0.25 * EPS * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        net.train()
        loss = F.cross_entropy(net(x_adv), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def formula(num_members: int, kind: str, steps: int) -> float:
    """Passes of an epoch of L members over those of L = 1, weights phases aside."""
    sampled = (2 * steps * num_members + 3) / (2 * steps + 3)
    return num_members * (sampled if kind == "sampled" else 1.0)


def measure(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one network and batch size: the loop, and every L, schedule and way of running, in turn."""
    torch.compiler.reset()
    kinds = {(n, kind) for n in args.members for kind in (args.schedules if n > 1 else ["shared"])}
    runs: dict[tuple[str, int, str], Loop | Ours] = {("loop", 1, "-"): Loop(model, args)}
    for num_members, kind in sorted(kinds):
        for name in args.runs:
            runs[name, num_members, kind] = Ours(model, num_members, kind, name == "compiled", args)
    warm_up = {key: harness.seconds(run) for key, run in runs.items()}
    times: dict[tuple[str, int, str], list[float]] = {key: [] for key in runs}
    phases: dict[tuple[str, int, str], list[float]] = {key: [] for key in runs}
    for _ in range(args.repeats):
        for key, run in runs.items():
            found = run()
            times[key].append(statistics.mean(found["members"]))
            phases[key] += found["weights"]
    per_epoch, rows, loop = args.images / args.batch, [], times["loop", 1, "-"]
    for key, values in times.items():
        name, num_members, kind = key
        served = num_members if kind == "sampled" else 1
        alone = times.get((name, 1, "shared"), loop)
        seconds = served * per_epoch * statistics.median(values)
        due = statistics.median(phases[key]) * per_epoch / args.T_theta if phases[key] else 0.0
        rows.append(
            {
                **dict(zip(SETTING, (model, args.batch, name, num_members, kind), strict=True)),
                "epoch_s": seconds,
                "epoch/1": statistics.median(served * a / b for a, b in zip(values, alone, strict=True)),
                "formula": 1.0 if name == "loop" else formula(num_members, kind, args.steps),
                "loop/it": statistics.median(num_members * b / (served * a) for a, b in zip(values, loop, strict=True)),
                "with_phases_s": seconds + due,
                "phases_share": due / (seconds + due),
                "spread": max(values) / min(values),
                "warm_up_s": warm_up[key],
                "batch_s": values,
                "phase_s": phases[key],
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small_resnet", "preact_resnet20"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--schedules", nargs="+", choices=["sampled", "shared"], default=["sampled", "shared"])
    parser.add_argument("--runs", nargs="+", choices=["plain", "compiled"], default=["plain", "compiled"])
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--batches", type=int, default=4, help="timed in each round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="in the epoch that is reported")
    parser.add_argument("--T-theta", type=int, default=50, help="updates per member between weights phases")
    parser.add_argument("--solver", default="oracle", help="of the weights phases: a file of conf/lambda_solver")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"an epoch of {args.images} images, PGD-{args.steps}, solver {args.solver}: {harness.describe()}", flush=True)
    rows: list[dict[str, Any]] = []
    for model in args.models:
        for batch in args.batch_sizes:
            settings = copy.copy(args)
            settings.batch = batch
            found = measure(model, settings)
            harness.table(found, COLUMNS)
            rows += found
    harness.save("-".join(["epoch", *args.models]), rows, vars(args))


if __name__ == "__main__":
    main()
