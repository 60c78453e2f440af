"""Lines that cut balls: Euler's count of the cells, dense samples, degenerate lines, and the game on the cells."""

import math
from fractions import Fraction as F
from itertools import combinations

import numpy as np
import pytest

from mixadv.games.cells import cell_points, game_on_points
from mixadv.threat_model import ThreatModel


def drawn(seed, members=7, balls=6):
    draw = np.random.default_rng(seed)
    normals = draw.normal(size=(members, 2)) * draw.uniform(0.2, 3, size=(members, 1))
    return normals, draw.normal(size=members), draw.normal(size=(balls, 2))


def positive_at(normals, offsets, points):
    return np.array(
        [[w[0] * z[0] + w[1] * z[1] + b >= 0 for w, b in zip(normals, offsets, strict=True)] for z in points]
    )


def size(step, norm):
    return math.hypot(*step) if norm == "l2" else max(map(abs, step))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("seed", range(6))
def test_lines_in_general_position_cut_a_ball_into_as_many_cells_as_euler_counts(seed, norm):
    """1 + (lines that meet the ball) + (crossings inside it), and every cell has signs of its own."""
    normals, offsets, centres = drawn(seed)
    eps = (0.2, 0.7, 1.6)[seed % 3]
    owner, points = cell_points(normals, offsets, centres, eps, norm)
    assert (np.diff(owner) >= 0).all()
    many = 0
    for i, centre in enumerate(centres):
        mine = points[owner == i]
        assert mine[0].tolist() == centre.tolist()
        assert max(size(z - centre, norm) for z in mine) <= eps * (1 + 1e-9)
        crossings = [
            np.linalg.solve(normals[[j, k]], -offsets[[j, k]]) for j, k in combinations(range(len(normals)), 2)
        ]
        dual = [math.hypot(*w) if norm == "l2" else abs(w[0]) + abs(w[1]) for w in normals]
        lines = sum(abs(w @ centre + b) < eps * d for w, b, d in zip(normals, offsets, dual, strict=True))
        wanted = 1 + lines + sum(size(z - centre, norm) < eps for z in crossings)
        assert len({tuple(row) for row in positive_at(normals, offsets, mine)}) == wanted
        many = max(many, wanted)
    assert many >= (3, 6, 12)[seed % 3]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_nothing_that_dense_samples_find_is_missed(norm):
    import torch

    normals, offsets, centres = drawn(11, members=5, balls=3)
    owner, points = cell_points(normals, offsets, centres, 1.1, norm)
    ball = ThreatModel(norm, 1.1, bounds=None)
    generator = torch.Generator().manual_seed(0)
    for i, centre in enumerate(centres):
        many = ball.sample(torch.from_numpy(centre).expand(3000, 2), generator).numpy()
        found = {tuple(row) for row in positive_at(normals, offsets, points[owner == i])}
        assert {tuple(row) for row in positive_at(normals, offsets, many)} <= found


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_lines_through_one_point_and_lines_that_coincide(norm):
    """Three lines through the origin, one of them twice and once turned round: six sectors, the lines, the origin."""
    normals = np.array([[1.0, 0], [0, 1], [1, 1], [2, 0], [-1, 0]])
    owner, points = cell_points(normals, np.zeros(5), np.array([[0.25, 0.125]]), 1.0, norm)
    found = {tuple(row) for row in positive_at(normals, np.zeros(5), points).tolist()}
    angles = [math.radians(30 + k) for k in (-10, 60, 100, 150, 200, 280)]
    sectors = positive_at(normals, np.zeros(5), [[math.cos(a), math.sin(a)] for a in angles])
    assert {tuple(row) for row in sectors.tolist()} <= found
    assert (True,) * 5 in found
    # On the first line both f and its mirror image say +1.
    assert any(row[0] and row[4] for row in found)
    assert not any(row[0] != row[3] for row in found)
    assert set(owner) == {0}


def test_a_ball_that_only_touches_a_closed_half_plane_reaches_it():
    """The motivating example in the plane: eps = 1/2, and the boundary counts to class +1."""
    normals, offsets = np.array([[-1.0, 0], [1, 0]]), np.array([-0.5, -0.5])
    centres = np.array([[0.0, 0], [-1, 0], [1, 0]])
    for norm in ("l2", "linf"):
        owner, points = cell_points(normals, offsets, centres, 0.5, norm)
        wrong = positive_at(normals, offsets, points) != np.array([False, True, True])[owner, None]
        game, place = game_on_points(wrong.astype(np.uint8), owner, np.array([0.5, 0.25, 0.25]))
        assert game.deterministic_values().tolist() == [F(3, 4)] * 2
        assert game.value(np.array([0.5, 0.5])) == 0.5
        for i in range(3):
            assert place[i, 0] == np.flatnonzero(owner == i)[0]


def test_constant_classifiers_have_no_line_and_a_ball_of_radius_0_is_a_point():
    normals, offsets, centres = np.array([[0.0, 0], [0, 0]]), np.array([1.0, -1.0]), np.array([[1.0, 2], [3, 4]])
    for eps in (0.0, 2.0):
        owner, points = cell_points(normals, offsets, centres, eps)
        assert (owner.tolist(), points.tolist()) == ([0, 1], centres.tolist())
    one = cell_points(np.array([[1.0, 0]]), np.array([-1.0]), centres, 0.0)
    assert one[1].tolist() == centres.tolist()
    with pytest.raises(ValueError, match="unknown norm 'l1': choose one of linf, l2"):
        cell_points(normals, offsets, centres, 1.0, "l1")


def test_the_game_on_points_has_every_loss_vector_once():
    losses = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1]], dtype=np.uint8)
    game, place = game_on_points(losses, np.array([0, 0, 0, 1, 1]), np.array([0.75, 0.25]))
    assert place.tolist() == [[0, 1], [3, 4]]
    assert game.losses.tolist() == [[[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 1, 1]]]
    assert game.masses.tolist() == [0.75, 0.25]
    ragged, where = game_on_points(losses[:4], np.array([0, 0, 0, 1]))
    assert where.tolist() == [[0, 1], [3, -1]]
    assert ragged.mask.tolist() == [[True, True], [True, False]]
