"""Balls in the plane cut by lines: one point of every cell, and the finite game on them.

L lines w_k·z + b_k = 0 cut a ball into cells, on each of which every linear classifier is constant. So the attacker's
choice within the whole ball is a choice of a cell, and a finite game on one point of each cell has exactly the values
of the game on the ball. A cell that is not the whole ball has an edge: a piece of a line between two neighbouring
crossings. A step from the middle of each edge to either side therefore reaches every cell.
"""

from __future__ import annotations

import numpy as np
import torch

from mixadv.game import FiniteGame
from mixadv.threat_model import NORMS

# Edges shorter than this share of the radius are rounding errors of lines that cross in one point.
_SHORTEST = 1e-12
# Numbers in the largest array: 128 MiB.
_ENTRIES = 1 << 24


def cell_points(
    normals: np.ndarray, offsets: np.ndarray, centres: np.ndarray, eps: float, norm: str = "l2"
) -> tuple[np.ndarray, np.ndarray]:
    """Points of closed balls, at least one in every cell of the lines that meets the ball.

    Also the centre, the point of each line that is nearest to the centre, the crossings of the lines and the middles of
    the edges, for classifiers whose boundary counts to one side. Whether such a point is on its line is decided by
    rounding; everywhere else the points are well inside their cells.

    Args:
        normals: [L, 2]; a normal of length 0 belongs to a constant classifier and has no line.
        offsets: [L].
        centres: [N, 2].
        eps: the radius, >= 0.
        norm: "l2" or "linf".

    Returns:
        owner [P], the number of the ball, ascending; points [P, 2]. The centre is the first point of its ball.

    Raises:
        ValueError: the norm is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
    lengths = np.hypot(*normals.T)
    lines = lengths > 0
    unit, shift = normals[lines] / lengths[lines, None], offsets[lines] / lengths[lines]
    owners, points = [np.arange(len(centres))], [centres]
    if eps > 0 and lines.any():
        size = max(1, _ENTRIES // (4 * len(unit) ** 3))
        for start in range(0, len(centres), size):
            found, there = _on_lines(unit, shift, centres[start : start + size], eps, norm)
            owners.append(found + start)
            points.append(there)
    owner, place = np.concatenate(owners), np.concatenate(points)
    order = np.argsort(owner, kind="stable")
    return owner[order], place[order]


def _on_lines(
    unit: np.ndarray, shift: np.ndarray, centres: np.ndarray, eps: float, norm: str
) -> tuple[np.ndarray, np.ndarray]:
    """Owners and points on and beside the pieces of lines inside the balls."""
    values = centres @ unit.T + shift
    # The dual norm of a normal: a ball reaches the line iff |value| <= eps times it.
    reach = eps * (np.ones(len(unit)) if norm == "l2" else np.abs(unit).sum(1))
    step = unit if norm == "l2" else np.sign(unit) / np.abs(unit).sum(1, keepdims=True)
    touched, at = np.nonzero(np.abs(values) <= reach)
    nearest = centres[touched] - values[touched, at, None] * step[at]

    ball, line = np.nonzero(np.abs(values) < reach)
    along = np.stack([-unit[:, 1], unit[:, 0]], axis=1)[line]
    foot = centres[ball] - values[ball, line, None] * unit[line]
    low, high = _inside(foot - centres[ball], along, eps, norm)
    # Where the other lines cross this one; parallel lines do not.
    slopes = along @ unit.T
    heights = foot @ unit.T + shift
    crossing = np.full_like(slopes, np.inf)
    np.divide(-heights, slopes, out=crossing, where=np.abs(slopes) > 1e-15)
    marks = np.sort(np.clip(np.column_stack([low, crossing, high]), low[:, None], high[:, None]), axis=1)
    piece, which = np.nonzero(np.diff(marks, axis=1) > _SHORTEST * eps)
    ends = [foot[piece] + marks[piece, which + side, None] * along[piece] for side in (0, 1)]
    middle = (ends[0] + ends[1]) / 2
    owner = ball[piece]
    beside = [_beside(middle, side * unit[line[piece]], unit, shift, centres[owner], eps, norm) for side in (-1, 1)]
    return np.concatenate([touched, *[owner] * 5]), np.concatenate([nearest, *ends, middle, *beside])


def _beside(
    points: np.ndarray,
    direction: np.ndarray,
    unit: np.ndarray,
    shift: np.ndarray,
    centres: np.ndarray,
    eps: float,
    norm: str,
) -> np.ndarray:
    """The points moved half way to the next line, or to the end of the ball."""
    heights, slopes = points @ unit.T + shift, direction @ unit.T
    distance = np.full_like(slopes, np.inf)
    np.divide(-heights, slopes, out=distance, where=np.abs(slopes) > 1e-15)
    # Lines through the point itself, this one and any that coincide with it, are left behind.
    distance[distance <= _SHORTEST * eps] = np.inf
    _, end = _inside(points - centres, direction, eps, norm)
    return points + np.minimum(distance.min(1), end)[:, None] / 2 * direction


def _inside(start: np.ndarray, direction: np.ndarray, eps: float, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest t with ||start + t direction|| <= eps; the line must meet the ball."""
    if norm == "l2":
        middle = -(start * direction).sum(1)
        half = np.sqrt(np.maximum(eps**2 - (start**2).sum(1) + middle**2, 0.0))
        return middle - half, middle + half
    bounds = np.tile(np.array([-np.inf, np.inf]), (*start.shape, 1))
    for k, sign in enumerate((-1.0, 1.0)):
        np.divide(sign * eps - start, direction, out=bounds[..., k], where=np.abs(direction) > 1e-15)
    bounds.sort(axis=2)
    return bounds[..., 0].max(1), bounds[..., 1].min(1)


def game_on_points(
    losses: np.ndarray, owner: np.ndarray, masses: np.ndarray | None = None
) -> tuple[FiniteGame, np.ndarray]:
    """The finite game whose perturbations of example i are the points that it owns, each loss vector once.

    Args:
        losses: [P, L] uint8, the 0/1 losses at the points.
        owner: [P], the example of each point; every example owns a point.
        masses: [N]; None means 1/N each.

    Returns:
        The game [N, m, L] with its mask, and [N, m] the number of a point that has these losses, -1 where masked.
    """
    packed = np.packbits(losses, axis=1)
    keys = np.column_stack([owner.astype(">u4")[:, None].view(np.uint8), packed])
    _, first = np.unique(np.ascontiguousarray(keys).view(f"V{keys.shape[1]}")[:, 0], return_index=True)
    first.sort()
    counts = np.bincount(owner[first])
    place = np.full((len(counts), counts.max()), -1)
    order = first[np.argsort(owner[first], kind="stable")]
    place[np.arange(place.shape[1]) < counts[:, None]] = order
    mask = place >= 0
    game = FiniteGame(torch.from_numpy(losses[place]), torch.from_numpy(mask), masses)
    return game, place
