"""Exact equilibria by linear programming; the double oracle if responses are attacks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.game import BestResponse, Equilibrium, FiniteGame, Game
from mixadv.lambda_solvers.cutting_planes import CuttingPlanes
from mixadv.lambda_solvers.driver import Iterate, LambdaSolver, best_of, draw_pool, drive, respond, start

CUTS = ("auto", "examples", "aggregated")


@dataclass(frozen=True)
class LinearProgram(LambdaSolver):
    """min over lam on the simplex, t, of sum_i mass_i t_i such that t_i >= sum_k lam_k A[i, j, k] for every j.

    **Finite games.** The program has N m rows, of which few matter, so they are generated (Kelley, 1960; Dantzig and
    Wolfe, 1960, from the attacker's side): start at lam0, add the rows of a best response to lam, solve the program
    on the rows so far with HiGHS, repeat with its lam. Every solution proves a lower bound of V, the value of its dual
    Q against the best member, and every lam has an exact value. The solver keeps the least value and the greatest
    bound, and stops when they differ by at most `tolerance`. `cuts` decides whether each example has rows of its own
    or the rows are summed over groups of examples; this changes the time, not the result. At the end the game computes
    `value`, `lower_bound` and `gap` again from `weights` and `attack`, in float64.

    Status: "converged"; "stopped" after max_rounds; "stalled" if rounding errors prevent a further cut before the
    tolerance is reached. The latter two also warn; `gap` is right in any case. History (one entry per response):
    value, best_value, weights, lower_bound, num_cuts.

    **Games whose responses are attacks** (not a `FiniteGame`). The double oracle: the same, with an attack for the
    best response (McMahan, Gordon, Blum, ICML 2003). The first points are those of `game.pool`, with attacks on lam0
    and on each member alone. Each round solves the program on `game.known()` exactly and attacks its weights, which
    adds points. The solver ends when the attack gains at most `attack_tolerance` over the program's bound, with status
    "converged", or after num_rounds, with status "stopped" and without a warning. Among all attacked weights,
    including lam0 and the members alone, it returns those of least value on all known points, so they are never worse
    there than the best member. `value` is a lower estimate of R. `lower_bound` bounds V from below on these examples
    with certainty, because all points are real; `gap` is None. History (one entry per round): value (just after the
    attack), best_value, weights, lower_bound, num_perturbations.

    Args:
        tolerance: of value - lower_bound on a finite game, in units of its largest |loss|.
        max_rounds: maximal number of responses on a finite game.
        time_limit: seconds for the whole call, checked by every linear program but not during attacks; None is no
            limit.
        cuts: "examples", "aggregated", or "auto", which means "examples" if there are at most 2 num_groups of them.
        num_groups: groups of examples, for aggregated cuts.
        num_rounds: rounds of the double oracle, one attack each, after the attacks for its pool.
        attack_tolerance: the gain of an attack at which the double oracle ends, in units of the largest |loss|.
        num_samples: random perturbations per example in the double oracle's pool.
        recent_batches: used by training only: a weights phase adds this many recently attacked batches to its batch.

    Raises:
        ValueError: an argument is outside its range.
        SolverError: in solve, the time limit passed, or HiGHS failed (a RuntimeError).
    """

    tolerance: float = 1e-9
    max_rounds: int = 1000
    time_limit: float | None = None
    cuts: str = "auto"
    num_groups: int = 128
    num_rounds: int = 10
    attack_tolerance: float = 1e-3
    num_samples: int = 0
    recent_batches: int = 4

    def __post_init__(self) -> None:
        for name in ("tolerance", "attack_tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        self.require_counts(max_rounds=1, num_groups=1, num_rounds=1, num_samples=0, recent_batches=0)
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive, in seconds, or None for no limit, got {self.time_limit}")
        if self.cuts not in CUTS:
            raise ValueError(f"cuts must be one of {', '.join(CUTS)}, got {self.cuts!r}")

    def attack_cost(self) -> float:
        """The attacks for the pool, on the mixture and on each member alone, and one attack per round."""
        return 2.0 + self.num_rounds

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; the generator draws the pool if responses are attacks."""
        lam = start(game, lam0)
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        if not isinstance(game, FiniteGame):
            return self._double_oracle(game, lam, deadline, generator)
        found = self._exact(game, lam, deadline)
        if found.status != "converged":
            reason = "max_rounds were too few" if found.status == "stopped" else "rounding errors allow no better"
            warnings.warn(
                f"the linear program {found.status} with a gap of {found.gap:.1e}, above "
                f"{self.tolerance:g} of the largest loss, {game.max_loss:g}: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def _exact(self, game: FiniteGame, lam: Tensor, deadline: float) -> Equilibrium:
        response = game.best_response(lam)
        apart = self.cuts == "examples" or (self.cuts == "auto" and game.num_examples <= 2 * self.num_groups)
        planes = CuttingPlanes(game, _chosen(response), game.num_examples if apart else self.num_groups)
        trace = drive(self._iterates(game, lam, response, planes, deadline))
        attack = planes.attack()
        lower_bound = game.response_value(attack)
        status = trace.status
        if status != "converged":
            status = "stopped" if trace.num_steps == self.max_rounds else "stalled"
        return Equilibrium(
            weights=trace.weights,
            value=trace.value,
            gap=max(trace.value - lower_bound, 0.0),
            attack=attack,
            status=status,
            history=trace.history,
            num_attacks=trace.num_steps,
            average_weights=None,
            lower_bound=lower_bound,
        )

    def _iterates(
        self, game: FiniteGame, lam: Tensor, response: BestResponse, planes: CuttingPlanes, deadline: float
    ) -> Iterator[Iterate]:
        best = math.inf
        for step in range(self.max_rounds):
            if step:
                response = game.best_response(lam)
            best = min(best, response.value)
            following = lam
            added = False
            if not self._met(game, best, planes):
                added = planes.add(lam, _chosen(response))
                following = planes.solve(deadline) if added else lam
            record = {"lower_bound": planes.bound, "num_cuts": len(planes)}
            yield Iterate(lam, response.value, response.gradient.cpu(), record, self._met(game, best, planes))
            if not added:
                return
            lam = following

    def _met(self, game: FiniteGame, best: float, planes: CuttingPlanes) -> bool:
        return best - planes.bound <= self.tolerance * game.max_loss

    def _double_oracle(
        self, game: Game, lam: Tensor, deadline: float, generator: torch.Generator | None
    ) -> Equilibrium:
        draw_pool(game, lam, self.num_samples, True, generator)
        candidates = [lam, *torch.eye(game.num_members, dtype=torch.float64)]
        trace = drive(self._rounds(game, lam, deadline))
        candidates += torch.tensor(trace.history["weights"], dtype=torch.float64)
        known = game.known()
        weights, value = best_of(known, candidates)
        last = self._exact(known, weights, deadline)
        assert last.lower_bound is not None
        return Equilibrium(
            weights=weights,
            value=value,
            gap=None,
            attack=None,
            status=trace.status if trace.status == "converged" else "stopped",
            history=trace.history,
            num_attacks=game.num_members + 1 + trace.num_steps,
            average_weights=None,
            lower_bound=min(max(last.lower_bound, trace.history["lower_bound"][-1]), value),
        )

    def _rounds(self, game: Game, lam: Tensor, deadline: float) -> Iterator[Iterate]:
        bound = -math.inf
        for _ in range(self.num_rounds):
            found = self._exact(game.known(), lam, deadline)
            assert found.lower_bound is not None
            # A bound that was proved on fewer points also holds on more.
            bound = max(bound, found.lower_bound)
            lam = found.weights
            response = respond(game, lam)
            known = game.known()
            value = known.value(lam)
            record = {"lower_bound": bound, "num_perturbations": known.num_perturbations}
            met = value - bound <= (self.attack_tolerance + self.tolerance) * known.max_loss
            yield Iterate(lam, value, response.gradient, record, met)


def _chosen(response: BestResponse) -> Tensor:
    """The perturbation [N] that a finite game's response chose for each example."""
    assert response.choice is not None
    return response.choice
