"""What an attack on a mixture climbs: one number per example, larger is better for the attacker.

An objective is called with the logits of all members `[L, B, C]`, labels `[B]`, weights `[L]` and, where its
`needs_clean` says so, the members' logits at the clean input `[L, B, C]` (constants); it returns `[B]`. The
expectation over members is the finite sum, never a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mixadv.losses import ATTACK_LOSSES, RobustLoss, cross_entropy


class Objective(Protocol):
    """The interface of this module's classes."""

    @property
    def needs_clean(self) -> bool:
        """Whether the members' logits at the clean input are needed."""

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None) -> Tensor:
        """[L, B, C], [B], [L], [L, B, C] or None -> [B]."""


def _expectation(losses: Tensor, weights: Tensor) -> Tensor:
    """sum_k lambda_k losses_k, [L, B] -> [B]; not a matrix product, which autocast and TF32 would round."""
    return (weights.to(losses)[:, None] * losses).sum(0)


@dataclass(frozen=True)
class ExpectedLoss:
    """sum_k lambda_k loss(f_k(x'), y), loss one of "ce", "margin", "dlr"; ValueError for another name."""

    loss: str = "ce"

    def __post_init__(self) -> None:
        if self.loss not in ATTACK_LOSSES:
            raise ValueError(f"unknown attack loss {self.loss!r}: choose one of {', '.join(ATTACK_LOSSES)}")

    @property
    def needs_clean(self) -> bool:
        return False

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _expectation(ATTACK_LOSSES[self.loss](logits, y), weights)


@dataclass(frozen=True)
class AveragedCE:
    """-log sum_k lambda_k softmax(f_k(x'))_y: the cross-entropy of the averaged prediction.

    At most the expected cross-entropy (Jensen). It measures the ensemble, not the randomized classifier.
    """

    @property
    def needs_clean(self) -> bool:
        return False

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        losses = cross_entropy(logits, y)
        return -torch.logsumexp(weights.to(losses).log()[:, None] - losses, dim=0)


@dataclass(frozen=True)
class InnerLoss:
    """sum_k lambda_k inner_k, the inner loss of adversarial training (`AT`, `TRADES`) against the mixture."""

    robust_loss: RobustLoss

    @property
    def needs_clean(self) -> bool:
        return self.robust_loss.needs_clean

    def __call__(self, logits: Tensor, y: Tensor, weights: Tensor, clean_logits: Tensor | None = None) -> Tensor:
        return _expectation(self.robust_loss.inner(logits, clean_logits, y), weights)
