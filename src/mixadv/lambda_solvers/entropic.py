"""Accelerated projected gradient on the entropic relaxation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.game import Equilibrium, FiniteGame, Game
from mixadv.lambda_solvers.driver import (
    Iterate,
    LambdaSolver,
    Trace,
    certified_gap,
    draw_pool,
    drive,
    require_selection,
    start,
)
from mixadv.simplex import project_simplex

SELECTIONS = ("best", "relaxed", "last")


@dataclass(frozen=True)
class AcceleratedEntropic(LambdaSolver):
    """FISTA on F(lam) = sum_i mass_i alpha_i log( (1/m) sum_j exp( sum_k lam_k l_k(i, j) / alpha_i ) ).

    F is the risk against an attacker who pays alpha_i KL(Q_i || uniform) on a pool of m perturbations per example
    (Meunier et al., ICML 2021, section 4.2): 0 <= R - F <= sum_i mass_i alpha_i log m on the pool, and F is smooth with
    the constant C = `FiniteGame.smoothness(alpha)`, of order 1 / alpha. After T steps of size 1 / C from lam_0, F
    exceeds its minimum by at most 2 C ||lam_0 - lam*||^2 / (T + 1)^2 (Beck and Teboulle, 2009). The momentum restarts
    when it points uphill (O'Donoghue and Candes, 2015), which gains orders of magnitude near the solution. A restart is
    allowed only if at least a quarter of all steps so far came after the last one. Then some run without restart has
    T / 5 steps, and the error keeps the order T^-2: it is at most 100 C / T^2, since points of the simplex are at most
    sqrt(2) apart.

    The pool is drawn once, from `game.pool`; a finite game is its own pool. `value` is the risk R of `weights` on the
    pool, without regularisation; if attacks play the game it is a lower estimate of R. The smoothed response with the
    largest lower bound gives `lower_bound` and, on a finite game, `attack`. `select` decides which iterate becomes
    `weights`:

    - "best" (the default): that of least R, which is closest to the equilibrium;
    - "relaxed": that of least F, the minimiser of the relaxation itself;
    - "last": the one after T steps.

    With a fixed number of steps a smaller alpha can end farther from the equilibrium. num_steps proportional to
    alpha^(-1/2) only keeps the bound C / T^2 constant; to approach the value take num_steps proportional to 1 / alpha,
    or reduce alpha step by step, each time with lam0 = the weights found before.

    History (T + 1 entries, the start included): value, best_value, weights, smoothed_value, smoothed_gap
    (max over the simplex of grad F(lam)·(lam - mu) >= F(lam) - min F), lower_bound.

    Args:
        alpha: the temperatures alpha_i > 0, in units of the losses: one number for all examples, or one for each, as a
            list, an array or a tensor [N]. The latter fit games of N examples only; in a training the examples are
            those of a batch in their order, or the images that a weights phase plays on.
        num_steps: T >= 1.
        num_samples: random perturbations per example in the pool.
        include_attack_points: whether the pool also holds x, the points of attacks and those found before; False is
            the pure Monte-Carlo form of random points alone, which find nothing in high dimension.
        tolerance: stop as soon as smoothed_gap <= tolerance, in units of the losses; None runs all steps. If num_steps
            do not suffice, the status is "stopped" and a RuntimeWarning is issued.
        select: "best", "relaxed" or "last".

    Raises:
        ValueError: an argument is outside its range; in solve, losses so large that their squares overflow, or another
            number of examples than of temperatures.
    """

    alpha: float | Sequence[float] = 1e-2
    num_steps: int = 1000
    num_samples: int = 16
    include_attack_points: bool = True
    tolerance: float | None = None
    select: str = "best"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", _plain_temperatures(self.alpha))
        require_selection(self.select, SELECTIONS)
        self.require_counts(num_steps=1, num_samples=0)
        if self.num_samples == 0 and not self.include_attack_points:
            raise ValueError("the pool would be empty: take num_samples >= 1 or include_attack_points=True")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be >= 0 and finite, or None to run all steps, got {self.tolerance}")

    @property
    def num_examples(self) -> int | None:
        """The number of temperatures, if each example has its own."""
        return len(self.alpha) if isinstance(self.alpha, tuple) else None

    def attack_cost(self) -> float:
        """The attacks for the pool: on the mixture, and on each member alone."""
        return 2.0 if self.include_attack_points else 0.0

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; the generator draws the pool."""
        lam = start(game, lam0)
        pool = draw_pool(game, lam, self.num_samples, self.include_attack_points, generator)
        alpha = self._temperatures(pool)
        trace = drive(self._iterates(pool, lam, alpha))
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
        attack = pool.smoothed_response(torch.tensor(where, dtype=torch.float64), alpha)
        lower_bound = pool.response_value(attack)
        weights, value = self._selected(trace)
        return Equilibrium(
            weights=weights,
            value=value,
            gap=certified_gap(game, value, lower_bound),
            attack=attack if pool is game else None,
            status=status,
            history=trace.history,
            num_attacks=game.num_members + 1 if self.include_attack_points and pool is not game else 0,
            average_weights=None,
            lower_bound=lower_bound,
        )

    def _temperatures(self, pool: FiniteGame) -> float | Tensor:
        if not isinstance(self.alpha, tuple):
            return float(self.alpha)  # type: ignore[arg-type]
        if len(self.alpha) != pool.num_examples:
            raise ValueError(f"alpha has {len(self.alpha)} temperatures, but the game has {pool.num_examples} examples")
        return torch.tensor(self.alpha, dtype=torch.float64)

    def _selected(self, trace: Trace) -> tuple[Tensor, float]:
        history = trace.history
        ranked = history["smoothed_value"] if self.select == "relaxed" else history["value"]
        chosen = len(ranked) - 1 if self.select == "last" else min(range(len(ranked)), key=ranked.__getitem__)
        return torch.tensor(history["weights"][chosen], dtype=torch.float64), history["value"][chosen]

    def _iterates(self, pool: FiniteGame, lam: Tensor, alpha: float | Tensor) -> Iterator[Iterate]:
        # If the losses do not depend on the perturbation, F is linear and C = 0: every step size is right, and this
        # one is large enough to reach a vertex at once.
        constant = max(pool.smoothness(alpha), 1e-9 * pool.max_loss)
        if not math.isfinite(constant):
            least = torch.as_tensor(alpha).min().item()
            raise ValueError(
                f"losses of {pool.max_loss} at alpha {least} make the smoothness constant {constant}: "
                "divide losses and alpha by the same number"
            )
        step_size = 1.0 / constant if constant > 0 else 0.0
        if not math.isfinite(step_size):
            raise ValueError(f"losses of {pool.max_loss} are too small: multiply losses and alpha by the same number")
        ahead, momentum, restarted = lam, 1.0, 0
        for step in range(self.num_steps + 1):
            values, smoothed, gradients = (part.to(lam) for part in pool.smoothed(torch.stack([lam, ahead]), alpha))
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


def _plain_temperatures(alpha: float | Sequence[float]) -> float | tuple[float, ...]:
    """One number or a tuple of numbers, so that solvers compare and are recorded as other settings are.

    Raises:
        ValueError: no number or list of numbers, or one is not positive and finite.
    """
    wide = torch.as_tensor(alpha, dtype=torch.float64).cpu()
    if wide.ndim > 1 or wide.numel() == 0:
        raise ValueError(f"alpha must be one number, or a list with one for each example, got shape {list(wide.shape)}")
    wrong = ~(wide.isfinite() & (wide > 0))
    if bool(wrong.any()):
        raise ValueError(f"alpha must be positive and finite, got {wide[wrong][0].item()}")
    return wide.item() if wide.ndim == 0 else tuple(wide.tolist())
