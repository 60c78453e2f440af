"""The values of a finite game, and the order that the theory puts them in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mixadv.game import FiniteGame
from mixadv.lambda_solvers import LinearProgram

# Relative to the largest loss: far above rounding and the program's tolerances, far below one example in a million.
TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class GameValues:
    """D <= V_rand <= V_det of a finite game, and how well they are known.

    Attributes:
        v_rand: R(weights) = sum_i mass_i max_j sum_k lam_k A[i, j, k] at the optimal weights.
        v_det: the least R of a member alone.
        dual: the least expected loss of a member against the attacker's optimal strategy.
        gap: v_rand - dual, the certificate that weights and strategy are a Nash equilibrium.
        violation: by how much the computed numbers break the order; 0 or rounding.
        weights: [L] float64, the optimal mixture.
        status: what the linear program said.
    """

    v_rand: float
    v_det: float
    dual: float
    gap: float
    violation: float
    weights: Tensor
    status: str


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
    return GameValues(v_rand, v_det, dual, max(v_rand - dual, 0.0), violation, solution.weights, solution.status)
