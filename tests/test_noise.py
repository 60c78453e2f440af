import math

import numpy as np
import pytest
import torch
from torch import nn

from mixadv.attacks import ExpectedLoss, InnerLoss, UniformNoise
from mixadv.losses import TRADES
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import Affine, exact_worst_case, linear_mixture

WEIGHTS = [0.5, 0.2, 0.3]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def members_of_one_dimension():
    """Right for label 1 on the right of -0.1, on the right of 0.05, and on the left of 0.12: at 0, all but one."""
    return Mixture(
        [
            Affine(torch.tensor([2.0]), torch.tensor(0.2)),
            Affine(torch.tensor([5.0]), torch.tensor(-0.25)),
            Affine(torch.tensor([-3.0]), torch.tensor(0.36)),
        ],
        WEIGHTS,
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("bounds", "low"), [(None, -0.2), ((-0.15, 1.0), -0.15)])
def test_the_mean_is_that_of_the_closed_form_on_the_line(samples, bounds, low):
    """On each piece between two thresholds the accuracy is known; the least of n uniform points follows by hand."""
    count = 20_000
    mixture = members_of_one_dimension()
    x, y = torch.zeros(count, 1), torch.ones(count, dtype=torch.long)
    found = UniformNoise(samples)(mixture, x, y, ThreatModel("linf", 0.2, bounds), seeded())
    accuracy = mixture.expected_accuracy(found, y)
    length = 0.2 - low
    # Accuracy on (-, -0.1): 0.3; (-0.1, 0.05): 0.8, as at 0 itself; (0.05, 0.12): 1; (0.12, 0.2): 0.7.
    lowest, second = (-0.1 - low) / length, 0.08 / length
    at_lowest = 1 - (1 - lowest) ** samples
    at_second = (1 - lowest) ** samples - (1 - lowest - second) ** samples
    values = np.array([0.3, 0.7, 0.8])
    chances = np.array([at_lowest, at_second, 1 - at_lowest - at_second])
    mean = values @ chances
    error = math.sqrt((chances @ values**2 - mean**2) / count)
    assert accuracy.mean().item() == pytest.approx(mean, abs=4 * error)
    np.testing.assert_allclose(sorted(set(accuracy.numpy().round(5))), values, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "share"), [("l2", (math.acos(0.5) - 0.5 * math.sqrt(0.75)) / math.pi), ("linf", 0.25)]
)
def test_the_mean_is_that_of_the_closed_form_in_the_plane(norm, share):
    """The line cuts a segment off the disc, or a quarter off the square, at half the radius."""
    count = 20_000
    angle = 0.7 if norm == "l2" else 0.0
    weight = torch.tensor([math.cos(angle), math.sin(angle)])
    mixture = Mixture([Affine(weight, torch.tensor(0.15))])
    x, y = torch.zeros(count, 2), torch.ones(count, dtype=torch.long)
    for samples in (1, 4):
        found = UniformNoise(samples)(mixture, x, y, ThreatModel(norm, 0.3, None), seeded(samples))
        survive = (1 - share) ** samples
        error = math.sqrt(survive * (1 - survive) / count)
        assert mixture.expected_accuracy(found, y).mean().item() == pytest.approx(survive, abs=4 * error)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_never_beats_the_exact_optimum(norm):
    generator = np.random.default_rng(2)
    W, b = generator.normal(size=(3, 2)), generator.normal(size=3) / 2
    x, y = generator.uniform(size=(30, 2)), generator.integers(2, size=30)
    mixture = linear_mixture(W, b, WEIGHTS)
    lam = np.array(WEIGHTS)
    best = np.array([1 - exact_worst_case(W, b, y[i], x[i], 0.4, norm, lam)[0] for i in range(30)])
    points, labels = torch.as_tensor(x), torch.as_tensor(y)
    found = UniformNoise(200)(mixture, points, labels, ThreatModel(norm, 0.4, None), seeded())
    accuracy = mixture.expected_accuracy(found, labels).numpy()
    assert (accuracy >= best - 1e-6).all()
    # In the plane 200 points find nearly everything, which is not at x itself.
    assert accuracy.mean() < best.mean() + 0.05
    assert (mixture.expected_accuracy(points, labels).numpy() > best + 0.1).sum() > 5


def blocks(shape=(3, 4, 4)):
    generator = seeded(5)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.5)) for _ in range(3)]
    for member in members:
        with torch.no_grad():
            member[1].weight.copy_(torch.randn(4, 48, generator=generator))
            member[1].bias.copy_(-member[1].weight.sum(1) / 2)
    mixture = Mixture(members, WEIGHTS).eval()
    x = torch.rand(12, *shape, generator=generator)
    with torch.no_grad():
        return mixture, x, mixture(x).argmax(-1)


LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)


@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 0.03), ThreatModel("l2", 0.15)], ids=str)
def test_the_worst_of_the_same_points_drawn_by_hand(threat_model):
    """Both numbers at every point, and the least of them in the order accuracy, then minus the loss."""
    mixture, x, y = blocks()
    y[5] = mixture.members[2](x[5:6]).argmax(-1)
    found = UniformNoise(20)(mixture, x, y, threat_model, seeded(3))
    # No example is fooled by every member anywhere, so that all are drawn for to the end.
    assert (mixture.expected_accuracy(found, y) > 0).all()
    generator = seeded(3)
    points = torch.stack([x] + [threat_model.sample(x, generator) for _ in range(20)])
    lam = np.array(WEIGHTS)
    with torch.no_grad():
        p = torch.stack([torch.stack([f(each) for f in mixture.members]) for each in points]).softmax(-1).numpy()
    for i in range(12):
        scores = [
            (round(float(lam @ (p[j, :, i].argmax(-1) == y[i].item())), 6), lam @ np.log(p[j, :, i, y[i]]))
            for j in range(21)
        ]
        assert torch.equal(found[i], points[scores.index(min(scores)), i])
    assert (found != x).flatten(1).any(1).sum() > 6
    # The loss alone would have chosen otherwise.
    assert len(set(mixture.expected_accuracy(found, y).tolist())) > 2


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_more_samples_never_help_the_defender(threat_model):
    mixture, x, y = blocks()
    accuracies = []
    for samples in (1, 4, 40):
        found = UniformNoise(samples)(mixture, x, y, threat_model, seeded(1))
        assert threat_model.contains(found, x).all()
        assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
        accuracies.append(mixture.expected_accuracy(found, y))
    assert (accuracies[0] <= mixture.expected_accuracy(x, y)).all()
    assert (accuracies[0] >= accuracies[1]).all()
    assert (accuracies[1] >= accuracies[2]).all()
    assert accuracies[2].mean() < accuracies[0].mean()


class Step(nn.Module):
    """Answers with no gradient: class 1 where the first number is above the threshold; fails at the n-th question."""

    def __init__(self, threshold, fails_at=None):
        super().__init__()
        self.threshold, self.fails_at, self.sizes = threshold, fails_at, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(self.sizes) == self.fails_at:
            raise RuntimeError("out of order")
        return nn.functional.one_hot((x.flatten(1)[:, 0] > self.threshold).long(), 2).float()


def test_members_need_no_gradient_and_fooled_examples_are_left_alone():
    member = Step(0.5)
    x = torch.tensor([[0.1], [0.45], [0.48], [0.9]])
    found = UniformNoise(50)(member, x, torch.zeros(4, dtype=torch.long), ThreatModel("linf", 0.1), seeded())
    assert torch.equal(found[:, 0] > 0.5, torch.tensor([False, True, True, True]))
    assert torch.equal(found[3], x[3])
    assert member.sizes[:2] == [4, 3]
    assert member.sizes[-1] == 1
    assert len(member.sizes) == 51


def test_the_mixture_is_left_as_found_and_randomness_is_the_generator_s():
    mixture, x, y = blocks()
    mixture.train()
    mixture.members[0].eval()
    mixture.members[1][1].bias.requires_grad_(False)
    flags = [module.training for module in mixture.modules()]
    frozen = [p.requires_grad for p in mixture.parameters()]
    numbers = torch.get_rng_state()
    first, same, other = (UniformNoise(5)(mixture, x, y, L2, seeded(s)) for s in (0, 0, 1))
    # Dropout would have made them differ.
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    broken = Mixture([mixture.members[0], mixture.members[1], Step(0.5, fails_at=3)])
    broken.members[2].forward = lambda x, ask=broken.members[2].forward: ask(x).repeat(1, 2)
    with pytest.raises(RuntimeError, match="out of order"):
        UniformNoise(5)(broken, x, y, L2, seeded())
    assert [module.training for module in mixture.modules()] == flags
    assert [p.requires_grad for p in mixture.parameters()] == frozen
    assert all(p.grad is None for p in mixture.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.is_grad_enabled()


def test_nothing_to_do():
    mixture, x, y = blocks()
    found = UniformNoise(5)(mixture, x, y, ThreatModel("l2", 0.0))
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()
    assert UniformNoise(5)(mixture, x[:0], y[:0], LINF).shape == (0, 3, 4, 4)


def test_inference_mode_and_other_objectives():
    mixture, x, y = blocks()
    outside = UniformNoise(5)(mixture, x, y, L2, seeded())
    with torch.inference_mode():
        inside = UniformNoise(5)(mixture, x.clone(), y.clone(), L2, seeded())
    assert torch.equal(inside, outside)
    outside = UniformNoise(40)(mixture, x, y, LINF, seeded())
    for objective in (ExpectedLoss("margin"), InnerLoss(TRADES())):
        found = UniformNoise(40, objective=objective)(mixture, x, y, LINF, seeded())
        assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()
        assert not torch.equal(found, outside)


def test_what_cannot_work_is_refused():
    mixture, x, y = blocks()
    with pytest.raises(ValueError, match="num_samples"):
        UniformNoise(0)
    for bad_x, bad_y, message in [(x.half(), y, "float32"), (x, y[:-1], "do not match"), (2 + x, y, "outside the box")]:
        with pytest.raises(ValueError, match=message):
            UniformNoise(1)(mixture, bad_x, bad_y, LINF)
