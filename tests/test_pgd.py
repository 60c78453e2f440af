import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import seeded
from builders.networks import WEIGHTS, Fragile, disagreeing_mixture
from mixadv.attacks import PGD, AveragedLoss, ExpectedLoss, InnerLoss
from mixadv.losses import AT, TRADES
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import Affine

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.3)


def affine_mixture(dimension, seed=0, scale=3.0):
    generator = seeded(seed)
    w = scale * torch.randn(3, dimension, generator=generator, dtype=torch.float64)
    b = torch.randn(3, generator=generator, dtype=torch.float64)
    x = torch.rand(5, dimension, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1])
    return Mixture([Affine(w[k], b[k]) for k in range(3)], WEIGHTS), w.numpy(), b.numpy(), x, y


def expected_ce(w, b, points, label):
    """sum_k lambda_k log(1 + exp(-sign (w_k.x + b_k))) in numpy, for points [n, d]."""
    sign = 1.0 if label == 1 else -1.0
    return np.logaddexp(0, -sign * (points @ w.T + b)) @ np.array(WEIGHTS)


@pytest.mark.parametrize("keep", ["objective", "last"])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_expected_margin_reaches_its_closed_form_in_linf(keep, bounds):
    """Linear in x, so each coordinate goes to the end of its interval that the averaged weight points to."""
    mixture, w, b, x, y = affine_mixture(7)
    threat_model = ThreatModel("linf", 0.2, bounds)
    objective = ExpectedLoss("margin")
    found = PGD(20, objective=objective, keep=keep)(mixture, x, y, threat_model)
    lam = mixture.weights.double().numpy()
    slope = np.where(y.numpy() == 1, -1.0, 1.0)[:, None] * (lam @ w)
    corner = x.numpy() + 0.2 * np.sign(slope)
    corner = corner if bounds is None else corner.clip(0, 1)
    np.testing.assert_allclose(found.numpy(), corner, atol=1e-12)
    best = (slope * corner).sum(1) + np.where(y.numpy() == 1, -1.0, 1.0) * (lam @ b)
    with torch.no_grad():
        reached = objective(mixture.member_logits(found), y, mixture.weights)
    np.testing.assert_allclose(reached, best, rtol=1e-6)


@pytest.mark.parametrize("keep", ["objective", "last"])
def test_expected_margin_reaches_its_closed_form_in_l2(keep):
    mixture, w, _, x, y = affine_mixture(7)
    found = PGD(80, objective=ExpectedLoss("margin"), keep=keep)(mixture, x, y, ThreatModel("l2", 0.7, None))
    slope = np.where(y.numpy() == 1, -1.0, 1.0)[:, None] * (mixture.weights.double().numpy() @ w)
    best = x.numpy() + 0.7 * slope / np.linalg.norm(slope, axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), best, atol=1e-5)


def test_expected_cross_entropy_reaches_the_best_corner_in_linf():
    """Convex in x, so a maximum is at one of the 2^5 corners; restarts find it among the local ones."""
    mixture, w, b, x, y = affine_mixture(5, seed=1, scale=4.0)
    eps = 0.5
    threat_model = ThreatModel("linf", eps, None)
    generator = seeded(0)
    found = PGD(20, restarts=10, keep="objective")(mixture, x, y, threat_model, generator).numpy()
    corners = eps * np.array(list(itertools.product((-1, 1), repeat=5)))
    for i in range(5):
        best = expected_ce(w, b, x[i].numpy() + corners, y[i]).max()
        assert expected_ce(w, b, found[i : i + 1], y[i])[0] == pytest.approx(best, rel=1e-6)


def test_expected_cross_entropy_reaches_the_best_point_of_the_circle():
    mixture, w, b, x, y = affine_mixture(2, seed=2)
    generator = seeded(0)
    attack = PGD(60, restarts=4, keep="objective")
    found = attack(mixture, x, y, ThreatModel("l2", 0.8, None), generator).numpy()
    angles = np.linspace(0, 2 * np.pi, 20_001)
    circle = 0.8 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for i in range(5):
        best = expected_ce(w, b, x[i].numpy() + circle, y[i]).max()
        assert expected_ce(w, b, found[i : i + 1], y[i])[0] == pytest.approx(best, rel=1e-5)


def test_objectives_by_hand():
    generator = seeded(1)
    z = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    clean = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 3, 1, 2, 0])
    weights = torch.tensor(WEIGHTS)
    lam = np.array(WEIGHTS)
    p, q = z.softmax(-1).numpy(), clean.softmax(-1).numpy()
    right = p[:, np.arange(5), y.numpy()]
    ce = -np.log(right)
    np.testing.assert_allclose(ExpectedLoss()(z, y, weights), lam @ ce, rtol=1e-6)
    np.testing.assert_allclose(InnerLoss(AT())(z, y, weights, None), lam @ ce, rtol=1e-6)
    np.testing.assert_allclose(AveragedLoss()(z, y, weights), -np.log(lam @ right), rtol=1e-6)
    divergence = (q * np.log(q / p)).sum(-1)
    np.testing.assert_allclose(InnerLoss(TRADES())(z, y, weights, clean), lam @ divergence, rtol=1e-6)
    assert [o.needs_clean for o in (ExpectedLoss(), AveragedLoss(), InnerLoss(AT()), InnerLoss(TRADES()))] == [
        False,
        False,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="ce, margin, dlr"):
        ExpectedLoss("cross-entropy")
    with pytest.raises(ValueError, match="clean logits"):
        InnerLoss(TRADES())(z, y, weights, None)


OBJECTIVES = [
    ExpectedLoss("ce"),
    ExpectedLoss("margin"),
    ExpectedLoss("dlr"),
    AveragedLoss(),
    InnerLoss(TRADES()),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_results_are_feasible_and_never_worse_than_the_input(objective, threat_model):
    mixture, x, y = disagreeing_mixture()
    generator = seeded(0)

    def score(points):
        with torch.no_grad():
            return objective(mixture.member_logits(points), y, mixture.weights, mixture.member_logits(x))

    for start, keep in [
        ("uniform", "objective"),
        ("gaussian", "objective"),
        ("none", "objective"),
        ("uniform", "accuracy"),
        ("none", "last"),
    ]:
        attack = PGD(3, objective=objective, start=start, keep=keep)
        found = attack(mixture, x, y, threat_model, generator)
        assert threat_model.contains(found, x).all()
        assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
        if keep == "objective":
            assert (score(found) >= score(x) - 1e-6).all()
            if start != "none" or objective != OBJECTIVES[-1]:
                assert score(found).mean() > score(x).mean()
        if keep == "accuracy":
            assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()


def test_the_objective_is_never_below_that_of_the_start():
    """With one huge step the only step overshoots; what is kept is the start, or x where that is better."""
    mixture, x, y = disagreeing_mixture()
    objective = ExpectedLoss("ce")

    def score(points):
        with torch.no_grad():
            return objective(mixture.member_logits(points), y, mixture.weights)

    start = LINF.sample(x, seeded(3))
    found = PGD(1, step_size=2.0, keep="objective")(mixture, x, y, LINF, seeded(3))
    assert (score(found) >= torch.maximum(score(start), score(x))).all()
    only_start = PGD(0, keep="objective")(mixture, x, y, LINF, seeded(3))
    better = score(start) > score(x)
    assert torch.equal(only_start, torch.where(better.reshape(-1, 1, 1, 1), start, x))


def test_more_restarts_are_never_worse():
    mixture, x, y = disagreeing_mixture()
    objective = ExpectedLoss("ce")
    scores, accuracies = [], []
    for restarts in (1, 2, 5):
        attack = PGD(2, restarts=restarts, keep="objective")
        found = attack(mixture, x, y, L2, seeded(0))
        with torch.no_grad():
            scores.append(objective(mixture.member_logits(found), y, mixture.weights))
        found = replace(attack, keep="accuracy")(mixture, x, y, L2, seeded(0))
        accuracies.append(mixture.expected_accuracy(found, y))
    assert (scores[0] <= scores[1] + 1e-6).all()
    assert (scores[1] <= scores[2] + 1e-6).all()
    assert (scores[2] > scores[0] + 1e-6).any()
    assert (accuracies[0] >= accuracies[1]).all()
    assert (accuracies[1] >= accuracies[2]).all()
    assert (accuracies[2] < mixture.expected_accuracy(x, y)).any()


class Ridge(nn.Module):
    """One input u, logits (0, score). The member that flips is right up to u = 0.6 and wrong beyond, at
    little loss; the other one is always wrong for label 1, at a loss that falls with u."""

    def __init__(self, flips):
        super().__init__()
        self.flips = flips

    def forward(self, x):
        u = x[:, 0]
        score = torch.where(u > 0.6, 0 * u - 0.01, 0 * u + 5) if self.flips else 10 * u - 10
        return torch.stack([torch.zeros_like(u), score], dim=1)


def test_accuracy_comes_before_the_objective():
    """Between x and a random point, one mode prefers the member that errs, the other one the loss."""
    mixture = Mixture([Ridge(True), Ridge(False)], [0.25, 0.75])
    x, y = torch.full((64, 1), 0.5), torch.ones(64, dtype=torch.long)
    threat_model = ThreatModel("linf", 0.2)
    generator = seeded(0)
    start = threat_model.sample(x, seeded(0))
    found = PGD(0)(mixture, x, y, threat_model, generator)
    flipped = start[:, 0] > 0.6
    assert 5 < flipped.sum() < 40
    assert torch.equal(found[flipped], start[flipped])
    # Elsewhere no point changes the accuracy, and the objective decides between x and the start.
    ce = ExpectedLoss()(mixture.member_logits(start), y, mixture.weights)
    ce_x = ExpectedLoss()(mixture.member_logits(x), y, mixture.weights)
    better = ((ce > ce_x) | flipped).unsqueeze(1)
    assert torch.equal(found, torch.where(better, start, x))
    assert (~better).any()
    by_loss = PGD(0, keep="objective")(mixture, x, y, threat_model, seeded(0))
    assert torch.equal(by_loss, torch.where((ce > ce_x).unsqueeze(1), start, x))
    assert not torch.equal(by_loss, found)


@pytest.mark.parametrize(("robust_loss", "clean_passes"), [(AT(), 0), (TRADES(), 1)])
def test_training_attacks_waste_no_pass(robust_loss, clean_passes):
    mixture, x, y = disagreeing_mixture()
    forwards, backwards = [0, 0, 0], [0, 0, 0]

    def count_forward(k):
        def hook(module, inputs, output):
            forwards[k] += 1
            if output.requires_grad:
                output.register_hook(lambda grad: backwards.__setitem__(k, backwards[k] + 1))

        return hook

    for k, member in enumerate(mixture.members):
        member.register_forward_hook(count_forward(k))
    attack = PGD(4, restarts=3, objective=InnerLoss(robust_loss), start=robust_loss.start, keep="last")
    attack(mixture, x, y, LINF)
    assert forwards == [4 + clean_passes] * 3
    assert backwards == [4] * 3
    forwards[:], backwards[:] = [0, 0, 0], [0, 0, 0]
    replace(attack, keep="objective", restarts=2)(mixture, x, y, LINF)
    assert forwards == [1 + 2 * 5] * 3
    assert backwards == [2 * 4] * 3


def test_gaussian_start_is_a_little_noise():
    mixture, x, y = disagreeing_mixture("linear")
    x = 0.1 + 0.8 * x
    attack = PGD(0, start="gaussian", keep="last")
    found = attack(mixture, x, y, LINF, seeded(0))
    assert (found - x).std().item() == pytest.approx(1e-3, rel=0.05)
    assert torch.equal(found, attack(mixture, x, y, LINF, seeded(0)))
    assert not torch.equal(found, attack(mixture, x, y, LINF, seeded(1)))
    small = ThreatModel("linf", 5e-4)
    assert small.contains(attack(mixture, x, y, small), x).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_are_relative_to_eps(norm):
    mixture, x, y = disagreeing_mixture()
    threat_model = ThreatModel(norm, 0.02, None)
    found = PGD(1, step_size=0.4, start="none", keep="last")(mixture, x, y, threat_model)
    torch.testing.assert_close(threat_model.distance(found, x), torch.full((6,), 0.008), rtol=1e-3, atol=0)


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_it_works_under_autocast(threat_model):
    mixture, x, y = disagreeing_mixture()
    seen = []
    mixture.members[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for keep in ("last", "accuracy"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = PGD(3, keep=keep)(mixture, x, y, threat_model, seeded(0))
        assert found.dtype == torch.float32
        assert threat_model.contains(found, x).all()
    assert set(seen) == {torch.bfloat16}
    plain = PGD(3, keep=keep)(mixture, x, y, threat_model, seeded(0))
    with torch.no_grad():
        clean, half, full = (
            ExpectedLoss()(mixture.member_logits(p), y, mixture.weights).mean() for p in (x, found, plain)
        )
    assert half - clean > 0.8 * (full - clean) > 0.01


def test_nan_gradients_stop_no_training():
    """The last iterate is finite, and nobody is warned: asking would wait for the device."""
    x = torch.tensor([[0.2, 0.5], [0.8, 0.5], [0.9, 0.3]])
    y = torch.ones(3, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = PGD(3, keep="last")(Fragile(), x, y, ThreatModel("linf", 0.05))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "num_steps"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": float("nan")}, "step_size"),
        ({"start": "random"}, "uniform, gaussian, none"),
        ({"keep": "best"}, "accuracy, objective, last"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PGD(**settings)
