"""Accelerated projected gradient on the entropic relaxation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.game import Equilibrium, FiniteGame, Game
from mixadv.lambda_solvers.driver import Iterate, LambdaSolver, certified_gap, draw_pool, drive, start
from mixadv.simplex import project_simplex


@dataclass(frozen=True)
class AcceleratedEntropic(LambdaSolver):
    """FISTA on F(lam) = sum_i mass_i alpha log( (1/m) sum_j exp( sum_k lam_k l_k(i, j) / alpha ) ).

    F is the risk against an attacker who pays alpha KL(Q_i || uniform) on a pool of m perturbations per example
    (Meunier et al., ICML 2021, section 4.2): 0 <= R - F <= alpha log m on the pool, and F is smooth with the constant
    C = `FiniteGame.smoothness(alpha)`, of order 1 / alpha. After T steps of size 1 / C from lam_0, F exceeds its
    minimum by at most 2 C ||lam_0 - lam*||^2 / (T + 1)^2 (Beck and Teboulle, 2009). The momentum restarts when it
    points uphill (O'Donoghue and Candes, 2015), which gains orders of magnitude near the solution. A restart is allowed
    only if at least a quarter of all steps so far came after the last one. Then some run without restart has T / 5
    steps, and the error keeps the order T^-2: it is at most 100 C / T^2, since points of the simplex are at most
    sqrt(2) apart.

    The pool is drawn once, from `game.pool`; a finite game is its own pool. `weights` are the iterate of least risk R
    (without regularisation) on the pool, and `value` is that risk; if attacks play the game it is a lower estimate of
    R. The last iterate, which minimises F, is `history["weights"][-1]`. The smoothed response with the largest lower
    bound gives `lower_bound` and, on a finite game, `attack`.

    With a fixed number of steps a smaller alpha can end farther from the equilibrium. num_steps proportional to
    alpha^(-1/2) only keeps the bound C / T^2 constant; to approach the value take num_steps proportional to 1 / alpha,
    or reduce alpha step by step, each time with lam0 = the weights found before.

    History (T + 1 entries, the start included): value, best_value, weights, smoothed_value, smoothed_gap
    (max over the simplex of grad F(lam)·(lam - mu) >= F(lam) - min F), lower_bound.

    Args:
        alpha: the temperature, > 0, in units of the losses.
        num_steps: T >= 1.
        num_samples: random perturbations per example in the pool.
        include_attack_points: whether the pool also holds the points of attacks; False is the pure Monte-Carlo form.
            In high dimension random points find nothing.
        tolerance: stop as soon as smoothed_gap <= tolerance, in units of the losses; None runs all steps. If num_steps
            do not suffice, the status is "stopped" and a RuntimeWarning is issued.

    Raises:
        ValueError: an argument is outside its range; in solve, losses so large that their squares overflow.
    """

    alpha: float = 1e-2
    num_steps: int = 1000
    num_samples: int = 16
    include_attack_points: bool = True
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        self.require_counts(num_steps=1, num_samples=0)
        if self.num_samples == 0 and not self.include_attack_points:
            raise ValueError("the pool would be empty: take num_samples >= 1 or include_attack_points=True")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be >= 0 and finite, or None to run all steps, got {self.tolerance}")

    def attack_cost(self) -> float:
        """The attacks for the pool: on the mixture, and on each member alone."""
        return 2.0 if self.include_attack_points else 0.0

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; the generator draws the pool."""
        lam = start(game, lam0)
        pool = draw_pool(game, lam, self.num_samples, self.include_attack_points, generator)
        trace = drive(self._iterates(pool, lam))
        status = trace.status
        if self.tolerance is not None and status != "converged":
            status = "stopped"
            warnings.warn(
                f"the entropic solver stopped after {self.num_steps} steps with a smoothed gap of "
                f"{trace.history['smoothed_gap'][-1]:.1e}, above the tolerance {self.tolerance:g}: take more "
                "num_steps, or a larger alpha or tolerance",
                RuntimeWarning,
                stacklevel=2,
            )
        bounds = trace.history["lower_bound"]
        where = trace.history["weights"][max(range(len(bounds)), key=bounds.__getitem__)]
        attack = pool.smoothed_response(torch.tensor(where, dtype=torch.float64), self.alpha)
        lower_bound = pool.response_value(attack)
        return Equilibrium(
            weights=trace.weights,
            value=trace.value,
            gap=certified_gap(game, trace.value, lower_bound),
            attack=attack if pool is game else None,
            status=status,
            history=trace.history,
            num_attacks=game.num_members + 1 if self.include_attack_points and pool is not game else 0,
            average_weights=None,
            lower_bound=lower_bound,
        )

    def _iterates(self, pool: FiniteGame, lam: Tensor) -> Iterator[Iterate]:
        # If the losses do not depend on the perturbation, F is linear and C = 0: every step size is right, and this
        # one is large enough to reach a vertex at once.
        constant = max(pool.smoothness(self.alpha), 1e-9 * pool.max_loss)
        if not math.isfinite(constant):
            raise ValueError(
                f"losses of {pool.max_loss} at alpha {self.alpha} make the smoothness constant {constant}: "
                "divide losses and alpha by the same number"
            )
        step_size = 1.0 / constant if constant > 0 else 0.0
        if not math.isfinite(step_size):
            raise ValueError(f"losses of {pool.max_loss} are too small: multiply losses and alpha by the same number")
        ahead, momentum, restarted = lam, 1.0, 0
        for step in range(self.num_steps + 1):
            values, smoothed, gradients = (
                part.to(lam) for part in pool.smoothed(torch.stack([lam, ahead]), self.alpha)
            )
            lower_bound = gradients[0].min().item()
            centred = gradients - gradients.mean(1, keepdim=True)
            gap = (centred[0] @ lam - centred[0].min()).item()
            record = {
                "smoothed_value": smoothed[0].item(),
                "smoothed_gap": gap,
                "lower_bound": lower_bound,
            }
            converged = self.tolerance is not None and gap <= self.tolerance
            yield Iterate(lam, values[0].item(), gradients[0], record, converged)
            if step == self.num_steps:
                return
            previous, lam = lam, project_simplex(ahead - step_size * centred[1])
            if 4 * (step + 1 - restarted) >= step + 1 and centred[1] @ (lam - previous) > 0:
                ahead, momentum, restarted = lam, 1.0, step + 1
                continue
            following = (1.0 + math.sqrt(1.0 + 4.0 * momentum * momentum)) / 2.0
            ahead = lam + ((momentum - 1.0) / following) * (lam - previous)
            momentum = following
