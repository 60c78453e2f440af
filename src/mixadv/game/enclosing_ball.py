"""The smallest Euclidean ball around a few points.

Its centre is a convex combination of some of the points, the support, that has the same distance to all of these and
no larger one to the others. So either the centre of the sphere through all points lies inside their simplex, and the
ball is that of the sphere, or one point can be left out without changing the ball.
"""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Relative volume of a simplex below which its points count as dependent: then one of them is not in the support.
_FLAT = 1e-14


def enclosing_radii(squares: Floats, radii_of_facets: Floats) -> Floats:
    """The radii of the smallest balls around n sets of k points.

    Args:
        squares: [n, k, k], the squared distances within each set.
        radii_of_facets: [n], the largest radius of the smallest balls around k - 1 points of the set.

    Returns:
        [n]; the radius of the sphere through all k points where its centre lies inside their simplex.
    """
    weights, radii, independent = _spheres(squares)
    inside = independent & (weights > 0).all(1)
    return np.where(inside, np.maximum(radii, radii_of_facets), radii_of_facets)


def enclosing_ball(points: Floats) -> tuple[Floats, float]:
    """Centre [d] and radius of the smallest ball around a few points [k, d]; tries every support."""
    k = len(points)
    between = points[:, None] - points
    squares = np.square(between).sum(2)
    best = points[0], float(np.sqrt(squares[0].max()))
    for support in chain.from_iterable(combinations(range(k), size) for size in range(2, k + 1)):
        chosen = list(support)
        weights, _, independent = _spheres(squares[np.ix_(chosen, chosen)][None])
        if independent[0] and (weights[0] >= 0).all():
            centre = weights[0] @ points[chosen]
            radius = float(np.sqrt(np.square(points - centre).sum(1).max()))
            if radius < best[1]:
                best = centre, radius
    return best


def _spheres(squares: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """The sphere through k points, from their squared distances [n, k, k].

    With the Gram matrix G of the edges from the first point, the centre is its sum with weights w, 2 G w = diag G.

    Returns:
        The barycentric coordinates of the centre [n, k], the radius [n], and whether the points are affinely
        independent [n]; the others are meaningless without that.
    """
    edges = squares[:, 0, 1:]
    gram = (edges[:, :, None] + edges[:, None, :] - squares[:, 1:, 1:]) / 2
    scale = np.prod(np.where(edges > 0, edges, 1.0), axis=1)
    independent = (edges > 0).all(1) & (np.linalg.det(gram) > _FLAT * scale)
    gram = np.where(independent[:, None, None], gram, np.eye(gram.shape[1]))
    weights = np.linalg.solve(gram, edges[:, :, None] / 2)[:, :, 0]
    radii = np.sqrt(np.maximum(np.einsum("nk,nk->n", weights, edges) / 2, 0.0))
    return np.concatenate([1 - weights.sum(1, keepdims=True), weights], axis=1), radii, independent
