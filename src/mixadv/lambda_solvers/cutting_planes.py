"""The master program of constraint generation: the attacker mixes the best responses that were found so far."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mixadv.game import FiniteGame
from mixadv.lambda_solvers.driver import SolverError
from mixadv.lambda_solvers.grouping import SAMPLE, Grouping

# Number of losses that are converted to float64 at a time.
_CHUNK_ENTRIES = 1 << 18
# A cut is new if it exceeds all earlier ones by this much, in units of the largest loss.
_ROUNDING = 1e-14
# The entries that HiGHS gets are scaled to this maximum. HiGHS treats entries below 1e-9 as zeros, and its tolerances
# (at best 1e-10) are absolute; with a maximum somewhat above 1 both are harmless at a relative gap of 1e-9.
_LARGEST_ENTRY = 8.0
_TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


class CuttingPlanes:
    """Piecewise linear lower bounds of R, and the mixtures of responses that prove them.

    A response c gives for every group g of examples the cut, linear in lam,

        t_g >= sum_k lam_k r_cgk,    r_cg = (1 / mass_g) sum_{i in g} mass_i A[i, choice_c(i), :],

    and R(lam) >= sum_g mass_g t_g. Groups of one example have one row per example and perturbation, larger groups an
    aggregate of these rows. HiGHS solves the dual, the attacker's side,

        max v  such that  v <= sum_cg mu_cg r_cgk for every k,  sum_c mu_cg = mass_g,  mu >= 0,

    whose value bounds V from below, whose multipliers are the weights lam, and whose solution is the strategy
    Q[i, j] = mass_i sum_c (mu_cg / mass_g) [choice_c(i) = j], g the group of i. It has one row per group, not per cut;
    a group with a single cut leaves no choice and is not part of the program.

    Cuts that were not used in the last `keep` solutions are dropped. The solution stays feasible without them, so the
    bound never falls; and since cuts are dropped only after the bound rose, the method cannot cycle.

    Args:
        game: the game.
        choice: [N], a response that decides which examples form a group, see `Grouping`. It adds no cut.
        num_groups: maximal number of groups; with N or more each example is a group.
        keep: after how many solutions an unused cut is dropped.
    """

    def __init__(self, game: FiniteGame, choice: Tensor, num_groups: int, keep: int = 3) -> None:
        self.game, self.keep = game, keep
        self.bound = -math.inf
        self._scale = game.max_loss or 1.0
        self._group = self._groups(choice, num_groups)
        masses = torch.zeros(int(self._group.max()) + 1, dtype=torch.float64, device=choice.device)
        self._masses = masses.index_add_(0, self._group, game.masses).cpu().numpy()
        # A loss that all members share does not change the weights; subtracting it keeps the digits of differences.
        self._shifts = np.zeros(len(masses))
        self._shifts = self._cuts(choice).mean(1)
        self._rows = np.zeros((0, game.num_members))
        self._row_group = self._row_round = self._idle = np.zeros(0, dtype=np.int64)
        self._choices: dict[int, Tensor] = {}
        self._rounds = 0
        # (mu, group, round) of the cuts that prove `bound`.
        self._proof = (np.zeros(0), self._row_group, self._row_round)

    def __len__(self) -> int:
        """The number of cuts held, counted per group."""
        return len(self._rows)

    def add(self, lam: Tensor, choice: Tensor) -> bool:
        """Add the cuts of the response `choice` [N] to lam [L] that exceed all earlier cuts at lam.

        Returns:
            Whether there was such a cut; if not, the lower bound is exact at lam up to rounding.
        """
        rows = self._cuts(choice)
        scores = rows @ lam.numpy()
        highest = np.full(len(rows), -np.inf)
        np.maximum.at(highest, self._row_group, self._rows @ lam.numpy())
        new = np.flatnonzero(scores > highest + _ROUNDING)
        if len(new) == 0:
            return False
        number, self._rounds = self._rounds, self._rounds + 1
        self._choices[number] = choice.to(_smallest_integer(self.game.num_perturbations))
        self._rows = np.concatenate([self._rows, rows[new]])
        self._row_group = np.concatenate([self._row_group, new])
        self._row_round = np.concatenate([self._row_round, np.full(len(new), number)])
        self._idle = np.concatenate([self._idle, np.zeros(len(new), dtype=np.int64)])
        return True

    def solve(self, deadline: float = math.inf) -> Tensor:
        """Minimise the lower bound of R, raise `bound`, drop unused cuts; returns the minimiser lam [L].

        Args:
            deadline: on the clock of `time.perf_counter`.

        Raises:
            SolverError: the deadline passed, or HiGHS failed (a RuntimeError).
        """
        if time.perf_counter() >= deadline:
            raise SolverError(_OUT_OF_TIME)
        mu, lam = self._attacker(deadline)
        bound = self._scale * float((mu @ self._rows).min() + self._masses @ self._shifts)
        self._idle = np.where(mu > 0, 0, self._idle + 1)
        if bound > self.bound:
            self.bound = bound
            used = mu > 0
            self._proof = (mu[used], self._row_group[used], self._row_round[used])
            self._drop()
        return torch.from_numpy(lam)

    def attack(self) -> Tensor:
        """[N, m] float64, the strategy Q that proves `bound`."""
        game = self.game
        attack = torch.zeros(game.losses.shape[:2], dtype=torch.float64, device=game.losses.device)
        mu, groups, rounds = self._proof
        for number in np.unique(rounds):
            mine = rounds == number
            share = np.zeros(len(self._masses))
            share[groups[mine]] = mu[mine] / self._masses[groups[mine]]
            weights = torch.from_numpy(share).to(game.masses)[self._group] * game.masses
            attack.scatter_add_(1, self._choices[number].long()[:, None], weights[:, None])
        return attack

    def _attacker(self, deadline: float) -> tuple[np.ndarray, np.ndarray]:
        """The multipliers mu, one per cut, and lam."""
        masses, group = self._masses, self._row_group
        alone = np.bincount(group, minlength=len(masses))[group] == 1
        mu = np.where(alone, masses[group], 0.0)
        fixed = mu @ self._rows
        if alone.all():
            # The attacker has no choice, so the best member alone is optimal.
            lam = np.zeros(len(fixed))
            lam[fixed.argmin()] = 1.0
            return mu, lam
        present, column = np.unique(group[~alone], return_inverse=True)
        solution, lam = _mix(self._rows[~alone], column, masses[present], fixed, deadline)
        solution = np.clip(solution, 0.0, None)
        total = np.bincount(column, solution)
        # For a tiny mass HiGHS may return mu = 0 within its tolerance, but Q must hold that mass.
        solution[total[column] == 0] = 1.0
        solution *= (masses[present] / np.bincount(column, solution))[column]
        mu[~alone] = solution
        lam = np.clip(lam, 0.0, None)
        return mu, lam / lam.sum()

    def _drop(self) -> None:
        held = self._idle <= self.keep
        self._rows, self._idle = self._rows[held], self._idle[held]
        self._row_group, self._row_round = self._row_group[held], self._row_round[held]
        needed = set(self._row_round.tolist()) | set(self._proof[2].tolist())
        self._choices = {number: choice for number, choice in self._choices.items() if number in needed}

    def _groups(self, choice: Tensor, num_groups: int) -> Tensor:
        n = self.game.num_examples
        if num_groups >= n:
            return torch.arange(n, device=choice.device)
        some = torch.arange(0, n, -(-n // SAMPLE), device=choice.device)
        sample = self.game.losses[some, choice[some]].to(torch.float64) / self._scale
        grouping = Grouping.learn(sample, num_groups)
        return torch.cat([grouping.assign(losses, rows.start) for rows, losses in self._picked(choice)])

    def _cuts(self, choice: Tensor) -> np.ndarray:
        """r_cg of all groups, [groups, L], divided by the scale, minus the shift of the group."""
        sums = torch.zeros(len(self._masses), self.game.num_members, dtype=torch.float64, device=choice.device)
        for rows, losses in self._picked(choice):
            sums.index_add_(0, self._group[rows], losses.mul_(self.game.masses[rows, None]))
        means = sums.cpu().numpy() / np.where(self._masses > 0, self._masses, 1.0)[:, None]
        return means - self._shifts[:, None]

    def _picked(self, choice: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """All examples in chunks: (rows, losses [n, L] at the choices in float64, divided by the scale)."""
        length = max(1, _CHUNK_ENTRIES // self.game.num_members)
        for start in range(0, self.game.num_examples, length):
            rows = slice(start, min(start + length, self.game.num_examples))
            picked = torch.arange(rows.stop - start, device=choice.device)
            yield rows, self.game.losses[rows][picked, choice[rows]].to(torch.float64).div_(self._scale)


def _mix(
    rows: np.ndarray, group: np.ndarray, masses: np.ndarray, fixed: np.ndarray, deadline: float
) -> tuple[np.ndarray, np.ndarray]:
    """max v such that v <= fixed_k + sum_r mu_r rows_rk, sum_{r in g} mu_r = masses_g, mu >= 0, by HiGHS.

    Args:
        rows: [R, L]; group: [R], in 0 .. G - 1; masses: [G], positive; fixed: [L].

    Returns:
        mu [R] and the multipliers lam [L], up to HiGHS's tolerances.
    """
    # Imported here, because scipy is slow to import and most commands solve no program.
    from scipy.optimize import linprog
    from scipy.sparse import csc_array

    count, members = rows.shape
    unit = float(np.abs(rows).max()) / _LARGEST_ENTRY or 1.0
    # Scaled to order 1: with masses of 1 / N, absolute tolerances would cost mu its digits.
    largest = masses.max()
    above = np.ones((members, count + 1))
    above[:, :count] = -rows.T / unit
    sums = csc_array((np.ones(count), group, np.append(np.arange(count + 1), count)), shape=(len(masses), count + 1))
    bounds = np.tile([0.0, np.inf], (count + 1, 1))
    bounds[count, 0] = -np.inf
    program = {
        "c": np.append(np.zeros(count), -1.0),
        "A_ub": csc_array(above),
        "b_ub": fixed / unit / largest,
        "A_eq": sums,
        "b_eq": masses / largest,
        "bounds": bounds,
    }
    message = ""
    # Presolve costs more than it saves on these programs, but HiGHS may succeed with it after a failure without.
    for presolve in (False, True):
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            raise SolverError(_OUT_OF_TIME)
        found = linprog(
            **program, method="highs", options={**_TOLERANCES, "presolve": presolve, "time_limit": remaining}
        )
        if found.status == 0:
            return found.x[:count] * largest, -found.ineqlin.marginals
        if found.status == 1:
            raise SolverError(_OUT_OF_TIME)
        message = found.message
    raise SolverError(
        f"HiGHS failed on a linear program of {count} cuts and {members} members: {message.strip()} "
        "Rescale the losses, or take another num_groups"
    )


_OUT_OF_TIME = (
    "the linear program ran out of time: raise time_limit, loosen tolerance, or take cuts='aggregated' with fewer "
    "num_groups"
)


def _smallest_integer(size: int) -> torch.dtype:
    """The narrowest of the types that hold 0 .. size - 1."""
    if size <= 1 << 8:
        return torch.uint8
    return torch.int16 if size <= 1 << 15 else torch.int32
