"""The pairs alone: the largest fractional independent set of a graph, by bipartite matching.

    maximise sum_i q_i    subject to    q_i + q_j <= 1 for every edge,  0 <= q_i <= 1

has a solution with q in {0, 1/2, 1}, and so has its dual, the smallest fractional cover of the points by edges and
points. Both follow from a maximum matching of the bipartite double cover and Konig's theorem. In a bipartite
component q is in {0, 1}. Some maximum independent set contains every point with q = 1 and none with q = 0 (Nemhauser
and Trotter, Mathematical Programming 8, 1975), so only the points with q = 1/2 remain to be decided.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_bipartite_matching

from mixadv.game.close_pairs import Bools, Floats, Ints


class PairPacking(NamedTuple):
    """The solution.

    Attributes:
        q: [N], in {0, 1/2, 1}.
        pairs: [M, 2], the pairs of the dual solution, each once.
        cover: [M], their dual variables u; those of the points are 1 - sum of u over the pairs of the point. The sum of
            all dual variables is the sum of q.
        bipartite: [N], whether the component of the point is bipartite.
    """

    q: Floats
    pairs: Ints
    cover: Floats
    bipartite: Bools


def pack_pairs(num_points: int, pairs: Ints) -> PairPacking:
    """Solve the program for the graph with `pairs` [P, 2], i < j, on points 0..N-1."""
    n = num_points
    i, j = pairs.T
    # In the double cover, i is joined to n + j and j to n + i; a component is bipartite if it falls into two.
    double = coo_array((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i] + n)), shape=(2 * n, 2 * n))
    part = connected_components(double, directed=False)[1]
    bipartite = part[:n] != part[n:]
    # One side of each bipartite component: the points that are in the smaller-numbered half.
    first = part[:n] < part[n:]
    keep = np.r_[~bipartite[i] | first[i], ~bipartite[j] | first[j]]
    left, right = np.r_[i, j][keep], np.r_[j, i][keep]
    edges = csr_array(coo_array((np.ones(len(left)), (left, right)), shape=(n, n)))
    partner = maximum_bipartite_matching(edges, perm_type="column").astype(np.int64)
    left_covered, right_covered = _least_cover(edges, partner)
    covered = (left_covered.astype(np.float64) + right_covered) / 2
    q = 1 - np.where(bipartite, 2 * covered, covered)
    a = np.flatnonzero(partner >= 0)
    ends = np.sort(np.stack([a, partner[a]], 1), axis=1)
    matched, place = np.unique(ends, axis=0, return_inverse=True)
    values = np.where(bipartite[a], 1.0, 0.5)
    cover = np.bincount(place.reshape(-1), weights=values, minlength=len(matched)).astype(np.float64)
    return PairPacking(q, matched.reshape(-1, 2), cover, bipartite)


def _least_cover(edges: csr_array, partner: Ints) -> tuple[Bools, Bools]:
    """The points of the least cover on the left and on the right, [N] each (Konig).

    From the unmatched points on the left, edges lead to the right, and matched edges back. The cover is what that
    does not reach on the left, and what it reaches on the right.
    """
    n = len(partner)
    matched = np.flatnonzero(partner >= 0)
    joined = np.diff(edges.indptr) > 0
    starts = np.flatnonzero(joined & (partner < 0))
    left, right = edges.nonzero()
    source = 2 * n
    rows = np.r_[left, n + partner[matched], np.full(len(starts), source)]
    columns = np.r_[n + right, matched, starts]
    steps = csr_array(coo_array((np.ones(len(rows)), (rows, columns)), shape=(2 * n + 1, 2 * n + 1)))
    reached = np.zeros(2 * n + 1, dtype=bool)
    reached[breadth_first_order(steps, source, return_predecessors=False)] = True
    return joined & ~reached[:n], reached[n : 2 * n]
