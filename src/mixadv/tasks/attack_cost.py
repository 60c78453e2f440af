"""The cost of attacks in passes through members, counted on stand-ins that cost nothing."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixadv.attacks.search import Attack
from mixadv.attacks.suite import passes_of
from mixadv.mixture import Mixture
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel

# The stand-ins' images, and a radius within which no attack succeeds, so that none stops early.
SHAPE, RADIUS, MARGIN = (1, 3, 3), 1e-3, 10.0
# The arguments that say how long an attack searches, and the two lengths from which longer ones are extrapolated.
LENGTHS, FEW = ("num_steps", "num_queries"), (4, 8)


class _StandIn(nn.Module):
    """A linear classifier that is sure of class 0, and counts its forward and backward passes, in images."""

    def __init__(self, num_classes: int, seed: int) -> None:
        super().__init__()
        draws = torch.randn(num_classes, 9, generator=generator_for(seed, "stand-in"))
        self.weight = nn.Parameter(draws / 9)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1) @ self.weight.T
        logits = logits + MARGIN * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), logits.shape[1])
        self.passes += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.passes += len(gradient)


def passes_per_image(attack: Attack, num_members: int, num_classes: int, norm: str) -> int:
    """Forward and backward passes through members that `attack` makes for one image that it cannot fool.

    Args:
        attack: on the whole mixture.
        num_members: of the mixture.
        num_classes: of the data.
        norm: of the ball.
    """
    mixture = _mixture(num_members, num_classes)
    return _cost(attack, mixture, mixture, norm)


def passes_of_protocol(attacks: Mapping[str, Attack], num_members: int, num_classes: int, norm: str) -> int:
    """The same for a whole evaluation: on the mixture, its members and its averaged twin, each replayed on all."""
    mixture = _mixture(num_members, num_classes)
    total, alone = num_members, f"member {num_members - 1}"
    for one in passes_of(attacks, mixture):
        total += num_members
        # An attack costs the same on each member.
        if one.against == alone or not one.against.startswith("member"):
            repeated = num_members if one.against == alone else 1
            total += repeated * _cost(one.attack, one.target, mixture, norm)
    return total


def _mixture(num_members: int, num_classes: int) -> Mixture:
    return Mixture([_StandIn(num_classes, k) for k in range(num_members)])


def _cost(attack: Attack, target: Mixture, mixture: Mixture, norm: str) -> int:
    """The passes of `attack`; those of many steps are extrapolated from few."""
    key = next((key for key in LENGTHS if getattr(attack, key, 0) > max(FEW)), None)
    if key is None or not dataclasses.is_dataclass(attack) or isinstance(attack, type):
        return _counted(attack, target, mixture, norm)
    short, long = (_counted(dataclasses.replace(attack, **{key: n}), target, mixture, norm) for n in FEW)
    return round(long + (long - short) * (getattr(attack, key) - FEW[1]) / (FEW[1] - FEW[0]))


def _counted(attack: Attack, target: Mixture, mixture: Mixture, norm: str) -> int:
    members = [member for member in mixture.members if isinstance(member, _StandIn)]
    before = sum(member.passes for member in members)
    x, y = torch.full((1, *SHAPE), 0.5), torch.zeros(1, dtype=torch.long)
    attack(target, x, y, ThreatModel(norm, RADIUS), generator_for(0, "stand-in"))
    return sum(member.passes for member in members) - before
