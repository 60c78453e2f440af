"""The triangle: against brute force over all answers on a grid, and against its geometry."""

import itertools
import math
from fractions import Fraction as F

import numpy as np
import pytest

from mixadv.game import ceiling, conflicts
from mixadv.games.triangle import Triangle, corners
from oracles_game import dual_linear_program, full_linear_program

REGIMES = ["0", "1/4", "1/2", "11/20", "577/1000", "578/1000", "3/4", "3"]


def regions_on_a_grid(eps):
    """The sets of classes whose balls share a place, found on a fine grid of the plane and at the edges' middles."""
    points = [(0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(3) / 2)]
    side = np.linspace(-eps - 0.1, 1.1 + eps, 500)
    places = [*np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), *points]
    places += [np.add(a, b) / 2 for a, b in itertools.combinations(points, 2)]
    places.append(np.mean(points, axis=0))
    inside = [np.hypot(*(np.array(places) - point).T) <= eps + 1e-12 for point in points]
    return {tuple(np.flatnonzero(row)) for row in np.stack(inside, axis=1) if row.any()}


@pytest.mark.parametrize("eps", REGIMES)
def test_every_classifier_on_the_regions_by_brute_force(eps):
    regions = sorted(regions_on_a_grid(float(F(eps))))
    # All answers in all regions, also those that are never right.
    everything = list(itertools.product(range(3), repeat=len(regions)))
    losses = [
        [[int(answers[r] != i) for answers in everything] for r, region in enumerate(regions) if i in region]
        for i in range(3)
    ]
    width = max(map(len, losses))
    padded = np.array([(rows * width)[:width] for rows in losses], dtype=float)
    found = Triangle(eps).solve()
    alone = [F(sum(max(row[k] for row in rows) for rows in losses), 3) for k in range(len(everything))]
    assert min(found.deterministic_risks) == min(alone)
    assert float(found.dual) == pytest.approx(dual_linear_program(padded), abs=1e-9)
    assert float(found.value) == pytest.approx(full_linear_program(padded)[0], abs=1e-9)
    assert found.gap == 0
    assert sum(found.weights) == 1


def test_in_between_a_mixture_of_two_classifiers_that_are_always_fooled_is_the_best():
    for eps in ("1/2", "11/20", 0.577):
        found = Triangle(eps).solve()
        assert found.value == found.dual == F(1, 2)
        assert min(found.deterministic_risks) == F(2, 3)
        assert found.weights[:2] == (F(1, 2), F(1, 2))
        assert found.deterministic_risks[:2] == (F(1), F(1))
        assert sorted(found.deterministic_risks[2:]) == [F(2, 3)] * 6


def test_outside_nothing_is_gained():
    for eps, risk in (("0", F(0)), ("499/1000", F(0)), ("578/1000", F(2, 3)), (5, F(2, 3))):
        found = Triangle(eps).solve()
        assert found.value == found.dual == min(found.deterministic_risks) == risk


def test_the_corners_are_at_distance_one_of_each_other():
    at = corners()
    for a, b in itertools.combinations(at, 2):
        assert np.hypot(*(a - b)) == pytest.approx(1)
    np.testing.assert_allclose(at.sum(0), 0, atol=1e-12)
    with pytest.raises(ValueError, match="eps=-1 is no radius"):
        Triangle(-1)


@pytest.mark.parametrize("eps", ["1/4", "11/20", "578/1000"])
def test_the_game_over_all_classifiers_on_the_corners_is_the_triangle(eps):
    """The program over conflicts knows nothing of regions or classifiers."""
    found = ceiling(conflicts(corners(), np.arange(3), float(F(eps)), "l2", bounds=None))
    exact = Triangle(eps).solve()
    assert found.status == "exact"
    assert found.randomised == pytest.approx(float(1 - exact.value), abs=1e-9)
    assert found.deterministic == pytest.approx(float(1 - min(exact.deterministic_risks)), abs=1e-9)
