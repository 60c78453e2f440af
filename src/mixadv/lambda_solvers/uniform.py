"""Uniform weights, whatever the game."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.game import Equilibrium, FiniteGame, Game
from mixadv.lambda_solvers.driver import Iterate, LambdaSolver, certified_gap, drive, respond
from mixadv.simplex import uniform


@dataclass(frozen=True)
class Uniform(LambdaSolver):
    """lam_k = 1/L for every game; one best response gives their value.

    `lower_bound` is min_k g_k of that response; on a finite game `attack` is the response.
    """

    adapts: ClassVar[bool] = False

    def attack_cost(self) -> float:
        """One best response."""
        return 1.0

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; lam0 and the generator are not used."""
        lam = uniform(game.num_members)
        response = respond(game, lam)
        trace = drive([Iterate(lam, response.value, response.gradient)])
        lower_bound = response.gradient.min().item()
        attack = None
        if isinstance(game, FiniteGame) and response.choice is not None:
            attack = torch.zeros(game.losses.shape[:2], dtype=torch.float64, device=game.losses.device)
            attack.scatter_(1, response.choice[:, None], game.masses[:, None])
        return Equilibrium(
            weights=lam,
            value=trace.value,
            gap=certified_gap(game, trace.value, lower_bound),
            attack=attack,
            status="fixed",
            history=trace.history,
            num_attacks=1,
            average_weights=lam,
            lower_bound=lower_bound,
        )
