"""`mixadv.game.conflicts` and `ceiling` against direct comparison, all labelings of tiny sets, and closed forms."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from mixadv.data.digits import Digits
from mixadv.game import FiniteGame, ceiling, close_pairs, conflict_graph, conflicts, over_radii
from mixadv.lambda_solvers import LinearProgram

METRIC = {"l2": "euclidean", "linf": "chebyshev"}


def tiny(seed, num_points, num_classes, dimension):
    """Points of [0, 1]^d and classes, each class at least once."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.r_[np.arange(num_classes), rng.integers(num_classes, size=num_points - num_classes)])
    return rng.random((num_points, dimension)), y


# --- pairs -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that do not divide the classes, and few values at a time."""
    monkeypatch.setattr(close_pairs, "_ROWS", 7)
    monkeypatch.setattr(close_pairs, "_COLUMNS", 11)
    monkeypatch.setattr(close_pairs, "_ENTRIES", 600)
    monkeypatch.setattr(close_pairs, "_STAGES", (2, 5))


@pytest.mark.parametrize("norm", METRIC)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_the_pairs_are_those_of_a_direct_comparison(norm, dtype, small_blocks):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, size=(90, 3, 2, 2))
    pixels[17] = pixels[4]
    y = rng.integers(0, 5, size=90)
    y[17], y[4] = 1, 3
    x = pixels.astype(np.uint8) if dtype == np.uint8 else (pixels / 255).astype(dtype)
    exact = x.reshape(90, -1).astype(np.float64) / (255 if dtype == np.uint8 else 1)
    apart = np.where(y[:, None] == y, np.inf, cdist(exact, exact, METRIC[norm]))
    eps = np.quantile(apart[np.isfinite(apart)], 0.13) / 2
    found = conflicts(torch.from_numpy(x), torch.from_numpy(y), eps, norm, closest=4)
    wanted = np.argwhere(np.triu(apart <= 2 * eps))
    assert set(map(tuple, found.pairs)) == set(map(tuple, wanted))
    assert np.allclose(found.distances, apart[tuple(found.pairs.T)], atol=1e-12)
    assert (np.diff(found.distances) >= 0).all()
    assert (found.in_conflict == (apart <= 2 * eps).any(1)).all()
    assert found.first_conflict_eps == 0
    assert np.allclose(found.closest_distances, np.sort(apart[np.triu_indices(90)])[:4], atol=1e-12)
    closer = found.at(0.8 * eps)
    anew = conflicts(x, y, 0.8 * eps, norm)
    assert (closer.pairs == anew.pairs).all()
    assert (closer.in_conflict == anew.in_conflict).all()


def test_the_closest_pairs_are_found_where_nothing_conflicts():
    x, y = tiny(1, 60, 4, 9)
    apart = np.where(y[:, None] == y, np.inf, cdist(x, x, "chebyshev"))
    found = conflicts(x, y, 0.0, "linf", closest=3)
    assert len(found.pairs) == 0
    assert found.first_conflict_eps == pytest.approx(apart.min() / 2)
    assert np.allclose(found.closest_distances, np.sort(apart[np.triu_indices(60)])[:3])


def test_balls_of_whole_pixels_that_touch_conflict():
    x = np.array([[10, 200], [26, 200], [26, 183]], dtype=np.uint8)
    y = np.array([0, 1, 2])
    assert conflicts(x, y, 8 / 255, "linf").pairs.tolist() == [[0, 1]]
    assert conflicts(x, y, 7.9999 / 255, "linf").pairs.tolist() == []


def test_rounding_of_the_matrix_product_hides_no_pair():
    """Far from their mean, float32 has seven digits for numbers of which the ninth counts."""
    rng = np.random.default_rng(0)
    centres = 1000 * rng.standard_normal((40, 50))
    step = rng.standard_normal((40, 50))
    x = np.concatenate([centres, centres + 1e-3 * step / np.linalg.norm(step, axis=1, keepdims=True)])
    found = conflicts(x, np.repeat([0, 1], 40), 0.50001e-3, "l2", bounds=None)
    assert found.pairs.tolist() == sorted([[i, i + 40] for i in range(40)], key=lambda p: found.pairs.tolist().index(p))
    assert len(conflicts(x, np.repeat([0, 1], 40), 0.49999e-3, "l2", bounds=None).pairs) == 0


# --- sets --------------------------------------------------------------------------------------------------


def simplex_points(count, side):
    """`count` points with the distance `side` from each other."""
    return np.eye(count) * side / np.sqrt(2)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_regular_simplex_has_common_points_from_its_circumradius_on(count):
    """k of its points have the circumradius sqrt((k - 1) / 2k): from there on their answers share one."""
    x, y = simplex_points(count, 1.0), np.arange(count)
    for k in range(2, count + 1):
        found = conflicts(x, y, np.sqrt((k - 1) / (2 * k)) + 1e-6, "l2", bounds=None)
        assert set(np.diff(found.sets.indptr)) == {k}
        solved = ceiling(found)
        assert solved.randomised == pytest.approx(1 / k)
        assert solved.deterministic == pytest.approx(1 / count)
        assert solved.status == "exact"


@pytest.mark.parametrize("norm", METRIC)
def test_sets_are_maximal_and_their_common_point_lies_in_all_balls(norm):
    x, y = tiny(5, 40, 5, 3)
    found = conflicts(x, y, 0.25, norm)
    sets = [set(row.indices) for row in found.sets]
    assert max(map(len, sets)) >= 4
    for one, other in itertools.permutations(sets, 2):
        assert not one < other
    for points in sets:
        members = sorted(points)
        assert len(set(y[members])) == len(members)
        centre = found.common_point(x, members)
        assert cdist(centre[None], x[members], METRIC[norm]).max() <= 0.25 * (1 + 1e-6)
        assert (centre >= 0).all()
        assert (centre <= 1).all()


# --- optima ------------------------------------------------------------------------------------------------


def meeting_points(x, eps, norm):
    """Points that hit every maximal set of balls with a common point: corners of boxes; crossings of circles."""
    if norm == "linf":
        return np.array(list(itertools.product(*(x - eps).T)))
    points = list(x)
    for a, b in itertools.combinations(x, 2):
        between = b - a
        length = np.linalg.norm(between)
        if 0 < length <= 2 * eps:
            across = np.array([-between[1], between[0]]) / length * np.sqrt(max(eps**2 - length**2 / 4, 0))
            points += [(a + b) / 2 + across, (a + b) / 2 - across]
    return np.array(points)


def brute_force(x, y, eps, norm):
    """The optima over all labelings of the points where balls meet: (randomised, deterministic)."""
    inside = {tuple(row) for row in cdist(meeting_points(x, eps, norm), x, METRIC[norm]) <= eps + 1e-9}
    cells = [cell for cell in inside if not any(cell != other and np.all(np.array(cell) <= other) for other in inside)]
    member = np.array(cells).T
    labels = np.array(list(itertools.product(np.unique(y), repeat=len(cells))))
    wrong = labels.T[None] != y[:, None, None]
    solved = LinearProgram().solve(FiniteGame(torch.from_numpy(wrong), mask=torch.from_numpy(member)))
    right = [~(wrong[i] & member[i][:, None]).any(0) for i in range(len(x))]
    return 1 - solved.value, np.mean(right, axis=0).max()


@pytest.mark.parametrize(("norm", "dimension"), [("l2", 1), ("linf", 1), ("l2", 2), ("linf", 2)])
def test_the_optima_are_those_of_all_labelings(norm, dimension):
    for seed in range(12):
        x, y = tiny(seed, 6, 3, dimension)
        eps = (0.05, 0.12, 0.2, 0.3)[seed % 4]
        plane = np.c_[x, np.zeros(6)] if dimension == 1 and norm == "l2" else x
        same_as_brute_force(x, plane, y, eps, norm)


def test_the_optima_are_those_of_all_labelings_where_randomising_pays():
    gains = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        corners = np.array([[0.3, 0.3], [0.7, 0.3], [0.5, 0.65]])
        y = np.array([2, 0, 1, 0, 1, 2])
        x = corners[y] + 0.01 * rng.standard_normal((6, 2))
        gains.append(same_as_brute_force(x, x, y, 0.215, "l2"))
    assert max(gains) == pytest.approx(1 / 6)


def same_as_brute_force(x, plane, y, eps, norm):
    randomised, deterministic = brute_force(plane, y, eps, norm)
    solved = ceiling(conflicts(x, y, eps, norm))
    assert solved.status == "exact"
    assert solved.randomised == solved.randomised_upper == pytest.approx(randomised, abs=1e-8)
    assert solved.deterministic == solved.deterministic_upper == pytest.approx(deterministic, abs=1e-12)
    return solved.gain_at_most


def test_the_motivating_example_in_fractions():
    """Masses 1/2, 1/4, 1/4 as copies of points: over all classifiers neither may be wrong less often than 1/2."""
    x, y = np.array([[0.0], [0.0], [-1.0], [1.0]]), np.array([-1, -1, 1, 1])
    solved = ceiling(conflicts(x, y, 0.5, "linf", bounds=None))
    exact = [Fraction(v) for v in (solved.randomised, solved.deterministic)]
    assert exact == [Fraction(1, 2), Fraction(1, 2)]
    # The attacker moves half of the points at 0 to each side.
    assert sorted(map(Fraction, solved.attack.toarray()[:2].sum(1))) == [Fraction(1, 4)] * 2


def test_the_triangle_in_fractions():
    x, y = simplex_points(3, 1.0), np.array([2, 0, 1])
    solved = ceiling(conflicts(x, y, 0.51, "l2", bounds=None))
    values = solved.randomised, solved.randomised_upper, solved.deterministic, solved.deterministic_upper
    assert [Fraction(value).limit_denominator(1000) for value in values] == [Fraction(1, 2)] * 2 + [Fraction(1, 3)] * 2
    assert solved.gain_at_most == pytest.approx(1 / 6)


def test_boxes_gain_only_in_odd_cycles_of_five():
    """Boxes that meet pairwise have a common point; five in a ring do not, whatever their classes."""
    x = np.array([[0.0, 0.0], [1.8, 0.5], [2.3, 2.3], [0.5, 3.0], [-1.3, 1.6]])
    y = np.array([0, 1, 0, 1, 2])
    found = conflicts(x, y, 1.0, "linf", bounds=None)
    assert sorted(map(tuple, found.pairs)) == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    solved = ceiling(found)
    assert (solved.randomised, solved.deterministic) == (pytest.approx(0.5), pytest.approx(0.4))
    assert brute_force(x, y, 1.0, "linf") == (pytest.approx(0.5), pytest.approx(0.4))


# --- what the numbers mean ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded():
    found = conflicts(*corners(), 0.44, "l2")
    return found, ceiling(found)


def corners():
    """Four classes near the corners of a tetrahedron with side 0.8."""
    x, y = tiny(7, 60, 4, 4)
    return (simplex_points(4, 0.8)[y] + 0.16 * x).clip(0, 1), y


def threshold_classifiers(found, q):
    """Classifiers and their weights: at each move, class c is answered with a probability of at least every q of it."""
    ends, answers = {0.0, 1.0}, []
    for column in [np.array([i]) for i in range(len(q))] + [row.indices for row in found.sets]:
        share = np.zeros(found.y.max() + 1)
        np.maximum.at(share, found.y[column], q[column])
        upto = np.minimum(np.cumsum(share), 1)
        upto[-1] = 1
        answers.append(upto)
        ends.update(np.round(upto, 12))
    ends = np.array(sorted(ends))
    middles, weights = (ends[1:] + ends[:-1]) / 2, np.diff(ends)
    return np.array([[int(np.searchsorted(upto, u)) for upto in answers] for u in middles]), weights


def test_a_mixture_reaches_the_randomised_optimum(crowded):
    found, solved = crowded
    assert solved.randomised == pytest.approx(solved.q.mean())
    labels, weights = threshold_classifiers(found, solved.q)
    game = found.game(labels)
    assert 1 - game.value(torch.from_numpy(weights)) == pytest.approx(solved.randomised, abs=1e-8)
    assert (1 - game.deterministic_values()).max() <= solved.deterministic_upper + 1e-12


def test_a_classifier_reaches_the_deterministic_optimum(crowded):
    found, solved = crowded
    assert solved.right.mean() == solved.deterministic
    labels, _ = threshold_classifiers(found, solved.right.astype(float))
    assert (1 - found.game(labels).deterministic_values()).max() == pytest.approx(solved.deterministic)


def test_no_classifier_is_right_more_often_under_the_strategy_of_the_attacker(crowded):
    found, solved = crowded
    attack, sets = solved.attack.toarray(), solved.sets.toarray() > 0
    stays = 1 / len(found) - attack.sum(1)
    assert (stays >= -1e-15).all()
    assert (attack[~sets.T] == 0).all()
    best = sum(max(attack[found.y == c, s].sum() for c in range(4)) for s in range(attack.shape[1]))
    assert best + stays.sum() == pytest.approx(solved.randomised_upper)


def test_the_crowded_points_gain(crowded):
    assert crowded[1].gain_at_most > 0.01


@pytest.mark.parametrize("norm", METRIC)
def test_more_room_for_the_attacker_lowers_both_optima(norm):
    x, y = tiny(11, 80, 4, 3)
    found = conflicts(x, y, 0.3, norm)
    values = [ceiling(found.at(eps)) for eps in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)]
    for name in ("randomised", "deterministic"):
        line = [getattr(value, name) for value in values]
        assert line == sorted(line, reverse=True)
        assert line[0] == 1
    assert all(value.randomised >= value.deterministic for value in values)
    assert min(value.randomised for value in values) < 0.5


@pytest.mark.parametrize("norm", METRIC)
def test_two_classes_gain_nothing(norm):
    """A conflict graph of two classes is bipartite (Konig): as many points are wrong as a matching has pairs."""
    for seed in range(8):
        x, y = tiny(seed, 70, 2, 2)
        found = conflicts(x, y, 0.05 * (1 + seed % 4), norm)
        solved = ceiling(found)
        matching = largest_matching(found.pairs)
        assert solved.randomised == solved.deterministic == solved.deterministic_upper == (70 - matching) / 70
        assert solved.gain_at_most == 0


def largest_matching(pairs):
    """The size of a largest matching of a bipartite graph, by augmenting paths."""
    neighbours, partner = {}, {}
    for i, j in pairs.tolist():
        neighbours.setdefault(i, []).append(j)
        neighbours.setdefault(j, []).append(i)

    def augment(i, seen):
        for j in neighbours[i]:
            if j not in seen:
                seen.add(j)
                if j not in partner or augment(partner[j], seen):
                    partner[j], partner[i] = i, j
                    return True
        return False

    return sum(augment(i, {i}) for i in neighbours if i not in partner)


# --- bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "value"), [("MAX_PAIRS", 60), ("MAX_SETS", 40)])
def test_what_is_left_out_widens_the_bounds_and_is_said(limit, value, monkeypatch):
    x, y = corners()
    whole = conflicts(x, y, 0.44, "l2")
    exact = ceiling(whole)
    monkeypatch.setattr(conflict_graph, limit, value)
    found = conflicts(x, y, 0.44, "l2")
    assert (found.in_conflict == whole.in_conflict).all()
    bounded = ceiling(found)
    assert bounded.randomised <= exact.randomised < bounded.randomised_upper
    assert bounded.deterministic <= exact.deterministic <= bounded.deterministic_upper
    assert bounded.gain_at_most >= exact.gain_at_most
    assert "only the closest 60 pairs" in bounded.status or "were left out" in bounded.status
    labels, _ = threshold_classifiers(whole, bounded.right.astype(float))
    assert (1 - whole.game(labels).deterministic_values()).max() >= bounded.deterministic - 1e-12
    # At a smaller radius what was kept is all.
    assert ceiling(found.at(0.34)).status == "exact"


def test_without_time_the_bounds_hold():
    found = conflicts(*corners(), 0.44, "l2")
    exact, bounded = ceiling(found), ceiling(found, time_limit=0)
    assert bounded.randomised <= exact.randomised <= bounded.randomised_upper
    assert bounded.deterministic <= exact.deterministic <= bounded.deterministic_upper
    assert "only bounded" in bounded.status


def test_bounds_at_one_radius_hold_at_the_others():
    """Where time or sets were lacking, what is known at a smaller and at a larger radius bounds the optimum."""
    whole = conflicts(*corners(), 0.44, "l2")
    radii = [0.36, 0.4, 0.41, 0.42, 0.43, 0.44]
    exact = [ceiling(whole.at(eps)) for eps in radii]
    loose = [ceiling(whole.at(eps), time_limit=0) for eps in radii]
    given = [exact[0], loose[1], exact[2], loose[3], loose[4], exact[5]]
    found = over_radii(given)
    assert [best.status for best in found] == [best.status for best in given]
    for eps, best, truth, before in zip(radii, found, exact, given, strict=True):
        assert best.randomised - 1e-9 <= truth.randomised <= best.randomised_upper + 1e-9
        assert best.deterministic <= truth.deterministic <= best.deterministic_upper
        assert best.gain_at_most <= before.gain_at_most + 1e-9
        assert (best.q.mean(), best.right.mean()) == pytest.approx((best.randomised, best.deterministic))
        sets = whole.at(eps).sets
        assert (sets @ best.q).max(initial=0) <= 1 + 1e-9
        assert (sets @ best.right.astype(float)).max(initial=0) <= 1
        # Whatever a classifier answers at the common points, it is right about one class; who stays is right.
        moved = best.attack.toarray()
        of_class = np.stack([moved[whole.y == label].sum(0) for label in np.unique(whole.y)])
        assert of_class.max(0, initial=0).sum() + 1 - moved.sum() <= best.randomised_upper + 1e-9
    for name in ("randomised", "randomised_upper", "deterministic", "deterministic_upper"):
        values = [getattr(best, name) for best in found]
        assert values == sorted(values, reverse=True), name
    assert any(a.randomised_upper > b.randomised_upper for a, b in zip(given, found, strict=True))
    assert any(a.deterministic < b.deterministic for a, b in zip(given, found, strict=True))


def test_one_class_conflicts_with_nothing():
    found = conflicts(np.zeros((3, 2)), np.zeros(3, dtype=int), 0.4, "l2")
    assert found.first_conflict_eps is None
    assert ceiling(found).deterministic == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "norm must be linf or l2"),
        ({"eps": -0.1}, "eps must be finite and at least 0"),
        ({"eps": float("nan")}, "eps must be finite"),
        ({"x": np.full((3, 2), 1.5)}, "must lie in the box"),
        ({"x": np.full((3, 2), np.nan)}, "x must be finite"),
        ({"x": np.zeros((3, 2), dtype=int)}, "of uint8 or floating point"),
        ({"y": np.array([0, 1])}, "y must be"),
        ({"y": np.array([0.0, 1.0, 2.0])}, "whole numbers"),
        ({"closest": 0}, "closest must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"x": np.zeros((3, 2)), "y": np.array([0, 1, 2]), "eps": 0.1, "norm": "l2", **change}
    with pytest.raises(ValueError, match=message):
        conflicts(**arguments)


def test_a_larger_radius_needs_a_new_search():
    found = conflicts(np.zeros((2, 2)), np.array([0, 1]), 0.1, "l2")
    with pytest.raises(ValueError, match="must be in"):
        found.at(0.2)
    with pytest.raises(ValueError, match="labels must be"):
        found.game(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="time_limit"):
        ceiling(found, time_limit=-1)


# --- digits ------------------------------------------------------------------------------------------------


def test_the_training_digits_have_the_known_ceilings():
    """The values that a linear and a mixed-integer program over all pairs and triples gave."""
    data = Digits().load()
    found = conflicts(data.train_images, data.train_labels, 1.1, "l2")
    wanted = {0.8: (95.2, 95.2), 0.9: (87.3, 87.3), 1.0: (72.6, 72.4), 1.05: (65.4, 64.9), 1.1: (57.1, 56.7)}
    for eps, (randomised, deterministic) in wanted.items():
        solved = ceiling(found.at(eps))
        assert solved.status == "exact"
        assert round(100 * solved.randomised, 1) == randomised
        assert round(100 * solved.deterministic, 1) == deterministic
    assert not conflicts(data.train_images, data.train_labels, 0.15, "linf").in_conflict.any()
