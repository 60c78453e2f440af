"""An attack whose images are divided among processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.attacks.pgd import PGD
from mixadv.mixture import Mixture
from mixadv.ranks import Ranks
from mixadv.threat_model import ThreatModel


@dataclass(frozen=True)
class SharedAttack:
    """PGD on a batch that every process holds; each attacks its own rows.

    Starts are drawn for the whole batch, by every process from its own copy of one generator, so that they are those
    of a single process. `attack.restarts` must be 1: further starts are drawn as the search goes.

    Args:
        attack: what each process runs on its rows. ranks: the processes.
    """

    attack: PGD
    ranks: Ranks

    def own_rows(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """This process's rows of the attacked batch [rows, ...]."""
        if self.ranks.size == 1:
            return self.attack(mixture, x, y, threat_model, generator)
        start = self.attack.starting_points(x, threat_model, generator)
        rows = self.ranks.rows(len(x))
        return self.attack(mixture, x[rows], y[rows], threat_model, generator, start_at=start[rows])

    def __call__(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The whole attacked batch [B, ...], on every process."""
        return self.ranks.gather(self.own_rows(mixture, x, y, threat_model, generator), len(x))
