"""Random linear classifiers on three Gaussians in the plane: when does a mixture beat its best member?

P(Y = -1) = P(Y = +1) = 1/2; X | Y = -1 ~ N((0, 0), I); X | Y = +1 ~ (N((-3, 0), I) + N((3, 0), I)) / 2. No line
separates the classes: one that cuts off the left half of class +1 leaves the right half to its mirror image. The
attacker moves each point within a Euclidean ball of radius eps, without a box. After the synthetic experiment of
Meunier et al., "Mixed Nash Equilibria in the Adversarial Examples Game", ICML 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from mixadv.game import FiniteGame
from mixadv.lambda_solvers import AcceleratedEntropic, OracleSubgradient
from mixadv.threat_model import ThreatModel

CENTRE = 3.0
MAX_TRIES = 20_000
_TRIES_AT_ONCE = 1_000


@dataclass(frozen=True, eq=False)
class GaussianProblem:
    """N labelled points, L half planes, and m random directions of attack per point.

    Attributes:
        x: [N, 2] float64.
        y: [N] long, -1 or +1.
        normals: [L, 2], of length 1.
        offsets: [L]; classifier k predicts +1 iff normals[k]·x + offsets[k] >= 0, so |offsets[k]| is its distance
            to the origin.
        steps: [N, 1 + m, 2], points of the unit ball, the first of them 0; the rest are uniform. One set serves
            every radius, so that curves over eps are not blurred by new draws.
    """

    x: Tensor
    y: Tensor
    normals: Tensor
    offsets: Tensor
    steps: Tensor

    @cached_property
    def _slopes(self) -> Tensor:
        """[N, 1 + m, L], how fast each score grows with the radius: the costly part of a game, shared by all radii."""
        return self.steps @ self.normals.T

    def candidates(self, eps: float) -> Tensor:
        """[N, 1 + m, 2], the perturbed points: x itself, and m uniform points of its ball of radius eps."""
        return self.x[:, None] + eps * self.steps

    def game(self, eps: float) -> FiniteGame:
        """The 0/1 losses [N, 1 + m, L] uint8 of the classifiers at the candidates, masses 1/N.

        Raises:
            ValueError: eps is negative or not finite.
        """
        radius = ThreatModel("l2", eps, bounds=None).eps
        start = self.x @ self.normals.T + self.offsets
        scores = torch.add(start[:, None], self._slopes, alpha=radius)
        return FiniteGame(((scores >= 0) != (self.y > 0)[:, None, None]).to(torch.uint8))

    def risks(self) -> Tensor:
        """[L], the 0/1 risk of each classifier on the unperturbed points."""
        return _risks(self.x, self.y, self.normals, self.offsets)


def draw_problem(
    generator: Generator,
    num_points: int = 1000,
    num_samples: int = 1000,
    num_classifiers: int = 10,
    max_risk: float = 0.4,
) -> GaussianProblem:
    """Draw the points, then the classifiers, then the directions of attack.

    A classifier is sign(w·x + b) with (w, b) ~ N(0, I_3), drawn anew until its 0/1 risk on the points is below
    `max_risk`; w and b are then divided by ||w||.

    Args:
        generator: a generator on the CPU.
        num_points: N >= 1.
        num_samples: m >= 0, uniform points per ball.
        num_classifiers: L >= 1.
        max_risk: in units of risk, > 0.

    Raises:
        ValueError: an argument is outside its range, or fewer than L of 20,000 random classifiers are good enough;
            the message says how good the best one was.
    """
    for name, value, least in (
        ("num_points", num_points, 1),
        ("num_samples", num_samples, 0),
        ("num_classifiers", num_classifiers, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if not max_risk > 0:
        raise ValueError(f"max_risk is {max_risk}: no risk is below it, take a number in (0, 1]")
    y = 2 * torch.randint(2, (num_points,), generator=generator) - 1
    side = 2 * torch.randint(2, (num_points,), generator=generator) - 1
    x = torch.randn(num_points, 2, generator=generator, dtype=torch.float64)
    x[:, 0] += CENTRE * side * (y > 0)
    normals, offsets = _draw_classifiers(x, y, num_classifiers, max_risk, generator)
    steps = torch.zeros(num_points, 1 + num_samples, 2, dtype=torch.float64)
    flat = torch.zeros(num_points * num_samples, 2, dtype=torch.float64)
    unit = ThreatModel("l2", 1.0, bounds=None)
    steps[:, 1:] = unit.sample(flat, generator).reshape(num_points, num_samples, 2)
    return GaussianProblem(x, y, normals, offsets, steps)


def _draw_classifiers(
    x: Tensor, y: Tensor, num_classifiers: int, max_risk: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Normals [L, 2] and offsets [L], by rejection."""
    kept: list[Tensor] = []
    found, best = 0, 1.0
    for _ in range(MAX_TRIES // _TRIES_AT_ONCE):
        drawn = torch.randn(_TRIES_AT_ONCE, 3, generator=generator, dtype=torch.float64)
        drawn = drawn / drawn[:, :2].norm(dim=1, keepdim=True)
        risks = _risks(x, y, drawn[:, :2], drawn[:, 2])
        good = drawn[risks < max_risk]
        kept.append(good)
        found, best = found + len(good), min(best, risks.min().item())
        if found >= num_classifiers:
            chosen = torch.cat(kept)[:num_classifiers]
            return chosen[:, :2].contiguous(), chosen[:, 2].contiguous()
    raise ValueError(
        f"max_risk is {max_risk}: only {found} of {MAX_TRIES:,} random classifiers have a smaller risk, "
        f"{num_classifiers} are wanted; the best has {best:.3g}, choose a larger max_risk"
    )


def _risks(x: Tensor, y: Tensor, normals: Tensor, offsets: Tensor) -> Tensor:
    wrong = (x @ normals.T + offsets >= 0) != (y > 0)[:, None]
    return wrong.to(torch.float64).mean(0)


def oracle_errors(game: FiniteGame, value: float, steps: Sequence[int]) -> list[float]:
    """R(best iterate) - value after Algorithm 1 with each number of steps; its step size is set for that number."""
    return [OracleSubgradient(num_steps=count).solve(game).value - value for count in steps]


@dataclass(frozen=True)
class EntropicTrace:
    """One run of the accelerated method; entry t of a list is the state after t steps.

    Attributes:
        alpha: its temperature.
        value_errors: R(best iterate so far) - V, which does not fall to 0: F is not R.
        smoothed_errors: F(iterate) - min F, where min F is the least F seen.
        certificate: a bound on how far that least F is above min F.
    """

    alpha: float
    value_errors: list[float]
    smoothed_errors: list[float]
    certificate: float


def entropic_trace(game: FiniteGame, value: float, alpha: float, num_steps: int) -> EntropicTrace:
    """The accelerated method at temperature alpha on the game's own perturbations; `value` is V."""
    history = AcceleratedEntropic(alpha=alpha, num_steps=num_steps).solve(game).history
    smoothed = history["smoothed_value"]
    # Every iterate bounds min F from below; the best bound need not be the least iterate's.
    bound = max(f - gap for f, gap in zip(smoothed, history["smoothed_gap"], strict=True))
    least = min(smoothed)
    return EntropicTrace(
        alpha,
        [best - value for best in history["best_value"]],
        [f - least for f in smoothed],
        max(least - bound, 0.0),
    )
