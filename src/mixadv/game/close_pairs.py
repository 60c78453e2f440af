"""All pairs of points of different classes that are close, without a matrix of all distances.

One matrix product per block of points gives a lower bound of every Euclidean distance, with a proven bound on the
rounding in float32. The few pairs that it does not exclude are compared exactly. For the maximum norm, the Euclidean
norm is at most sqrt(d) times as large, and the coordinates are compared a few at a time, because most pairs differ in
the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from mixadv.seeding import generator_for

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Two balls of radius eps meet if the distance is at most 2 eps (1 + TOLERANCE): 16/255 counts as twice 8/255.
TOLERANCE = 1e-9
_ROWS, _COLUMNS = 1024, 4096
# Values that are compared at a time: 32 MiB of float64.
_ENTRIES = 1 << 22
# Number of coordinates after which pairs that are too far apart are dropped, for the maximum norm.
_STAGES = (16, 128)
_UNIT_ROUNDING = 2.0**-24


@dataclass(frozen=True, eq=False)
class ClosePairs:
    """Pairs of points of different classes.

    Attributes:
        pairs: [P, 2], i and j with y_i != y_j and a distance of at most the radius, by growing distance; the first
            `most` of them.
        distances: [P].
        complete: whether there are no more.
        nearest: [N], the distance of each point to the closest point of another class, inf if that exceeds the radius.
        closest: [K, 2], the K closest pairs of all, whatever the radius.
        closest_distances: [K].
    """

    pairs: Ints
    distances: Floats
    complete: bool
    nearest: Floats
    closest: Ints
    closest_distances: Floats


def close_pairs(x: NDArray[np.generic], y: Ints, radius: float, norm: str, count: int, most: int) -> ClosePairs:
    """Find the pairs of different classes within `radius` (with `TOLERANCE`), and the `count` closest pairs of all.

    Args:
        x: [N, d], uint8 (0..255 stand for [0, 1]) or float64.
        y: [N].
        radius: of the distance, not of a ball.
        norm: "l2" or "linf".
        count: at least 1.
        most: pairs that are kept.
    """
    found = _Found(len(x), radius * (1 + TOLERANCE), count, most)
    order = np.argsort(y, kind="stable")
    points = _Points(np.ascontiguousarray(x[order]), norm)
    for rows, columns in _blocks(y[order]):
        bounds = points.bounds(rows, columns)
        if len(found.closest) < count:
            # Without this every pair of the first blocks would be compared.
            flat = np.argpartition(bounds, -min(count, bounds.size), axis=None)[-count:]
            i, j = _pairs_at(flat, rows, columns)
            found.hint(points.within(i, j, np.inf)[2])
        i, j = _pairs_at(np.flatnonzero(bounds >= points.least_bound(found.limit)), rows, columns)
        i, j, distances = points.within(i, j, found.limit)
        found.add(order[i], order[j], distances)
    return found.result()


def _blocks(classes: Ints) -> Iterator[tuple[slice, slice]]:
    """Rows of one class with columns of later classes: every pair of different classes once."""
    ends = np.append(np.flatnonzero(np.diff(classes)) + 1, len(classes))
    start = 0
    for end in ends:
        for row in range(start, end, _ROWS):
            for column in range(end, len(classes), _COLUMNS):
                yield slice(row, min(row + _ROWS, end)), slice(column, min(column + _COLUMNS, len(classes)))
        start = end


def _pairs_at(flat: Ints, rows: slice, columns: slice) -> tuple[Ints, Ints]:
    i, j = np.divmod(flat, columns.stop - columns.start)
    return rows.start + i, columns.start + j


class _Points:
    """Points [N, d] with a quick lower bound of their distances and the exact distances."""

    def __init__(self, x: NDArray[np.generic], norm: str) -> None:
        self.norm, self.scale, self.dimension = norm, 255.0 if x.dtype == np.uint8 else 1.0, x.shape[1]
        # An order of the coordinates in which neighbouring pixels, which are alike, are apart.
        order = torch.randperm(self.dimension, generator=generator_for(0, "order of entries")).numpy()
        edges = [0, *(stage for stage in _STAGES if stage < self.dimension), self.dimension]
        stages = edges if norm == "linf" else [0, self.dimension]
        self.stages = [np.ascontiguousarray(x[:, order[a:b]]) for a, b in pairwise(stages)]
        mean = x.mean(0, dtype=np.float64)
        self._centred = np.empty((len(x), self.dimension + 2), dtype=np.float32)
        self._other = np.empty_like(self._centred)
        # |fl(u·v) - u·v| <= n r |u|·|v| for n summands and unit rounding r (Higham, Accuracy and Stability of Numerical
        # Algorithms, section 3.1); doubled for the rounding of the centred points themselves.
        slack = 2 * (self.dimension + 8) * _UNIT_ROUNDING
        for start in range(0, len(x), max(1, _ENTRIES // self.dimension)):
            rows = slice(start, start + max(1, _ENTRIES // self.dimension))
            points = (x[rows].astype(np.float64) - mean) / self.scale
            squares = (1 - 2 * slack) * np.square(points).sum(1) / 2
            self._centred[rows, :-2] = self._other[rows, :-2] = points
            self._centred[rows, -2], self._centred[rows, -1] = 1.0, -squares
            self._other[rows, -2], self._other[rows, -1] = -squares, 1.0

    def bounds(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        """-1/2 times a lower bound of the squared Euclidean distance, u·v - |u|^2/2 - |v|^2/2 with slack."""
        return self._centred[rows] @ self._other[columns].T

    def least_bound(self, limit: float) -> float:
        """The least value of `bounds` at which a distance may be at most `limit`."""
        squared = limit * limit * (self.dimension if self.norm == "linf" else 1)
        return -0.5 * squared * (1 + 1e-6) if np.isfinite(squared) else -np.inf

    def within(self, i: Ints, j: Ints, limit: float) -> tuple[Ints, Ints, Floats]:
        """The pairs whose exact distance is at most `limit`, with that distance."""
        parts = [(i[:0], j[:0], np.zeros(0))]
        size = max(1, _ENTRIES // max(stage.shape[1] for stage in self.stages))
        for start in range(0, len(i), size):
            a, b = i[start : start + size], j[start : start + size]
            measured = np.zeros(len(a))
            for stage in self.stages:
                part = self._measured(stage[a], stage[b])
                measured = np.maximum(measured, part) if self.norm == "linf" else measured + part
                near = measured <= limit
                a, b, measured = a[near], b[near], measured[near]
            parts.append((a, b, measured))
        a, b, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
        return a, b, distances

    def _measured(self, a: NDArray[np.generic], b: NDArray[np.generic]) -> Floats:
        """[n], the distances of the rows of a and b; exact for uint8."""
        if a.dtype == np.uint8:
            apart = np.maximum(a, b) - np.minimum(a, b)
            if self.norm == "linf":
                return apart.max(1) / self.scale
            wide = apart.astype(np.float64)
            return np.sqrt(np.einsum("nd,nd->n", wide, wide)) / self.scale
        difference = a.astype(np.float64) - b.astype(np.float64)
        return np.abs(difference).max(1) if self.norm == "linf" else np.sqrt(np.square(difference).sum(1))


class _Found:
    """What has been found so far."""

    def __init__(self, num_points: int, radius: float, count: int, most: int) -> None:
        self.radius, self.count, self.most, self.complete = radius, count, most, True
        self.nearest = np.full(num_points, np.inf)
        self.pairs, self.distances = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0)]
        self.held = 0
        self.closest, self.closest_distances = np.zeros((0, 2), dtype=np.int64), np.zeros(0)
        self._hints: list[float] = []

    @property
    def limit(self) -> float:
        """The largest distance that is still of interest."""
        known = self.closest_distances if len(self.closest_distances) >= self.count else np.sort(self._hints)
        reach = known[self.count - 1] if len(known) >= self.count else np.inf
        return max(self.radius, float(reach))

    def hint(self, distances: Floats) -> None:
        """Distances of pairs of which those within `limit` are added next."""
        self._hints += distances.tolist()

    def add(self, i: Ints, j: Ints, distances: Floats) -> None:
        pairs = np.sort(np.stack([i, j], 1), axis=1)
        closest = np.concatenate([self.closest, pairs])
        measured = np.concatenate([self.closest_distances, distances])
        first = _by_distance(closest, measured)[: self.count]
        self.closest, self.closest_distances = closest[first], measured[first]
        inside = distances <= self.radius
        pairs, distances = pairs[inside], distances[inside]
        for side in (0, 1):
            np.minimum.at(self.nearest, pairs[:, side], distances)
        self.pairs.append(pairs)
        self.distances.append(distances)
        self.held += len(pairs)
        if self.held > 2 * self.most:
            self._keep_closest()

    def _keep_closest(self) -> None:
        pairs, distances = np.concatenate(self.pairs), np.concatenate(self.distances)
        first = _by_distance(pairs, distances)
        self.complete = self.complete and len(first) <= self.most
        first = first[: self.most]
        self.pairs, self.distances, self.held = [pairs[first]], [distances[first]], len(first)

    def result(self) -> ClosePairs:
        self._keep_closest()
        closest = self.closest, self.closest_distances
        return ClosePairs(self.pairs[0], self.distances[0], self.complete, self.nearest, *closest)


def _by_distance(pairs: Ints, distances: Floats) -> Ints:
    """The order of growing distance, then of the points: it does not depend on the blocks."""
    return np.lexsort((pairs[:, 1], pairs[:, 0], distances))
