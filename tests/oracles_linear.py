"""Exact worst cases of mixtures of linear classifiers, in numpy and scipy alone.

Two kinds: a few members of two classes, without a box, exact to rounding (`exact_worst_case`); any number of members
and classes, with a box, where a member must be wrong by a margin (`worst_case_with_depth`).

With two classes, member k answers with the sign of w_k·x + b_k, and a label y > 0 is the positive class (so labels
{0, 1} and {-1, 1} both do). It errs at x' where its margin m_k(x') = s (w_k·x' + b_k), s = ±1 the sign of the label, is
negative. The set S of members is foolable at x if some point of the ball makes all its margins negative, and

    max over the ball of sum_k lam_k 1[m_k < 0] = max over foolable S of sum of lam_k over S.

There is no box. The sets of the theory are open, so instances where a line is tangent to the ball, or where three
lines meet in a point, are decided by rounding; random instances are not of this kind.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, nnls
from torch import nn

from mixadv.mixture import Mixture

# By how much, in units of the input, a member must be fooled to count in `worst_case_by_subsets`.
DEPTH = 1e-9


class Affine(nn.Module):
    """Two classes with logits (0, w·x + b), for inputs [B, d]."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight))
        self.bias = nn.Parameter(torch.as_tensor(bias))

    def forward(self, x):
        score = x @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def linear_mixture(W, b, weights=None):
    """The mixture of the members (w_k, b_k): labels 0 and 1, in the dtype of W."""
    return Mixture([Affine(w, c) for w, c in zip(torch.as_tensor(W), torch.as_tensor(b), strict=True)], weights)


def signs(y):
    """±1 for each label."""
    return np.where(np.asarray(y) > 0, 1.0, -1.0)


def member_errors(W, b, y, points):
    """1[m_k < 0] for points [N, n, d], labels [N], members [N or 1, L, d]: bool [N, n, L]."""
    scores = np.einsum("ind,ikd->ink", points, np.broadcast_to(W, (len(points), *W.shape[1:]))) + b[:, None]
    return signs(y)[:, None, None] * scores < 0


def exact_worst_case(W, b, y, x, eps, norm, lam):
    """The largest expected 0/1 loss over the ball around one point, and a point of the ball that has it.

    Args:
        W: [L, d]; b: [L]; y: a label; x: [d]; lam: [L].
        eps: the radius; norm: "l2" or "linf".

    Returns:
        (value, point [d]): by arrangement of lines for d = 2, else by subsets.
    """
    W, b, x, lam = (np.asarray(part, dtype=float) for part in (W, b, x, lam))
    if len(x) != 2:
        return worst_case_by_subsets(W, b, y, x, eps, norm, lam)
    values, points = worst_cases_in_the_plane(W, b, [y], x[None], eps, norm, lam)
    return values[0], points[0]


# --- any dimension: one convex problem for each set of members -------------------------------------------------


def worst_case_by_subsets(W, b, y, x, eps, norm, lam):
    """As `exact_worst_case`: the heaviest set of members whose least perturbation is shorter than eps.

    What a set of members needs is the point of a polytope nearest to x: by all active sets for l2, by a linear
    program for linf.
    """
    clean = signs(y) * (W @ x + b)
    at_x = lam[clean < 0].sum()
    sets = [s for size in range(1, len(lam) + 1) for s in map(list, itertools.combinations(range(len(lam)), size))]
    for members in sorted(sets, key=lambda s: -lam[s].sum()):
        if lam[members].sum() <= at_x:
            break
        delta = least_perturbation(signs(y) * W[members], clean[members], norm)
        if delta is not None and length(delta, norm) <= eps:
            return lam[members].sum(), x + delta
    return at_x, x.copy()


def length(delta, norm):
    """The norm of delta [..., d]."""
    return np.abs(delta).max(-1) if norm == "linf" else np.linalg.norm(delta, axis=-1)


def least_perturbation(G, margins, norm):
    """The shortest delta with margins + G delta <= -DEPTH ||g_k||; None where there is none."""
    limit = -margins - DEPTH * np.linalg.norm(G, axis=1)
    if (limit >= 0).all():
        return np.zeros(G.shape[1])
    if norm == "linf":
        d = G.shape[1]
        box = np.concatenate([np.eye(d), -np.eye(d)])
        found = linprog(
            np.r_[np.zeros(d), 1.0],
            A_ub=np.block([[G, np.zeros((len(G), 1))], [box, -np.ones((2 * d, 1))]]),
            b_ub=np.r_[limit, np.zeros(2 * d)],
            bounds=[(None, None)] * d + [(0, None)],
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        return found.x[:d] if found.status == 0 else None
    best = None
    for size in range(1, len(G) + 1):
        for active in map(list, itertools.combinations(range(len(G)), size)):
            delta = np.linalg.pinv(G[active]) @ limit[active]
            feasible = (G @ delta <= limit + 1e-12 * (1 + np.abs(limit))).all()
            if feasible and (best is None or np.linalg.norm(delta) < np.linalg.norm(best)):
                best = delta
    return best


# --- the plane: a point in every cell that the lines cut the ball into -----------------------------------------


def points_of_all_cells(W, b, x, eps, norm):
    """Points [N, n, 2] of the balls, x first, that meet every cell of the arrangement of lines within them.

    A cell either holds an arc of the ball's boundary between neighbouring crossings, and then the arc's middle;
    or it is a polygon with a crossing of two lines for a corner, and then the point half a step from there, where
    a step reaches the nearest other line or the boundary.

    Args:
        W: [L, 2] or [N, L, 2]; b: [L] or [N, L]; x: [N, 2].
    """
    x = np.asarray(x, dtype=float)
    W = np.broadcast_to(W, (len(x), *np.shape(W)[-2:]))
    offset = np.einsum("ikd,id->ik", W, x) + b
    if eps == 0:
        return x[:, None].copy()
    boundary = _circle(W, offset, eps) if norm == "l2" else _square(W, offset, eps)
    moves = [np.zeros((len(x), 1, 2)), boundary]
    sizes = np.linalg.norm(W, axis=2)
    along = np.stack([-W[..., 1], W[..., 0]], axis=2) / sizes[..., None]
    for k, other in itertools.combinations(range(W.shape[1]), 2):
        # Parallel lines have their crossing at infinity, outside every ball.
        with np.errstate(divide="ignore", invalid="ignore"):
            determinant = W[:, k, 0] * W[:, other, 1] - W[:, k, 1] * W[:, other, 0]
            first = (offset[:, other] * W[:, k, 1] - offset[:, k] * W[:, other, 1]) / determinant
            second = (offset[:, k] * W[:, other, 0] - offset[:, other] * W[:, k, 0]) / determinant
        corner = np.stack([first, second], axis=1)
        inside = np.isfinite(corner).all(1) & (length(corner, norm) < eps)
        corner = np.where(inside[:, None], corner, 0.0)
        room = eps - length(corner, norm)
        for third in set(range(W.shape[1])) - {k, other}:
            distance = np.abs(np.einsum("id,id->i", W[:, third], corner) + offset[:, third]) / sizes[:, third]
            room = np.minimum(room, distance)
        for sign, turn in itertools.product((1, -1), repeat=2):
            way = sign * along[:, k] + turn * along[:, other]
            way /= np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-300)
            moves.append(np.where(inside[:, None], corner + 0.5 * room[:, None] * way, 0.0)[:, None])
    return x[:, None] + np.concatenate(moves, axis=1)


def _middles(breaks, period):
    """The middles of the arcs between sorted breaks [N, n] of a closed curve; more breaks do no harm."""
    breaks = np.sort(breaks, axis=1)
    return (breaks + np.concatenate([breaks[:, 1:], breaks[:, :1] + period], axis=1)) / 2


def _circle(W, offset, eps):
    """Middles of the arcs of the circle: the line is at signed distance -offset / ||w|| along w."""
    height = -offset / (eps * np.linalg.norm(W, axis=2))
    normal = np.arctan2(W[..., 1], W[..., 0])
    spread = np.arccos(np.clip(height, -1, 1))
    crosses = np.abs(height) < 1
    breaks = [np.where(crosses, (normal + sign * spread) % (2 * np.pi), 0.0) for sign in (1, -1)]
    angles = _middles(np.concatenate(breaks, axis=1), 2 * np.pi)
    return eps * (1 - 1e-12) * np.stack([np.cos(angles), np.sin(angles)], axis=2)


def _square(W, offset, eps):
    """Middles of the arcs of the square, walked as four sides of length 2 in units of eps."""
    level, breaks = -offset / eps, []
    for side in range(4):
        start, step = CORNERS[side], (CORNERS[(side + 1) % 4] - CORNERS[side]) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            where = (level - W @ start) / (W @ step)
        breaks.append(np.where((where > 0) & (where < 2), 2 * side + where, 0.0))
    walked = _middles(np.concatenate(breaks, axis=1), 8.0) % 8.0
    side = np.minimum(walked.astype(int) // 2, 3)
    step = (np.roll(CORNERS, -1, axis=0) - CORNERS) / 2
    return eps * (1 - 1e-12) * (CORNERS[side] + (walked - 2 * side)[..., None] * step[side])


CORNERS = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])


def exact_game(W, b, y, x, eps, norm):
    """0/1 losses, bool [N, n, L], of a finite game that equals the game on the whole balls: members of the plane.

    Every joint answer that the members can be brought to is in some column; column 0 is x itself.
    """
    points = points_of_all_cells(W, b, x, eps, norm)
    W, b = np.asarray(W, dtype=float), np.asarray(b, dtype=float)
    return member_errors(W if W.ndim == 3 else W[None], b if b.ndim == 2 else b[None], y, points)


def worst_cases_in_the_plane(W, b, y, x, eps, norm, lam):
    """`exact_worst_case` of N points at once: values [N], points [N, 2].

    Args:
        W: [L, 2] or [N, L, 2]; b: [L] or [N, L]; y: [N]; x: [N, 2]; lam: [L] or [N, L].
    """
    points = points_of_all_cells(W, b, x, eps, norm)
    losses = exact_game(W, b, y, x, eps, norm)
    totals = (losses * np.broadcast_to(lam, (len(points), losses.shape[2]))[:, None]).sum(2)
    W = np.broadcast_to(W, (len(points), *np.shape(W)[-2:]))
    distance = np.abs(np.einsum("ind,ikd->ink", points, W) + np.broadcast_to(b, W.shape[:2])[:, None])
    distance = (distance / np.linalg.norm(W, axis=2)[:, None]).min(2)
    # Among equals the point farthest from all lines, so that rounding elsewhere does not change what it fools.
    best = totals.max(1, keepdims=True)
    chosen = np.where(totals >= best - 1e-12, distance, -1.0).argmax(1)
    rows = np.arange(len(points))
    return totals[rows, chosen], points[rows, chosen]


# --- any number of members and classes, with a box: wrong by a margin ------------------------------------------


def worst_case_with_depth(W, b, y, x, eps, norm, lam, bounds=(0.0, 1.0), depth=0.01):
    """The largest weight of members that are wrong together by a margin, at one point of ball and box.

    Member k has the logits z_k = W_k x' + b_k. It is wrong by the margin if, for some class t != y,

        (z_kt - z_ky)(x') >= depth eps ||w_kt - w_ky||_q,    q dual to the norm:

    x' lies at least depth * eps beyond the boundary to class t. So no answer hangs on rounding. linf is solved as a
    mixed-integer program, l2 by a tree over sets whose nodes are least-norm problems.

    Args:
        W: [L, C, d]; b: [L, C]; y: a label; x: [d]; lam: [L].
        eps: the radius; norm: "l2" or "linf"; bounds: of the box, or None.

    Returns:
        (value, point [d]).
    """
    W, b, x, lam = (np.asarray(part, dtype=float) for part in (W, b, x, lam))
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    # In units of eps the tolerances of the programs are relative to the radius.
    boundaries = _Boundaries.of(W, b, y, x, norm, eps, depth)
    solve = _by_integer_program if norm == "linf" else _by_tree
    value, delta = solve(boundaries, (low - x) / eps, (high - x) / eps, lam)
    return value, x + eps * delta


class _Boundaries(NamedTuple):
    """Boundary number i is passed by x + eps delta where normal_i · delta >= limit_i; it is one of member owner_i."""

    normal: np.ndarray
    limit: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, W, b, y, x, norm, eps, depth):
        """The boundaries between the label and every other class of every member, with the depth added."""
        wrong = [t for t in range(W.shape[1]) if t != y]
        slope, lead = W[:, wrong] - W[:, [y]], (W[:, [y]] - W[:, wrong]) @ x + b[:, [y]] - b[:, wrong]
        size = np.abs(slope).sum(2) if norm == "linf" else np.linalg.norm(slope, axis=2)
        owner = np.repeat(np.arange(len(W)), len(wrong))
        return cls((slope / size[..., None]).reshape(len(owner), -1), (lead / (eps * size)).ravel() + depth, owner)


def _by_integer_program(boundaries, low, high, lam):
    """Maximise sum_i lam_owner(i) z_i: z_i = 1 asks for boundary i to be passed, at most one for each member."""
    low, high = np.maximum(low, -1), np.minimum(high, 1)
    least, most = (part(boundaries.normal * low, boundaries.normal * high).sum(1) for part in (np.minimum, np.maximum))
    normal, limit, owner, least = (part[most >= boundaries.limit] for part in (*boundaries, least))
    count, d = normal.shape
    if not count:
        return 0.0, np.zeros(d)
    # Where z_i = 0 the constraint asks for no more than the least value of normal_i · delta in ball and box.
    slack = np.maximum(limit - least, 0.0)
    passed = LinearConstraint(np.hstack([normal, -np.diag(slack)]), limit - slack, np.inf)
    one_each = LinearConstraint(np.hstack([np.zeros((len(lam), d)), np.eye(len(lam))[:, owner]]), -np.inf, 1.0)
    found = milp(
        np.r_[np.zeros(d), -lam[owner]],
        integrality=np.r_[np.zeros(d), np.ones(count)],
        bounds=Bounds(np.r_[low, np.zeros(count)], np.r_[high, np.ones(count)]),
        constraints=[passed, one_each],
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0, found.message
    return lam[owner[found.x[d:] > 0.5]].sum(), found.x[:d]


def _by_tree(boundaries, low, high, lam):
    """Branch and bound over sets of boundaries: the heaviest undecided member is wrong in one way, or left alone.

    A boundary that cannot be passed together with one of those chosen is no longer offered. A node ends where all
    that is offered could not beat the best set.
    """
    normal, limit, owner = boundaries

    def reached(chosen):
        delta = least_perturbation_in_box(normal[chosen], limit[chosen], low, high)
        return delta if delta is not None and np.linalg.norm(delta) <= 1 else None

    count = len(owner)
    together = np.zeros((count, count), dtype=bool)
    for i in range(count):
        together[i, i] = limit[i] <= 1 and reached([i]) is not None
        for j in range(i):
            if together[i, i] and together[j, j] and owner[i] != owner[j]:
                together[i, j] = together[j, i] = reached([i, j]) is not None
    best, best_delta = -1.0, None

    def visit(chosen, delta, offered):
        nonlocal best, best_delta
        passed = normal @ delta >= limit - 1e-9
        value = lam[np.unique(owner[passed])].sum()
        if value > best:
            best, best_delta = value, delta
        undecided = np.unique(owner[offered])
        if lam[owner[chosen]].sum() + lam[undecided].sum() <= best + 1e-9:
            return
        k = undecided[np.argmax(lam[undecided])]
        others = offered & (owner != k)
        for i in np.flatnonzero(offered & (owner == k)):
            moved = delta if passed[i] else reached([*chosen, i])
            if moved is not None:
                visit([*chosen, i], moved, others & together[i])
        visit(chosen, delta, others)

    visit([], np.zeros(len(low)), together.diagonal())
    return best, best_delta


def least_perturbation_in_box(G, limit, low, high):
    """The delta of least l2 norm with G delta >= limit and low <= delta <= high; None where there is none.

    Least distance programming by non-negative least squares (Lawson and Hanson, Solving Least Squares Problems, 1974,
    chapter 23); sides of the box enter once they are crossed.
    """
    sides = np.eye(G.shape[1])
    while True:
        rows = np.vstack([G.T, limit])
        target = np.r_[np.zeros(G.shape[1]), 1.0]
        multipliers, residual = nnls(rows, target)
        if residual < 1e-9:
            return None
        gap = rows @ multipliers - target
        delta = -gap[:-1] / gap[-1]
        over, under = delta > high + 1e-9, delta < low - 1e-9
        if not (over | under).any():
            return delta
        G, limit = np.vstack([G, -sides[over], sides[under]]), np.r_[limit, -high[over], low[under]]
