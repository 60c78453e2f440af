"""How the members' phases of a training attack their batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mixadv.attacks.objectives import OuterLoss
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import WorstPoints
from mixadv.losses import SmoothedZeroOne
from mixadv.mixture import Mixture
from mixadv.ranks import Ranks
from mixadv.threat_model import ThreatModel
from mixadv.training.shared_attack import SharedAttack, parts_of

TARGETS = ("none", "random")
WORST_OF = ("expected", "smoothed", "members")


@dataclass(frozen=True)
class MembersPhase:
    """What the attacks of the members' phases try; those of weights phases, validation and evaluation stay as they are.

    The defaults are the published phase: one PGD that climbs sum_k lambda_k inner_k.

    Args:
        targets: "none", or "random": the attack climbs sum_k lambda_k (z_k,t - z_k,y) with a wrong class t that is
            drawn uniformly for each example, so that members meet all boundaries of the class, not only the nearest.
        worst_of: several attacks on each batch; every example keeps the point of least exact expected accuracy
            sum_k lambda_k 1[f_k(x') = y], and among equals that of largest smoothed 0/1 loss. Of "expected" (climbs the
            inner loss of the training, or the targets), "smoothed" (climbs the expected `SmoothedZeroOne`) and
            "members" (as "expected", on each member of positive weight alone). (): "expected" alone, without a choice.
        eps_scale: s > 0, the radius of the members' phases relative to eps. Members that were trained against a
            radius a little larger than the measured one keep a distance from the images' balls.
        eps_ramp: rho, a share of the training: batch t of T is attacked within the radius s eps min(1, t / (rho T)), so
            that members learn clean images first. 0: the radius is s eps from the first batch on.

    Raises:
        ValueError: an argument is out of its range, or targets that no attack of `worst_of` would use.
    """

    targets: str = "none"
    eps_scale: float = 1.0
    eps_ramp: float = 0.0
    worst_of: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise ValueError(f"targets={self.targets} is unknown: choose one of {', '.join(TARGETS)}")
        if not 0 < self.eps_scale < math.inf:
            raise ValueError(f"eps_scale={self.eps_scale} must be positive and finite: it multiplies eps")
        if not 0 <= self.eps_ramp <= 1:
            raise ValueError(f"eps_ramp={self.eps_ramp} must be a share of the training, from 0 to 1")
        names = [self.worst_of] if isinstance(self.worst_of, str) else list(self.worst_of)
        if set(names) - set(WORST_OF) or len(set(names)) < len(names):
            raise ValueError(f"worst_of=[{','.join(names)}]: give some of {', '.join(WORST_OF)}, each once")
        if self.targets == "random" and names == ["smoothed"]:
            raise ValueError(
                "worst_of=[smoothed] has no attack on targets, so targets=random would be ignored: add expected or "
                "members, or use targets=none"
            )
        object.__setattr__(self, "worst_of", tuple(names))

    def changed(self) -> list[str]:
        """The names of the settings that differ from the published phase."""
        return [one.name for one in fields(self) if getattr(self, one.name) != one.default]

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
        smoothed: the loss that "smoothed" climbs, and that decides between points of equal accuracy.
        num_classes: C.
        ranks: the processes.
        micro_batch_size: the most images that one call of `attack` sees; None for no limit.
    """

    phase: MembersPhase
    attack: PGD
    smoothed: SmoothedZeroOne
    num_classes: int
    ranks: Ranks
    micro_batch_size: int | None = None

    def own_rows(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """This process's rows of the attacked batch [rows, ...]. Draws are made for the whole batch."""
        wanted = random_wrong_classes(y, self.num_classes, generator) if self.phase.targets == "random" else None
        found = []
        for target, attack, classes in self._attacks(mixture, wanted):
            shared = SharedAttack(attack, self.ranks, self.micro_batch_size)
            found.append(shared.own_rows(target, x, y, threat_model, generator, classes))
        return found[0] if len(found) == 1 else self._worst(mixture, found, y[self.ranks.rows(len(y))])

    def _attacks(self, mixture: Mixture, wanted: Tensor | None) -> Iterator[tuple[Mixture, PGD, Tensor | None]]:
        """Whom each attack is on, the attack, and the classes [B] that it aims at."""
        names = self.phase.worst_of or ("expected",)
        members = mixture.support().members
        # On a single member both are the same attack.
        if "expected" in names or ("members" in names and len(members) == 1):
            yield mixture, self.attack, wanted
        if "smoothed" in names:
            yield mixture, replace(self.attack, objective=OuterLoss(self.smoothed)), None
        if "members" in names and len(members) > 1:
            for member in members:
                yield Mixture([member]), self.attack, wanted

    def _worst(self, mixture: Mixture, found: Sequence[Tensor], y: Tensor) -> Tensor:
        """For each example the worst of its points: `found` holds one for each example, [rows, ...] per attack."""
        mixture, objective, kept = mixture.support(), OuterLoss(self.smoothed), []
        with torch.no_grad(), mixture.attack_mode():
            for part in parts_of(len(y), self.micro_batch_size):
                worst = WorstPoints(mixture, found[0][part], y[part])
                for points in found:
                    logits = mixture.member_logits(points[part])
                    worst.offer(points[part], logits, objective(logits, y[part], mixture.weights))
                kept.append(worst.x)
        return torch.cat(kept)

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
