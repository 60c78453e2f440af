"""The motivating example: two threshold classifiers on the line, solved in fractions.

Labels and masses: -1 at 0 with mass 1/2; +1 at -1 and at +1 with mass 1/4 each. f1 predicts +1 iff x <= -1/2, f2
predicts +1 iff x >= 1/2, so boundary points belong to class +1. At eps = 1/2 either classifier alone has adversarial
risk 3/4, the mixture (1/2, 1/2) has 1/2, and the attacker reaches 1/2 only by moving the mass at 0 both ways (Meunier
et al., "Mixed Nash Equilibria in the Adversarial Examples Game", ICML 2021).

The 0/1 losses are constant on the cells that the thresholds cut the line into, so finitely many perturbations of a
point stand for its whole ball: the point, the ends of the ball, the thresholds inside it, a point of every open cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch

from mixadv.game import FiniteGame

HALF = Fraction(1, 2)


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
        pure_attacker: the most that an attacker without randomness can be sure of: max over maps that send every
            point to one place, of the least risk of a classifier that knows the map.
        curve: (lam_1, R(lam)) at the ends and at every kink of the piecewise linear R, in order.
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

    def losses(self, i: int) -> list[tuple[int, int]]:
        """The 0/1 losses of both classifiers at each of the candidates of point i."""
        first, second = self.classifiers
        label = self.labels[i]
        return [(int(first.predict(x) != label), int(second.predict(x) != label)) for x in self.candidates(i)]

    def risk(self, first: Fraction) -> Fraction:
        """R(lam) = sum_i mass_i max_j (lam_1 l_1 + lam_2 l_2) at lam = (first, 1 - first)."""
        return sum(
            (mass * max(first * a + (1 - first) * b for a, b in set(self.losses(i))))
            for i, mass in enumerate(self.masses)
        ) + Fraction(0)

    def finite_game(self) -> FiniteGame:
        """The same game as losses [N, m, 2] uint8 with a mask [N, m], perturbations in the order of `candidates`."""
        rows = [self.losses(i) for i in range(len(self.points))]
        width = max(map(len, rows))
        losses = torch.zeros(len(rows), width, 2, dtype=torch.uint8)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            losses[i, : len(row)] = torch.tensor(row, dtype=torch.uint8)
            mask[i, : len(row)] = True
        return FiniteGame(losses, mask, torch.tensor([float(mass) for mass in self.masses], dtype=torch.float64))

    def solve(self) -> ExactSolution:
        """The equilibrium. R is convex and piecewise linear in lam_1, so its minimum is at an end or at a kink."""
        kinks = sorted({Fraction(0), Fraction(1), *self._kinks()})
        curve = tuple((first, self.risk(first)) for first in kinks)
        value = min(risk for _, risk in curve)
        optimal = [first for first, risk in curve if risk == value]
        first = (optimal[0] + optimal[-1]) / 2
        attack = self._best_attack(first)
        return ExactSolution(
            deterministic_risks=(self.risk(Fraction(1)), self.risk(Fraction(0))),
            weights=(first, 1 - first),
            value=value,
            attack=attack,
            dual=min(self._expected_losses(attack)),
            pure_attacker=self._pure_attacker(),
            curve=curve,
        )

    def _kinks(self) -> list[Fraction]:
        """Where two perturbations of one point become equally good, inside (0, 1)."""
        found = []
        for i in range(len(self.points)):
            for (a, b), (c, d) in itertools.combinations(set(self.losses(i)), 2):
                slope = (a - b) - (c - d)
                if slope and 0 < (kink := Fraction(d - b, slope)) < 1:
                    found.append(kink)
        return found

    def _best_attack(self, first: Fraction) -> tuple[tuple[Move, ...], ...]:
        """A strategy on best responses to lam under which no other lam does better.

        As a function of lam_1 the expected loss under a strategy is linear; its slope lies between that of the
        flattest and that of the steepest best responses, and mixing the two with one share for all points makes it 0
        (or as near to 0 as it can be, where lam is an end).
        """
        flat, steep, slopes = [], [], [Fraction(0), Fraction(0)]
        for i, mass in enumerate(self.masses):
            places, losses = self.candidates(i), self.losses(i)
            scores = [first * a + (1 - first) * b for a, b in losses]
            best = [j for j, score in enumerate(scores) if score == max(scores)]
            # Equally good places are taken nearest first.
            ends = [choose(best, key=lambda j: losses[j][0] - losses[j][1]) for choose in (min, max)]
            for s, j in enumerate(ends):
                slopes[s] += mass * (losses[j][0] - losses[j][1])
            flat.append(places[ends[0]])
            steep.append(places[ends[1]])
        span = slopes[1] - slopes[0]
        share = min(max(-slopes[0] / span, Fraction(0)), Fraction(1)) if span else Fraction(0)
        return tuple(
            (Move(a, Fraction(1)),) if a == b else tuple(m for m in (Move(a, 1 - share), Move(b, share)) if m[1])
            for a, b in zip(flat, steep, strict=True)
        )

    def _expected_losses(self, attack: Sequence[Sequence[Move]]) -> list[Fraction]:
        """E_Q l_k for k = 1, 2."""
        return [
            sum(
                (
                    mass * probability * int(classifier.predict(to) != label)
                    for mass, label, moves in zip(self.masses, self.labels, attack, strict=True)
                    for to, probability in moves
                ),
                start=Fraction(0),
            )
            for classifier in self.classifiers
        ]

    def _pure_attacker(self) -> Fraction:
        choices = [sorted(set(self.losses(i))) for i in range(len(self.points))]
        return max(
            min(sum(mass * losses[k] for mass, losses in zip(self.masses, chosen, strict=True)) for k in (0, 1))
            for chosen in itertools.product(*choices)
        ) + Fraction(0)
