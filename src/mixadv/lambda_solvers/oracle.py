"""Projected subgradient on best responses: Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.game import BestResponse, Equilibrium, FiniteGame, Game
from mixadv.lambda_solvers.driver import (
    Iterate,
    LambdaSolver,
    Trace,
    best_of,
    certified_gap,
    drive,
    require_selection,
    respond,
    start,
)
from mixadv.simplex import project_simplex

SELECTIONS = ("best", "last", "average")


@dataclass(frozen=True)
class OracleSubgradient(LambdaSolver):
    """lam_{t+1} = projection of lam_t - eta g_t onto the simplex, g_t the members' losses at a best response to lam_t.

    Meunier et al. (ICML 2021), Algorithm 1: with |l| <= M and eta = 2 / (M sqrt(L T)), the best of the iterates has
    value <= V + 2 delta + 2 M sqrt(L / T), and so has their mean. Here delta bounds the error of each member's loss,
    |E_Q~ l_k - E_Q* l_k| <= delta for every k, with Q~ the response that was found and Q* a best one; if only the
    value of a response is within delta of the maximum, delta takes the place of 2 delta.

    T steps make the iterates lam_0 .. lam_T, all of which can be returned, so that a single step moves the weights.
    lam_T gets a response of its own, which only judges it. `select` decides:

    - "best" (the default): the iterate of least value. Exact games compare exact values; if attacks play, the values
      against all points that were found during the call.
    - "last": lam_T, as Algorithm 2 is published. If attacks play, lam_T is judged on the points found before, without
      an attack of its own.
    - "average": the mean of the iterates.

    `average_weights` is that mean in any case. Every distribution of real perturbations bounds V from below, so
    `lower_bound` is min_k of the mean of the g_t, and on a finite game `attack` is the distribution behind it. `gap`
    is None unless the game's responses are exact.

    History (T + 1 entries): value, best_value, weights, step_size, max_loss (the running M).

    Args:
        num_steps: T >= 1.
        step_size: eta, in 1 / units of the losses; None takes the eta above, with the largest M so far.
        select: "best", "last" or "average".
        centred: False takes the largest |loss| for M, as published. True takes the largest
            (max_k g_k - min_k g_k) / 2: a level that all members share does not change the projection, so the bound
            holds with this M as well, and the steps are longer.

    Raises:
        ValueError: num_steps is not a positive integer, step_size not positive and finite, or select unknown.
    """

    num_steps: int = 1000
    step_size: float | None = None
    select: str = "best"
    centred: bool = False

    def __post_init__(self) -> None:
        self.require_counts(num_steps=1)
        require_selection(self.select, SELECTIONS)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, or None for the theory's, got {self.step_size}")

    def attack_cost(self) -> float:
        """One best response per step, and one that judges the last iterate."""
        return float(self.num_steps + (self.select != "last"))

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; the generator is not used, attacks draw from that of the game."""
        lam = start(game, lam0)
        counts = None
        if isinstance(game, FiniteGame):
            counts = torch.zeros(game.losses.shape[:2], dtype=torch.int32, device=game.losses.device)
        trace = drive(self._iterates(game, lam, counts))
        weights, value = self._selected(game, trace)
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
            num_attacks=self.num_steps + self._judges_last(game),
            average_weights=trace.average_weights,
            lower_bound=lower_bound,
        )

    def _selected(self, game: Game, trace: Trace) -> tuple[Tensor, float]:
        """The weights that `select` asks for, and their value: exact, or against all points that attacks found."""
        if self.select == "best" and game.exact:
            return trace.weights, trace.value
        iterates = list(torch.tensor(trace.history["weights"], dtype=torch.float64))
        candidates = {"best": iterates, "last": iterates[-1:], "average": [trace.average_weights]}[self.select]
        # Each attack finds other points, so the value that an attack gave an iterate is partly luck.
        return best_of(game if game.exact else game.known(), candidates)

    def _judges_last(self, game: Game) -> bool:
        return game.exact or self.select != "last"

    def _iterates(self, game: Game, lam: Tensor, counts: Tensor | None) -> Iterator[Iterate]:
        bound = 0.0
        for step in range(self.num_steps + 1):
            plays = step < self.num_steps or self._judges_last(game)
            response = respond(game if plays else game.known(), lam)
            # `size <= bound` is False for NaN, so that `drive` sees it.
            for size in self._sizes(response):
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

    def _sizes(self, response: BestResponse) -> tuple[float, ...]:
        """Numbers whose largest is M."""
        gradient = response.gradient
        if self.centred:
            return ((gradient.max() - gradient.min()).item() / 2,)
        # The mean of losses cannot exceed the largest loss.
        return gradient.abs().max().item(), response.max_loss
