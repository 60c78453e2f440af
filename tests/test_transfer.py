from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mixadv.attacks import PGD, ExpectedLoss, InnerLoss, Square, Transfer
from mixadv.losses import TRADES
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel
from oracles_linear import Affine

WEIGHTS = [0.3, 0.2, 0.5]
LINF, L2 = ThreatModel("linf", 0.08), ThreatModel("l2", 0.4)
# Without random numbers, and where members disagree, so that every surrogate leads elsewhere.
STEPS = PGD(5, start="none")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def networks():
    torch.manual_seed(5)
    mixture = Mixture(
        [build_member("small_cnn", num_classes=4, image_shape=(3, 8, 8), width=4, hidden=16) for _ in range(3)],
        WEIGHTS,
    ).eval()
    x = torch.rand(40, 3, 8, 8, generator=seeded(6))
    with torch.no_grad():
        for member in mixture.members:
            member.net[-1].weight *= 30
            member.net[-1].bias -= member(x).mean(0)
        return mixture, x, mixture(x).argmax(-1)


class Twin(nn.Module):
    """The averaged prediction written out: probabilities in a loop, then their logarithm."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return sum(lam * member(x).softmax(-1) for lam, member in zip(WEIGHTS, self.members, strict=True)).log()


def accuracy_by_hand(mixture, points, y):
    with torch.no_grad():
        right = np.stack([(member(points).argmax(-1) == y).numpy() for member in mixture.members])
    return np.array(WEIGHTS) @ right


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_it_is_the_worst_of_the_points_replayed_by_hand(threat_model):
    mixture, x, y = networks()
    found = Transfer(STEPS)(mixture, x, y, threat_model)
    surrogates = [*mixture.members, Twin(mixture.members)]
    points = [STEPS(surrogate.eval(), x, y, threat_model) for surrogate in surrogates]
    replayed = np.stack([accuracy_by_hand(mixture, each, y) for each in (x, *points)])
    accuracy = accuracy_by_hand(mixture, found, y)
    np.testing.assert_allclose(accuracy, replayed.min(0), atol=1e-6)
    assert threat_model.check(found, x).all()
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
    # Each surrogate but the lightest has examples where its point alone is the worst.
    for own in (1, 3, 4):
        assert (replayed[own] < np.delete(replayed, own, axis=0).min(0) - 1e-6).any(), own


def test_points_of_equal_accuracy_are_ordered_by_the_objective():
    mixture, x, y = networks()
    # In l2, where rounding does not turn signs.
    found = Transfer(STEPS, objective=ExpectedLoss("margin"))(mixture, x, y, L2)
    points = [x, *(STEPS(each, x, y, L2) for each in [*mixture.members, Twin(mixture.members)])]

    def margins(at):
        with torch.no_grad():
            z = torch.stack([member(at) for member in mixture.members]).double()
        right = z.gather(-1, y.expand(3, -1)[..., None])[..., 0]
        wrong = z.scatter(-1, y.expand(3, -1)[..., None], -np.inf).amax(-1)
        return np.array(WEIGHTS) @ (wrong - right).numpy()

    accuracies = np.stack([accuracy_by_hand(mixture, each, y) for each in points]).round(6)
    objectives = np.stack([margins(each) for each in points])
    best = np.where(accuracies == accuracies.min(0), objectives, -np.inf).max(0)
    open_ = accuracies.min(0) > 0
    assert open_.sum() > 5
    np.testing.assert_allclose(margins(found)[open_], best[open_], rtol=1e-4, atol=1e-4)


def test_a_sum_that_stalls():
    """Two members pull in opposite directions with equal force: the mixture's gradient is zero, a member's is not."""
    mixture = Mixture(
        [Affine(torch.tensor([1.0]), torch.tensor(0.1)), Affine(torch.tensor([-1.0]), torch.tensor(0.1))], [0.5, 0.5]
    )
    x, y = torch.zeros(1, 1), torch.ones(1, dtype=torch.long)
    threat_model = ThreatModel("linf", 0.2, None)
    attack = PGD(10, start="none")
    assert mixture.expected_accuracy(attack(mixture, x, y, threat_model), y).item() == 1.0
    assert mixture.expected_accuracy(Transfer(attack)(mixture, x, y, threat_model), y).item() == 0.5


class Recorder:
    """Keeps what it is called with; moves each example by `step`."""

    def __init__(self, step=0.05):
        self.step, self.calls = step, []

    def __call__(self, mixture, x, y, threat_model, generator):
        self.calls.append((mixture, x.clone(), y.clone(), threat_model, generator))
        return threat_model.project(x + self.step, x).requires_grad_(True)


def test_whom_it_attacks():
    """Heavy members first, the twin last; each time only the examples that somebody still gets right."""
    mixture, x, y = networks()
    y = y.clone()
    with torch.no_grad():
        answers = mixture.member_logits(x).argmax(-1)
    y[7] = next(c for c in range(4) if (answers[:, 7] != c).all())
    attack, generator = Recorder(), seeded()
    found = Transfer(attack)(mixture, x, y, LINF, generator)
    assert not found.requires_grad
    singles = [call[0] for call in attack.calls]
    assert [single.num_members for single in singles] == [1, 1, 1, 1]
    assert [single.members[0] for single in singles[:3]] == [mixture.members[k] for k in (2, 0, 1)]
    with torch.no_grad():
        torch.testing.assert_close(singles[3].member_logits(x)[0], Twin(mixture.members)(x))
    still_right = accuracy_by_hand(mixture, x, y) > 0
    assert not still_right[7]
    for _, seen, labels, threat_model, given in attack.calls:
        assert threat_model is LINF
        assert given is generator
        assert torch.equal(seen, x[torch.as_tensor(still_right)])
        assert torch.equal(labels, y[torch.as_tensor(still_right)])
        still_right &= accuracy_by_hand(mixture, LINF.project(x + 0.05, x), y) > 0
    assert torch.equal(found[7], x[7])


@pytest.mark.parametrize("keep", ["accuracy", "last"])
def test_one_member_is_attacked_as_it_is(keep):
    mixture, x, y = networks()
    attack = PGD(3, restarts=2, keep=keep)
    for single in (Mixture([mixture.members[1]]), mixture.members[1]):
        direct = attack(single, x, y, L2, seeded(3))
        assert torch.equal(Transfer(attack)(single, x, y, L2, seeded(3)), direct)
        assert not torch.equal(direct, x)


def test_attacks_that_return_no_worst_point_can_only_gain():
    mixture, x, y = networks()
    found = Transfer(PGD(3, keep="last"))(mixture, x, y, LINF, seeded())
    assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()
    away = Transfer(Recorder(0.0))(mixture, x, y, LINF)
    assert torch.equal(away, x)
    nowhere = Transfer(Recorder(float("nan")))(mixture, x, y, LINF)
    assert torch.equal(nowhere, x)


def test_more_steps_and_restarts_find_more():
    mixture, x, y = networks()

    def accuracy(attack):
        return mixture.expected_accuracy(Transfer(attack)(mixture, x, y, LINF, seeded()), y).mean()

    assert accuracy(replace(STEPS, num_steps=9)) < accuracy(replace(STEPS, num_steps=1))
    assert accuracy(PGD(2, restarts=6)) <= accuracy(PGD(2))


def test_black_box_attacks_transfer_between_members_without_gradient():
    class Step(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return nn.functional.one_hot((x.flatten(1) @ self.weight > 0.5 * self.weight.sum()).long(), 2).float()

    generator = seeded(2)
    mixture = Mixture([Step(torch.randn(16, generator=generator)) for _ in range(3)], WEIGHTS)
    x = torch.rand(30, 1, 4, 4, generator=generator)
    y = mixture(x).argmax(-1)
    found = Transfer(Square(60))(mixture, x, y, LINF, seeded())
    assert mixture.expected_accuracy(found, y).mean() < mixture.expected_accuracy(x, y).mean() - 0.05
    with pytest.raises(ValueError, match="no gradient"):
        Transfer(STEPS)(mixture, x, y, LINF)


def test_the_mixture_is_left_as_found_and_randomness_is_the_generator_s():
    mixture, x, y = networks()
    mixture.train()
    mixture.members[0].eval()
    mixture.members[1].net[0].requires_grad_(False)
    flags = [module.training for module in mixture.modules()]
    frozen = [p.requires_grad for p in mixture.parameters()]
    state = {k: v.clone() for k, v in mixture.state_dict().items()}
    numbers = torch.get_rng_state()

    class Fails(Recorder):
        def __call__(self, mixture, *rest):
            if len(self.calls) == 2:
                mixture.train()
                mixture.requires_grad_(True)
                raise RuntimeError("out of order")
            return super().__call__(mixture, *rest)

    first, same, other = (Transfer(PGD(2))(mixture, x, y, L2, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with pytest.raises(RuntimeError, match="out of order"):
        Transfer(Fails())(mixture, x, y, L2, seeded())
    assert [module.training for module in mixture.modules()] == flags
    assert [p.requires_grad for p in mixture.parameters()] == frozen
    assert all(torch.equal(v, state[k]) for k, v in mixture.state_dict().items())
    assert all(p.grad is None for p in mixture.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.is_grad_enabled()


def test_a_member_without_weight_is_attacked_too():
    """What fools it may fool others; it only does not count."""
    mixture, x, y = networks()
    attack = Recorder()
    with mixture.using_weights([0.0, 0.4, 0.6]):
        found = Transfer(attack)(mixture, x, y, LINF)
        assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()
    assert [call[0].members[0] for call in attack.calls[:3]] == [mixture.members[k] for k in (2, 1, 0)]


def test_nothing_to_do():
    mixture, x, y = networks()
    found = Transfer(STEPS)(mixture, x, y, ThreatModel("l2", 0.0))
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()
    assert Transfer(STEPS)(mixture, x[:0], y[:0], LINF).shape == (0, 3, 8, 8)


def test_inference_mode_and_other_objectives():
    mixture, x, y = networks()
    outside = Transfer(STEPS)(mixture, x, y, L2)
    with torch.inference_mode():
        inside = Transfer(STEPS)(mixture, x.clone(), y.clone(), L2)
    assert torch.equal(inside, outside)
    found = Transfer(STEPS, objective=InnerLoss(TRADES()))(mixture, x, y, L2)
    torch.testing.assert_close(mixture.expected_accuracy(found, y), mixture.expected_accuracy(outside, y))


def test_what_cannot_work_is_refused():
    mixture, x, y = networks()
    with pytest.raises(ValueError, match="attack is 'pgd'"):
        Transfer("pgd")
    for bad_x, bad_y, message in [(x.half(), y, "float32"), (x, y[:-1], "do not match"), (2 + x, y, "outside the box")]:
        with pytest.raises(ValueError, match=message):
            Transfer(STEPS)(mixture, bad_x, bad_y, LINF)
