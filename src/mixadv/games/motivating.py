"""The motivating example: two threshold classifiers on the line, solved in fractions.

Labels and masses: -1 at 0 with mass 1/2; +1 at -1 and at +1 with mass 1/4 each. f1 predicts +1 iff x <= -1/2, f2
predicts +1 iff x >= 1/2, so boundary points belong to class +1. At eps = 1/2 either classifier alone has adversarial
risk 3/4, the mixture (1/2, 1/2) has 1/2, and the attacker reaches 1/2 only by moving the mass at 0 both ways (Meunier
et al., "Mixed Nash Equilibria in the Adversarial Examples Game", ICML 2021).

The 0/1 losses are constant on the cells that the thresholds cut the line into, so finitely many perturbations of a
point stand for its whole ball: the point, the ends of the ball, the thresholds inside it, a point of every open cell.

At a point the attacker can fool both classifiers by one move, or either of them but not both, or only the first, or
only the second, or neither. With the masses of the points of each kind

    R(lam) = both + max(lam_1, lam_2) either + lam_1 first + lam_2 second,

which is linear on 0 <= lam_1 <= 1/2 and on 1/2 <= lam_1 <= 1, so it is least at lam_1 = 0, 1/2 or 1. The attacker's
optimal strategy fools f1 with probability q, else f2, where it can fool either: both + q either + first is the expected
loss of f1 and both + (1 - q) either + second that of f2, and the q in [0, 1] that brings them closest is optimal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mixadv.game import FiniteGame
from mixadv.games.base import TOLERANCE, Playable, Played, exact_radius, solve_values
from mixadv.lambda_solvers import AcceleratedEntropic, LambdaSolver, LinearProgram, OracleSubgradient

HALF = Fraction(1, 2)
# The 0/1 losses of f1 and f2 at one place, and the kinds of points: both, either, first, second, neither.
Losses = tuple[int, int]
KINDS: tuple[tuple[Losses, ...], ...] = (((1, 1),), ((1, 0), (0, 1)), ((1, 0),), ((0, 1),), ((0, 0),))


class Threshold(NamedTuple):
    """Predicts +1 iff side (x - at) >= 0, else -1: side = -1 for x <= at, side = +1 for x >= at."""

    at: Fraction
    side: int

    def predict(self, x: Fraction) -> int:
        """The label of x, -1 or +1."""
        return 1 if self.side * (x - self.at) >= 0 else -1


class Move(NamedTuple):
    """The attacker sends the mass of a point to `to` with this probability."""

    to: Fraction
    probability: Fraction


@dataclass(frozen=True)
class ExactSolution:
    """The equilibrium, in fractions.

    Attributes:
        deterministic_risks: the adversarial risk of either classifier alone.
        weights: (lam_1, lam_2) of the best mixture; the middle one where a whole interval is optimal.
        value: R(weights) = V_rand.
        attack: for each point the moves of the attacker's optimal strategy, those of positive probability.
        dual: D = min_k of the expected loss of classifier k against that strategy.
        pure_attacker: the value of the best attack without randomness: the maximum, over maps of the points to
            positions within eps, of the least risk of a classifier that knows the map.
        curve: (lam_1, R(lam)) at lam_1 = 0, 1/2 and 1; R is linear in between.
    """

    deterministic_risks: tuple[Fraction, Fraction]
    weights: tuple[Fraction, Fraction]
    value: Fraction
    attack: tuple[tuple[Move, ...], ...]
    dual: Fraction
    pure_attacker: Fraction
    curve: tuple[tuple[Fraction, Fraction], ...]

    @property
    def gap(self) -> Fraction:
        """value - dual: 0 at an equilibrium."""
        return self.value - self.dual


@dataclass(frozen=True)
class LineGame:
    """Weighted, labelled points on the line against two thresholds; the attacker moves each point by at most eps.

    Args:
        eps: the radius, >= 0; the ball is closed.
        points, labels, masses: of the same length; labels are -1 or +1, masses >= 0 sum to 1.
        classifiers: two.

    Raises:
        ValueError: an argument is outside its range.
    """

    eps: Fraction = HALF
    points: tuple[Fraction, ...] = (Fraction(0), Fraction(-1), Fraction(1))
    labels: tuple[int, ...] = (-1, 1, 1)
    masses: tuple[Fraction, ...] = (HALF, HALF / 2, HALF / 2)
    classifiers: tuple[Threshold, ...] = (Threshold(-HALF, -1), Threshold(HALF, 1))

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps is {self.eps}: a radius is at least 0")
        if not len(self.points) == len(self.labels) == len(self.masses) > 0:
            raise ValueError(
                f"{len(self.points)} points, {len(self.labels)} labels and {len(self.masses)} masses: "
                "give one label and one mass per point, and at least one point"
            )
        if not set(self.labels) <= {-1, 1}:
            raise ValueError(f"labels are {self.labels}: each must be -1 or 1")
        if min(self.masses) < 0 or sum(self.masses) != 1:
            raise ValueError(f"masses must be non-negative and sum to 1, their sum is {sum(self.masses)}")
        if len(self.classifiers) != 2:
            raise ValueError(f"the exact solution is for two classifiers, got {len(self.classifiers)}")

    def candidates(self, i: int) -> list[Fraction]:
        """Places that stand for the whole ball of point i, nearest first: the point itself comes first."""
        x = self.points[i]
        low, high = x - self.eps, x + self.eps
        inside = {classifier.at for classifier in self.classifiers if low <= classifier.at <= high}
        marks = sorted({x, low, high} | inside)
        between = {(a + b) / 2 for a, b in itertools.pairwise(marks)}
        return sorted({*marks, *between}, key=lambda place: (abs(place - x), place))

    def losses(self, i: int) -> list[Losses]:
        """The 0/1 losses of both classifiers at each of the candidates of point i."""
        first, second = self.classifiers
        label = self.labels[i]
        return [(int(first.predict(x) != label), int(second.predict(x) != label)) for x in self.candidates(i)]

    def finite_game(self) -> FiniteGame:
        """The same game as losses [N, m, 2] uint8 with a mask [N, m], perturbations in the order of `candidates`."""
        rows = [torch.tensor(self.losses(i), dtype=torch.uint8) for i in range(len(self.points))]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        masses = torch.tensor([float(mass) for mass in self.masses], dtype=torch.float64)
        return FiniteGame(pad_sequence(rows, batch_first=True), mask, masses)

    @cached_property
    def _threats(self) -> list[dict[Losses, Fraction]]:
        """For each point, each loss vector that the attacker can cause, with the nearest position that causes it."""
        threats = []
        for i in range(len(self.points)):
            places = dict(reversed(list(zip(self.losses(i), self.candidates(i), strict=True))))
            kind = next(kind for kind in KINDS if set(kind) <= set(places))
            threats.append({losses: places[losses] for losses in kind})
        return threats

    @cached_property
    def _kinds(self) -> tuple[Fraction, ...]:
        """The masses (both, either, first, second, neither)."""
        points = list(zip(self.masses, map(tuple, self._threats), strict=True))
        return tuple(sum((mass for mass, threats in points if threats == kind), Fraction(0)) for kind in KINDS)

    def risk(self, weight: Fraction) -> Fraction:
        """R(lam) at lam = (weight, 1 - weight)."""
        both, either, first, second, _ = self._kinds
        return both + max(weight, 1 - weight) * either + weight * first + (1 - weight) * second

    def solve(self) -> ExactSolution:
        """The equilibrium, as the head of this module derives it."""
        _, either, first, second, _ = self._kinds
        curve = tuple((weight, self.risk(weight)) for weight in (Fraction(0), HALF, Fraction(1)))
        value = min(risk for _, risk in curve)
        optimal = [weight for weight, risk in curve if risk == value]
        weight = (optimal[0] + optimal[-1]) / 2
        q = min(max((second - first + either) / (2 * either), Fraction(0)), Fraction(1)) if either else Fraction(0)
        attack = []
        for threats in self._threats:
            chances = (q, 1 - q) if len(threats) == 2 else (Fraction(1),)
            attack.append(tuple(Move(to, p) for to, p in zip(threats.values(), chances, strict=True) if p))
        return ExactSolution(
            deterministic_risks=(self.risk(Fraction(1)), self.risk(Fraction(0))),
            weights=(weight, 1 - weight),
            value=value,
            attack=tuple(attack),
            dual=min(self._expected_loss(classifier, attack) for classifier in self.classifiers),
            pure_attacker=self._pure_attacker(),
            curve=curve,
        )

    def _expected_loss(self, classifier: Threshold, attack: Sequence[Sequence[Move]]) -> Fraction:
        """E_Q l of one classifier under the attacker's strategy Q."""
        losses = (
            mass * probability
            for mass, label, moves in zip(self.masses, self.labels, attack, strict=True)
            for to, probability in moves
            if classifier.predict(to) != label
        )
        return sum(losses, Fraction(0))

    def _pure_attacker(self) -> Fraction:
        """See `ExactSolution.pure_attacker`; at every point of the kind `either` one of the two is fooled for sure."""
        both, either, first, second, _ = self._kinds
        parts = {Fraction(0)}  # of `either`, on which f1 is fooled
        for mass, threats in zip(self.masses, self._threats, strict=True):
            parts |= {part + mass for part in parts if len(threats) == 2}
        return both + max(min(first + part, second + either - part) for part in parts)


class Motivating(Playable):
    """The example in fractions, beside what the solvers of `mixadv.lambda_solvers` find.

    Args:
        eps: the radius, a number or a fraction such as "1/2"; it stays exactly as written.
        alpha: temperature of the entropic solver, in units of the 0/1 loss.
        num_steps: of Algorithm 1 and of the entropic solver.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, eps: float | str = "1/2", alpha: float = 0.01, num_steps: int = 1000) -> None:
        self.line = LineGame(exact_radius("eps", eps))
        oracle = OracleSubgradient(num_steps=num_steps)
        entropic = AcceleratedEntropic(alpha=alpha, num_steps=num_steps)
        # The iterative solvers start at f1 alone: 1/L, their usual start, is the solution already.
        self.solvers: list[tuple[str, str, LambdaSolver, list[float] | None]] = [
            ("LP", "HiGHS", LinearProgram(), None),
            ("Algorithm 1", f"{num_steps:,} steps", oracle, [1.0, 0.0]),
            ("entropic", f"α = {alpha:g}", entropic, [1.0, 0.0]),
        ]

    def play(self, log: Callable[[str], None]) -> Played:
        """See `Playable.play`; in results.json the exact numbers are fractions, as text."""
        line, exact, game = self.line, self.line.solve(), self.line.finite_game()
        v_rand = solve_values(game).v_rand
        if exact.gap != 0 or abs(v_rand - float(exact.value)) > TOLERANCE:
            raise RuntimeError(f"V = {exact.value}, D = {exact.dual} in fractions, but {v_rand!r} by linear program")
        attack = [
            {
                "point": str(point),
                "label": label,
                "mass": str(mass),
                "moves": [{"to": str(to), "probability": str(probability)} for to, probability in moves],
            }
            for point, label, mass, moves in zip(line.points, line.labels, line.masses, exact.attack, strict=True)
        ]
        names = ("deterministic_risks", "weights", "value", "dual", "gap", "pure_attacker")
        summary = {
            "eps": str(line.eps),
            "exact": {name: _as_text(getattr(exact, name)) for name in names},
            "attack": attack,
            "solvers": [_solved(game, *solver) for solver in self.solvers],
        }
        arrays = {"curve": exact.curve, "thresholds": line.classifiers}
        return Played("motivating", summary, {name: np.array(rows, dtype=float) for name, rows in arrays.items()})


def _as_text(value: Fraction | tuple[Fraction, ...]) -> str | list[str]:
    return [str(part) for part in value] if isinstance(value, tuple) else str(value)


def _solved(
    game: FiniteGame, name: str, detail: str, solver: LambdaSolver, start: list[float] | None
) -> dict[str, Any]:
    found = solver.solve(game, lam0=None if start is None else torch.tensor(start, dtype=torch.float64))
    return {
        "solver": name,
        "detail": detail,
        "start": start,
        "deterministic_risks": game.deterministic_values().tolist(),
        "weights": found.weights.tolist(),
        "value": found.value,
        "dual": found.lower_bound,
        "gap": found.gap,
        "status": found.status,
    }
