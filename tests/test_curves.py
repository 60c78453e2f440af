"""Curves against closed forms, against one run of PGD, and what must hold for every mixture."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from builders.networks import WEIGHTS, disagreeing_mixture
from mixadv.attacks import PGD
from mixadv.evaluation.curves import curves
from mixadv.losses import cross_entropy
from mixadv.mixture import Mixture
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel

FACTORS = np.array([0, 0.25, 0.5, 0.75, 1, 1.5, 2])
STEPS = [0, 1, 2, 5, 10, 20, 50]


def linear(w, b):
    """Class 1 where w x + b > 0."""
    net = nn.Linear(len(w), 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0] * len(w), w]))
        net.bias.copy_(torch.tensor([0.0, b]))
    return net


NORMALS, OFFSETS = [[1.0, -2.0], [0.5, 1.5], [-3.0, 0.2]], [0.3, -0.1, 0.2]


def plane(count=50):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 2, generator=generator), torch.randint(2, (count,), generator=generator)


def small():
    """Three small networks on 12 inputs, their weights, and labels that most of them agree with."""
    torch.manual_seed(4)
    mixture = Mixture([nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3)], WEIGHTS).eval()
    x = torch.rand(16, 12, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for member in mixture.members:
            member[2].weight *= 5
            member[2].bias -= member(x).mean(0)
        return mixture, x, mixture(x).argmax(-1)


def mixture_of_lines():
    return Mixture([linear(w, b) for w, b in zip(NORMALS, OFFSETS, strict=True)], WEIGHTS)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_members_follow_the_closed_form(norm):
    """A linear member survives eps where its distance to the boundary, in the dual norm, is larger."""
    x, y = plane()
    found = curves(mixture_of_lines(), x, y, ThreatModel(norm, 0.3, None))
    assert found["num_examples"] == 50
    np.testing.assert_allclose(found["eps"]["eps"], 0.3 * FACTORS)
    for k, (w, b) in enumerate(zip(NORMALS, OFFSETS, strict=True)):
        dual = np.abs(w).sum() if norm == "linf" else np.linalg.norm(w)
        distance = (2 * y.numpy() - 1) * (x.double().numpy() @ w + b) / dual
        exact = [(distance > eps).mean() for eps in 0.3 * FACTORS]
        np.testing.assert_allclose(found["eps"]["members"][k], exact, atol=1e-12)
    assert len(set(found["eps"]["members"][0])) >= 5


def test_mixtures_of_two_linear_members_follow_the_closed_form():
    """In one dimension both boundaries are points, and so is every worst case."""
    generator = torch.Generator().manual_seed(4)
    x, y = 2 * torch.rand(80, 1, generator=generator) - 1, torch.randint(2, (80,), generator=generator)
    mixture = Mixture([linear([1.0], -0.2), linear([-2.0], -0.6)], [0.3, 0.7])
    found = curves(mixture, x, y, ThreatModel("linf", 0.3, None))["eps"]
    exact = []
    for eps in 0.3 * FACTORS:
        candidates = x.numpy() + eps * np.linspace(-1, 1, 4001)
        first, second = candidates - 0.2 > 0, -2 * candidates - 0.6 > 0
        label = y.numpy()[:, None] == 1
        exact.append((0.3 * (first == label) + 0.7 * (second == label)).min(1).mean())
    # A grid misses boundaries by a 2,000th of eps.
    np.testing.assert_allclose(found["mixture"], exact, atol=0.7 / 80 + 1e-9)
    # The average of opposite members is another classifier.
    assert found["averaged_twin"] != found["mixture"]


def test_accuracy_falls_and_lies_between_its_bounds():
    mixture, x, y = small()
    found = curves(mixture, x, y, ThreatModel("linf", 0.1))
    eps = found["eps"]
    everybody = np.array([eps["mixture"], *eps["members"], eps["averaged_twin"]])
    assert everybody.shape == (5, 7)
    assert (np.diff(everybody, axis=1) <= 1e-12).all()
    assert everybody[:, -1].min() < everybody[:, 0].max()
    # No point fools more than all members at their worst: points are replayed on everybody.
    assert (everybody[0] >= np.array(WEIGHTS) @ everybody[1:4] - 1e-7).all()
    with torch.no_grad():
        right = mixture.member_logits(x).argmax(-1) == y
        assert everybody[4, 0] == pytest.approx(float((mixture(x).argmax(-1) == y).float().mean()))
    np.testing.assert_allclose(everybody[1:4, 0], right.float().mean(1), atol=1e-7)
    np.testing.assert_allclose(everybody[0, 0], np.array(WEIGHTS) @ right.double().mean(1).numpy(), atol=1e-7)


def test_steps_are_the_iterates_of_one_run():
    mixture, x, y = small()
    ball = ThreatModel("linf", 0.1)
    found = curves(mixture, x, y, ball, seed=5, batch_size=10)["steps"]
    assert found["steps"] == STEPS
    targets = {"mixture": mixture, "member 1": Mixture([mixture.members[1]]), "averaged twin": Mixture([mixture])}
    for against, target in targets.items():
        curve = found["members"][1] if against == "member 1" else found[against.replace(" ", "_")]
        by_hand = []
        for steps in STEPS:
            attack = PGD(steps, keep="last")
            losses = []
            for i, (images, labels) in enumerate(zip(x.split(10), y.split(10), strict=True)):
                last = attack(target, images, labels, ball, generator_for(5, "steps", against, i))
                with torch.no_grad():
                    each = [cross_entropy(member(last), labels) for member in target.members]
                losses.append(sum(w * loss for w, loss in zip(target.weights, each, strict=True)))
            by_hand.append(float(torch.cat(losses).double().mean()))
        np.testing.assert_allclose(curve, by_hand, rtol=1e-6)
        assert curve[-1] > curve[0]
        # Later it goes to and fro between corners.
        assert len(set(curve[:5])) == 5


@pytest.mark.parametrize(("norm", "last"), [("linf", [0.8, 1.0, 1.0]), ("l2", [0.8, 1.2, 1.6])])
def test_linf_ends_with_the_box(norm, last):
    x, y = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1])
    found = curves(mixture_of_lines(), x, y, ThreatModel(norm, 0.8))
    np.testing.assert_allclose(found["eps"]["eps"][4:], last)


def test_a_single_model_is_its_own_member_and_twin():
    x, y = plane(20)
    found = curves(Mixture([linear(NORMALS[0], OFFSETS[0])]), x, y, ThreatModel("l2", 0.2, None))
    for kind in ("eps", "steps"):
        assert found[kind]["members"] == [found[kind]["mixture"]]
        assert found[kind]["averaged_twin"] == found[kind]["mixture"]


def test_no_ball_no_fall():
    x, y = plane(20)
    found = curves(mixture_of_lines(), x, y, ThreatModel("linf", 0.0, None))
    assert found["eps"]["eps"] == [0.0] * 7
    assert len(set(found["eps"]["mixture"])) == len(set(found["steps"]["mixture"])) == 1


def test_the_seed_decides_and_nothing_is_left_behind():
    mixture, x, y = small()
    mixture = Mixture(mixture.members[:1]).train()
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    first, other = (curves(mixture, x, y, ThreatModel("l2", 0.2), seed=seed) for seed in (0, 1))
    torch.manual_seed(9)
    assert curves(mixture, x, y, ThreatModel("l2", 0.2)) == first
    assert first["steps"] != other["steps"]
    assert json.loads(json.dumps(first)) == first
    assert all(module.training for module in mixture.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())


def test_no_images_are_refused():
    x, y = plane(2)
    with pytest.raises(ValueError, match="at least one image"):
        curves(mixture_of_lines(), x[:0], y[:0], ThreatModel("l2", 0.2, None))


# --- where PGD may begin ---------------------------------------------------------------------------------------


def test_pgd_begins_where_it_is_told_to():
    mixture, x, y = disagreeing_mixture()
    ball = ThreatModel("linf", 8 / 255)
    start = ball.sample(x, torch.Generator().manual_seed(1))
    stayed = PGD(num_steps=0, keep="last")(mixture, x, y, ball, start_at=start)
    assert torch.equal(stayed, start)
    assert stayed is not start
    whole = PGD(num_steps=7, keep="last")(mixture, x, y, ball, torch.Generator().manual_seed(1))
    half = PGD(num_steps=3, keep="last")(mixture, x, y, ball, torch.Generator().manual_seed(1))
    assert torch.equal(PGD(num_steps=4, keep="last")(mixture, x, y, ball, start_at=half), whole)


@pytest.mark.parametrize("keep", ["accuracy", "objective"])
def test_pgd_never_loses_the_point_that_it_began_at(keep):
    mixture, x, y = disagreeing_mixture()
    ball = ThreatModel("linf", 16 / 255)
    start = PGD(num_steps=10, restarts=3)(mixture, x, y, ball, torch.Generator().manual_seed(2))
    found = PGD(num_steps=1, step_size=2.0, keep=keep)(mixture, x, y, ball, start_at=start)

    def loss(points):
        with torch.no_grad():
            return sum(w * cross_entropy(member(points), y) for w, member in zip(WEIGHTS, mixture.members, strict=True))

    if keep == "accuracy":
        assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(start, y)).all()
        assert mixture.expected_accuracy(start, y).sum() < mixture.expected_accuracy(x, y).sum()
    else:
        assert (loss(found) >= loss(start) - 1e-6).all()


def test_only_the_first_start_is_told():
    mixture, x, y = disagreeing_mixture()
    ball = ThreatModel("linf", 8 / 255)
    generator = torch.Generator().manual_seed(3)
    PGD(num_steps=1, restarts=2, keep="objective")(mixture, x, y, ball, generator, start_at=x)
    drawn = torch.Generator().manual_seed(3)
    ball.sample(x, drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())


def test_starts_of_another_shape_are_refused():
    mixture, x, y = disagreeing_mixture()
    with pytest.raises(ValueError, match="start_at has shape"):
        PGD()(mixture, x, y, ThreatModel("linf", 0.1), start_at=x[:2])
