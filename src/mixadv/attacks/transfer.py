"""Points found against parts of a mixture, replayed on all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import Attack, check_batch, worst_from_x
from mixadv.mixture import Mixture, as_mixture
from mixadv.threat_model import ThreatModel


@dataclass(frozen=True)
class Transfer:
    """An attack on each member alone and on the averaged twin; the points count as replayed on the mixture.

    The averaged twin is the classifier with logits log sum_k lambda_k softmax(f_k(x)), attacked as a mixture of one
    member. Climbing a sum over members can stall where each pulls its own way; a point that fools one member alone
    is found by an attack on that one, and what it does to the others is seen when it is replayed.

    Per example, the worst of these L + 1 points and of x itself: the lowest exact expected accuracy
    sum_k lambda_k 1[f_k(x') = y], and among equals the highest objective. The members are attacked in the order of
    decreasing lambda, those without weight last, and then the twin; an example whose expected accuracy has reached 0
    is left alone from there on. With L = 1 it is the attack itself, called as it is.

    attack: any attack, called with mixtures of one member.
    objective: what decides between points of equal accuracy, see `mixadv.attacks.objectives`.

    Calling it returns x_adv in the shape and dtype of x, detached; the mixture is left as found.

    Raises ValueError where the attack cannot be called, or raises it (an attack with gradients does so on a member
    that has none); for x not float32 or float64, labels that do not match, x outside the box.
    """

    transfers: ClassVar[bool] = False

    attack: Attack
    objective: Objective = field(default_factory=ExpectedLoss)

    def __post_init__(self) -> None:
        if not callable(self.attack):
            raise ValueError(f"attack is {self.attack!r}: give an attack, for example PGD()")

    def __call__(
        self,
        mixture: Mixture | nn.Module,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Attack x `[B, ...]` with labels y `[B]`; a plain module counts as a mixture of one member."""
        check_batch(x, y, threat_model)
        mixture = as_mixture(mixture)
        if mixture.num_members == 1:
            return self.attack(mixture, x, y, threat_model, generator)
        if threat_model.eps == 0 or x.numel() == 0:
            return x.detach().clone()
        with torch.inference_mode(False), torch.no_grad(), mixture.attack_mode():
            x, y = x.detach().clone(), y.clone()
            # What fools a member that is never drawn may fool others, so all of them are attacked.
            drawn = mixture.support()
            worst, clean_logits = worst_from_x(drawn, x, y, self.objective)
            for surrogate in _surrogates(mixture):
                rows = worst.open()
                if not len(rows):
                    break
                points = self.attack(surrogate, x[rows], y[rows], threat_model, generator).detach()
                logits = drawn.member_logits(points)
                reference = None if clean_logits is None else clean_logits[:, rows]
                worst.offer(points, logits, self.objective(logits, y[rows], drawn.weights, reference), rows)
            return worst.x


def _surrogates(mixture: Mixture) -> Iterator[Mixture]:
    """Mixtures of one member: each member by decreasing weight, then the averaged twin."""
    for k in mixture.weights.argsort(descending=True, stable=True).tolist():
        yield Mixture([mixture.members[k]])
    # A mixture's forward pass is its averaged prediction.
    yield Mixture([mixture])
