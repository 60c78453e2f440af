"""Exact equilibria by linear programming, and the double oracle where responses are attacks."""

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
from mixadv.lambda_solvers.driver import Iterate, LambdaSolver, drive, respond, start

CUTS = ("auto", "examples", "aggregated")


@dataclass(frozen=True)
class LinearProgram(LambdaSolver):
    """min over lam on the simplex, t, of sum_i mass_i t_i such that t_i >= sum_k lam_k A[i, j, k] for every j.

    **Finite games.** The program has N m rows, of which few matter, so they are generated (Kelley, 1960; Dantzig
    and Wolfe, 1960, from the attacker's side): starting at lam0, add the rows of a best response to lam, solve the
    program on the rows so far with HiGHS, go on from its lam. Every solution proves a lower bound of V, the value
    of its dual Q against the best member, and every lam has an exact value; the least value and the greatest bound
    are kept, until they differ by at most `tolerance`. The rows of a response are kept apart for every example, or
    summed over groups of examples (`cuts`); the result is the same, not the time. The certificate that is returned,
    `value`, `lower_bound` and `gap`, is computed anew by the game from `weights` and `attack`, in float64.

    Status: "converged"; "stopped" after max_rounds; "stalled" where rounding leaves nothing to add above the
    tolerance. The latter two also warn; `gap` is right in any case. History (one entry per response): value,
    best_value, weights, lower_bound, num_cuts.

    **Games whose responses are attacks** (not a `FiniteGame`). The double oracle: the same with an attack for the
    best response (McMahan, Gordon, Blum, ICML 2003). The pool first holds what `game.pool` gives, with attacks on
    lam0 and on each member alone; each round solves the program on `game.known()` exactly, and attacks its weights,
    which adds points. It ends when the attack gains at most `attack_tolerance` over the program's bound, with status
    "converged", or after num_rounds with "stopped", the ordinary end of a phase with a budget, so without warning. Of
    all weights that
    were attacked, lam0 and the members alone included, those with the least value on all known points are returned,
    so they are never worse there than the best member. `value` is a lower estimate of R; `lower_bound` is certain
    for these examples, since all points are real, and bounds V from below; `gap` is None. History (one entry per
    round): value (just after the attack), best_value, weights, lower_bound, num_perturbations.

    Args:
        tolerance: of value - lower_bound on a finite game, in units of its largest |loss|.
        max_rounds: responses at most on a finite game.
        time_limit: seconds for the whole call, checked by every linear program and not during attacks; None is no
            limit.
        cuts: "examples", "aggregated", or "auto": examples up to twice num_groups of them.
        num_groups: groups of examples, for aggregated cuts.
        num_rounds: attacks of the double oracle, after those for its pool.
        attack_tolerance: the gain of an attack at which the double oracle ends, in units of the largest |loss|.
        num_samples: random perturbations per example in the double oracle's pool.
        recent_batches: only read by training: so many recently attacked batches join the batch in a weights phase.

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
        for name, least in (
            *(("max_rounds", 1), ("num_groups", 1), ("num_rounds", 1)),
            *(("num_samples", 0), ("recent_batches", 0)),
        ):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {number}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive, in seconds, or None for no limit, got {self.time_limit}")
        if self.cuts not in CUTS:
            raise ValueError(f"cuts must be one of {', '.join(CUTS)}, got {self.cuts!r}")

    def attack_cost(self) -> float:
        """The pool's attacks, on the mixture and on each member alone, and one attack a round."""
        return 2.0 + self.num_rounds

    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """See `LambdaSolver.solve`; the generator draws the pool of a game that is played by attacks."""
        lam = start(game, lam0)
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        if not isinstance(game, FiniteGame):
            return self._double_oracle(game, lam, deadline, generator)
        found = self._exact(game, lam, deadline)
        if found.status != "converged":
            reason = "max_rounds were too few" if found.status == "stopped" else "rounding allows no better"
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
        pool = game.pool(lam, self.num_samples, True, generator)
        if pool.num_members != game.num_members:
            raise ValueError(f"the game has {game.num_members} members, but its pool has {pool.num_members}")
        candidates = [lam, *torch.eye(game.num_members, dtype=torch.float64)]
        trace = drive(self._rounds(game, lam, deadline))
        candidates += [torch.tensor(weights, dtype=torch.float64) for weights in trace.history["weights"]]
        known = game.known()
        values = [known.value(candidate) for candidate in candidates]
        best = min(range(len(values)), key=values.__getitem__)
        last = self._exact(known, candidates[best], deadline)
        assert last.lower_bound is not None
        return Equilibrium(
            weights=candidates[best],
            value=values[best],
            gap=None,
            attack=None,
            status=trace.status if trace.status == "converged" else "stopped",
            history=trace.history,
            num_attacks=game.num_members + 1 + trace.num_steps,
            average_weights=None,
            lower_bound=min(max(last.lower_bound, trace.history["lower_bound"][-1]), values[best]),
        )

    def _rounds(self, game: Game, lam: Tensor, deadline: float) -> Iterator[Iterate]:
        bound = -math.inf
        for _ in range(self.num_rounds):
            found = self._exact(game.known(), lam, deadline)
            assert found.lower_bound is not None
            # What was proved on fewer points holds on more.
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
