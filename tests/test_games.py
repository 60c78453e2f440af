"""The built-in games: the motivating example in fractions, the Gaussians, and the order of values."""

import math
import random
from dataclasses import replace
from fractions import Fraction as F
from itertools import pairwise

import numpy as np
import pytest
import torch

from mixadv.game import Equilibrium, FiniteGame
from mixadv.games import base
from mixadv.games.base import exact_radius, solve_values
from mixadv.games.gaussians import Gaussians, entropic_errors, oracle_errors
from mixadv.games.motivating import LineGame, Motivating, Threshold
from mixadv.lambda_solvers import AcceleratedEntropic
from mixadv.threat_model import ThreatModel
from oracles_game import best_pure_attack, best_value, full_linear_program, random_losses

# --- the motivating example --------------------------------------------------------------------------------


def test_the_motivating_example_comes_out_in_fractions():
    line = LineGame()
    found = line.solve()
    assert line.eps == F(1, 2)
    assert found.deterministic_risks == (F(3, 4), F(3, 4))
    assert found.weights == (F(1, 2), F(1, 2))
    assert found.value == found.dual == F(1, 2)
    assert found.gap == 0
    assert found.pure_attacker == F(1, 4)
    assert sorted(found.attack[0]) == [(F(-1, 2), F(1, 2)), (F(1, 2), F(1, 2))]
    assert found.attack[1:] == (((F(-1), F(1)),), ((F(1), F(1)),))
    assert found.curve == ((F(0), F(3, 4)), (F(1, 2), F(1, 2)), (F(1), F(3, 4)))
    numbers = [found.value, found.dual, found.pure_attacker, *found.weights, *found.deterministic_risks]
    assert {type(number) for number in numbers} == {F}


def test_a_slightly_larger_ball_lets_the_attacker_into_the_middle():
    found = LineGame(F(21, 40)).solve()
    assert found.deterministic_risks == (F(1), F(1))
    assert found.weights == (F(1, 2), F(1, 2))
    assert found.value == found.dual == F(3, 4)
    # Between the thresholds both are wrong about +1.
    for ((to, probability),) in found.attack[1:]:
        assert probability == 1
        assert F(-1, 2) < to < F(1, 2)


def test_just_below_one_half_nothing_can_be_gained():
    found = LineGame(F(19, 40)).solve()
    assert found.value == found.pure_attacker == F(1, 4)
    assert found.deterministic_risks == (F(1, 4), F(1, 4))


def losses_on_a_grid(label, low, high):
    """The pairs of 0/1 losses of the two classifiers of the example anywhere on a fine grid of [low, high]."""
    step, found = F(1, 480), set()
    for k in range(int((high - low) / step) + 1):
        x = low + k * step
        first = 1 if x <= F(-1, 2) else -1
        second = 1 if x >= F(1, 2) else -1
        found.add((int(first != label), int(second != label)))
    return found


@pytest.mark.parametrize("eps", ["0", "1/4", "1/2", "21/40", "3/4", "1", "21/20", "3/2", "121/80", "2"])
def test_every_radius_agrees_with_brute_force_on_a_grid(eps):
    eps = F(eps)
    line, found = LineGame(eps), LineGame(eps).solve()
    places, labels, masses = (F(0), F(-1), F(1)), (-1, 1, 1), (F(1, 2), F(1, 4), F(1, 4))
    balls = [losses_on_a_grid(label, x - eps, x + eps) for x, label in zip(places, labels, strict=True)]
    for i, ball in enumerate(balls):
        assert set(line.losses(i)) == ball
        assert line.candidates(i)[0] == places[i]
        assert all(abs(x - places[i]) <= eps for x in line.candidates(i))

    def risk(first):
        return sum(
            mass * max(first * a + (1 - first) * b for a, b in ball) for mass, ball in zip(masses, balls, strict=True)
        )

    assert found.deterministic_risks == (risk(1), risk(0))
    assert found.value == min(risk(F(k, 120)) for k in range(121)) == risk(found.weights[0])
    assert [value for _, value in found.curve] == [risk(first) for first, _ in found.curve]
    width = max(map(len, balls))
    padded = [(sorted(ball) * width)[:width] for ball in balls]
    assert found.pure_attacker == best_pure_attack(padded, masses)

    expected = [F(0), F(0)]
    for x, label, mass, moves in zip(places, labels, masses, found.attack, strict=True):
        assert sum(probability for _, probability in moves) == 1
        for to, probability in moves:
            assert abs(to - x) <= eps
            assert probability > 0
            expected[0] += mass * probability * ((1 if to <= F(-1, 2) else -1) != label)
            expected[1] += mass * probability * ((1 if to >= F(1, 2) else -1) != label)
    assert found.dual == min(expected) == found.value


@pytest.mark.parametrize("seed", range(12))
def test_any_points_and_thresholds_agree_with_the_linear_program(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    parts = [draw.randint(1, 9) for _ in range(count)]
    line = LineGame(
        eps=F(draw.randint(0, 12), 8),
        points=tuple(F(draw.randint(-16, 16), 8) for _ in range(count)),
        labels=tuple(draw.choice((-1, 1)) for _ in range(count)),
        masses=tuple(F(part, sum(parts)) for part in parts),
        classifiers=tuple(Threshold(F(draw.randint(-8, 8), 8), draw.choice((-1, 1))) for _ in range(2)),
    )
    found, game = line.solve(), line.finite_game()
    value, _, _ = full_linear_program(game.losses.numpy(), game.masses.numpy(), game.mask.numpy())
    assert found.gap == 0
    assert float(found.value) == pytest.approx(value, abs=1e-9)
    assert found.pure_attacker <= found.dual <= min(found.deterministic_risks)
    for first in (F(0), F(2, 7), found.weights[0], F(1)):
        lam = [float(first), float(1 - first)]
        by_loops = best_value(game.losses.numpy(), lam, game.masses.numpy(), game.mask.numpy())
        assert float(line.risk(first)) == pytest.approx(by_loops, abs=1e-12)


def test_the_finite_game_has_the_value_of_the_fractions():
    for eps in (F(0), F(1, 2), F(21, 40)):
        line = LineGame(eps)
        game = line.finite_game()
        assert game.losses.dtype == torch.uint8
        assert game.masses.tolist() == [0.5, 0.25, 0.25]
        found = solve_values(game)
        exact = line.solve()
        assert found.v_rand == pytest.approx(float(exact.value), abs=1e-9)
        assert found.dual == pytest.approx(float(exact.dual), abs=1e-9)
        assert found.v_det == pytest.approx(float(min(exact.deterministic_risks)), abs=1e-12)
        assert found.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"eps": F(-1, 8)}, "eps is -1/8"),
        ({"labels": (-1, 1)}, "3 points, 2 labels and 3 masses"),
        ({"points": (), "labels": (), "masses": ()}, "at least one point"),
        ({"labels": (0, 1, 1)}, "each must be -1 or 1"),
        ({"masses": (F(1, 2), F(1, 4), F(1, 3))}, "their sum is 13/12"),
        ({"masses": (F(3, 2), F(-1, 4), F(-1, 4))}, "non-negative"),
        ({"classifiers": (Threshold(F(0), 1),)}, "two classifiers, got 1"),
    ],
)
def test_line_games_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        LineGame(**arguments)


# --- the values --------------------------------------------------------------------------------------------


def test_values_agree_with_the_full_linear_program():
    losses = random_losses()
    value, lam, _ = full_linear_program(losses.numpy())
    found = solve_values(FiniteGame(losses))
    assert found.v_rand == pytest.approx(value, abs=1e-7)
    assert found.dual == pytest.approx(value, abs=1e-7)
    assert found.v_det == pytest.approx(losses.amax(1).mean(0).min().item())
    assert found.v_det > found.v_rand + 1e-3
    torch.testing.assert_close(found.weights, torch.tensor(lam), atol=1e-5, rtol=0)
    assert found.violation <= 1e-7


@pytest.mark.parametrize("wrong", ["weights", "attack", "none"])
def test_a_solution_that_contradicts_the_theory_is_an_error(monkeypatch, wrong):
    game = FiniteGame(random_losses())
    _, lam, attack = full_linear_program(game.losses.numpy())
    lam, attack = torch.tensor(lam), torch.tensor(attack)
    if wrong == "weights":
        lam = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    elif wrong == "attack":
        attack = torch.full_like(attack, 1 / attack.numel())
    else:
        attack = None

    class Careless:
        def solve(self, game):
            return Equilibrium(lam, 0.0, 0.0, attack, "optimal", {}, 1, None, 0.0)

    monkeypatch.setattr(base, "LinearProgram", Careless)
    with pytest.raises(RuntimeError, match=r"contradict D = V_rand|no strategy of the attacker"):
        solve_values(game)


# --- the Gaussians -----------------------------------------------------------------------------------------


def drawn(seed=0, **settings):
    less = {"num_points": 60, "num_samples": 25, "num_classifiers": 4}
    return Gaussians(seed=seed, draws=1, **{**less, **settings}).draw()


@pytest.fixture(scope="module")
def problem():
    return drawn(seed=4, num_points=200, num_samples=80, num_classifiers=5)


def test_the_points_follow_their_law():
    many = drawn(num_points=40_000, num_samples=0)
    x, positive = many.x.numpy(), (many.y > 0).numpy()
    assert set(many.y.tolist()) == {-1, 1}
    assert positive.mean() == pytest.approx(0.5, abs=0.01)
    groups = {0.0: x[~positive], 3.0: x[positive & (x[:, 0] > 0)], -3.0: x[positive & (x[:, 0] <= 0)]}
    assert len(groups[3.0]) / positive.sum() == pytest.approx(0.5, abs=0.02)
    for centre, group in groups.items():
        np.testing.assert_allclose(group.mean(0), [centre, 0], atol=0.05)
        np.testing.assert_allclose(np.cov(group.T), np.eye(2), atol=0.06)


def test_the_first_candidate_is_the_point_itself_and_all_lie_in_the_ball(problem):
    for eps in (0.0, 0.3, 2.5):
        owner, points = problem.candidates(eps)
        assert torch.equal(owner, torch.arange(200).repeat_interleave(81))
        candidates = points.reshape(200, 81, 2)
        assert torch.equal(candidates[:, 0], problem.x)
        flat, centres = candidates.reshape(-1, 2), problem.x.repeat_interleave(81, 0)
        assert bool(ThreatModel("l2", eps, bounds=None).contains(flat, centres).all())
        distances = (flat - centres).square().sum(1).sqrt()
        assert distances.max() <= eps + 1e-12
        if eps:
            assert distances.max() > 0.98 * eps
    assert torch.equal(problem.candidates(0.0)[1], problem.x.repeat_interleave(81, 0))


def test_samples_are_uniform_on_the_disc():
    steps = drawn(num_points=200, num_samples=400).steps[:, 1:].reshape(-1, 2).numpy()
    radii = np.hypot(*steps.T)
    for inside in (0.3, 0.6, 0.9):
        assert (radii <= inside).mean() == pytest.approx(inside**2, abs=0.01)
    np.testing.assert_allclose(steps.mean(0), 0, atol=0.01)


def test_losses_are_those_of_the_classifiers_at_the_candidates(problem):
    """Each loss vector that some candidate causes is there once, and no other."""
    eps = 1.3
    game = problem.game(eps)
    assert game.losses.dtype == torch.uint8
    normals, offsets = problem.normals.numpy(), problem.offsets.numpy()
    owner, points = (tensor.numpy() for tensor in problem.candidates(eps))
    for i in (0, 7, 199):
        wanted = set()
        for x in points[owner == i]:
            scores = [normals[k][0] * x[0] + normals[k][1] * x[1] + offsets[k] for k in range(5)]
            wanted.add(tuple((score >= 0) != (problem.y[i].item() == 1) for score in scores))
        rows = game.losses[i][game.mask[i]].bool().tolist()
        assert len(rows) == len(wanted)
        assert set(map(tuple, rows)) == wanted
    np.testing.assert_allclose(np.hypot(*normals.T), 1, rtol=1e-12)


def test_classifiers_are_better_than_asked_and_differ(problem):
    x, y = problem.x.numpy(), problem.y.numpy()
    for k in range(5):
        said = np.where(x @ problem.normals[k].numpy() + problem.offsets[k].item() >= 0, 1, -1)
        assert (said != y).mean() < 0.4
        assert problem.risks()[k].item() == pytest.approx((said != y).mean())
    assert len(torch.unique(problem.offsets)) == 5
    strict = drawn(max_risk=0.31, num_points=300)
    assert strict.risks().max() < 0.31
    # Rejection: the good ones of a lax draw are those of the strict draw, in order.
    lax = drawn(max_risk=0.4, num_points=300, num_classifiers=100)
    good = lax.normals[lax.risks() < 0.31]
    assert len(good) > 0
    count = min(len(good), 4)
    torch.testing.assert_close(strict.normals[:count], good[:count])


def test_at_radius_zero_a_mixture_cannot_beat_its_best_member(problem):
    found = solve_values(problem.game(0.0))
    best = problem.risks().min().item()
    assert found.v_rand == pytest.approx(best, abs=1e-9)
    assert found.v_det == pytest.approx(best, abs=1e-12)
    assert found.dual == pytest.approx(best, abs=1e-9)


def test_values_keep_their_order_and_a_mixture_wins_at_large_radii(problem):
    by_eps = {eps: solve_values(problem.game(eps)) for eps in (0.5, 1.5, 3.0)}
    for eps, found in by_eps.items():
        game = problem.game(eps)
        value, _, _ = full_linear_program(game.losses.numpy(), mask=game.mask.numpy())
        assert found.v_rand == pytest.approx(value, abs=1e-7), eps
        assert found.dual <= found.v_rand + 1e-9 <= found.v_det + 2e-9
    assert by_eps[3.0].v_det - by_eps[3.0].v_rand > 0.05


def test_more_candidates_and_the_whole_ball_only_help_the_attacker(problem):
    eps = 1.2
    few = [solve_values(replace(problem, steps=problem.steps[:, :count]).game(eps)) for count in (1, 5, 21, 81)]
    whole = solve_values(replace(problem, steps=None).game(eps))
    for less, more in pairwise([*few, whole]):
        assert less.v_rand <= more.v_rand + 1e-9
        assert less.v_det <= more.v_det + 1e-12
    assert few[0].v_rand < few[-1].v_rand - 0.05
    assert few[-1].v_rand < whole.v_rand


def test_on_whole_balls_a_member_alone_errs_where_its_margin_is_below_the_radius(problem):
    """The closed form: the nearest point of the wrong half plane is at the distance |w·x + b| of the line."""
    whole = replace(problem, steps=None)
    x, y = whole.x.numpy(), whole.y.numpy()
    for eps in (0.0, 0.4, 1.7, 3.0):
        closed = np.zeros(5)
        for k, (normal, offset) in enumerate(zip(whole.normals.numpy(), whole.offsets.numpy(), strict=True)):
            closed[k] = np.mean([label * (normal @ at + offset) < eps for at, label in zip(x, y, strict=True)])
        assert whole.game(eps).deterministic_values().tolist() == pytest.approx(closed, abs=1e-12)
        assert whole.risks(eps).tolist() == pytest.approx(closed, abs=1e-12)


def test_the_best_mixture_on_whole_balls_against_a_program_on_dense_samples():
    """30,000 points per ball miss only cells that are smaller than a few of their spacings."""
    few = Gaussians(seed=0, draws=1, num_points=40, num_classifiers=6).draw()
    eps, draw = 1.8, np.random.default_rng(0)
    angle, radius = draw.uniform(0, 2 * math.pi, 30_000), eps * np.sqrt(draw.uniform(0, 1, 30_000))
    steps = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    dense = []
    for at, label in zip(few.x.numpy(), few.y.numpy(), strict=True):
        said = np.where((at + steps) @ few.normals.numpy().T + few.offsets.numpy() >= 0, 1, -1)
        dense.append(np.unique(said != label, axis=0))
    longest = max(map(len, dense))
    losses = np.stack([np.concatenate([rows, rows[:1].repeat(longest - len(rows), 0)]) for rows in dense])
    sampled, _, _ = full_linear_program(losses.astype(float))
    game = few.game(eps)
    exact, _, _ = full_linear_program(game.losses.numpy(), mask=game.mask.numpy())
    found = solve_values(game)
    assert found.v_rand == pytest.approx(exact, abs=1e-9)
    assert sampled - 1e-9 <= found.v_rand <= sampled + 0.02
    assert found.v_rand < found.v_det - 0.01


# --- deterministic classifiers that are no members ---------------------------------------------------------


def test_the_best_constant_gives_up_the_lighter_classes():
    assert base.best_constant(torch.tensor([-1, 1, 1, -1, 1])) == pytest.approx(0.4)
    assert base.best_constant(torch.tensor([3, 0, 7]), torch.tensor([0.5, 0.2, 0.3]).double()) == pytest.approx(0.5)


def test_the_best_vote_by_trying_every_threshold(problem):
    whole = replace(problem, steps=None)
    for eps in (0.0, 1.0, 2.5):
        game = whole.game(eps)
        for weights in (solve_values(game).weights, torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)):
            owner, points = (tensor.numpy() for tensor in whole.candidates(eps))
            share = (points @ whole.normals.numpy().T + whole.offsets.numpy() >= 0) @ weights.numpy()
            positive = (whole.y > 0).numpy()
            risks = {}
            for above in np.arange(0, 1, 1 / 400) + 1e-6:
                wrong = (share > above) != positive[owner]
                risks[above] = np.bincount(owner, wrong).astype(bool).mean()
            risk, threshold = base.best_vote(game, whole.y > 0, weights)
            assert risk == pytest.approx(min(risks.values()), abs=1e-12)
            wrong = (share > threshold + 1e-8) != positive[owner]
            assert risk == pytest.approx(np.bincount(owner, wrong).astype(bool).mean())
            # A mean over thresholds is the risk of the mixture, so the best one is no worse.
            assert np.mean(list(risks.values())) == pytest.approx(game.value(weights), abs=0.005)
            assert risk <= game.value(weights) + 1e-9


def test_where_mixing_pays_on_the_gaussians_a_constant_beats_the_mixture():
    """What the picture has to show: with two classes no mixture can beat every deterministic classifier."""
    paying = 0
    played = Gaussians(seed=0, draws=3, eps=[1, 2, 3], num_points=400, num_steps=1, alphas=0.1).play(lambda _: None)
    for run in played.summary["runs"]:
        assert run["best_vote"] <= run["v_rand"] + 1e-9
        if run["v_rand"] < run["v_det"] - 0.02:
            paying += 1
            assert run["best_constant"] < run["v_rand"]
    assert paying >= 4


def test_neighbouring_seeds_share_no_problem():
    games = [Gaussians(seed=seed, draws=3, num_points=50, num_classifiers=2) for seed in (0, 1)]
    firsts = [tuple(game.draw(k).x[0].tolist()) for game in games for k in range(3)]
    assert len(set(firsts)) == 6


def test_one_seed_gives_one_problem():
    a, b, c = drawn(seed=4), drawn(seed=4), drawn(seed=5)
    for name in ("x", "y", "normals", "offsets", "steps"):
        assert torch.equal(getattr(a, name), getattr(b, name))
        assert not torch.equal(getattr(a, name), getattr(c, name))
    fewer = drawn(seed=4, num_samples=3)
    assert torch.equal(fewer.x, a.x)
    assert torch.equal(fewer.normals, a.normals)


@pytest.mark.parametrize(
    ("game", "settings", "said"),
    [
        (Gaussians, {"num_points": 0}, r"num_points=0 must be at least 1"),
        (Gaussians, {"num_samples": -1}, "num_samples=-1 must be at least 0"),
        (Gaussians, {"num_classifiers": 0}, "num_classifiers=0 must be"),
        (Gaussians, {"draws": 0}, "draws=0 must be at least 1"),
        (Gaussians, {"max_risk": 0.0}, r"max_risk=0.0 must be a risk in \(0, 1\]"),
        (Gaussians, {"max_risk": math.nan}, "max_risk=nan must be"),
        (Gaussians, {"max_risk": 0.05}, "max_risk=0.05: in draw 0 of seed 0 only 0 of 20,000 random"),
        (Gaussians, {"eps": []}, r"eps=\[\] is empty: give at least one number, as eps="),
        (Gaussians, {"eps": [0, -1]}, "eps=-1 is no radius"),
        (Gaussians, {"eps": [1, "nan"]}, "eps=nan is no radius"),
        (Gaussians, {"show_eps": -1}, "show_eps=-1 is no radius: .* show_eps=1/2"),
        (Gaussians, {"alphas": []}, r"alphas=\[\] is empty"),
        (Gaussians, {"alphas": [0.1, -1]}, "alpha must be positive and finite, got -1"),
        (Gaussians, {"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        (Motivating, {"eps": math.nan}, "eps=nan is no radius"),
        (Motivating, {"alpha": 0}, "alpha must be positive and finite, got 0"),
        (Motivating, {"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(game, settings, said):
    with pytest.raises(ValueError, match=said):
        game(**settings)


def test_radii_are_read_as_they_are_written():
    cases = {"21/40": F(21, 40), 0.525: F(21, 40), " 1 / 3 ": F(1, 3), "0.5/2": F(1, 4)}
    for text, exact in {**cases, 0: F(0), "3.": F(3), "+.5": F(1, 2)}.items():
        assert exact_radius("eps", text) == exact
    assert float(exact_radius("eps", "1e-3")) == 1e-3
    for text in ("-1", "nan", "inf", "1/0", "1/", "one", "1/2/3", "1e999", None, True, [1]):
        with pytest.raises(ValueError, match=r"^eps=.* is no radius: .* eps=1/2"):
            exact_radius("eps", text)


def test_a_bound_that_nobody_keeps_is_refused_after_a_bounded_search():
    with pytest.raises(
        ValueError, match=r"only \d+ of 20,000 random classifiers.*the best has 0\.\d+, choose a larger"
    ):
        drawn(max_risk=0.05, num_points=500)


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_a_radius_must_be_one(problem, eps):
    with pytest.raises(ValueError, match="eps is"):
        problem.game(eps)


# --- convergence -------------------------------------------------------------------------------------------


def test_errors_are_measured_from_the_value(problem):
    game = problem.game(2.0)
    losses, mask = game.losses.numpy(), game.mask.numpy()
    value, _, _ = full_linear_program(losses, mask=mask)
    steps = [1, 8, 64, 512]
    errors = oracle_errors(game, value, steps)
    uniform = best_value(losses, [0.2] * 5, mask=mask) - value
    # One step may already improve on the uniform weights.
    assert 0 < errors[0] <= uniform + 1e-12
    for count, error in zip(steps, errors, strict=True):
        assert -1e-12 <= error <= 2 * math.sqrt(5 / count)
    assert errors[-1] < uniform / 3

    errors = entropic_errors(game, value, AcceleratedEntropic(alpha=0.05, num_steps=300))
    assert len(errors) == 301
    assert errors[0] == pytest.approx(uniform, abs=1e-12)
    assert min(errors) >= -1e-9
    assert errors[-1] <= 0.05 * math.log(losses.shape[1]) + 1e-9
