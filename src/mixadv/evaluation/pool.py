"""The finite game on all points that an evaluation found: what other weights could have done."""

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
    """How the weights lam stand in a finite game of 0/1 losses.

    Returns:
        value_at_weights: R(lam), the risk of lam over these points.
        value_lp: the least risk of any weights over these points. The points are real, so no weights over these members
            have a smaller adversarial risk on these examples: for certain.
        gap: their difference, the equilibrium regret of lam on these points. Points that no attack found may make it
            larger or smaller.
        matching_penny_gap: sum_k lam_k R(k) - R(lam) >= 0, what the mixture gains over the mean of its members because
            a point that fools one need not fool the others.
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
