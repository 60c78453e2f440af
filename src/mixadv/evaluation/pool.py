"""The finite game on all points that an evaluation found, and the best weights on it."""

import numpy as np
import torch

from mixadv.evaluation.record import EvaluationRecord
from mixadv.game import FiniteGame
from mixadv.lambda_solvers import LinearProgram


def pool_of(*records: EvaluationRecord) -> FiniteGame:
    """0/1 losses [N, P, L] at x and at every point that any of the records of the same N examples found."""
    losses = np.concatenate([1 - record.points().astype(np.uint8) for record in records])
    return FiniteGame(torch.from_numpy(losses).permute(2, 0, 1).contiguous())


def equilibrium_of(game: FiniteGame, lam: torch.Tensor) -> dict[str, float]:
    """Compare the weights lam with the best weights of a finite game of 0/1 losses.

    Returns:
        value_at_weights: R(lam), the risk of lam on these points.
        value_lp: the least risk of any weights on these points. The points are real, so it is a certain lower bound of
            the adversarial risk of all weights over these members on these examples.
        gap: their difference, the equilibrium regret of lam on these points. Points that no attack found may make it
            larger or smaller.
        matching_penny_gap: sum_k lam_k R(k) - R(lam) >= 0, the gain of the mixture over the mean of its members; it
            arises because a point that fools one member need not fool the others.
    """
    optimum = LinearProgram().solve(game)
    assert optimum.lower_bound is not None
    value = game.value(lam)
    return {
        "value_at_weights": value,
        "value_lp": optimum.lower_bound,
        "gap": max(0.0, value - optimum.lower_bound),
        "matching_penny_gap": max(0.0, float(game.deterministic_values() @ lam.to(torch.float64)) - value),
    }
