"""The optima of the game over all classifiers on given points: what any classifier and any mixture can reach at most.

See `mixadv.game.conflict_graph` for the program. Its linear form gives the randomised optimum, and its dual variables
the attacker's optimal strategy; its form with q in {0, 1} is a maximum independent set of the conflict graph and
gives the deterministic optimum. The difference is the most that randomising can add on these points, for any model
and training. Where a component of the graph is bipartite, as all are with two classes, both optima are equal (Konig's
theorem).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from mixadv.game.close_pairs import Bools, Floats, Ints
from mixadv.game.conflict_graph import Conflicts
from mixadv.game.pair_packing import PairPacking, pack_pairs

# Rows that are added to the linear program at a time, and by how much the sum over a set must exceed 1.
_ROWS_AT_ONCE, _VIOLATED = 5_000, 1e-9
# Above these sizes of a component HiGHS does not end its first linear program in a minute, nor in its time limit.
_MOST_PAIRS, _MOST_CLIQUES = 100_000, 25_000
# Bounds that are closer than this are one number.
_SAME = 1e-9


@dataclass(frozen=True, eq=False)
class Ceiling:
    """The optima over all classifiers at one radius, as fractions of the N points; see `ceiling`.

    Attributes:
        randomised, randomised_upper: bounds of the largest expected accuracy under attack of a mixture, equal if exact.
        deterministic, deterministic_upper: bounds of the largest accuracy of one classifier, equal if exact.
        q: [N], some mixture is right on the whole ball of point i with probability q_i; their mean is `randomised`.
        right: [N], some classifier is right on the whole balls of these points; their mean is `deterministic`.
        sets: [S, N] of 0 and 1, the sets whose common points the attacker uses.
        attack: [N, S], the attacker's strategy: Q[i, s] is the probability with which it draws point i and moves it to
            the common point of set s; with the rest of 1/N the point stays. No classifier is right more often than
            `randomised_upper` under it.
        status: "exact", or what was left out.
    """

    randomised: float
    randomised_upper: float
    deterministic: float
    deterministic_upper: float
    q: Floats
    right: Bools
    sets: csr_array
    attack: csr_array
    status: str

    @property
    def gain_at_most(self) -> float:
        """The most that randomising can add, `randomised_upper` - `deterministic`."""
        return self.randomised_upper - self.deterministic


def ceiling(conflicts: Conflicts, time_limit: float = 60.0) -> Ceiling:
    """Solve the game over all classifiers on the points of `conflicts`.

    Args:
        conflicts: see `mixadv.game.conflicts`.
        time_limit: seconds for the linear program, and as many for the mixed-integer program; then their bounds are
            returned.

    Raises:
        ValueError: a negative time limit.
    """
    if not time_limit >= 0:
        raise ValueError(f"time_limit must be at least 0 seconds, got {time_limit}")
    packing = pack_pairs(len(conflicts), conflicts.pairs)
    fractional = _Fractional(conflicts, packing, time.monotonic() + time_limit)
    whole = _Whole(conflicts, packing, time.monotonic() + time_limit)
    n, right = len(conflicts), whole.right
    q = fractional.q if fractional.q.sum() > right.sum() else right.astype(np.float64)
    randomised, upper = _bounds(float(q.mean()), fractional.upper / n)
    most = min(whole.upper, int(np.floor(n * upper + 1e-6)))
    low, high = int(right.sum()) / n, most / n
    if low == high and abs(upper - low) <= _SAME:
        randomised = upper = low
    left_out = [reason for reason in (fractional.left_out, whole.left_out) if reason]
    if not conflicts.all_pairs:
        left_out = [f"only the closest {len(conflicts.pairs):,} pairs of points were used"]
    return Ceiling(
        *(randomised, upper, low, high, q, right),
        *(fractional.sets, _strategy(fractional.sets, fractional.cover)),
        "; ".join(left_out) or "exact",
    )


def over_radii(ceilings: Sequence[Ceiling]) -> list[Ceiling]:
    """The ceilings of the same points at growing radii, each with the bounds that follow from the others.

    A larger ball only helps the attacker. So what is reached at one radius is reached at every smaller one, and what
    is not exceeded at one radius is not exceeded at any larger one, by the same strategy of the attacker.

    Args:
        ceilings: by ascending radius.
    """
    found = list(ceilings)
    for k in range(1, len(found)):
        before, here = found[k - 1], found[k]
        if before.randomised_upper < here.randomised_upper - _SAME:
            at_most, sets, attack = before.randomised_upper, before.sets, before.attack
            here = replace(here, randomised_upper=at_most, sets=sets, attack=attack)
        found[k] = replace(here, deterministic_upper=min(before.deterministic_upper, here.deterministic_upper))
    for k in reversed(range(len(found) - 1)):
        here, after = found[k], found[k + 1]
        if after.randomised > here.randomised + _SAME:
            here = replace(here, randomised=after.randomised, q=after.q)
        if after.deterministic > here.deterministic:
            here = replace(here, deterministic=after.deterministic, right=after.right)
        found[k] = here
    return found


def _bounds(low: float, high: float) -> tuple[float, float]:
    """The same number twice where only rounding tells them apart.

    Raises:
        RuntimeError: the lower bound is above the upper one.
    """
    if low - high > 1e-6:
        raise RuntimeError(f"a defect of the ceiling: a lower bound {low} above an upper bound {high}")
    if high - low > _SAME:
        return low, high
    # Rounded, so that a value that was computed in two ways is one number too.
    return (round((low + high) / 2, 10),) * 2


class _Fractional:
    """The linear program: q [N] feasible, and a feasible dual solution: `cover` [S] of `sets`, with its value `upper`.

    The pairs are solved by matching; then sets of three and more points are added where they are violated.
    """

    def __init__(self, conflicts: Conflicts, packing: PairPacking, deadline: float) -> None:
        n, count = len(conflicts), len(packing.pairs)
        self.left_out = ""
        self.q = packing.q
        rows = np.repeat(np.arange(count), 2)
        self.sets = csr_array(coo_array((np.ones(2 * count), (rows, packing.pairs.ravel())), shape=(count, n)))
        self.cover = packing.cover
        if not conflicts.all_pairs:
            self.q = np.zeros(n)
        else:
            self._add_sets(conflicts, deadline)
        self.upper = float(self.cover.sum() + _of_points(self.sets, self.cover).sum())

    def _add_sets(self, conflicts: Conflicts, deadline: float) -> None:
        sets = conflicts.sets
        sizes = np.diff(sets.indptr)
        used = sizes == 2
        while True:
            violation = sets @ self.q - 1
            wrong = np.flatnonzero(~used & (violation > _VIOLATED))
            if not len(wrong):
                break
            used[wrong[np.argsort(-violation[wrong], kind="stable")[:_ROWS_AT_ONCE]]] = True
            if not self._solve(sets[np.flatnonzero(used)], deadline):
                self.left_out = "the randomised optimum is only bounded"
                break
        self.q = self.q / max(1.0, float((sets @ self.q).max(initial=0.0)))
        if not conflicts.all_sets:
            # In a larger set every choice of that many points sums to at most 1.
            listed, classes = int(sizes.max()), len(np.unique(conflicts.y))
            self.q = self.q * listed / classes
            self.left_out = f"sets of more than {listed} points were left out"

    def _solve(self, sets: csr_array, deadline: float) -> bool:
        """Solve the program with these sets; whether that ended in time. The points without conflicts are left out."""
        points = np.flatnonzero(np.bincount(sets.indices, minlength=sets.shape[1]))
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        found = linprog(
            -np.ones(len(points)),
            A_ub=sets[:, points],
            b_ub=np.ones(sets.shape[0]),
            bounds=(0, 1),
            # On dense conflicts several times as fast as the simplex method.
            method="highs-ipm",
            options={"time_limit": left},
        )
        if found.status != 0:
            return False
        self.q = np.ones(sets.shape[1])
        self.q[points] = np.clip(found.x, 0.0, 1.0)
        self.sets, self.cover = sets, np.maximum(-found.ineqlin.marginals, 0.0)
        return True


class _Whole:
    """The maximum independent set: `right` [N], and an upper bound of its size, `upper`."""

    def __init__(self, conflicts: Conflicts, packing: PairPacking, deadline: float) -> None:
        self.left_out = ""
        if not conflicts.all_pairs:
            # One answer for all points in conflict, and the right one for all others.
            share = np.bincount(conflicts.y[conflicts.in_conflict] - conflicts.y.min())
            self.right = ~conflicts.in_conflict | (conflicts.y - conflicts.y.min() == share.argmax())
            self.upper = int(np.floor(packing.q.sum() + 1e-6))
            return
        self.right = packing.q == 1
        self.upper = int(self.right.sum())
        for part, graph in _components(np.flatnonzero(packing.q == 0.5), conflicts):
            chosen = _greedy(graph)
            better, most = _independent(graph, deadline)
            chosen = chosen if better is None or better.sum() < chosen.sum() else better
            self.right[part[chosen]] = True
            self.upper += most
            if most > chosen.sum():
                self.left_out = "the deterministic optimum is only bounded"


def _components(points: Ints, conflicts: Conflicts) -> list[tuple[Ints, csr_array]]:
    """The components of the conflict graph on `points`, the smallest first, with their adjacency matrices."""
    inside = np.isin(conflicts.pairs, points).all(1)
    i, j = np.searchsorted(points, conflicts.pairs[inside]).T
    ends = np.r_[i, j], np.r_[j, i]
    graph = csr_array(coo_array((np.ones(2 * len(i)), ends), shape=(len(points), len(points))))
    number = connected_components(graph, directed=False)[1]
    order = np.argsort(number, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(points) else []
    return [(points[part], graph[part][:, part]) for part in sorted(parts, key=len)]


def _greedy(graph: csr_array) -> Bools:
    """An independent set [n]: again and again a point with the fewest neighbours that are left."""
    chosen = np.zeros(graph.shape[0], dtype=bool)
    degree = np.diff(graph.indptr).astype(np.float64)
    while np.isfinite(degree.min(initial=np.inf)):
        best = int(degree.argmin())
        chosen[best] = True
        gone = graph.indices[graph.indptr[best] : graph.indptr[best + 1]]
        gone = gone[np.isfinite(degree[gone])]
        degree[best] = degree[gone] = np.inf
        for point in gone:
            degree[graph.indices[graph.indptr[point] : graph.indptr[point + 1]]] -= 1
    return chosen


def _independent(graph: csr_array, deadline: float) -> tuple[Bools | None, int]:
    """A maximum independent set of a graph [n], or the largest found in time or None; and a bound of its size.

    Points with the same neighbours are chosen all or none, so they are one point of the program with their number as
    weight. The program has one row for each of some cliques that cover all pairs: fewer rows, and a tighter linear
    bound, than with one row for each pair.
    """
    half, left = graph.shape[0] // 2, deadline - time.monotonic()
    first, twin, size = _twins(graph)
    graph, n = graph[first][:, first], len(first)
    rows = _cliques(graph) if graph.nnz <= 2 * _MOST_PAIRS else []
    if left <= 0 or not 0 < len(rows) <= _MOST_CLIQUES:
        return None, half
    places = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    matrix = csr_array(coo_array((np.ones(len(places)), (places, np.concatenate(rows))), shape=(len(rows), n)))
    found = milp(
        -size,
        constraints=LinearConstraint(matrix, -np.inf, 1),
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        options={"time_limit": left},
    )
    most = half if found.mip_dual_bound is None else min(half, int(np.floor(-found.mip_dual_bound + 1e-6)))
    return None if found.x is None else found.x[twin] > 0.5, most


def _twins(graph: csr_array) -> tuple[Ints, Ints, Floats]:
    """Groups of points with the same neighbours: the first point of each, the group of each point [n], their sizes."""
    graph.sort_indices()
    around = (graph.indices[a:b].tobytes() for a, b in zip(graph.indptr, graph.indptr[1:], strict=False))
    groups: dict[bytes, int] = {}
    twin = np.array([groups.setdefault(key, len(groups)) for key in around])
    _, first, size = np.unique(twin, return_index=True, return_counts=True)
    return first, twin, size.astype(np.float64)


def _cliques(graph: csr_array) -> list[list[int]]:
    """Cliques that cover all edges: each begins with an edge that none covers yet, and grows while it can."""
    ends = zip(graph.indptr, graph.indptr[1:], strict=False)
    neighbours = [set(graph.indices[a:b].tolist()) for a, b in ends]
    covered: set[tuple[int, int]] = set()
    cliques = []
    for i, around in enumerate(neighbours):
        for j in sorted(around):
            if j < i or (i, j) in covered:
                continue
            clique, common = [i, j], around & neighbours[j]
            while common:
                clique.append(min(common))
                common &= neighbours[clique[-1]]
            covered.update(combinations(sorted(clique), 2))
            cliques.append(clique)
    return cliques


def _of_points(sets: csr_array, cover: Floats) -> Floats:
    """The least dual variables v_i >= 0 of the points with v_i + sum over their sets of u >= 1."""
    return np.maximum(1 - sets.T @ cover, 0.0)


def _strategy(sets: csr_array, cover: Floats) -> csr_array:
    """The attacker's strategy [N, S] of a dual solution: Q[i, s] = u_s / N, scaled down where they exceed 1/N."""
    total = sets.T @ cover
    scale = 1 / (len(total) * np.maximum(total, 1.0))
    moves = coo_array(sets.T)
    values = cover[moves.col] * scale[moves.row]
    used = values > 0
    return csr_array(coo_array((values[used], (moves.row[used], moves.col[used])), shape=moves.shape))
