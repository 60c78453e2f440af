"""Several attacks on one mixture, and the worst that any of them finds for each example."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixadv.attacks.search import Attack, WorstPoints, check_batch, check_points
from mixadv.correctness import correct
from mixadv.mixture import Mixture, as_mixture
from mixadv.seeding import generator_for
from mixadv.shipped import shipped_protocol
from mixadv.threat_model import ThreatModel

MIXTURE, TWIN, CLEAN = "mixture", "averaged twin", "clean"


class Pass(NamedTuple):
    """One attack against one classifier; its points are replayed on the whole mixture.

    An attack class sets ``warm_starts = True`` if its calls take ``starts=`` [B, ...]: the worst points that earlier
    passes have found for the mixture. The results of such an attack depend on the passes before it.

    name: of the attack. attack: the attack. against: "mixture", "member k", "averaged twin" or "other weights j".
    target: the attacked classifier as a mixture; it shares the members' modules.
    """

    name: str
    attack: Attack
    against: str
    target: Mixture

    @property
    def key(self) -> str:
        """NAME for the attack on the mixture, "NAME on AGAINST" for the others."""
        return self.name if self.against == MIXTURE else f"{self.name} on {self.against}"

    @property
    def is_warm(self) -> bool:
        """Whether the attack takes the worst points of earlier passes as ``starts``."""
        return bool(getattr(self.attack, "warm_starts", False))

    def points(
        self, x: Tensor, y: Tensor, threat_model: ThreatModel, seed: int, batch: int, starts: Tensor | None = None
    ) -> Tensor:
        """The attacked images of batch number `batch`, checked by `check_points`.

        starts: [B, ...], the worst points of earlier passes, for an attack that `is_warm`; other passes do not matter.
        """
        draws = generator_for(seed, self.name, self.against, batch, device=x.device)
        more: dict[str, Any] = {"starts": starts} if self.is_warm else {}
        points = self.attack(self.target, x, y, threat_model, draws, **more)
        check_points(self.name, points, x, threat_model)
        return points

    def replayed(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        seed: int,
        batch: int,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The `points`, and the logits [L, B, C] of all members of `mixture` there, from a plain forward pass."""
        points = self.points(x, y, threat_model, seed, batch, starts)
        with torch.no_grad(), mixture.attack_mode(plain=True):
            return points, mixture.member_logits(points)


@dataclass(frozen=True, eq=False)
class SuiteRecord:
    """What a suite found on a batch.

    Attributes:
        expected_accuracy: [B] float64, the least exact expected accuracy sum_k lambda_k 1[f_k(x') = y] over x and all
            points found. Its mean over examples is an upper bound of the robust accuracy.
        clean: [B] float64, the expected accuracy at x.
        by_attack: [B] float64 for each attack against the mixture, under its name, and for each attack against a part
            of it, under "NAME on member k" and "NAME on averaged twin".
        x_adv: [B, ...], points with this `expected_accuracy`.
        found_by: B names: the entry of `by_attack` that found x_adv first; "clean" for x itself.
        seconds: duration of each entry of `by_attack`.
    """

    expected_accuracy: Tensor
    clean: Tensor
    by_attack: dict[str, Tensor]
    x_adv: Tensor
    found_by: list[str]
    seconds: dict[str, float]


@dataclass(frozen=True)
class AttackSuite:
    """Named attacks, each run on the mixture and, if it `transfers`, on every member alone and on the averaged twin.

    The result of an example is the minimum over all points that any attack found, so adding an attack never raises it.
    Every pass draws from a generator of its own, so the points of an attack do not depend on the other attacks, unless
    it begins at their worst points (``warm_starts``, see `Pass`).

    An attack class sets ``transfers = False`` if its points against one member are not worth replaying on the mixture
    (attacks made for mixtures, slow black boxes, noise).

    attacks: name -> attack; names begin with their algorithm.
    name: of the protocol.

    Raises ValueError if there is no attack, or one is not callable or named "clean".
    """

    attacks: Mapping[str, Attack]
    name: str = "custom"

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("a suite needs at least one attack")
        for name, attack in self.attacks.items():
            if name == CLEAN:
                raise ValueError(f"the name {CLEAN} stands for the clean images: give that attack another name")
            if not callable(attack):
                raise ValueError(f"attack {name} is {attack!r}: give an attack, for example PGD()")

    @classmethod
    def from_protocol(cls, name: str) -> AttackSuite:
        """The suite that `protocol=NAME` runs: "fast", "strict", "paper", "study" or "study_paper".

        Raises:
            UserError: there is no such protocol.
        """
        # Hydra is slow to import.
        from mixadv.instantiate import instantiate

        nodes = shipped_protocol(name)["attacks"]
        return cls({key: instantiate(node, f"protocol.attacks.{key}", Attack) for key, node in nodes.items()}, name)

    def __call__(
        self,
        mixture: Mixture | nn.Module,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        *,
        seed: int = 0,
        batch: int = 0,
    ) -> SuiteRecord:
        """Attack x [B, ...] with labels y [B]; a plain module counts as a mixture of one member.

        Args:
            seed: of all random starts. batch: the number of this batch; batches have different random starts.

        Raises:
            ValueError: as `check_batch`. RuntimeError: an attack left ball or box.
        """
        y = check_batch(x, y, threat_model)
        mixture = as_mixture(mixture)
        x = x.detach()
        worst = WorstPoints(mixture, x, y)
        found_by = [CLEAN] * len(x)
        accuracy: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        for one in (unattacked(mixture), *passes_of(self.attacks, mixture)):
            started = time.perf_counter()
            points, logits = one.replayed(mixture, x, y, threat_model, seed, batch, worst.x)
            accuracy[one.key] = mixture.expectation(correct(logits, y))
            for i in worst.offer(points, logits, -accuracy[one.key]).nonzero().flatten().tolist():
                found_by[i] = one.key
            seconds[one.key] = time.perf_counter() - started
        clean = accuracy.pop(CLEAN)
        del seconds[CLEAN]
        return SuiteRecord(worst.accuracy, clean, accuracy, worst.x, found_by, seconds)


def unattacked(mixture: Mixture) -> Pass:
    """The pass that returns the clean images."""
    return Pass(CLEAN, _no_attack, MIXTURE, mixture)


def _no_attack(
    mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
) -> Tensor:
    return x


def passes_of(
    attacks: Mapping[str, Attack], mixture: Mixture, other_weights: Sequence[Sequence[float]] = ()
) -> list[Pass]:
    """All attacks on the mixture, then those on its members alone, its averaged twin, and it with other weights.

    Passes that begin at the worst points of others come last.
    """
    passes = [Pass(name, attack, MIXTURE, mixture) for name, attack in attacks.items()]
    if mixture.num_members > 1:
        for name, attack in attacks.items():
            if getattr(attack, "transfers", True):
                alone = enumerate(mixture.members)
                passes += [Pass(name, attack, f"member {k}", Mixture([member])) for k, member in alone]
                # The forward pass of a mixture is its averaged prediction.
                passes.append(Pass(name, attack, TWIN, Mixture([mixture])))
            for j, weights in enumerate(other_weights):
                passes.append(Pass(name, attack, f"other weights {j}", Mixture(mixture.members, weights)))
    return sorted(passes, key=lambda one: one.is_warm)
