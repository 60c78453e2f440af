"""Which points of different classes an attacker can make alike: the game over all classifiers, as a sparse structure.

Points of different classes *conflict* if their balls have a common point: whatever a classifier answers there, it is
wrong for all of them but one. Over all measurable classifiers nothing else limits the accuracy under attack. Let q_i
be the least probability, over the ball of point i, with which a randomised classifier is right. Exactly those q are
possible for which

    0 <= q_i <= 1    and    sum over i in S of q_i <= 1    for every set S of points of pairwise different classes
                                                           whose balls have a common point

(for q in {0, 1}: deterministic classifiers). The classifier that answers at x' with class c with probability max {q_i
: y_i = c, x' in ball i} has it. See Bhagoji, Cullina, Mittal, NeurIPS 2019 (two classes); Trillos, Jacobs, Kim, 2023
(the multimarginal view); Dai, Ding, Bhagoji, Cullina, Zhao, Zheng, Mittal, NeurIPS 2023, arXiv 2302.10722 (several
classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from mixadv.game.close_pairs import TOLERANCE, Bools, Floats, Ints, close_pairs
from mixadv.game.common_sets import Level, common_sets
from mixadv.game.enclosing_ball import enclosing_ball
from mixadv.game.finite import FiniteGame

# The closest pairs that are kept. Their sets fill about 1 GiB.
MAX_PAIRS = 5_000_000
# Sets of one size that are listed at most.
MAX_SETS = 1_000_000


@dataclass(frozen=True, eq=False)
class Conflicts:
    """The conflicts among N labelled points at radius eps; made by `conflicts`.

    Attributes:
        y: [N] int64, the classes.
        norm: "linf" or "l2".
        eps: the radius of the balls.
        pairs: [P, 2] int64, the conflicting pairs i < j by growing distance. If there are more than `MAX_PAIRS`, the
            closest of them.
        distances: [P] float64.
        all_pairs: whether `pairs` holds all of them.
        nearest: [N], the distance to the closest point of another class, inf if the two do not conflict.
        closest: [K, 2], the closest pairs of different classes, whether they conflict or not.
        closest_distances: [K].
    """

    y: Ints
    norm: str
    eps: float
    pairs: Ints
    distances: Floats
    all_pairs: bool
    nearest: Floats
    closest: Ints
    closest_distances: Floats

    def __len__(self) -> int:
        return len(self.y)

    @property
    def in_conflict(self) -> Bools:
        """[N], whether the point conflicts with another one."""
        return np.isfinite(self.nearest)

    @property
    def first_conflict_eps(self) -> float | None:
        """The least radius with a conflict, half the least distance between classes; None with a single class."""
        return float(self.closest_distances[0]) / 2 if len(self.closest_distances) else None

    def at(self, eps: float) -> Conflicts:
        """The conflicts at a radius of at most `eps` of this one.

        Raises:
            ValueError: a larger radius, which needs `conflicts` again.
        """
        if not 0 <= eps <= self.eps:
            raise ValueError(f"eps={eps} must be in [0, {self.eps}], the radius for which pairs were sought")
        reach = 2 * eps * (1 + TOLERANCE)
        inside = self.distances <= reach
        # Pairs are sorted: if one that is kept is farther than `reach`, so are those that were dropped.
        complete = self.all_pairs or not bool(inside.all())
        nearest = np.where(self.nearest <= reach, self.nearest, np.inf)
        pairs, distances = self.pairs[inside], self.distances[inside]
        return replace(self, eps=eps, pairs=pairs, distances=distances, all_pairs=complete, nearest=nearest)

    @cached_property
    def _levels(self) -> tuple[list[Level], bool]:
        levels, complete = common_sets(len(self), self.pairs, self.distances, self.eps, self.norm, MAX_SETS)
        return levels, complete and self.all_pairs

    @property
    def all_sets(self) -> bool:
        """Whether `sets` holds all maximal sets; False if there are more than `MAX_PAIRS` pairs or `MAX_SETS` sets."""
        return self._levels[1]

    @cached_property
    def sets(self) -> csr_array:
        """[S, N] of 0 and 1: each row a set of points of pairwise different classes whose balls have a common point.

        They are the maximal ones, of two points or more; without `all_sets`, the maximal ones among those of the listed
        sizes. For linf a common point exists if the balls meet pairwise (boxes; Helly's theorem), for l2 if the least
        ball around the points has a radius of at most eps: its centre lies in their convex hull, hence in the box.
        """
        maximal = [level.sets[~level.is_facet] for level in self._levels[0]]
        rows = [np.repeat(np.arange(len(sets)), sets.shape[1]) for sets in maximal]
        starts = np.cumsum([0, *(len(sets) for sets in maximal)])
        at = np.concatenate([np.zeros(0, dtype=np.int64), *(r + s for r, s in zip(rows, starts, strict=False))])
        points = np.concatenate([np.zeros(0, dtype=np.int64), *(sets.ravel() for sets in maximal)])
        return csr_array(coo_array((np.ones(len(at)), (at, points)), shape=(int(starts[-1]), len(self.y))))

    def common_point(self, x: Any, points: Sequence[int]) -> Floats:
        """A point in the balls of all `points`, of the shape of x[0] and in the units of eps."""
        chosen = _as_points(x)[list(points)]
        exact = chosen.astype(np.float64) / (255.0 if chosen.dtype == np.uint8 else 1.0)
        centre = (exact.min(0) + exact.max(0)) / 2 if self.norm == "linf" else enclosing_ball(exact)[0]
        return centre.reshape(tuple(x.shape[1:]))

    def game(self, labels: Any) -> FiniteGame:
        """The finite game in which the members are given classifiers, and the attacker chooses among common points.

        Args:
            labels: [L, N + S] integers, the classes that member k gives to the N points, then to the common points of
                the S `sets`.

        Returns:
            Losses A[i, j, k] = 1 if member k is wrong at move j of point i: the point itself, then the sets that
            contain it. Its value is an upper bound of the risk over all classifiers, because they are more.

        Raises:
            ValueError: labels of another shape.
        """
        labels = np.asarray(labels)
        if labels.ndim != 2 or labels.shape[1] != len(self) + self.sets.shape[0]:
            raise ValueError(f"labels must be [L, {len(self)} + {self.sets.shape[0]}], got {list(labels.shape)}")
        by_point = csr_array(self.sets.T)
        counts = np.diff(by_point.indptr)
        place = np.arange(1 + int(counts.max(initial=0)))
        moves = np.tile(np.arange(len(self))[:, None], (1, len(place)))
        allowed = place <= counts[:, None]
        moves[allowed & (place > 0)] = len(self) + by_point.indices
        losses = labels[:, moves].transpose(1, 2, 0) != self.y[:, None, None]
        return FiniteGame(torch.from_numpy(losses), mask=torch.from_numpy(allowed))


def conflicts(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    eps: float,
    norm: str,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    *,
    closest: int = 1,
) -> Conflicts:
    """Find all conflicts among labelled points: pairs with a distance of at most 2 eps, which are those that meet.

    Distances are compared with a relative tolerance of 1e-9: balls that touch conflict. Equal points of different
    classes conflict at eps = 0. The box does not matter: it is convex, so it holds the middle of any two of its
    points.

    Args:
        x: [N, ...], uint8 (0..255 stand for [0, 1]) or floating point.
        y: [N], whole numbers.
        eps: the radius, in units of x (of [0, 1] for uint8).
        norm: "linf" or "l2".
        bounds: the box, or None. It is only used to check x.
        closest: the number of closest pairs to be found in any case.

    Raises:
        ValueError: wrong shapes or dtypes, an unknown norm, eps negative or not finite, points outside the box.
    """
    points, classes = _as_points(x), np.asarray(y)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be linf or l2, got {norm!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if classes.shape != (len(points),) or classes.dtype.kind not in "iu":
        raise ValueError(f"y must be [{len(points)}] whole numbers, got {classes.dtype} {list(classes.shape)}")
    if closest < 1:
        raise ValueError(f"closest must be at least 1, got {closest}")
    if points.dtype != np.uint8:
        if not np.isfinite(points).all():
            raise ValueError("x must be finite")
        if bounds is not None and not (
            bounds[0] <= points.min(initial=np.inf) and points.max(initial=-np.inf) <= bounds[1]
        ):
            raise ValueError(f"x must lie in the box {bounds}; without a box: bounds=None")
    classes = classes.astype(np.int64)
    found = close_pairs(points, classes, 2 * eps, norm, closest, MAX_PAIRS)
    pairs = found.pairs, found.distances, found.complete
    return Conflicts(classes, norm, float(eps), *pairs, found.nearest, found.closest, found.closest_distances)


def _as_points(x: Any) -> np.ndarray:
    """x as [N, d], uint8 or float64.

    Raises:
        ValueError: not such an array.
    """
    array = np.asarray(x)
    if array.ndim < 2 or array.size == 0 or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        raise ValueError(f"x must be [N, ...] of uint8 or floating point, got {array.dtype} {list(array.shape)}")
    flat = array.reshape(len(array), -1)
    return flat if flat.dtype == np.uint8 else flat.astype(np.float64)
