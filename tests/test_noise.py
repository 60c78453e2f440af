import math

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import seeded
from builders.networks import WEIGHTS, Step
from mixadv.attacks import ExpectedLoss, InnerLoss, UniformNoise
from mixadv.losses import TRADES
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import Affine, exact_worst_case, linear_mixture


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
def test_in_the_plane_noise_comes_close_to_the_exact_optimum(norm):
    generator = np.random.default_rng(2)
    W, b = generator.normal(size=(3, 2)), generator.normal(size=3) / 2
    x, y = generator.uniform(size=(30, 2)), generator.integers(2, size=30)
    mixture = linear_mixture(W, b, WEIGHTS)
    lam = np.array(WEIGHTS)
    best = np.array([1 - exact_worst_case(W, b, y[i], x[i], 0.4, norm, lam)[0] for i in range(30)])
    points, labels = torch.as_tensor(x), torch.as_tensor(y)
    found = UniformNoise(200)(mixture, points, labels, ThreatModel(norm, 0.4, None), seeded())
    accuracy = mixture.expected_accuracy(found, labels).numpy()
    # In the plane 200 points find nearly everything, which is not at x itself.
    assert accuracy.mean() < best.mean() + 0.05
    assert (mixture.expected_accuracy(points, labels).numpy() > best + 0.1).sum() > 5


LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)


def linear_on_images():
    """Three linear members that answer differently, and 12 images with the labels that their average answers."""
    generator = seeded(5)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(48, 4)) for _ in range(3)]
    for member in members:
        with torch.no_grad():
            member[1].weight.copy_(torch.randn(4, 48, generator=generator))
            member[1].bias.copy_(-member[1].weight.sum(1) / 2)
    mixture = Mixture(members, WEIGHTS).eval()
    x = torch.rand(12, 3, 4, 4, generator=generator)
    with torch.no_grad():
        return mixture, x, mixture(x).argmax(-1)


@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 0.03), ThreatModel("l2", 0.15)], ids=str)
def test_the_worst_of_the_same_points_drawn_by_hand(threat_model):
    """Both numbers at every point, and the least of them in the order accuracy, then minus the loss."""
    mixture, x, y = linear_on_images()
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
    mixture, x, y = linear_on_images()
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


def test_fooled_examples_are_left_alone():
    member, sizes = Step(), []
    member.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    x = torch.tensor([[0.1], [0.45], [0.48], [0.9]])
    found = UniformNoise(50)(member, x, torch.zeros(4, dtype=torch.long), ThreatModel("linf", 0.1), seeded())
    assert torch.equal(found[:, 0] > 0.5, torch.tensor([False, True, True, True]))
    assert torch.equal(found[3], x[3])
    assert sizes[:2] == [4, 3]
    assert sizes[-1] == 1
    assert len(sizes) == 51


def test_other_objectives():
    mixture, x, y = linear_on_images()
    outside = UniformNoise(40)(mixture, x, y, LINF, seeded())
    for objective in (ExpectedLoss("margin"), InnerLoss(TRADES())):
        found = UniformNoise(40, objective=objective)(mixture, x, y, LINF, seeded())
        assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()
        assert not torch.equal(found, outside)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="num_samples"):
        UniformNoise(0)
