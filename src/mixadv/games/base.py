"""What every game of ``task=game`` has, and the values of a finite game in the order that the theory gives them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixadv.game import FiniteGame
from mixadv.lambda_solvers import LinearProgram

# Relative to the largest loss: far above rounding and the program's tolerances, far below one example in a million.
TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class Played:
    """What `Playable.play` found.

    Attributes:
        name: the game's name. "motivating" and "gaussians" have a table and a figure of their own; any other game is
            shown by the `runs` of its summary.
        summary: plain values for results.json. `runs` is a list of `GameValues.row`, one for each solved game.
        arrays: what the figure needs besides, for game.npz.
    """

    name: str
    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Playable(ABC):
    """A game for ``game._target_``: the settings are the arguments of the constructor, which checks them."""

    @abstractmethod
    def play(self, log: Callable[[str], None]) -> Played:
        """Solve the game.

        Args:
            log: prints one line, after each part of the work that takes seconds.

        Raises:
            RuntimeError: the solution contradicts the theory.
        """


@dataclass(frozen=True, eq=False)
class GameValues:
    """D <= V_rand <= V_det of a finite game, with their certificate.

    Attributes:
        v_rand: R(weights) = sum_i mass_i max_j sum_k lam_k A[i, j, k] at the optimal weights.
        v_det: the least R of a member alone.
        dual: the least expected loss of a member against the attacker's optimal strategy.
        gap: v_rand - dual, the certificate that weights and strategy are a Nash equilibrium.
        violation: by how much the computed numbers break the order; 0 or rounding.
        weights: [L] float64, the optimal mixture.
        status: how the linear program ended.
        attack: [N, m] float64, the attacker's optimal strategy.
    """

    v_rand: float
    v_det: float
    dual: float
    gap: float
    violation: float
    weights: Tensor
    status: str
    attack: Tensor

    def row(self, draw: int, eps: float) -> dict[str, Any]:
        """The values in plain numbers, with the number of the random draw and the radius of the game."""
        plain = {name: value for name, value in vars(self).items() if name != "attack"}
        return {"draw": draw, "eps": eps, **plain, "weights": self.weights.tolist()}


def solve_values(game: FiniteGame) -> GameValues:
    """Solve the game by linear programming and check D = V_rand <= V_det (Meunier et al., ICML 2021).

    The three numbers are computed anew from the solution's weights and strategy, not taken from the solver.

    Raises:
        RuntimeError: the order is violated, or the gap is open, by more than `TOLERANCE` times the largest loss.
    """
    solution = LinearProgram().solve(game)
    if solution.attack is None:
        raise RuntimeError(f"the linear program found no strategy of the attacker: it ended with {solution.status!r}")
    v_rand = game.value(solution.weights)
    v_det = game.deterministic_values().min().item()
    dual = game.response_value(solution.attack)
    violation = max(dual - v_rand, v_rand - v_det, 0.0)
    allowed = TOLERANCE * max(game.max_loss, 1e-12)
    if not (violation <= allowed and v_rand - dual <= allowed):
        raise RuntimeError(
            f"D = {dual!r}, V_rand = {v_rand!r}, V_det = {v_det!r} contradict D = V_rand <= V_det "
            f"(the linear program ended with {solution.status!r})"
        )
    gap = max(v_rand - dual, 0.0)
    return GameValues(v_rand, v_det, dual, gap, violation, solution.weights, solution.status, solution.attack)


def best_constant(labels: Tensor, masses: Tensor | None = None) -> float:
    """The risk of the best constant classifier, which no attacker can change: 1 minus the largest mass of a class.

    Args:
        labels: [N].
        masses: [N]; None means 1/N each.
    """
    masses = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64) if masses is None else masses
    _, classes = labels.unique(return_inverse=True)
    return 1.0 - torch.zeros(int(classes.max()) + 1, dtype=torch.float64).index_add_(0, classes, masses).max().item()


def best_vote(game: FiniteGame, positive: Tensor, weights: Tensor) -> tuple[float, float]:
    """The least adversarial risk of a vote of two-class members: +1 iff members of total weight above a predict +1.

    At a point of class +1 whose worst expected loss is r, the attacker can lower the share of +1 to 1 - r: the vote is
    wrong iff 1 - r <= a. At a point of class -1 it is wrong iff r > a. The mean of these risks over a in [0, 1) is
    R(weights), so the best one is at most R(weights) (Gnecco-Heredia et al., NeurIPS 2023). The game must hold the 0/1
    losses of the whole ball, or the vote is attacked on the game's points only.

    Args:
        game: 0/1 losses [N, m, L].
        positive: [N] bool, the examples of class +1.
        weights: [L].

    Returns:
        The risk, and the least best threshold a in [0, 1).
    """
    choice = game.best_response(weights).choice
    assert choice is not None, "a finite game names its choices"
    worst = game.losses[torch.arange(game.num_examples), choice].to(torch.float64) @ weights
    # Sums of the same weights in another order differ by rounding.
    reached = torch.where(positive, 1.0 - worst, worst).round(decimals=9)
    thresholds = torch.cat([torch.zeros(1, dtype=torch.float64), reached[reached < 1]]).unique()
    wrong = torch.where(positive[:, None], reached[:, None] <= thresholds, reached[:, None] > thresholds)
    risks = game.masses @ wrong.to(torch.float64)
    best = int(risks.argmin())
    return risks[best].item(), thresholds[best].item()


def exact_radius(key: str, value: float | str) -> Fraction:
    """A radius as the fraction that the user wrote: "21/40", 0.525 or 0; with an exponent, as the nearest float.

    Raises:
        ValueError: not a finite non-negative number or fraction.
    """
    text = str(value)
    numerator, slash, denominator = text.partition("/")
    try:
        rounded = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        rounded = math.nan
    if not 0 <= rounded < math.inf:
        raise ValueError(
            f"{key}={value} is no radius: give a finite number or fraction of at least 0, as {key}=1/2 or {key}=0.5"
        )
    # Powers of ten may be too large to be written out.
    return Fraction(rounded) if "e" in text.lower() else Fraction(numerator) / Fraction(denominator or 1)
