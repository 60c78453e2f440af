"""Random points of the ball: a control for the other attacks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import Climb, SearchAttack
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel


@dataclass(frozen=True)
class UniformNoise(SearchAttack):
    """The worst of x and `num_samples` random points of S_eps(x), drawn by `ThreatModel.sample`; see `SearchAttack`.

    In many dimensions random points find little; an attack that finds less than they do is broken.

    objective: decides between points of equal expected accuracy, see `mixadv.attacks.objectives`.

    Members need not be differentiable. Raises ValueError for num_samples below 1.
    """

    num_samples: int = 100
    objective: Objective = field(default_factory=ExpectedLoss)

    def __post_init__(self) -> None:
        self.require({"num_samples": 1})

    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        climb = Climb.begin(mixture, self.objective, x, y)
        for _ in range(self.num_samples):
            rows = climb.worst.unfinished()
            if not len(rows):
                break
            climb.score(threat_model.sample(x[rows], generator), rows)
        return climb.worst.x
