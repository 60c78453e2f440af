"""The exact worst cases of many linear members, compared with brute force, and what the suites reach of them."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from builders.linear_problems import ManyLinearMembers
from mixadv.attacks import AttackSuite
from oracles_linear import exact_worst_case, length, worst_case_with_depth


def brute_force(problem, i, depth=0.01):
    """The largest expected loss at point i: each way in which members can be wrong is a convex program of its own."""
    W, b, ball = problem.W, problem.b, problem.threat_model
    x, y = problem.x[i].numpy(), int(problem.y[i])
    order = 1 if ball.norm == "linf" else 2
    largest = 0.0
    for way in itertools.product([None, *(t for t in range(W.shape[1]) if t != y)], repeat=len(W)):
        wrong = [(k, t) for k, t in enumerate(way) if t is not None]
        weight = sum(problem.lam[k] for k, _ in wrong)
        if weight <= largest:
            continue
        slopes = np.array([W[k, t] - W[k, y] for k, t in wrong])
        leads = slopes @ x + np.array([b[k, t] - b[k, y] for k, t in wrong])
        sizes = np.linalg.norm(slopes, order, axis=1)
        if shortest(slopes / sizes[:, None], depth * ball.eps - leads / sizes, x, ball) <= ball.eps:
            largest = weight
    return largest


def shortest(G, limit, x, ball):
    """The least norm of a delta with G delta >= limit and x + delta in the box; infinite where there is none."""
    d = len(x)
    box = [(ball.bounds[0] - v, ball.bounds[1] - v) for v in x]
    if ball.norm == "linf":
        sides = np.concatenate([np.eye(d), -np.eye(d)])
        found = linprog(
            np.r_[np.zeros(d), 1.0],
            A_ub=np.block([[-G, np.zeros((len(G), 1))], [sides, -np.ones((2 * d, 1))]]),
            b_ub=np.r_[-limit, np.zeros(2 * d)],
            bounds=[*box, (0, None)],
        )
        return found.fun if found.status == 0 else np.inf
    found = minimize(
        lambda v: v @ v,
        np.zeros(d),
        jac=lambda v: 2 * v,
        bounds=box,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: G @ v - limit, "jac": lambda v: G},
        options={"ftol": 1e-12, "maxiter": 300},
    )
    return np.sqrt(found.fun) if found.success else np.inf


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("L", [3, 4])
def test_the_optimum_is_that_of_brute_force(L, norm):
    problem = ManyLinearMembers(L, 20, norm, 0.1 if norm == "linf" else 0.25, 5, seed=1, num_classes=3)
    expected = [1 - brute_force(problem, i) for i in range(5)]
    assert problem.best == pytest.approx(expected, abs=1e-9)
    assert len(set(np.round(expected, 6))) > 2


@pytest.mark.parametrize(("L", "d", "norm", "eps"), [(8, 32, "linf", 0.1), (8, 32, "l2", 0.4), (16, 48, "linf", 0.08)])
def test_the_optimal_points_lie_in_ball_and_box_and_replay(L, d, norm, eps):
    problem = ManyLinearMembers(L, d, norm, eps, 6)
    for i in range(6):
        loss, point = problem.worst_case(i)
        moved = point - problem.x[i].numpy()
        assert length(moved, norm) <= eps * (1 + 1e-9)
        assert point.min() >= -1e-8
        assert point.max() <= 1 + 1e-8
        # The answer does not hang on rounding: every member that counts is wrong by half of the depth at least.
        z = problem.W @ point + problem.b
        y = int(problem.y[i])
        slopes = problem.W - problem.W[:, [y]]
        size = np.abs(slopes).sum(2) if norm == "linf" else np.linalg.norm(slopes, axis=2)
        depths = (z - z[:, [y]]) / np.where(size > 0, size, np.inf)
        wrong = (depths > 0.005 * eps).any(1)
        assert problem.lam[wrong].sum() == pytest.approx(loss, abs=1e-9)
        accuracy = problem.mixture.expected_accuracy(problem.x.new_tensor(point)[None], problem.y[i : i + 1])
        assert float(accuracy) <= 1 - loss + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_classes_without_a_box_agree_with_the_other_oracle(norm):
    random = np.random.default_rng(5)
    W, b, lam = random.normal(size=(3, 6)), random.normal(size=3) / 2, random.dirichlet(np.ones(3))
    logits = np.stack([np.zeros_like(W), W], axis=1), np.stack([np.zeros(3), b], axis=1)
    eps = 0.25 if norm == "linf" else 0.5
    for _ in range(10):
        x, y = random.uniform(size=6), int(random.integers(2))
        expected, _ = exact_worst_case(W, b, y, x, eps, norm, lam)
        value, _ = worst_case_with_depth(*logits, y, x, eps, norm, lam, bounds=None, depth=1e-6)
        assert value == pytest.approx(expected, abs=1e-9)


# --- what the protocols reach -----------------------------------------------------------------------------------

CASES = {3: (20, "linf", 0.12), 4: (24, "l2", 0.35), 8: (32, "linf", 0.1), 16: (48, "l2", 0.45)}
OTHER_NORM = {3: (20, "l2", 0.3), 4: (24, "linf", 0.12), 8: (32, "l2", 0.45), 16: (48, "linf", 0.1)}
# How far the mean accuracy may be above the optimum.
ALLOWED = {"fast": {3: 0.01, 4: 0.01, 8: 0.01, 16: 0.05}, "strict": {3: 0.001, 4: 0.001, 8: 0.003, 16: 0.015}}


def excess(protocol, L, d, norm, eps):
    """By how much the mean expected accuracy under a protocol is above the optimum of 20 points."""
    problem = ManyLinearMembers(L, d, norm, eps, 20)
    record = AttackSuite.from_protocol(protocol)(problem.mixture, problem.x, problem.y, problem.threat_model)
    found = record.expected_accuracy.numpy()
    # Members may count as wrong right behind their boundary, but nobody finds more than there is.
    assert all(found[i] >= 1 - problem.worst_case(i, depth=-1e-6)[0] - 1e-9 for i in range(20))
    above = float((found - problem.best).mean())
    print(f"{protocol} L={L} d={d} {norm}: {found.mean():.2%}, optimum {problem.best.mean():.2%}, above {above:.2%}")
    return above


@pytest.mark.parametrize("L", [3, 4, 8])
def test_the_fast_protocol_comes_close_to_the_optimum(L):
    assert excess("fast", L, *CASES[L]) <= ALLOWED["fast"][L]


def test_the_strict_protocol_reaches_the_optimum_of_three_members():
    assert excess("strict", 3, *CASES[3]) <= ALLOWED["strict"][3]


@pytest.mark.slow
@pytest.mark.parametrize("L", [4, 8, 16])
def test_the_strict_protocol_reaches_the_optimum_of_many_members(L):
    assert excess("strict", L, *CASES[L]) <= ALLOWED["strict"][L]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["fast", "strict"])
@pytest.mark.parametrize("L", CASES)
def test_the_protocols_come_close_in_the_other_norm(L, protocol):
    assert excess(protocol, L, *OTHER_NORM[L]) <= ALLOWED[protocol][L]
