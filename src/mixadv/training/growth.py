"""Growing a mixture: each new member is trained as a response to the attacker, then the game is solved again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixadv.game import FiniteGame
from mixadv.lambda_solvers import LinearProgram
from mixadv.mixture_game import MixtureGame

STARTS = ("last", "fresh")
RESPONSES = ("adaptive", "fixed", "equilibrium")


@dataclass(frozen=True)
class Growth:
    """How the stages of a growing mixture train their members, and when a mixture is large enough.

    Stage s = 0, 1, ... trains member s alone; members 0..s-1 stay as they are. Stage 0 is adversarial training of one
    model. What the later ones train on:

    - ``adaptive``: attacks on the mixture of the members 0..s with equal weights, the new one included, as in BARRE
      (Dbouk & Shanbhag, On the robustness of randomized ensembles to adversarial perturbations, ICML 2023).
      MRBoost (Zhang et al., Building robust ensembles via margin boosting, ICML 2022) attacks, and trains through,
      averaged logits instead.
    - ``fixed``: attacks on the mixture of the members 0..s-1 with its weights lambda, as in BAT (Pinot et al.,
      Randomization matters, ICML 2020), where the second member is trained on attacks of the first.
    - ``equilibrium``: the attacker's optimal mixed strategy against the members 0..s-1: the game on training images is
      solved at the start of the stage, and each example is an image i drawn uniformly with a point drawn from Q_i. The
      new member approximates a best response to Q: the double oracle (McMahan, Gordon & Blum, ICML 2003) with networks
      as strategies. Images have no augmentation then.

    Args:
        start: parameters from which a stage starts: "last", those of the member before it (as BARRE), or "fresh", those
            that the member has.
        response: see above.
        min_gain: a new member that lowers the value of the game (in units of the payoff) by at most this much is left
            out, and the training ends. None: all members are trained and weighed. A member that adds nothing alone may
            do so with the next one.
        num_images: the most training images in the game of ``equilibrium``; all its points are kept in memory.

    Raises:
        ValueError: an argument is out of its range.
    """

    start: str = "last"
    response: str = "adaptive"
    min_gain: float | None = 0.005
    num_images: int = 1000

    def __post_init__(self) -> None:
        for name, choices in (("start", STARTS), ("response", RESPONSES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        if self.min_gain is not None and not 0 <= self.min_gain < math.inf:
            raise ValueError(f"min_gain={self.min_gain} must be at least 0 and finite, or None to train all members")
        if not isinstance(self.num_images, int) or isinstance(self.num_images, bool) or self.num_images < 1:
            raise ValueError(f"num_images={self.num_images} must be a whole number of at least 1")


@dataclass(frozen=True)
class Stage:
    """The game after a stage, on all points that the attacker found in it: the certificate of the new member.

    Attributes:
        member: the new one, s.
        value: the largest loss of the weights found for the members 0..s, the mean over the images of the payoff at the
            worst point: an estimate from below of their risk.
        lower_bound: no weights of the members 0..s have less, on these images.
        value_without: the least value of any weights of the members 0..s-1, on the same points; None for the first.
            It is the value of `weights` where the new member was left out.
        kept: whether the new member lowered the value by more than ``min_gain``; the first is always kept.
        weights: lambda [L] after the stage, 0 for all members that are not in the mixture.
        num_images, num_points: of the game; points of each image.
    """

    member: int
    value: float
    lower_bound: float
    value_without: float | None
    kept: bool
    weights: list[float]
    num_images: int
    num_points: int

    def __str__(self) -> str:
        lam = ", ".join(f"{weight:.2f}" for weight in self.weights)
        images = f"on {self.num_images:,} images"
        if self.value_without is None:
            return f"member {self.member}: value {self.value:.4f} {images}"
        numbers = f"value {self.value:.4f} with it (at least {self.lower_bound:.4f}), {self.value_without:.4f} without"
        end = f"lambda ({lam})" if self.kept else "it is left out, and the training ends"
        return f"member {self.member}: {numbers}, {images}; {end}"


def weigh(
    game: MixtureGame, solver: LinearProgram, before: Sequence[float], min_gain: float | None, num_members: int
) -> Stage:
    """Solve the game of the members 0..s, and compare its value with that of the members 0..s-1.

    The game of the members 0..s-1 is solved on the points of the game of all. If the new member is left out, these are
    the weights, of value `value_without`. Most of the points were found against mixtures that hold the new member. So
    `value_without` may be too low for the risk of the members 0..s-1, and the gain of the new member with it.

    Args:
        game: its members are 0..s.
        solver: starts from the weights `before` [s], which so are attacked first.
        before: lambda of the members 0..s-1; () for the first.
        min_gain: see `Growth`.
        num_members: L, the length of `Stage.weights`.
    """
    count = game.num_members
    lam0 = torch.tensor([*before, 0.0] if before else [1.0], dtype=torch.float64)
    solution = solver.solve(game, lam0=lam0, generator=game.generator)
    known = game.known()
    assert solution.lower_bound is not None
    without, lam = None, solution.weights
    if before:
        without = solver.solve(FiniteGame(known.losses[..., : count - 1], known.mask, known.masses))
    kept = without is None or min_gain is None or without.value - solution.value > min_gain
    if without is not None and not kept:
        lam = without.weights
    weights = [*lam.tolist(), *[0.0] * (num_members - len(lam))]
    return Stage(
        member=count - 1,
        value=solution.value,
        lower_bound=solution.lower_bound,
        value_without=None if without is None else without.value,
        kept=kept,
        weights=weights,
        num_images=known.num_examples,
        num_points=known.num_perturbations,
    )


class RecordedGame(MixtureGame):
    """A game that keeps the points that its attacker plays, on the CPU, in the order of `known().losses`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.points = [self.x.cpu()]

    def _play(self, points: Sequence[Tensor]) -> None:
        self.points += [point.cpu() for point in points]
        super()._play(points)


class Strategy:
    """The attacker's optimal strategy Q in a solved game: for each image a distribution over its points.

    An optimal basic solution plays about one point for most images: only points with Q_ij > 0 are kept.

    Args:
        game: after its solver has ended.
        solver: solves the finite game on all points exactly.
    """

    def __init__(self, game: RecordedGame, solver: LinearProgram) -> None:
        attack = solver.solve(game.known()).attack
        assert attack is not None
        self.x, self.y = game.x, game.y
        self.probabilities = attack.clamp_min(0)
        images, moves = self.probabilities.nonzero(as_tuple=True)
        self.points = torch.stack([game.points[j][i] for i, j in zip(images.tolist(), moves.tolist(), strict=True)])
        # The row of `points` of each (image, move).
        self._rows = torch.zeros_like(attack, dtype=torch.long)
        self._rows[images, moves] = torch.arange(len(images))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images x [count, C, H, W] drawn uniformly, a point of each drawn from its Q_i, and labels [count].

        Args:
            count: of the batch. generator: on the CPU.
        """
        images = torch.randint(len(self.x), (count,), generator=generator)
        moves = torch.multinomial(self.probabilities[images], 1, generator=generator)[:, 0]
        device = self.x.device
        return (
            self.x[images.to(device)],
            self.points[self._rows[images, moves]].to(device),
            self.y[images.to(device)],
        )
