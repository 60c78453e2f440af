"""All sets of points whose balls have a common point, built up point by point from the pairs that meet.

The sets form a simplicial complex, that is, with a set all its subsets: the Cech complex of the balls for the Euclidean
norm, and for the maximum norm the clique complex of the pairs, because boxes that meet pairwise have a common point
(Helly's theorem).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixadv.game.close_pairs import TOLERANCE, Bools, Floats, Ints
from mixadv.game.enclosing_ball import enclosing_radii

# The number of candidate sets in one batch, and the largest number for one size of set.
_AT_ONCE, _MOST_CANDIDATES = 200_000, 50_000_000


@dataclass(frozen=True, eq=False)
class Level:
    """All sets of one size k.

    Attributes:
        sets: [n, k], ascending within a row; the rows are in lexicographic order.
        facets: [n, k], the place of the set without its m-th point in the level below (for k = 2: the point).
        radii: [n], of the smallest ball around the points (l2), else 0.
        is_facet: [n], whether a larger set contains the set.
    """

    sets: Ints
    facets: Ints
    radii: Floats
    is_facet: Bools

    def keys(self, num_points: int) -> Ints:
        """[n] ascending: the set without its last point, and the last point, as one number."""
        return self.facets[:, -1] * num_points + self.sets[:, -1]


def common_sets(
    num_points: int, pairs: Ints, distances: Floats, eps: float, norm: str, most: int
) -> tuple[list[Level], bool]:
    """The sets of two points, of three, and so on; and whether these are all.

    Args:
        num_points: N.
        pairs: [P, 2], the pairs i < j whose balls meet. distances: [P].
        eps: the radius of the balls.
        norm: "l2" or "linf".
        most: the number of sets of one size from which on the size and all larger ones are left out.
    """
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs, distances = pairs[order], distances[order]
    level = Level(pairs, pairs[:, ::-1], distances / 2, np.zeros(len(pairs), dtype=bool))
    levels = [level]
    edges = level.keys(num_points), np.square(distances)
    while len(level.sets):
        larger = _larger(level, num_points, edges, eps, norm, most)
        if larger is None:
            return levels, False
        if len(larger.sets):
            level.is_facet[larger.facets.ravel()] = True
            levels.append(larger)
        level = larger
    return levels, True


def _larger(
    level: Level, num_points: int, edges: tuple[Ints, Floats], eps: float, norm: str, most: int
) -> Level | None:
    """The level above, or None if it has more than `most` sets."""
    keys = level.keys(num_points)
    followers = _followers(level.facets[:, -1])
    if followers.sum() > _MOST_CANDIDATES:
        return None
    first = np.repeat(np.arange(len(followers)), followers)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(followers) - followers, followers)
    size = level.sets.shape[1] + 1
    none = np.zeros((0, size), dtype=np.int64)
    found = [(none, none, np.zeros(0))]
    count = 0
    for start in range(0, len(first), _AT_ONCE):
        a, b = first[start : start + _AT_ONCE], second[start : start + _AT_ONCE]
        last = level.sets[b, -1]
        # The set without one of the points that a and b share; it ends in the last point of b.
        others = level.facets[a, :-1] * num_points + last[:, None]
        at = np.searchsorted(keys, others).clip(max=len(keys) - 1)
        whole = (keys[at] == others).all(1)
        a, b, last, at = a[whole], b[whole], last[whole], at[whole]
        sets = np.concatenate([level.sets[a], last[:, None]], axis=1)
        facets = np.concatenate([at, b[:, None], a[:, None]], axis=1)
        radii = np.zeros(len(sets))
        if norm == "l2" and len(sets):
            radii = enclosing_radii(_squares(sets, num_points, edges), level.radii[facets].max(1))
        inside = radii <= eps * (1 + TOLERANCE)
        found.append((sets[inside], facets[inside], radii[inside]))
        count += int(inside.sum())
        if count > most:
            return None
    sets, facets, radii = (np.concatenate(part) for part in zip(*found, strict=True))
    return Level(sets, facets, radii, np.zeros(len(sets), dtype=bool))


def _followers(parents: Ints) -> Ints:
    """[n], how many sets after this one have the same parent; the sets of one parent follow each other."""
    ends = np.append(np.flatnonzero(np.diff(parents)) + 1, len(parents))
    sizes = np.diff(ends, prepend=0)
    return np.repeat(ends, sizes) - np.arange(len(parents)) - 1


def _squares(sets: Ints, num_points: int, edges: tuple[Ints, Floats]) -> Floats:
    """[n, k, k], the squared distances within each set."""
    count, size = sets.shape
    keys, values = edges
    squares = np.zeros((count, size, size))
    for m in range(size):
        for n in range(m + 1, size):
            at = np.searchsorted(keys, sets[:, m] * num_points + sets[:, n])
            squares[:, m, n] = squares[:, n, m] = values[at]
    return squares
