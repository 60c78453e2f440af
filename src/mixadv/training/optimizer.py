"""A member's optimizer, and its learning rate as a function of the share of its training that is done."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class LearningRate:
    """Factor on the base rate after ``done`` of ``total`` updates of a member, s = done / total in [0, 1].

    constant: 1. piecewise: gamma to the number of milestones passed. cosine: (1 + cos(pi s)) / 2. one_cycle: linear
    from 0 to 1 until s = warmup, then linear to 0; the first update already moves (s counts the update being
    made). Beyond ``total``, where a sampled schedule may lead a member, the rate stays at its last value.

    Raises:
        ValueError: unknown kind.
    """

    kind: str = "piecewise"
    milestones: Sequence[float] = field(default_factory=lambda: (0.5, 0.75))
    gamma: float = 0.1
    warmup: float = 0.25

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "piecewise", "cosine", "one_cycle"):
            raise ValueError(f"lr_schedule {self.kind!r} is unknown: constant, piecewise, cosine or one_cycle")

    def factor(self, done: int, total: int) -> float:
        """The factor for update number ``done`` (from 0) of ``total``."""
        done = min(done, total - 1)
        share = done / total
        if self.kind == "piecewise":
            return self.gamma ** sum(share >= milestone for milestone in self.milestones)
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * share)) / 2
        if self.kind == "one_cycle":
            share = (done + 0.5) / total
            return share / self.warmup if share < self.warmup else (1 - share) / (1 - self.warmup)
        return 1.0


@dataclass(frozen=True)
class MemberOptimizer:
    """SGD of one member: base rate, momentum, weight decay, and the rate's shape over its own updates."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    learning_rate: LearningRate = field(default_factory=LearningRate)

    def build(self, member: nn.Module, updates: int) -> tuple[SGD, LambdaLR]:
        """For `member`, which makes `updates` updates; the schedule is stepped by hand, with the member."""
        optimizer = SGD(
            member.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
        return optimizer, LambdaLR(optimizer, lambda done: self.learning_rate.factor(done, updates))
