"""Projected subgradient on best responses: Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.game import Equilibrium, FiniteGame, Game
from mixadv.lambda_solvers.driver import Iterate, LambdaSolver, best_of, certified_gap, drive, respond, start
from mixadv.simplex import project_simplex


@dataclass(frozen=True)
class OracleSubgradient(LambdaSolver):
    """lam_{t+1} = projection of lam_t - eta g_t onto the simplex, g_t the members' losses at a best response to lam_t.

    Meunier et al. (ICML 2021), Algorithm 1: with responses within delta of the maximum, |l| <= M and
    eta = 2 / (M sqrt(L T)), the best of lam_0 .. lam_{T-1} has value <= V + 2 delta + 2 M sqrt(L / T). The solver
    returns this iterate; it compares exact values, or for attacks the values against all points that were found during
    the call. `average_weights` is the mean of the same iterates.

    Every distribution of real perturbations bounds V from below, so `lower_bound` is min_k of the mean of the g_t, and
    on a finite game `attack` is the distribution behind it. `gap` is None unless the game's responses are exact.

    History: value, best_value, weights, step_size, max_loss (the running M).

    Args:
        num_steps: T >= 1, one best response each.
        step_size: eta, in 1 / units of the losses; None takes the eta above, with the largest loss so far for M.

    Raises:
        ValueError: num_steps is not a positive integer, or step_size not positive and finite.
    """

    num_steps: int = 1000
    step_size: float | None = None

    def __post_init__(self) -> None:
        self.require_counts(num_steps=1)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, or None for the theory's, got {self.step_size}")

    def attack_cost(self) -> float:
        """One best response per step."""
        return float(self.num_steps)

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; the generator is not used, attacks draw from that of the game."""
        lam = start(game, lam0)
        counts = None
        if isinstance(game, FiniteGame):
            counts = torch.zeros(game.losses.shape[:2], dtype=torch.int32, device=game.losses.device)
        trace = drive(self._iterates(game, lam, counts))
        weights, value = trace.weights, trace.value
        if not game.exact:
            # Each attack finds other points, so the least value is partly luck: compare all iterates on the points
            # of all attacks.
            iterates = torch.tensor(trace.history["weights"], dtype=torch.float64)
            weights, value = best_of(game.known(), list(iterates))
        lower_bound = trace.average_gradient.min().item()
        attack = None
        if isinstance(game, FiniteGame) and counts is not None:
            attack = counts * (game.masses[:, None] / trace.num_steps)
        return Equilibrium(
            weights=weights,
            value=value,
            gap=certified_gap(game, value, lower_bound),
            attack=attack,
            status=trace.status,
            history=trace.history,
            num_attacks=trace.num_steps,
            average_weights=trace.average_weights,
            lower_bound=lower_bound,
        )

    def _iterates(self, game: Game, lam: Tensor, counts: Tensor | None) -> Iterator[Iterate]:
        bound = 0.0
        for _ in range(self.num_steps):
            response = respond(game, lam)
            # The mean of losses cannot exceed the largest loss. `size <= bound` is False for NaN, so that `drive`
            # sees it.
            for size in (response.gradient.abs().max().item(), response.max_loss):
                bound = bound if size <= bound else size
            step_size = self.step_size
            if step_size is None:
                step_size = 2.0 / (bound * math.sqrt(game.num_members * self.num_steps)) if bound else 0.0
            if counts is not None and response.choice is not None:
                chosen = response.choice[:, None]
                counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
            yield Iterate(lam, response.value, response.gradient, {"max_loss": bound, "step_size": step_size})
            # The projection ignores a common shift; removing it keeps the digits of small differences.
            lam = project_simplex(lam - step_size * (response.gradient - response.gradient.mean()))
