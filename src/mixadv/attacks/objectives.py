"""Objectives that an attack on a mixture maximises: one number per example, larger is better for the attacker.

An objective is called with the logits of all members `[L, B, C]`, labels `[B]`, weights `[L]` and, if its
`needs_clean` is true, the members' logits at the clean input `[L, B, C]` (constants); it returns `[B]`. The
expectation over members is the finite sum, never a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from mixadv.losses import ATTACK_LOSSES, TARGETED_LOSSES, RobustLoss, margin_targeted
from mixadv.mixture import log_average


class Objective(Protocol):
    """The interface of this module's classes."""

    @property
    def needs_clean(self) -> bool:
        """Whether the objective needs the members' logits at the clean input."""

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None) -> Tensor:
        """[L, B, C], [B], [L], [L, B, C] or None -> [B]."""


@runtime_checkable
class ExpectedObjective(Objective, Protocol):
    """An objective sum_k lambda_k l_k(f_k(x'), y): its gradient can be computed member by member."""

    def of_member(self, k: int, logits: Tensor, y: Tensor, clean_logits: Tensor | None) -> Tensor:
        """l_k, [B], for the logits [B, C] of member k and the clean logits [L, B, C] of all members."""


def _expectation(losses: Tensor, weights: Tensor) -> Tensor:
    """sum_k lambda_k losses_k, [L, B] -> [B]; not a matrix product, which autocast and TF32 would round."""
    return (weights.to(losses)[:, None] * losses).sum(0)


@dataclass(frozen=True)
class ExpectedLoss:
    """sum_k lambda_k loss(f_k(x'), y), loss one of "ce", "margin", "dlr"; ValueError for another name."""

    needs_clean: ClassVar[bool] = False

    loss: str = "ce"

    def __post_init__(self) -> None:
        if self.loss not in ATTACK_LOSSES:
            raise ValueError(f"unknown attack loss {self.loss!r}: choose one of {', '.join(ATTACK_LOSSES)}")

    def of_member(self, k: int, logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        """loss(f_k(x'), y): see `ExpectedObjective`."""
        return ATTACK_LOSSES[self.loss](logits, y)

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _expectation(ATTACK_LOSSES[self.loss](logits, y), weights)


@dataclass(frozen=True)
class AveragedLoss:
    """loss(log sum_k lambda_k softmax(f_k(x')), y), loss one of "ce", "margin", "dlr"; ValueError for another name.

    The log-probabilities of the averaged prediction take the place of the logits. With one member, "margin" and "dlr"
    equal those of its logits, because a log-softmax only shifts them. "ce" is at most the expected cross-entropy
    (Jensen). The objective measures the ensemble, not the randomized classifier.
    """

    needs_clean: ClassVar[bool] = False

    loss: str = "ce"

    def __post_init__(self) -> None:
        if self.loss not in ATTACK_LOSSES:
            raise ValueError(f"unknown attack loss {self.loss!r}: choose one of {', '.join(ATTACK_LOSSES)}")

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return ATTACK_LOSSES[self.loss](log_average(logits, weights), y)


@dataclass(frozen=True)
class TargetedLoss:
    """sum_k lambda_k loss_t(f_k(x')): pulls all members towards one wrong class t(x), fixed for the whole search.

    t(x) is the `rank`-th most probable wrong class (counted from 1) of the averaged prediction at the clean input.

    loss: "dlr" (needs 4 classes) or "margin".

    Raises ValueError for unknown names, a rank below 1 or beyond the wrong classes, missing clean logits.
    """

    needs_clean: ClassVar[bool] = True

    loss: str = "dlr"
    rank: int = 1

    def __post_init__(self) -> None:
        if self.loss not in TARGETED_LOSSES:
            raise ValueError(f"unknown targeted loss {self.loss!r}: choose one of {', '.join(TARGETED_LOSSES)}")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: 1 is the most probable wrong class")

    def target(self, clean_logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """t(x): [L, B, C], [B], [L] -> [B] long."""
        wrong = log_average(clean_logits, weights).scatter(-1, y[:, None], float("-inf"))
        if self.rank >= wrong.shape[-1]:
            raise ValueError(f"there is no wrong class of rank {self.rank}: the members have {wrong.shape[-1]} classes")
        return wrong.topk(self.rank, dim=-1).indices[:, -1]

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        if clean_logits is None:
            raise ValueError("targets are chosen at the clean input: pass the clean logits")
        target = self.target(clean_logits, y, weights)
        return _expectation(TARGETED_LOSSES[self.loss](logits, y, target), weights)


@dataclass(frozen=True, eq=False)
class TowardsClass:
    """sum_k lambda_k (z_k,t - z_k,y): pulls all members towards the wrong class t of each example.

    target: t, [B] long, for the examples of one call; a search that drops examples on its way cannot use it.
    """

    needs_clean: ClassVar[bool] = False

    target: Tensor

    def of_member(self, k: int, logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        """z_k,t - z_k,y: see `ExpectedObjective`."""
        return margin_targeted(logits, y, self.target)

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _expectation(margin_targeted(logits, y, self.target), weights)


@dataclass(frozen=True)
class InnerLoss:
    """sum_k lambda_k inner_k, the inner loss of adversarial training (`AT`, `TRADES`) against the mixture."""

    robust_loss: RobustLoss

    @property
    def needs_clean(self) -> bool:
        return self.robust_loss.needs_clean

    def of_member(self, k: int, logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        """inner_k: see `ExpectedObjective`."""
        return self.robust_loss.inner(logits, None if clean_logits is None else clean_logits[k], y)

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _expectation(self.robust_loss.inner(logits, clean_logits, y), weights)


@dataclass(frozen=True)
class OuterLoss:
    """sum_k lambda_k outer_k, the expected loss that the members minimise."""

    robust_loss: RobustLoss

    @property
    def needs_clean(self) -> bool:
        return self.robust_loss.needs_clean

    def of_member(self, k: int, logits: Tensor, y: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        """outer_k: see `ExpectedObjective`."""
        return self.robust_loss.outer(logits, None if clean_logits is None else clean_logits[k], y)

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _expectation(self.robust_loss.outer(logits, clean_logits, y), weights)
