"""Random points of the ball: the control that every search must beat."""

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
    """The worst of `num_samples` random points of S_eps(x), see `ThreatModel.sample`, and of x itself.

    Per example: the lowest exact expected accuracy sum_k lambda_k 1[f_k(x') = y], and among equals the highest
    objective, see `mixadv.attacks.objectives`. An example whose expected accuracy has reached 0 is left alone from
    there on. In many dimensions random points find little; an attack that finds less than they do is broken.

    Members need not be differentiable. Raises ValueError for num_samples below 1.
    """

    num_samples: int = 100
    objective: Objective = field(default_factory=ExpectedLoss)

    def __post_init__(self) -> None:
        self.require({"num_samples": 1})

    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        climb, worst = Climb.begin(mixture, self.objective, x, y)
        for _ in range(self.num_samples):
            rows = worst.open()
            if not len(rows):
                break
            climb.look(threat_model.sample(x[rows], generator), rows)
        return worst.x
