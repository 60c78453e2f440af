"""Small finite games in fractions: guessed from the linear program, then proved.

A pair of strategies whose duality gap is exactly 0 is a Nash equilibrium, however it was found. So the strategies of
the linear program are rounded to fractions with small denominators, and the gap of these is computed in fractions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mixadv.game import FiniteGame
from mixadv.games.base import GameValues

# Denominators of losses, masses and strategies. Floats tell fractions with denominators up to 10,000 well apart.
DENOMINATORS = (100, 10_000)
# More losses than this are not turned into fractions: that would take seconds.
MOST_LOSSES = 20_000


@dataclass(frozen=True)
class ExactValues:
    """Two strategies of a finite game, and what they reach, in fractions.

    Attributes:
        deterministic_risks: [L], of each member alone.
        weights: [L], the strategy of the mixture.
        value: R(weights) >= V.
        dual: the least expected loss of a member against the attacker's strategy, <= V.
        attack: for each example one probability per perturbation; each row sums to 1.
    """

    deterministic_risks: tuple[Fraction, ...]
    weights: tuple[Fraction, ...]
    value: Fraction
    dual: Fraction
    attack: tuple[tuple[Fraction, ...], ...]

    @property
    def gap(self) -> Fraction:
        """value - dual: 0 at an equilibrium, and only there."""
        return self.value - self.dual

    def as_text(self) -> dict[str, Any]:
        """The numbers as text, without the attack."""
        return {
            "deterministic_risks": [str(risk) for risk in self.deterministic_risks],
            "weights": [str(weight) for weight in self.weights],
            **{name: str(getattr(self, name)) for name in ("value", "dual", "gap")},
        }


def evaluate(
    losses: Sequence[Sequence[Sequence[Fraction]]],
    masses: Sequence[Fraction],
    weights: Sequence[Fraction],
    attack: Sequence[Sequence[Fraction]],
) -> ExactValues:
    """What the strategies `weights` [L] and `attack` reach.

    Args:
        losses: losses[i][j][k]; examples may have different numbers of perturbations j.
        masses: [N], summing to 1.
        weights: [L], on the simplex.
        attack: attack[i][j] >= 0, summing to 1 for each i.
    """
    members = range(len(weights))

    def mean(values: Iterable[Fraction]) -> Fraction:
        return sum((mass * value for mass, value in zip(masses, values, strict=True)), Fraction(0))

    expected = [
        mean(
            sum((q * row[k] for q, row in zip(chances, rows, strict=True)), Fraction(0))
            for chances, rows in zip(attack, losses, strict=True)
        )
        for k in members
    ]
    return ExactValues(
        deterministic_risks=tuple(mean(max(row[k] for row in rows) for rows in losses) for k in members),
        weights=tuple(weights),
        value=mean(max(sum((weights[k] * row[k] for k in members), Fraction(0)) for row in rows) for rows in losses),
        dual=min(expected),
        attack=tuple(map(tuple, attack)),
    )


def proved(game: FiniteGame, found: GameValues) -> ExactValues | None:
    """The equilibrium in fractions, with gap 0; None if losses, masses or strategies are not fractions as in
    `DENOMINATORS`, or the game has more than `MOST_LOSSES` losses.

    The rows of its attack have a probability for each allowed perturbation, in their order.
    """
    if game.losses.numel() > MOST_LOSSES:
        return None
    allowed = [range(game.num_perturbations)] * game.num_examples
    if game.mask is not None:
        allowed = [row.nonzero()[:, 0].tolist() for row in game.mask]
    try:
        losses = [[list(map(_fraction, game.losses[i, j].tolist())) for j in js] for i, js in enumerate(allowed)]
        masses = [_fraction(mass) for mass in game.masses.tolist()]
    except ValueError:
        return None
    if sum(masses) != 1:
        return None
    for largest in DENOMINATORS:
        weights = [Fraction(weight).limit_denominator(largest) for weight in found.weights.tolist()]
        attack = []
        for i, js in enumerate(allowed):
            mass = game.masses[i].item()
            # The moves of an example without mass do not count: any will do.
            chances = [found.attack[i, j].item() / mass if mass else float(j == js[0]) for j in js]
            attack.append([Fraction(chance).limit_denominator(largest) for chance in chances])
        if sum(weights) == 1 and all(sum(row) == 1 for row in attack):
            exact = evaluate(losses, masses, weights, attack)
            if exact.gap == 0:
                return exact
    return None


def _fraction(number: float) -> Fraction:
    """The fraction with a small denominator that has this float, up to rounding; ValueError if there is none."""
    found = Fraction(number).limit_denominator(DENOMINATORS[-1])
    if abs(found - Fraction(number)) > 1e-14 * abs(number):
        raise ValueError(f"{number!r} is no fraction with a small denominator")
    return found
