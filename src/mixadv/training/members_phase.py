"""How the members' phases of a training attack their batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixadv.attacks.pgd import PGD
from mixadv.mixture import Mixture
from mixadv.ranks import Ranks
from mixadv.threat_model import ThreatModel
from mixadv.training.shared_attack import SharedAttack

TARGETS = ("none", "random")


@dataclass(frozen=True)
class MembersPhase:
    """What the attacks of the members' phases try; those of weights phases, validation and evaluation stay as they are.

    The defaults are the published phase: one PGD that climbs sum_k lambda_k inner_k.

    Args:
        targets: "none", or "random": the attack climbs sum_k lambda_k (z_k,t - z_k,y) with a wrong class t that is
            drawn uniformly for each example, so that members meet all boundaries of the class, not only the nearest.
        eps_scale: s > 0, the radius of the members' phases relative to eps. Members that were trained against a
            radius a little larger than the measured one keep a distance from the images' balls.
        eps_ramp: rho, a share of the training: batch t of T is attacked within the radius s eps min(1, t / (rho T)), so
            that members learn clean images first. 0: the radius is s eps from the first batch on.

    Raises:
        ValueError: an argument is out of its range.
    """

    targets: str = "none"
    eps_scale: float = 1.0
    eps_ramp: float = 0.0

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise ValueError(f"targets={self.targets} is unknown: choose one of {', '.join(TARGETS)}")
        if not 0 < self.eps_scale < math.inf:
            raise ValueError(f"eps_scale={self.eps_scale} must be positive and finite: it multiplies eps")
        if not 0 <= self.eps_ramp <= 1:
            raise ValueError(f"eps_ramp={self.eps_ramp} must be a share of the training, from 0 to 1")

    def ball(self, threat_model: ThreatModel, share_done: float) -> ThreatModel:
        """The ball of batch t of T; share_done: t / T."""
        share = self.eps_scale * (1.0 if share_done >= self.eps_ramp else share_done / self.eps_ramp)
        return threat_model if share == 1 else replace(threat_model, eps=threat_model.eps * share)


@dataclass(frozen=True)
class MembersAttack:
    """The attack of a members' phase on a batch that every process holds, see `SharedAttack`.

    Args:
        phase: what it tries.
        attack: PGD on the inner loss.
        num_classes: C.
        ranks: the processes.
        micro_batch_size: the most images that one call of `attack` sees; None for no limit.
    """

    phase: MembersPhase
    attack: PGD
    num_classes: int
    ranks: Ranks
    micro_batch_size: int | None = None

    def own_rows(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """This process's rows of the attacked batch [rows, ...]. Draws are made for the whole batch."""
        wanted = random_wrong_classes(y, self.num_classes, generator) if self.phase.targets == "random" else None
        shared = SharedAttack(self.attack, self.ranks, self.micro_batch_size)
        return shared.own_rows(mixture, x, y, threat_model, generator, wanted)

    def __call__(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """The whole attacked batch [B, ...], on every process."""
        return self.ranks.gather(self.own_rows(mixture, x, y, threat_model, generator), len(x))


def random_wrong_classes(y: Tensor, num_classes: int, generator: torch.Generator | None) -> Tensor:
    """A class other than y for each example, uniformly: [B] -> [B] long."""
    device = y.device if generator is None else generator.device
    steps = torch.randint(1, num_classes, y.shape, generator=generator, device=device)
    return (y + steps.to(y.device)) % num_classes
