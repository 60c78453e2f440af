"""Three classes that conflict in pairs: the smallest game in which randomising beats every deterministic classifier.

One point of each class, with mass 1/3, at the corners of an equilateral triangle of side 1; the attacker moves a point
by at most eps in the plane. Theta is the set of *all* classifiers. Nothing can be gained where balls do not meet
(eps < 1/2: every point can be right) or where all three balls have a common point (eps >= 1/sqrt 3: the attacker moves
every point there). In between each pair of balls overlaps, the three have no common point, and

- a deterministic classifier has to answer one class in each overlap, so it is right on at most one of the three points
  wherever the attacker moves them: accuracy 1/3, risk V_det = 2/3;
- a classifier that answers either class of an overlap with probability 1/2 is right on every point with probability
  1/2: accuracy 1/2, risk V_rand = 1/2. It is the mixture of two classifiers that are wrong on every point under attack;
- the attacker who moves each point to either of its overlaps with probability 1/2 leaves two equally likely classes in
  each overlap: no classifier has a smaller risk than D = 1/2.

Only the answers in the regions that balls share matter, and there only the classes of these balls, so finitely many
classifiers stand for all of them. Conflicts in odd cycles are those of Dai et al., "Characterizing the Optimal 0-1 Loss
for Multi-class Classification with a Test-time Attacker", NeurIPS 2023; with two classes there are none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mixadv.game import FiniteGame
from mixadv.games.base import TOLERANCE, Playable, Played, exact_radius, solve_values
from mixadv.games.rational import ExactValues, evaluate

CLASSES = range(3)
# The regions that two balls share, in the order of the cycle.
PAIRS = ((0, 1), (1, 2), (2, 0))


def corners() -> np.ndarray:
    """[3, 2], the points of classes 0, 1, 2: an equilateral triangle of side 1 around the origin."""
    angles = np.pi * (0.5 + 2 / 3 * np.arange(3))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(3)


class Triangle(Playable):
    """The game in fractions, over all classifiers.

    Args:
        eps: the radius in units of the side, a number or a fraction such as "11/20"; it stays exactly as written.

    Raises:
        ValueError: `eps` is no radius.
    """

    def __init__(self, eps: float | str = "11/20") -> None:
        self.eps = exact_radius("eps", eps)

    @cached_property
    def shared(self) -> tuple[tuple[int, ...], ...]:
        """The regions that belong to several balls, each as the classes of its balls."""
        pairs = PAIRS if 2 * self.eps >= 1 else ()
        return (*pairs, (0, 1, 2)) if 3 * self.eps**2 >= 1 else pairs

    @cached_property
    def classifiers(self) -> list[tuple[int, ...]]:
        """All classifiers, each as its answers in the shared regions; in a ball's own region it answers its class.

        Where there are pairs, the first two answer them in a cycle: class 0 against 1, 1 against 2, 2 against 0, and
        the other way round.
        """
        every = list(itertools.product(*self.shared))
        cycles = [tuple(region[side % len(region)] for region in self.shared) for side in (0, 1)]
        return sorted(every, key=lambda answers: cycles.index(answers) if answers in cycles else 2)

    def losses(self, i: int) -> list[list[int]]:
        """The 0/1 losses of all classifiers in the regions of ball i: its own region, then the shared ones."""
        rows = [[int(answers[place] != i) for answers in self.classifiers] for place in self._places(i)]
        return [[0] * len(self.classifiers), *rows]

    def _places(self, i: int) -> list[int]:
        return [place for place, region in enumerate(self.shared) if i in region]

    def finite_game(self) -> FiniteGame:
        """The losses [3, m, L] uint8 with their mask [3, m], regions in the order of `losses`."""
        rows = [torch.tensor(self.losses(i), dtype=torch.uint8) for i in CLASSES]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return FiniteGame(pad_sequence(rows, batch_first=True), mask)

    def solve(self) -> ExactValues:
        """The equilibrium of the head of this module, evaluated in fractions against all classifiers."""
        losses = [[[Fraction(loss) for loss in row] for row in self.losses(i)] for i in CLASSES]
        zero, half, one = Fraction(0), Fraction(1, 2), Fraction(1)
        chances = {0: [one], 3: [zero, half, half], 4: [zero, zero, zero, one]}[len(self.shared)]
        risks = [sum(max(row[k] for row in rows) for rows in losses) for k in range(len(self.classifiers))]
        best = risks.index(min(risks))
        weights = [Fraction(k == best) for k in range(len(risks))]
        if len(self.shared) == 3:
            weights = [half, half, *[zero] * (len(risks) - 2)]
        return evaluate(losses, [Fraction(1, 3)] * 3, weights, [chances] * 3)

    def play(self, log: Callable[[str], None]) -> Played:
        """See `Playable.play`; in results.json the exact numbers are fractions, as text."""
        exact, values = self.solve(), solve_values(self.finite_game())
        by_program = (values.v_rand, values.dual, values.v_det)
        in_fractions = (exact.value, exact.dual, min(exact.deterministic_risks))
        if exact.gap != 0 or any(abs(a - b) > TOLERANCE for a, b in zip(by_program, in_fractions, strict=True)):
            raise RuntimeError(f"V, D, V_det are {in_fractions} in fractions, but {by_program} by linear program")
        summary = {
            "eps": str(self.eps),
            "regions": [list(region) for region in self.shared],
            "classifiers": [list(answers) for answers in self.classifiers],
            "exact": exact.as_text(),
            "attack": [[str(chance) for chance in row] for row in exact.attack],
        }
        return Played("triangle", summary, {"points": corners()})
