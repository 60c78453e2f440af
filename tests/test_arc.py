from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import seeded
from builders.linear_problems import LinearProblem, linear_problems
from mixadv.attacks import ARC, PGD, arc
from mixadv.attacks.boundaries import Boundary, nearest_boundary
from mixadv.threat_model import ThreatModel
from oracles_linear import linear_mixture

ONE_STEP = ARC(num_steps=1, num_runner_ups=1, order="weights")


# --- boundaries --------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """C classes, logits x W^T + b."""

    def __init__(self, W, b):
        super().__init__()
        self.register_buffer("W", W)
        self.register_buffer("b", b)

    def forward(self, x):
        return x.flatten(1) @ self.W.T + self.b


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("leave_top", [True, False])
def test_the_nearest_boundary_of_a_linear_member(norm, leave_top):
    """Five classes in seven dimensions: the distances are quotients, and a step that long leads onto the boundary."""
    generator = seeded()
    W = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    b = torch.randn(5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (40,), generator=generator)
    member, threat_model = Linear(W, b), ThreatModel(norm, 1.0, None)
    logits = (x @ W.T + b).numpy()
    order = {g: nearest_boundary(member, x, y, threat_model, g, leave_top) for g in (1, 3, 4, 9)}
    for i in range(40):
        t = logits[i].argmax() if leave_top else y[i].item()
        rivals = [j for j in np.argsort(-logits[i]) if j != t]
        dual = {j: np.linalg.norm((W[t] - W[j]).numpy(), 1 if norm == "linf" else 2) for j in rivals}
        distance = {j: (logits[i, t] - logits[i, j]) / dual[j] for j in rivals}
        for g, found in order.items():
            nearest = min(rivals[:g], key=distance.get)
            assert found.distance[i].item() == pytest.approx(distance[nearest], rel=1e-9)
            np.testing.assert_allclose(found.normal[i], (W[nearest] - W[t]).numpy() / dual[nearest], atol=1e-12)
            on_it = (x[i] + found.distance[i] * found.direction[i]).numpy()
            assert np.linalg.norm(found.direction[i], np.inf if norm == "linf" else 2) == pytest.approx(1)
            lead = on_it @ (W[t] - W[nearest]).numpy() + (b[t] - b[nearest]).item()
            assert lead == pytest.approx(0, abs=1e-9)
    assert torch.equal(order[4].distance, order[9].distance)
    assert (order[3].distance < order[1].distance).any()
    assert (order[1].distance < 0).any() != leave_top
    np.testing.assert_allclose(order[1].logits, logits)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boundaries_of_members_that_are_very_sure_or_flat(norm):
    """Gradients whose squares underflow still have their distance; a constant member is infinitely far away."""
    tiny = torch.tensor([[0.0, 0.0], [3e-30, -4e-30]])
    member = Linear(tiny, torch.tensor([6e-30, 0.0]))
    x = torch.zeros(1, 2)
    found = nearest_boundary(member, x, torch.tensor([0]), ThreatModel(norm, 1.0, None))
    assert found.distance.item() == pytest.approx(6 / 7 if norm == "linf" else 6 / 5, rel=1e-5)
    flat = Linear(torch.zeros(2, 2), torch.tensor([1.0, 0.0]))
    for label, distance in ((0, float("inf")), (1, -float("inf"))):
        found = nearest_boundary(flat, x, torch.tensor([label]), ThreatModel(norm, 1.0, None))
        assert found.distance.item() == distance
        assert torch.equal(found.normal, x)
        assert torch.equal(found.direction, x)


def reached(n, d, v, beta, step, norm):
    turned = v + beta * d
    size = np.abs(turned).max() if norm == "linf" else np.linalg.norm(turned)
    return n @ turned * step / size


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_smallest_crossing_against_bisection(norm):
    """Steps in five dimensions, some of whose coordinates member k does not see."""
    random = np.random.default_rng(0)
    counts = {"turn": 0, "stay": 0, "far": 0}
    for _ in range(300):
        step = random.uniform(0.2, 3)
        w = random.normal(size=5) * (random.random(5) < 0.7)
        if not w.any():
            continue
        d = -np.sign(w) if norm == "linf" else -w / np.linalg.norm(w)
        n = -w / np.abs(w).sum() if norm == "linf" else d
        v = random.normal(size=5)
        v *= step / (np.abs(v).max() if norm == "linf" else np.linalg.norm(v))
        distance = step * random.uniform(-1.3, 1.3)
        tensors = [torch.as_tensor(a)[None] for a in (np.array(distance), n, d, np.zeros(2), np.array(False))]
        beta = arc.crossing_length(Boundary(*tensors), torch.as_tensor(v)[None], step, norm).item()
        target = distance + arc.OVERSHOOT * step
        if reached(n, d, v, 0, step, norm) >= target:
            assert beta == 0
            counts["stay"] += 1
        elif target >= step:
            assert beta == step
            counts["far"] += 1
        else:
            low, high = 0.0, step
            while reached(n, d, v, high, step, norm) < target:
                high *= 2
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (low, middle) if reached(n, d, v, middle, step, norm) >= target else (middle, high)
            assert beta == pytest.approx(high, rel=1e-4, abs=1e-9)
            counts["turn"] += 1
    assert min(counts.values()) > 20


def test_lengths_by_hand():
    n = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    v = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    boundary = Boundary(torch.tensor([0.5], dtype=torch.float64), n, n, torch.zeros(1, 2), torch.tensor([False]))
    # 2 / (2 - 0.5) |0.5 - 1.2| + 0.1
    assert arc.published_length(boundary, v, 2.0, 0.1).item() == pytest.approx(4 / 3 * 0.7 + 0.1)
    for length in (arc.published_length(boundary, 0 * v, 2.0, 0.1), arc.crossing_length(boundary, 0 * v, 2.0, "l2")):
        assert length.item() == 2.0
    far = replace(boundary, distance=torch.tensor([2.5], dtype=torch.float64))
    assert arc.published_length(far, v, 2.0, 0.1).item() == 2.0
    erring = replace(boundary, distance=torch.tensor([-0.5], dtype=torch.float64))
    assert arc.crossing_length(erring, 0 * v, 2.0, "l2").item() == 0.0


# --- linear members: what is found, beside what there is ----------------------------------------------------


def test_variants_on_pairs_that_one_point_fools(monkeypatch):
    """One step as long as eps, l2: the published step, the same with boundaries at x + delta, the smallest crossing."""
    problem = LinearProblem(1500, [0.6, 0.4], "l2", seed=1, distances=(0, 1))
    problem.keep(problem.best < 1e-6)
    assert len(problem.x) > 800
    attacks = {variant: replace(ONE_STEP, variant=variant) for variant in ("published", "exact")}
    rates = {name: problem.solved(problem.attacked(attack)).mean() for name, attack in attacks.items()}
    with monkeypatch.context() as patch:
        patch.setattr(arc, "crossing_length", lambda b, v, step, norm: arc.published_length(b, v, step, 0.05))
        rates["closed form at x + delta"] = problem.solved(problem.attacked(ONE_STEP)).mean()
    print(rates)
    assert 0.6 < rates["published"] < 0.8
    assert 0.8 < rates["closed form at x + delta"] < 0.92
    assert rates["exact"] > 0.99


def test_members_that_err_are_kept_erring():
    """Pairs whose lighter member errs at x; the heavier one turns the step, and the lighter one is to turn it back."""
    problem = LinearProblem(2000, [0.6, 0.4], "l2", seed=2, distances=(-1, 1))
    clean = problem.mixture.member_logits(problem.x).argmax(-1) == problem.y
    problem.keep((clean[0] & ~clean[1]).numpy() & (problem.best < 1e-6))
    assert len(problem.x) > 150
    assert problem.solved(problem.attacked(ONE_STEP)).mean() > 0.99
    assert problem.solved(problem.attacked(replace(ONE_STEP, variant="published"))).mean() < 0.9


def compare(problems, attacks):
    """The share of instances where each attack reaches the exact minimum, over all problems and the worst of them."""
    problems = list(problems)
    shares = {}
    for name, attack in attacks.items():
        solved = [problem.solved(problem.attacked(attack)) for problem in problems]
        shares[name] = (np.concatenate(solved).mean(), min(part.mean() for part in solved))
    print({name: f"{overall:.3f} (worst group {worst:.3f})" for name, (overall, worst) in shares.items()})
    return shares


def test_it_finds_most_exact_optima():
    shares = compare(linear_problems(50, [0]), {"PGD": PGD(20, restarts=5), "ARC": ARC(restarts=5)})
    assert shares["ARC"][0] >= 0.93
    assert shares["ARC"][0] > shares["PGD"][0]


@pytest.mark.slow
def test_it_finds_most_exact_optima_of_two_thousand():
    constant = ARC(restarts=5, decay=1)
    attacks = {
        "PGD": PGD(20, restarts=5),
        "ARC": ARC(restarts=5),
        "ARC by weights": ARC(restarts=5, order="weights"),
        "ARC of constant step": constant,
        "published": replace(constant, variant="published", order="weights"),
    }
    shares = compare(linear_problems(100, range(5)), attacks)
    assert shares["ARC"][0] >= 0.95
    assert shares["ARC"][1] >= 0.85
    assert shares["ARC"][0] > shares["ARC of constant step"][0] > shares["published"][0] > shares["PGD"][0]


@pytest.mark.parametrize(("decay", "reach"), [(1, 1.2), (0.25, 0.7)])
def test_steps_add_up_and_shrink(decay, reach):
    """Three steps of 0.4, or of 0.4, 0.2 and 0.1, each kept though the accuracy stays until the last."""
    attack = ARC(num_steps=3, step_size=0.4, decay=decay)
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    for distance in (reach - 0.02, reach + 0.02):
        mixture = linear_mixture(np.array([[6.0, 8.0]]), np.array([10 * distance]))
        found = attack(mixture, x, y, ThreatModel("l2", 1.0, None))
        assert found.norm().item() == pytest.approx(min(reach, 1))
        assert (mixture.expected_accuracy(found, y).item() == 0) == (distance < min(reach, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "num_steps"),
        ({"num_runner_ups": 0}, "num_runner_ups"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": float("inf")}, "step_size"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.5}, "decay"),
        ({"order": "lambda"}, "random, weights"),
        ({"variant": "best"}, "exact, published"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ARC(**settings)
