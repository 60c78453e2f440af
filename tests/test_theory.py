"""What the theory says of mixtures and attackers, on finite games and on linear classifiers of the plane.

D <= V_rand <= V_det and when they differ, the attacker's need to randomise, convexity, the matching-penny identity,
exact worst cases of linear members, and what must not change an answer.
"""

import itertools
import math
import re
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linprog, minimize

from mixadv.attacks import PGD, ExpectedLoss
from mixadv.game import FiniteGame
from mixadv.lambda_solvers import AcceleratedEntropic, OracleSubgradient
from mixadv.losses import RobustLoss, margin, zero_one
from mixadv.mixture_game import MixtureGame
from mixadv.simplex import is_distribution
from mixadv.threat_model import ThreatModel
from oracles_game import (
    best_pure_attack,
    dual_linear_program,
    full_linear_program,
    motivating_example,
    random_losses,
)
from oracles_linear import (
    exact_game,
    exact_worst_case,
    least_perturbation,
    length,
    linear_mixture,
    member_errors,
    worst_case_by_subsets,
    worst_cases_in_the_plane,
)


def zero_one_losses(n=8, m=4, members=3, seed=0):
    """0/1 losses [N, m, L], about a third of them 1; with N a power of two, averages are exact in binary."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, m, members, generator=generator) < 0.3).to(torch.uint8)


def random_weights(members, seed, shape=()):
    """Points of the simplex whose entries are multiples of 1/64, so that sums of them are exact."""
    counts = np.random.default_rng(seed).multinomial(64, np.full(members, 1 / members), size=shape)
    return torch.from_numpy(counts / 64)


# --- the order of the values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["real", "0/1"])
@pytest.mark.parametrize("seed", range(8))
def test_dual_is_the_randomised_value_and_that_is_at_most_the_deterministic_one(kind, seed):
    """D = V_rand <= V_det, D and V by two programs; and a pure attacker gets at most D."""
    losses = random_losses(seed=seed) if kind == "real" else zero_one_losses(5, 4, 3, seed)
    game = FiniteGame(losses)
    table = losses.double().numpy()
    dual, (primal, lam, attack) = dual_linear_program(table), full_linear_program(table)
    assert dual == pytest.approx(primal, abs=1e-8)
    assert game.value(torch.from_numpy(lam)) == pytest.approx(primal, abs=1e-8)
    assert game.response_value(torch.from_numpy(attack)) == pytest.approx(dual, abs=1e-8)
    assert primal <= game.deterministic_values().min() + 1e-9
    assert best_pure_attack(table.tolist()) <= dual + 1e-9
    clean = FiniteGame(losses[:, :1])
    assert clean.deterministic_values().min() <= primal + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_without_perturbations_mixing_gains_nothing(seed):
    """Where x is the only move R is linear in lam: V_rand^0 = V_det^0 = D^0."""
    losses = random_losses(m=1, seed=seed)
    best = FiniteGame(losses).deterministic_values().min().item()
    assert full_linear_program(losses.numpy())[0] == pytest.approx(best, abs=1e-9)
    assert dual_linear_program(losses.numpy()) == pytest.approx(best, abs=1e-9)
    lam = random_weights(3, seed)
    assert FiniteGame(losses).value(lam) == pytest.approx((lam @ losses[:, 0].mean(0)).item(), abs=1e-14)


def test_mixing_can_gain_strictly():
    """Two moves, each of which fools one member: 1 for either, 1/2 for the fair mixture; and more with more members."""
    for members in (2, 3, 5):
        game = FiniteGame(torch.eye(members)[None])
        assert game.deterministic_values().tolist() == [1.0] * members
        assert game.value(torch.full((members,), 1 / members)) == pytest.approx(1 / members)
        assert full_linear_program(game.losses.numpy())[0] == pytest.approx(1 / members)
        assert best_pure_attack(game.losses.tolist()) == 0.0


def test_motivating_example_from_its_geometry_in_fractions():
    """The balls on a grid of eighths: V_det = 3/4, V_rand = D = 1/2, and no pure attacker of all gets above 1/4."""
    half = Fraction(1, 2)
    points = [(Fraction(0), -1), (Fraction(-1), 1), (Fraction(1), 1)]
    masses = [half, half / 2, half / 2]
    classifiers = [lambda x: 1 if x <= -half else -1, lambda x: 1 if x >= half else -1]
    moves = [Fraction(k, 8) for k in range(-4, 5)]
    losses = [[[int(f(x + move) != y) for f in classifiers] for move in moves] for x, y in points]

    def risk(lam):
        best = [max(sum(w * loss for w, loss in zip(lam, row, strict=True)) for row in rows) for rows in losses]
        return sum(mass * worst for mass, worst in zip(masses, best, strict=True))

    assert risk([1, 0]) == risk([0, 1]) == Fraction(3, 4)
    assert risk([half, half]) == half
    # R is convex and symmetric under the exchange of f1 and f2, so the fair mixture is its minimum.
    assert min(risk([Fraction(k, 16), 1 - Fraction(k, 16)]) for k in range(17)) == half
    # The mass at 0 goes to -1/2 and to 1/2, the rest to where the one member that is right errs too.
    split = {0: {0: half / 2, 8: half / 2}, 1: {8: masses[1]}, 2: {0: masses[2]}}
    payoff = [sum(mass * losses[i][j][k] for i, row in split.items() for j, mass in row.items()) for k in range(2)]
    assert payoff == [half, half]
    assert best_pure_attack(losses, masses) == Fraction(1, 4)
    # The three moves of the finite game of the same name lose nothing.
    coarse, weights = motivating_example()
    game = FiniteGame(torch.tensor(losses), masses=weights)
    for lam in random_weights(2, 0, (20,)):
        assert (
            game.value(lam)
            == FiniteGame(coarse, masses=weights).value(lam)
            == risk([Fraction(w) for w in lam.tolist()])
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_risk_is_convex_in_the_weights(seed, members):
    losses = random_losses(members=members, seed=seed)
    game = FiniteGame(losses)
    first, second = random_weights(members, seed, (2,))
    values = [game.value((1 - t) * first + t * second) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (np.diff(values, 2) >= -1e-13).all()


def test_risk_is_not_linear():
    values = [FiniteGame(torch.eye(2)[None]).value(torch.tensor([t, 1 - t])) for t in (0.0, 0.5, 1.0)]
    assert values == [1.0, 0.5, 1.0]


# --- matching pennies ----------------------------------------------------------------------------------------------


def matching_penny_gaps(losses, lam):
    """gap(x_i) = sum_k lam_k max_j l_k - max_j sum_k lam_k l_k, [N]."""
    return losses.max(1) @ lam - (losses @ lam).max(1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_matching_penny_identity(seed, members):
    """R(lam) = sum_k lam_k R(k) - E gap, and gap >= 0: R(lam) is never above the mean of the members."""
    losses, lam = random_losses(members=members, seed=seed), random_weights(members, seed)
    game, gaps = FiniteGame(losses), matching_penny_gaps(losses.numpy(), lam.numpy())
    assert (gaps >= -1e-14).all()
    average = (game.deterministic_values() @ lam).item()
    assert game.value(lam) == pytest.approx(average - gaps.mean(), abs=1e-13)


def test_a_mixture_beats_its_best_member_where_the_gap_exceeds_the_spread_and_nowhere_else():
    """0/1 losses, N = 8 and weights in 64ths: every number is exact, so strict inequalities are decided."""
    outcomes = []
    for seed in range(60):
        losses, lam = zero_one_losses(members=2 + seed % 3, seed=seed), random_weights(2 + seed % 3, seed)
        game = FiniteGame(losses)
        alone = game.deterministic_values()
        gap = matching_penny_gaps(losses.double().numpy(), lam.numpy()).mean()
        beats = game.value(lam) < alone.min().item()
        assert beats == (gap > (alone @ lam - alone.min()).item())
        assert game.value(lam) == (alone @ lam).item() - gap
        outcomes.append(beats)
    assert 10 <= sum(outcomes) <= 50


def test_the_gap_is_positive_only_where_members_can_be_fooled_but_not_together():
    """0/1 losses: gap(x) = 0 where one move fools all who can be fooled; of two members it is else min(lam)."""
    kinds = set()
    for seed in range(20):
        losses = zero_one_losses(members=2, seed=seed).double().numpy()
        lam = np.array([0.625, 0.375])
        for rows, gap in zip(losses, matching_penny_gaps(losses, lam), strict=True):
            together = any((move == rows.max(0)).all() for move in rows)
            assert gap == (0.0 if together else 0.375)
            kinds.add((together, int(rows.max(0).sum())))
    assert kinds == {(True, 0), (True, 1), (True, 2), (False, 2)}


# --- linear members: the exact worst case ----------------------------------------------------------------------------


def linear_instances(n, members, seed, d=2):
    """n instances with members of their own: W [n, L, d], b [n, L], y [n], x [n, d], lam [n, L]."""
    rng = np.random.default_rng(seed)
    W, b = rng.normal(size=(n, members, d)), 0.5 * rng.normal(size=(n, members))
    return W, b, rng.integers(0, 2, n), 0.5 * rng.normal(size=(n, d)), rng.dirichlet(np.full(members, 3.0), n)


def uniform_in_ball(rng, shape, norm):
    if norm == "linf":
        return rng.uniform(-1, 1, shape)
    direction = rng.normal(size=shape)
    return direction / length(direction, "l2")[..., None] * rng.uniform(size=shape[:-1])[..., None] ** (1 / shape[-1])


def margins_at(W, b, y, points):
    return (1 if y > 0 else -1) * (points @ W.T + b)


def deepest_by_slsqp(G, margins, eps, norm):
    """max t such that some delta of the ball has margins + G delta <= -t: above 0 where all can be fooled."""
    d = G.shape[1]
    constraints = [
        {"type": "ineq", "fun": lambda z: -z[d] - margins - G @ z[:d], "jac": lambda z: np.c_[-G, -np.ones(len(G))]}
    ]
    if norm == "l2":
        constraints.append(
            {"type": "ineq", "fun": lambda z: eps**2 - z[:d] @ z[:d], "jac": lambda z: np.r_[-2 * z[:d], 0.0]}
        )
    found = minimize(
        lambda z: -z[d],
        np.r_[np.zeros(d), -margins.max()],
        jac=lambda z: np.r_[np.zeros(d), -1.0],
        method="SLSQP",
        bounds=[(-eps, eps)] * d + [(None, None)],
        constraints=constraints,
        options={"ftol": 1e-12, "maxiter": 200},
    )
    return found.x[d]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("members", "d"), [(2, 2), (3, 2), (3, 4)])
def test_least_perturbations_agree_with_a_convex_solver(norm, members, d):
    """A set of members is foolable within eps iff the shortest perturbation that fools it is shorter than eps."""
    eps, answers = 0.6, []
    for W, b, y, x, _ in zip(*linear_instances(12, members, 3, d), strict=True):
        for size in range(1, members + 1):
            for chosen in map(list, itertools.combinations(range(members), size)):
                margins, G = margins_at(W, b, y, x)[chosen], (1 if y > 0 else -1) * W[chosen]
                delta = least_perturbation(G, margins, norm)
                foolable = delta is not None and length(delta, norm) <= eps
                depth = deepest_by_slsqp(G, margins, eps, norm)
                assert foolable == (depth > 0), depth
                answers.append(foolable)
                if delta is not None:
                    assert (margins + G @ delta < 0).all()
    assert 0.2 < np.mean(answers) < 0.9


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_exact_worst_case_by_cells_and_by_subsets(norm, members):
    """Two methods, one value; the points lie in the ball and have it; some triangle needs an inner point."""
    instances, eps = linear_instances(90 // members, members, 10 + members), 0.5
    values, points = worst_cases_in_the_plane(*instances[:4], eps, norm, instances[4])
    assert (length(points - instances[3], norm) <= eps).all()
    for i, (W, b, y, x, lam) in enumerate(zip(*instances, strict=True)):
        value, point = worst_case_by_subsets(W, b, y, x, eps, norm, lam)
        assert value == pytest.approx(values[i], abs=1e-12)
        for found in (point, points[i]):
            assert lam[margins_at(W, b, y, found) < 0].sum() == pytest.approx(values[i], abs=1e-12)
        alone, single = exact_worst_case(W, b, y, x, eps, norm, lam)
        assert (alone, single.tolist()) == (values[i], points[i].tolist())
        assert exact_worst_case(W, b, 2 * y - 1, x, eps, norm, lam)[0] == alone
    assert ((values > 1e-9) & (values < 1 - 1e-9)).mean() > 0.15


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_triangle_inside_the_ball_is_found(norm):
    """Three members that err together on a small triangle only, which touches no boundary."""
    angles = 2 * np.pi * np.arange(3) / 3 + 0.3
    W, b = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.full(3, 0.01)
    x, lam = np.array([0.5, -0.2]), np.array([0.3, 0.3, 0.4])
    centre = np.array([0.1, 0.15])
    value, point = exact_worst_case(-W, b * 0 - 0.01 + W @ centre, 0, x, 1.0, norm, lam)
    assert value == pytest.approx(0.7)
    value, point = exact_worst_case(W, -0.01 - W @ centre, 1, x, 1.0, norm, lam)
    assert value == pytest.approx(1.0)
    assert np.linalg.norm(point - centre) < 0.02


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("members", [2, 3])
def test_sampling_the_ball_never_exceeds_the_exact_worst_case_and_nearly_reaches_it(norm, members):
    W, b, y, x, lam = linear_instances(300, members, 20 + members)
    values, _ = worst_cases_in_the_plane(W, b, y, x, 0.5, norm, lam)
    cloud = 0.5 * uniform_in_ball(np.random.default_rng(5), (300, 1500, 2), norm)
    sampled = (member_errors(W, b, y, x[:, None] + cloud) * lam[:, None]).sum(2).max(1)
    assert (sampled <= values + 1e-12).all()
    assert (sampled >= values - 1e-12).mean() >= 0.97


def test_exact_worst_cases_without_a_radius_and_of_one_member():
    W, b, y, x, lam = linear_instances(50, 3, 7)
    values, points = worst_cases_in_the_plane(W, b, y, x, 0.0, "l2", lam)
    np.testing.assert_array_equal(points, x)
    np.testing.assert_allclose(values, (member_errors(W, b, y, x[:, None])[:, 0] * lam).sum(1))
    # A member errs within eps of x iff its signed distance, in the dual norm, is below eps.
    for norm, dual in (("l2", 2), ("linf", 1)):
        values, _ = worst_cases_in_the_plane(W[:, :1], b[:, :1], y, x, 0.4, norm, np.ones(1))
        margins = np.where(y > 0, 1, -1) * ((W[:, 0] * x).sum(1) + b[:, 0])
        np.testing.assert_array_equal(values, margins < 0.4 * np.linalg.norm(W[:, 0], ord=dual, axis=1))


def test_exact_worst_cases_take_little_time():
    """A hundredth of a second each is ten times what they take."""
    started = time.process_time()
    for members, norm in itertools.product((2, 3), ("l2", "linf")):
        for W, b, y, x, lam in zip(*linear_instances(25, members, 1), strict=True):
            exact_worst_case(W, b, y, x, 0.5, norm, lam)
    assert time.process_time() - started < 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_exact_worst_case_on_many_instances(norm, members):
    instances = linear_instances(1000, members, 50 + members)
    values, _ = worst_cases_in_the_plane(*instances[:4], 0.5, norm, instances[4])
    by_subsets = [
        worst_case_by_subsets(W, b, y, x, 0.5, norm, lam)[0] for W, b, y, x, lam in zip(*instances, strict=True)
    ]
    np.testing.assert_allclose(values, by_subsets, atol=1e-12)


# --- linear members: attacks and the game ----------------------------------------------------------------------------

LAM = np.array([0.5, 0.3125, 0.1875])


@dataclass(frozen=True)
class ZeroOne(RobustLoss):
    """The attacker climbs margins, the classifier pays for errors."""

    needs_clean: ClassVar[bool] = False
    start: ClassVar[str] = "uniform"

    def inner(self, adv_logits, clean_logits, y):
        return margin(adv_logits, y)

    def outer(self, adv_logits, clean_logits, y):
        return zero_one(adv_logits, y)


def plane(seed, n=40):
    """Three lines and n labelled points of the plane, most of them on the right side of two lines or more."""
    rng = np.random.default_rng(seed)
    W, x = rng.normal(size=(3, 2)), rng.normal(size=(n, 2))
    b = 0.3 * rng.normal(size=3)
    y = ((x @ W.T + b > 0).sum(1) >= 2).astype(int)
    return W, b, y, x


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("seed", range(3))
def test_pgd_never_beats_the_exact_worst_case_of_linear_members(norm, seed):
    W, b, y, x = plane(seed)
    values, points = worst_cases_in_the_plane(W, b, y, x, 0.6, norm, LAM)
    mixture = linear_mixture(W, b, LAM)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    replayed = 1 - mixture.expected_accuracy(torch.from_numpy(points), labels)
    np.testing.assert_allclose(replayed, values, atol=1e-12)
    for objective in (ExpectedLoss("ce"), ExpectedLoss("margin")):
        attack = PGD(12, restarts=2, objective=objective)
        found = attack(mixture, inputs, labels, ThreatModel(norm, 0.6, None), torch.Generator().manual_seed(seed))
        losses = (1 - mixture.expected_accuracy(found, labels)).numpy()
        assert (losses <= values + 1e-12).all()
        # It reaches many, and falls short of others: the averaged loss is not what the attacker is paid.
        assert 0.5 <= (losses >= values - 1e-12).mean() < 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_game_on_a_mixture_is_below_the_exact_game(norm):
    """0/1 payoffs: responses <= R(lam) and lower bounds <= V, both exact; Algorithm 1 ends near V all the same."""
    W, b, y, x = plane(5)
    exact = FiniteGame(torch.from_numpy(exact_game(W, b, y, x, 0.6, norm)))
    game = MixtureGame(
        linear_mixture(W, b),
        torch.from_numpy(x),
        torch.from_numpy(y),
        ThreatModel(norm, 0.6, None),
        [PGD(8, objective=ExpectedLoss(loss)) for loss in ("ce", "margin")],
        ZeroOne(),
        torch.Generator().manual_seed(0),
    )
    for lam in random_weights(3, 1, (4,)):
        response = game.best_response(lam)
        assert response.value == pytest.approx((response.gradient @ lam).item(), abs=1e-12)
        assert response.value <= exact.value(lam) + 1e-12
        assert response.value >= 0.7 * exact.value(lam)
    value = full_linear_program(exact.losses.double().numpy())[0]
    found = OracleSubgradient(12).solve(game, torch.tensor([0.75, 0.125, 0.125]))
    assert found.lower_bound <= value + 1e-9
    assert found.value <= exact.value(found.weights) + 1e-12
    assert value - 1e-9 <= exact.value(found.weights) <= value + 0.03
    assert exact.value(found.weights) < exact.deterministic_values().min()


def test_the_exact_game_of_a_batch_has_the_exact_worst_cases():
    W, b, y, x = plane(2)
    for norm, lam in itertools.product(("l2", "linf"), random_weights(3, 3, (3,))):
        game = FiniteGame(torch.from_numpy(exact_game(W, b, y, x, 0.6, norm)))
        values, _ = worst_cases_in_the_plane(W, b, y, x, 0.6, norm, lam.numpy())
        assert game.value(lam) == pytest.approx(values.mean(), abs=1e-14)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_values_of_linear_members_grow_with_the_radius_and_mixing_gains_at_a_large_one(norm):
    """The paper's points: class -1 around 0, class +1 around (-3, 0) and (3, 0); lines that are right more often."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 2)) + np.where(y[:, None] > 0, [[3.0, 0.0]], 0.0) * rng.choice([-1, 1], (60, 1))
    W, b = rng.normal(size=(400, 2)), rng.normal(size=400) * 2
    clean = member_errors(W[None], b[None], y, x[:, None])[:, 0].mean(0)
    W, b = W[clean < 0.4][:5], b[clean < 0.4][:5]
    assert len(W) == 5
    previous, gains = 0.0, []
    for eps in (0.0, 0.5, 1.0, 2.0, 3.0):
        game = FiniteGame(torch.from_numpy(exact_game(W, b, y, x, eps, norm)))
        value, lam, _ = full_linear_program(game.losses.double().numpy())
        deterministic = game.deterministic_values().min().item()
        sampled = x[:, None] + eps * uniform_in_ball(rng, (60, 40, 2), norm)
        pool = torch.from_numpy(member_errors(W[None], b[None], y, np.concatenate([x[:, None], sampled], axis=1)))
        # A pool of samples is part of the ball.
        assert FiniteGame(pool).value(torch.from_numpy(lam)) <= game.value(torch.from_numpy(lam)) + 1e-12
        assert previous - 1e-9 <= value <= deterministic + 1e-9
        previous = value
        gains.append(deterministic - value)
    assert gains[0] == pytest.approx(0.0, abs=1e-9)
    assert gains[-1] > 0.05


# --- the ball of distributions, and samples of the ball -------------------------------------------------------------


def moved_mass(P, y, near, labels, payoffs):
    """max over Q with W_inf(P, Q) <= eps of min_k E_Q l_k, and the maximum of E_Q l_k for every k.

    Q lies on targets of both labels. By Strassen's theorem some coupling moves P to Q by at most eps, without changing
    labels, if and only if Q(targets near A, with the labels of A) >= P(A) for every set A of atoms.

    Args:
        P: [N] masses of atoms with labels y; near: [N, m] bool, the targets within eps; labels: [m] of the targets;
        payoffs: [m, L].
    """
    n, m = near.shape
    rows, bounds = [], []
    for size in range(1, n + 1):
        for atoms in map(list, itertools.combinations(range(n), size)):
            reached = (near[atoms] & (labels == y[atoms][:, None])).any(0)
            rows.append(-reached.astype(float))
            bounds.append(-P[atoms].sum())
    settings = {"A_eq": np.ones((1, m)), "b_eq": [1.0], "bounds": [(0, None)] * m}
    single = [-linprog(-payoffs[:, k], A_ub=rows, b_ub=bounds, **settings).fun for k in range(payoffs.shape[1])]
    rows = [np.append(row, 0.0) for row in rows] + [np.append(-payoffs[:, k], 1.0) for k in range(payoffs.shape[1])]
    bounds = bounds + [0.0] * payoffs.shape[1]
    joint = linprog(
        np.append(np.zeros(m), -1.0),
        A_ub=rows,
        b_ub=bounds,
        A_eq=np.append(np.ones((1, m)), [[0.0]], axis=1),
        b_eq=[1.0],
        bounds=[(0, None)] * m + [(None, None)],
    )
    return -joint.fun, single


@pytest.mark.parametrize("seed", range(6))
def test_moving_each_example_in_its_ball_is_moving_the_distribution_in_a_wasserstein_ball(seed):
    """The attacker's strategies are the Q with W_inf(P, Q) <= eps: the same values, although no Q names an example."""
    rng = np.random.default_rng(seed)
    atoms, y, P = rng.uniform(size=5), np.array([0, 1, 0, 1, 0]), rng.dirichlet(np.ones(5))
    places = np.concatenate([atoms, rng.uniform(size=6)])
    where, labels = np.tile(places, 2), np.repeat([0, 1], len(places))
    near = np.abs(where - atoms[:, None]) <= 0.3
    payoffs = rng.normal(size=(len(where), 3))
    # The game: example i chooses among the targets near it that have its label.
    allowed = near & (labels == y[:, None])
    losses = torch.from_numpy(np.broadcast_to(payoffs, (5, *payoffs.shape)).copy())
    game = FiniteGame(losses, torch.from_numpy(allowed), torch.from_numpy(P))
    dual, single = moved_mass(P, y, near, labels, payoffs)
    np.testing.assert_allclose(game.deterministic_values(), single, atol=1e-8)
    assert dual == pytest.approx(full_linear_program(losses.numpy(), P, allowed)[0], abs=1e-8)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("m", [2, 8, 32])
def test_what_m_uniform_points_tell_of_the_whole_ball(norm, m):
    """One member on an interval that the box cuts to [0, 0.4]; it errs beyond 0.3, on a share p = 1/4 of it.

    R = 1 there; the pool misses with probability (1 - p)^m. F = alpha log(1 - p + p exp(1 / alpha)) for the whole ball;
    the expected F of a pool is below it and rises with m; and with probability 1 - delta both differ by at most
    alpha (exp(M / alpha) - 1) sqrt(log(2 / delta) / (2 m)).
    """
    n, p, alpha, delta = 4000, 0.25, 0.5, 0.1
    x = torch.full((n, 1), 0.1, dtype=torch.float64)
    game = MixtureGame(
        linear_mixture(np.array([[1.0]]), np.array([-0.3])),
        x,
        torch.zeros(n, dtype=torch.long),
        ThreatModel(norm, 0.3),
        [],
        ZeroOne(),
    )
    one = torch.ones(1, dtype=torch.float64)
    pool = game.pool(one, m, False, torch.Generator().manual_seed(m))
    assert pool.value(one) == pytest.approx(1 - (1 - p) ** m, abs=4 * math.sqrt(p / n))
    whole = alpha * math.log(1 - p + p * math.exp(1 / alpha))
    binomial = stats.binom(m, p)
    hits = np.arange(m + 1)
    of_pools = alpha * np.log1p((math.exp(1 / alpha) - 1) * hits / m)
    expected = float(binomial.pmf(hits) @ of_pools)
    assert pool.smoothed_value(one, alpha) == pytest.approx(expected, abs=4 * alpha / math.sqrt(n))
    assert expected < whole
    half = game.pool(one, m // 2, False, torch.Generator().manual_seed(m + 1))
    assert half.smoothed_value(one, alpha) < pool.smoothed_value(one, alpha)
    bound = alpha * (math.exp(1 / alpha) - 1) * math.sqrt(math.log(2 / delta) / (2 * m))
    found = pool.losses[..., 0].double().mean(1).numpy()
    off = np.abs(alpha * np.log1p((math.exp(1 / alpha) - 1) * found) - whole)
    assert (off <= bound).mean() >= 1 - delta
    # The relaxation of the whole ball is below R, by the price of the small share p at most.
    assert 0 <= 1 - whole <= alpha * math.log(1 / p)


def test_every_test_that_the_page_of_the_theory_names_exists():
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)(\.py)?`", page)
    assert len(named) > 40
    for name, ending in named:
        assert (Path(__file__).parent / f"{name}.py").exists() if ending else f"def {name}(" in tests, name
    table = page.partition("## The poster, row by row")[2]
    for place in re.findall(r"`(\w+/\w+\.py|\w+\.py)`", table):
        assert (Path(__file__).parents[1] / "src" / "mixadv" / place).exists(), place
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 18
    for row in rows:
        assert "`test_" in row, row


# --- what must not change an answer ----------------------------------------------------------------------------------


@st.composite
def games(draw, masked=(True, False), kinds=("real", "0/1")):
    """(losses [N, m, L], mask or None, masses or None) of any small shape."""
    n, m, members, seed = (draw(st.integers(1, high)) for high in (5, 4, 4, 10**6))
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(n, m, members)) + 0.2 * np.arange(members)
    if draw(st.sampled_from(kinds)) == "0/1":
        table = (table > 0.5).astype(float)
    mask = masses = None
    if draw(st.sampled_from(masked)):
        mask = rng.random((n, m)) < 0.6
        mask[np.arange(n), rng.integers(0, m, n)] = True
    if draw(st.booleans()):
        masses = rng.dirichlet(np.ones(n))
    return table, mask, masses


def build(losses, mask=None, masses=None):
    return FiniteGame(
        *(None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in (losses, mask, masses))
    )


def some_weights(members, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(members)))


def answers(game, lam, alpha=0.3):
    """Everything about one lam that does not name a member, an example or a perturbation."""
    return [game.value(lam), game.smoothed_value(lam, alpha), game.smoothness(alpha), game.max_loss]


PROPERTY = settings(max_examples=20, deadline=None)


@PROPERTY
@given(games())
def test_solutions_lie_on_the_simplex_between_their_bounds(game_parts):
    losses, mask, masses = game_parts
    game = build(*game_parts)
    value = full_linear_program(losses, masses, mask)[0]
    for solver in (OracleSubgradient(15), AcceleratedEntropic(0.05, 15)):
        found = solver.solve(game)
        assert is_distribution(found.weights, 1e-14)
        assert found.lower_bound - 1e-8 <= value <= found.value + 1e-8
        assert found.value <= game.value(torch.full((game.num_members,), 1 / game.num_members)) + 1e-12
        assert torch.allclose(found.attack.sum(1), game.masses, atol=1e-12)
        assert mask is None or (found.attack.numpy()[~mask] == 0).all()


def beside_masked_ones(losses, mask, masses, poison):
    """The game with `poison` for every masked loss, and two masked perturbations more, before the others."""
    spoiled = np.where(mask[..., None], losses, poison)
    wider = np.concatenate([np.full((len(losses), 2, losses.shape[2]), poison), spoiled], axis=1)
    return build(wider, np.concatenate([np.zeros((len(losses), 2), dtype=bool), mask], axis=1), masses)


POISONS = st.sampled_from([1e6, -1e6, np.nan, np.inf])


@PROPERTY
@given(games(masked=(True,)), POISONS)
def test_what_is_masked_does_not_matter(game_parts, poison):
    game, other, lam = build(*game_parts), beside_masked_ones(*game_parts, poison), some_weights(game_parts[0].shape[2])
    np.testing.assert_allclose(answers(other, lam), answers(game, lam), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(other.deterministic_values(), game.deterministic_values(), atol=1e-14)
    np.testing.assert_allclose(other.smoothed_gradient(lam, 0.3), game.smoothed_gradient(lam, 0.3), atol=1e-13)


# From here on real losses for whole runs: where perturbations tie, rounding chooses, and the order of sums rounds.
@PROPERTY
@given(games(masked=(True,), kinds=("real",)), POISONS)
def test_what_is_masked_does_not_turn_a_solver(game_parts, poison):
    game, other = build(*game_parts), beside_masked_ones(*game_parts, poison)
    for solver in (OracleSubgradient(8), AcceleratedEntropic(0.3, 8)):
        expected, found = solver.solve(game), solver.solve(other)
        np.testing.assert_allclose(found.history["weights"], expected.history["weights"], atol=1e-9)
        np.testing.assert_allclose(found.attack[:, 2:], expected.attack, atol=1e-9)
        assert (found.attack[:, :2] == 0).all()


@PROPERTY
@given(games(kinds=("real",)), st.integers(0, 10**6))
def test_the_order_of_members_examples_and_perturbations_does_not_matter(game_parts, seed):
    losses, mask, masses = game_parts
    rng = np.random.default_rng(seed)
    rows, columns, members = (rng.permutation(size) for size in losses.shape)
    game, lam = build(*game_parts), some_weights(losses.shape[2])
    shuffled = build(
        losses[rows][:, columns][..., members],
        None if mask is None else mask[rows][:, columns],
        None if masses is None else masses[rows],
    )
    np.testing.assert_allclose(answers(shuffled, lam[members]), answers(game, lam), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(shuffled.deterministic_values(), game.deterministic_values()[members], atol=1e-14)
    np.testing.assert_allclose(
        shuffled.best_response(lam[members]).gradient, game.best_response(lam).gradient[members], atol=1e-14
    )
    for solver in (OracleSubgradient(8), AcceleratedEntropic(0.3, 8)):
        expected, found = solver.solve(game), solver.solve(shuffled)
        assert found.value == pytest.approx(expected.value, abs=1e-9)
        np.testing.assert_allclose(
            found.history["weights"], np.array(expected.history["weights"])[:, members], atol=1e-9
        )
        np.testing.assert_allclose(found.attack, expected.attack[rows][:, columns], atol=1e-9)


@PROPERTY
@given(games())
def test_duplicates_change_nothing(game_parts):
    """A member twice shares its weight, an example twice its mass; a perturbation twice is one choice more."""
    losses, mask, masses = game_parts
    n, _, members = losses.shape
    game, lam = build(*game_parts), some_weights(members)
    value, *_ = full_linear_program(losses, masses, mask)

    again = np.concatenate([losses, losses[..., -1:]], axis=2)
    shared = torch.cat([lam[:-1], 0.25 * lam[-1:], 0.75 * lam[-1:]])
    assert build(again, mask, masses).value(shared) == pytest.approx(game.value(lam), abs=1e-13)
    assert build(again, mask, masses).smoothed_value(shared, 0.3) == pytest.approx(
        game.smoothed_value(lam, 0.3), abs=1e-13
    )
    assert full_linear_program(again, masses, mask)[0] == pytest.approx(value, abs=1e-8)

    twice = [0, *range(n)]
    halves = np.full(n, 1 / n) if masses is None else masses
    halves = np.concatenate([[0.5 * halves[0], 0.5 * halves[0]], halves[1:]])
    repeated = build(losses[twice], None if mask is None else mask[twice], halves)
    np.testing.assert_allclose(answers(repeated, lam), answers(game, lam), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(repeated.smoothed_gradient(lam, 0.3), game.smoothed_gradient(lam, 0.3), atol=1e-13)

    doubled = build(
        np.concatenate([losses] * 2, axis=1), None if mask is None else np.concatenate([mask] * 2, axis=1), masses
    )
    # All perturbations twice leave the uniform law of the relaxation as it is, too.
    np.testing.assert_allclose(answers(doubled, lam), answers(game, lam), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(doubled.deterministic_values(), game.deterministic_values(), atol=1e-13)


@PROPERTY
@given(games(masked=(False,)), st.integers(0, 10**6))
def test_another_perturbation_never_lowers_the_risk_and_another_member_never_raises_the_value(game_parts, seed):
    losses, _, masses = game_parts
    n, m, members = losses.shape
    rng = np.random.default_rng(seed)
    lam = some_weights(members, seed)
    value, *_ = full_linear_program(losses, masses)
    more = np.concatenate([losses, rng.normal(size=(n, 1, members))], axis=1)
    assert build(more, None, masses).value(lam) >= build(losses, None, masses).value(lam) - 1e-14
    assert full_linear_program(more, masses)[0] >= value - 1e-8
    richer = np.concatenate([losses, rng.normal(size=(n, m, 1))], axis=2)
    assert full_linear_program(richer, masses)[0] <= value + 1e-8
    extended = torch.cat([lam, torch.zeros(1, dtype=torch.float64)])
    assert build(richer, None, masses).value(extended) == pytest.approx(
        build(losses, None, masses).value(lam), abs=1e-13
    )
