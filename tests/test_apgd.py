import contextlib
import copy
import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import digits_tensors, seeded
from builders.networks import WEIGHTS, network_on_digits
from mixadv.attacks import APGD, PGD, AveragedLoss, ExpectedLoss, InnerLoss, TargetedLoss
from mixadv.attacks.apgd import checkpoints
from mixadv.losses import TRADES, dlr_targeted, margin_targeted
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import Affine

LINF, L2 = ThreatModel("linf", 0.02), ThreatModel("l2", 0.2)
EVERYTHING = [
    *(APGD(loss=loss, num_steps=6) for loss in ("ce", "margin", "dlr", "dlr-targeted")),
    *(APGD(objective=AveragedLoss(loss), num_steps=6) for loss in ("ce", "margin", "dlr")),
]


class Small(nn.Module):
    """One convolution, batch norm and a linear head on [B, 3, 6, 6]."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def nearly_equal_members(num_classes=5, members=3):
    """Members that mostly agree (one network, with noise on the weights of the others), and 12 inputs.

    Logits are centred over the batch, so that all classes occur.
    """
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = Small(num_classes)
    mixture = Mixture([copy.deepcopy(first) for _ in range(members)], WEIGHTS if members == 3 else None).eval()
    x = torch.rand(12, 3, 6, 6, generator=seeded(6))
    noise = seeded(7)
    with torch.no_grad():
        for k, member in enumerate(mixture.members):
            for own in member.parameters():
                own += 0.1 * (k > 0) * own.abs().mean() * torch.randn(own.shape, generator=noise)
            member.head.weight *= 10
            member.head.bias -= member(x).mean(0)
        y = mixture(x).argmax(-1)
    return mixture, x, y


@contextlib.contextmanager
def points_of(member):
    """The inputs that a member is called with, in order."""
    seen = []
    handle = member.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


# The algorithm.


def test_checkpoints_are_those_of_the_paper():
    # p = 0.22, +0.19, +0.16, +0.13, +0.10, +0.07, then +0.06 each.
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(1000) == (220, 410, 570, 700, 800, 870, 930, 990)
    # 2.2, 4.1, 5.7, 7, 8, 8.7, 9.3, 9.9 rounded up.
    assert checkpoints(10) == (3, 5, 6, 7, 8, 9, 10)
    assert checkpoints(1) == (1,)
    assert 300 not in checkpoints(300)


class Peak(nn.Module):
    """One input u, two classes, logits (0, |u - top|): for label 1 the margin is -|u - top|, never positive."""

    def __init__(self, top):
        super().__init__()
        self.top = top

    def forward(self, x):
        return torch.stack([torch.zeros_like(x[:, 0]), (x[:, 0] - self.top).abs()], dim=1)


TRACES = [
    # From 0, eta = 2, ball [-1, 1], peak at 0.3: checkpoints after steps 3, 5, 6, 7, 8, 9, 10.
    (
        0.75,
        0.3,
        [
            1.0,  # gradient +: clamped; the first step has no momentum
            -0.25,  # gradient -: z = -1, 1 + 0.75 (-2) + 0.25 (1)
            0.375,  # +: z = 1, -0.25 + 0.75 (1.25) + 0.25 (-1.25); best so far. 2 rises of 3 < 2.25: eta = 1
            -0.21875,  # -: z = -0.625, 0.375 - 0.75 + 0.25 (0.625)
            0.3828125,  # +: z = 0.78125, -0.21875 + 0.75 + 0.25 (-0.59375). 1 of 2 < 1.5: eta = 1/2, back to 0.375
            0.1484375,  # -: z = -0.125, 0.375 - 0.375 + 0.25 (0.375 + 0.21875). No rise: eta = 1/4, back to 0.375
            0.1875,  # -: z = 0.125, no move before it. No rise: eta = 1/8, back to 0.375
            0.28125,  # -: z = 0.25. A rise and the best: eta stays
            0.3515625,  # +: z = 0.40625, 0.28125 + 0.09375 + 0.25 (-0.09375). No rise: eta = 1/16, back to 0.28125
            0.328125,  # +: z = 0.34375
        ],
        0.28125,
    ),
    # rho = 1/2: the first checkpoint sees 2 rises of 3, enough, but nothing above the start: condition 2. At the
    # second one it holds again, but eta has just been halved.
    (
        0.5,
        0.1,
        [
            1.0,
            -0.25,
            0.375,  # eta = 1, back to 0
            0.8125,  # +: z = 1, 0.75 + 0.25 (0 + 0.25)
            0.265625,  # -: z = -0.1875, 0.8125 - 0.75 + 0.25 (0.8125). 1 rise of 2 is enough: eta stays
            -0.62109375,  # -: z = -0.734375, 0.265625 - 0.75 + 0.25 (-0.546875)
        ],
        0.0,
    ),
]


@pytest.mark.parametrize(("rho", "top", "steps", "best"), TRACES)
def test_steps_by_hand(rho, top, steps, best):
    """Start, best point, restarts, momentum and both conditions of Algorithm 1, worked out on paper for N = 10."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    member = Peak(top)
    attack = APGD(10, loss="margin", start="none", rho=rho)
    with points_of(member) as seen:
        found = attack(member, x, torch.ones(1, dtype=torch.long), ThreatModel("linf", 1.0, None))
    assert [float(point) for point in seen][: 2 + len(steps)] == [0.0, 0.0, *steps]
    assert len(seen) == 12
    if len(steps) == 10:
        assert float(found) == best


def test_every_example_has_its_own_schedule():
    """Three peaks in one batch: the input's second number says which; each goes as it goes alone."""

    class Peaks(nn.Module):
        def forward(self, x):
            u, top = x[:, 0], x[:, 1].detach()
            return torch.stack([torch.zeros_like(u), (u - top).abs()], dim=1)

    x = torch.tensor([[0.0, 0.3], [0.0, 0.1], [0.0, -0.9]], dtype=torch.float64)
    y, threat_model = torch.ones(3, dtype=torch.long), ThreatModel("l2", 1.0, None)
    member = Peaks()
    attack = APGD(30, loss="margin", start="none")
    with points_of(member) as together:
        attack(member, x, y, threat_model)
    for i in range(3):
        with points_of(member) as alone:
            attack(member, x[i : i + 1], y[:1], threat_model)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))
    paths = torch.stack(together)[:, :, 0]
    assert not torch.equal(paths[:, 0] - 0.3, paths[:, 1] - 0.1)


def test_no_pass_is_wasted():
    mixture, x, y = nearly_equal_members()
    forwards, backwards = [0, 0, 0], [0, 0, 0]

    def count(k):
        def hook(module, inputs, output):
            forwards[k] += 1
            if output.requires_grad:
                output.register_hook(lambda grad: backwards.__setitem__(k, backwards[k] + 1))

        return hook

    y, tiny = mixture.members[0](x).argmax(-1), ThreatModel("linf", 1e-5)
    for k, member in enumerate(mixture.members):
        member.register_forward_hook(count(k))
    APGD(7, restarts=2)(mixture, x, y, tiny)
    assert forwards == [1 + 2 * 8] * 3
    assert backwards == [2 * 7] * 3
    forwards[:], backwards[:] = [0, 0, 0], [0, 0, 0]
    APGD(4, restarts=2, loss="dlr-targeted", targets=3)(mixture, x, y, tiny)
    assert forwards == [1 + 6 * 5] * 3
    assert backwards == [6 * 4] * 3
    forwards[:] = [0, 0, 0]
    APGD(4, restarts=2, start="none")(mixture, x, y, tiny)
    assert forwards == [1 + 5] * 3


def test_examples_that_cannot_get_worse_are_left_alone():
    mixture, x, y = nearly_equal_members(members=1)
    y = y.clone()
    y[1] = (y[1] + 1) % 5
    with points_of(mixture.members[0]) as seen:
        found = APGD(20)(mixture, x, y, ThreatModel("linf", 0.01), seeded())
    sizes = [len(points) for points in seen]
    assert sizes[:2] == [12, 11]
    assert sizes == sorted(sizes, reverse=True)
    assert torch.equal(found[1], x[1])
    accuracy = mixture.expected_accuracy(found, y)
    assert 0 < accuracy.sum() < 10
    assert accuracy.sum() <= sizes[-1] < 11
    with points_of(mixture.members[0]) as seen:
        APGD(20, restarts=2)(mixture, x, y, ThreatModel("linf", 0.01), seeded())
    assert [len(points) for points in seen][:23] == [*sizes, accuracy.sum()]


# Closed forms.


def affine(members):
    """Linear members, 5 inputs, and labels that every member gets right by far, so that nobody is fooled."""
    w = torch.randn(members, 7, generator=seeded(), dtype=torch.float64)
    w[:, 0] = 60
    x = torch.rand(5, 7, generator=seeded(1), dtype=torch.float64)
    x[:, 0] = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7])
    y = torch.tensor([0, 1, 1, 0, 1])
    mixture = Mixture([Affine(w[k], -30.0) for k in range(members)], WEIGHTS if members == 3 else None)
    assert (mixture.expected_accuracy(x, y) == 1).all()
    slope = torch.where(y == 1, -1.0, 1.0)[:, None] * (mixture.weights.double() @ w)
    return mixture, x, y, slope.numpy()


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_linear_members_in_linf(members, bounds, loss):
    """The margin is linear: its maximum is the corner x + eps sign(slope), cut with the box, and reached exactly."""
    mixture, x, y, slope = affine(members)
    if loss == "ce" and members == 3:
        loss = "dlr"
    found = APGD(15, loss=loss)(mixture, x, y, ThreatModel("linf", 0.15, bounds), seeded()).numpy()
    corner = x.numpy() + 0.15 * np.sign(slope)
    corner = corner if bounds is None else corner.clip(0, 1)
    np.testing.assert_array_equal(found, corner)
    assert bounds is None or ((found == 0) | (found == 1)).any()


@pytest.mark.parametrize("members", [1, 3])
def test_linear_members_in_l2(members):
    mixture, x, y, slope = affine(members)
    found = APGD(60, loss="margin")(mixture, x, y, ThreatModel("l2", 0.15, None), seeded()).numpy()
    best = x.numpy() + 0.15 * slope / np.linalg.norm(slope, axis=1, keepdims=True)
    np.testing.assert_allclose(found, best, atol=1e-4)  # points on the sphere may be outside it by rounding


# Objectives.


def test_objectives_by_hand():
    z = 2 * torch.randn(3, 5, 4, generator=seeded(1), dtype=torch.float64)
    clean = torch.randn(3, 5, 4, generator=seeded(2), dtype=torch.float64)
    y, target = torch.tensor([0, 3, 1, 2, 0]), torch.tensor([1, 0, 2, 3, 3])
    lam, weights, rows = np.array(WEIGHTS), torch.tensor(WEIGHTS), np.arange(5)
    averaged = np.log(np.einsum("k,kbc->bc", lam, z.softmax(-1).numpy()))

    def by_hand(logits, targets):
        top = -np.sort(-logits, axis=-1)
        lead = logits[..., rows, targets] - logits[..., rows, y.numpy()]
        return lead, lead / (top[..., 0] - 0.5 * (top[..., 2] + top[..., 3]))

    lead, ratio = by_hand(z.numpy(), target.numpy())
    np.testing.assert_allclose(margin_targeted(z, y, target), lead)
    np.testing.assert_allclose(dlr_targeted(z, y, target), ratio)
    assert dlr_targeted(z.bfloat16(), y, target).dtype == torch.float32

    # The two runner-ups at the clean input, which are not those at z.
    mean = np.einsum("k,kbc->bc", lam, clean.softmax(-1).numpy())
    order = np.array([[c for c in np.argsort(-mean[i]) if c != y[i]] for i in range(5)])
    for rank in (1, 2, 3):
        hand = dict(zip(("margin", "dlr"), by_hand(z.numpy(), order[:, rank - 1]), strict=True))
        for loss in ("margin", "dlr"):
            objective = TargetedLoss(loss, rank)
            assert objective.needs_clean
            np.testing.assert_allclose(objective(z, y, weights, clean), lam @ hand[loss], rtol=1e-6)
    assert (order[:, 0] != np.array([[c for c in np.argsort(-averaged[i]) if c != y[i]] for i in range(5)])[:, 0]).any()

    others = np.where(np.eye(4, dtype=bool)[y.numpy()], -np.inf, averaged).max(-1)
    lead = others - averaged[rows, y.numpy()]
    top = -np.sort(-averaged, axis=-1)
    np.testing.assert_allclose(AveragedLoss("margin")(z, y, weights), lead, rtol=1e-6)
    np.testing.assert_allclose(AveragedLoss("dlr")(z, y, weights), lead / (top[:, 0] - top[:, 2]), rtol=1e-6)
    np.testing.assert_allclose(AveragedLoss("ce")(z, y, weights), -averaged[rows, y.numpy()], rtol=1e-6)
    assert not AveragedLoss().needs_clean
    assert AveragedLoss("dlr")(z.bfloat16(), y, weights).dtype == torch.float32


def test_the_averaged_loss_is_that_of_the_mixture_as_a_single_model():
    mixture, x, y = nearly_equal_members()
    twin = Mixture([mixture])
    with torch.no_grad():
        inside, outside = mixture.member_logits(x), twin.member_logits(x)
    for loss in ("ce", "margin", "dlr"):
        torch.testing.assert_close(
            AveragedLoss(loss)(inside, y, mixture.weights), ExpectedLoss(loss)(outside, y, twin.weights)
        )
    # And the attack on the averaged prediction, kept by its accuracy, is the attack on that model.
    attack = APGD(10, loss="dlr")
    found = attack(twin, x, y, LINF, seeded())
    assert twin.expected_accuracy(found, y).sum() == mixture.ensemble_accuracy(found, y).sum() < 10


def test_objectives_refuse():
    z, y, weights = torch.randn(3, 5, 4, generator=seeded()), torch.tensor([0, 3, 1, 2, 0]), torch.tensor(WEIGHTS)
    for make, message in [
        (lambda: AveragedLoss("nll"), "ce, margin, dlr"),
        (lambda: TargetedLoss("ce"), "margin, dlr"),
        (lambda: TargetedLoss(rank=0), "rank"),
        (lambda: TargetedLoss()(z, y, weights, None), "clean logits"),
        (lambda: TargetedLoss(rank=4)(z, y, weights, z), "no wrong class of rank 4"),
        (lambda: dlr_targeted(z[..., :3], y % 3, y % 3), "at least 4 classes, got 3"),
        (lambda: margin_targeted(z, y, y[:-1]), "differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_names_stand_for_objectives():
    assert APGD().objectives(10) == (ExpectedLoss("ce"),)
    assert APGD(loss="dlr").objectives(3) == (ExpectedLoss("dlr"),)
    targeted = APGD(loss="dlr-targeted")
    assert targeted.objectives(100) == tuple(TargetedLoss("dlr", rank) for rank in range(1, 10))
    assert replace(targeted, targets=12).objectives(100)[-1] == TargetedLoss("dlr", 12)
    assert targeted.objectives(4) == tuple(TargetedLoss("dlr", rank) for rank in (1, 2, 3))
    # With too few classes the margin.
    assert targeted.objectives(3) == tuple(TargetedLoss("margin", rank) for rank in (1, 2))
    assert APGD(loss="dlr").objectives(2) == (ExpectedLoss("margin"),)
    custom = InnerLoss(TRADES())
    assert APGD(objective=custom).objectives(10) == (custom,)


def test_settings_come_from_yaml():
    from hydra.utils import instantiate

    attack = instantiate({"_target_": "mixadv.attacks.apgd.APGD", "loss": "dlr-targeted", "targets": 3})
    assert attack == APGD(loss="dlr-targeted", targets=3)


# The whole attack on networks.


@pytest.mark.parametrize("attack", EVERYTHING, ids=lambda attack: f"{attack.loss}-{attack.objective}")
@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_results_are_feasible_and_never_worse_than_the_input(attack, threat_model):
    mixture, x, y = nearly_equal_members()
    for start in ("uniform", "none"):
        found = replace(attack, start=start)(mixture, x, y, threat_model, seeded())
        assert threat_model.contains(found, x).all()
        assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
        before, after = mixture.expected_accuracy(x, y), mixture.expected_accuracy(found, y)
        assert (after <= before).all()
        assert after.mean() < before.mean() - 0.2


@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 2e-4), ThreatModel("l2", 2e-3)], ids=str)
def test_where_nobody_is_fooled_the_objective_is_kept(threat_model):
    """In so small a ball no answer changes, and the point returned is at least as good as that of PGD."""
    mixture, x, y = nearly_equal_members()
    with torch.no_grad():
        clean = mixture.member_logits(x)
    for objective in (ExpectedLoss("dlr"), AveragedLoss("margin"), TargetedLoss("dlr", 2)):

        def score(points, objective=objective):
            with torch.no_grad():
                return objective(mixture.member_logits(points), y, mixture.weights, clean)

        found = APGD(20, objective=objective)(mixture, x, y, threat_model, seeded())
        peer = PGD(20, step_size=0.15, objective=objective, keep="objective")(mixture, x, y, threat_model, seeded())
        assert torch.equal(mixture.expected_accuracy(found, y), mixture.expected_accuracy(x, y))
        assert (score(found) > score(x)).all()
        assert ((score(found) - score(x)) > 0.98 * (score(peer) - score(x))).all()


@pytest.mark.parametrize(("loss", "num_steps", "eps"), [("ce", 0, 0.03), ("dlr-targeted", 2, 0.015)])
def test_more_restarts_never_help_the_defender(loss, num_steps, eps):
    mixture, x, y = nearly_equal_members()
    threat_model = ThreatModel("linf", eps)
    accuracies, points = [], []
    for restarts in (1, 2, 6):
        with points_of(mixture.members[0]) as seen:
            found = APGD(num_steps, restarts=restarts, loss=loss)(mixture, x, y, threat_model, seeded(3))
        accuracies.append(mixture.expected_accuracy(found, y))
        points.append(seen)
    # More of them do what fewer do, and then go on.
    for few, many in itertools.pairwise(points):
        assert len(few) < len(many)
        assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert (accuracies[0] >= accuracies[1]).all()
    assert (accuracies[1] >= accuracies[2]).all()
    assert accuracies[2].sum() < accuracies[0].sum()


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_one_member_however_often_it_is_named(loss):
    mixture, x, y = nearly_equal_members()
    member = mixture.members[1].train()
    y = member.eval()(x).argmax(-1)
    member.train()
    attack, threat_model = APGD(8, loss=loss), ThreatModel("linf", 0.01)
    plain = attack(member, x, y, threat_model, seeded())
    assert all(module.training for module in member.modules())
    assert torch.equal(plain, attack(Mixture([member]), x, y, threat_model, seeded()))
    twice = attack(Mixture([member, member], [0.25, 0.75]), x, y, threat_model, seeded())
    accuracies = [Mixture([member]).eval().expected_accuracy(found, y) for found in (plain, twice)]
    assert torch.equal(*accuracies)
    assert 0 < accuracies[0].sum() < 11
    if loss != "dlr-targeted":
        # With one member averaging changes nothing.
        other = APGD(8, objective=AveragedLoss(loss))(member, x, y, threat_model, seeded())
        assert torch.equal(member.eval()(other).argmax(-1) == y, accuracies[0] == 1)


def test_dlr_does_not_see_the_scale_of_a_member():
    """The expected cross-entropy is ruled by the loudest member; DLR takes the same way at any scale."""

    class Scaled(nn.Module):
        def __init__(self, member, factor):
            super().__init__()
            self.member, self.factor = member, factor

        def forward(self, x):
            return self.factor * self.member(x)

    mixture, x, y = nearly_equal_members()
    factors = [2.0**20, 2.0**3, 1.0]
    scaled = Mixture([Scaled(m, c) for m, c in zip(mixture.members, factors, strict=True)], WEIGHTS).eval()
    small = ThreatModel("linf", 0.004)
    plain, loud = (APGD(5, loss="dlr")(m, x, y, small, seeded()) for m in (mixture, scaled))
    torch.testing.assert_close(plain, loud, rtol=0, atol=1e-6)
    plain, loud = (APGD(5, loss="ce")(m, x, y, small, seeded()) for m in (mixture, scaled))
    assert (plain - loud).abs().max() > 1e-3


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes(num_classes):
    mixture, x, y = nearly_equal_members(num_classes)
    before = mixture.expected_accuracy(x, y).sum()
    for loss in ("ce", "dlr", "dlr-targeted"):
        found = APGD(10, loss=loss)(mixture, x, y, LINF, seeded())
        assert LINF.contains(found, x).all()
        assert mixture.expected_accuracy(found, y).sum() < before - 1
    if num_classes == 2:
        runs = [APGD(10, loss=loss)(mixture, x, y, LINF, seeded()) for loss in ("dlr", "margin", "dlr-targeted")]
        assert torch.equal(runs[0], runs[1])
        torch.testing.assert_close(runs[0], runs[2])


def test_a_single_class_has_no_target():
    x, y = torch.rand(2, 4), torch.zeros(2, dtype=torch.long)
    for loss, message in (("dlr", "at least 2 classes"), ("dlr-targeted", "no wrong class of rank 1")):
        with pytest.raises(ValueError, match=message):
            APGD(loss=loss)(nn.Linear(4, 1), x, y, LINF)


def test_without_steps_the_starts_count():
    mixture, x, y = nearly_equal_members()
    start = LINF.sample(x[mixture.expected_accuracy(x, y) > 0], seeded())
    found = APGD(0)(mixture, x, y, LINF, seeded())
    assert ((found == x).flatten(1).all(1) | (found == start).flatten(1).all(1)).all()
    # Wrong on every example from the start: nothing to do.
    wrong = APGD(2)(Mixture([mixture.members[0]]), x, (mixture.members[0](x).argmax(-1) + 1) % 5, LINF)
    assert torch.equal(wrong, x)


class Hole(nn.Module):
    """NaN logits for u > 0.6, right at less; the loss of label 1 grows towards the hole."""

    def forward(self, x):
        u = x[:, 0]
        return torch.stack([torch.zeros_like(u), 1 - u + torch.where(u > 0.6, float("nan"), 0.0)], dim=1)


def test_a_point_without_an_answer_is_the_worst_although_its_objective_is_nan():
    x, y = torch.full((4, 1), 0.5), torch.ones(4, dtype=torch.long)
    with pytest.warns(UserWarning, match="NaN gradients"):
        found = APGD(40, start="none")(Hole(), x, y, ThreatModel("linf", 0.2))
    assert (found > 0.6).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "num_steps"),
        ({"restarts": 0}, "restarts"),
        ({"loss": "nll"}, "ce, margin, dlr, dlr-targeted"),
        ({"start": "gaussian"}, "uniform, none"),
        ({"rho": 1.5}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"targets": 3}, "use loss=dlr-targeted"),
        ({"targets": 0, "loss": "dlr-targeted"}, "targets"),
        ({"objective": AveragedLoss(), "loss": "dlr"}, "give only one"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        APGD(**settings)


# The peer.


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.5)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_as_strong_as_autoattack(norm, eps, loss):
    """At equal steps and targets, over three starts: at most half a point of accuracy more than AutoAttack's APGD."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    net, (x, y) = network_on_digits(), (part[:300] for part in digits_tensors()[2:])
    steps, targets = (20, 3) if loss == "dlr-targeted" else (50, None)
    ours, theirs = [], []
    for seed in range(3):
        settings = {"n_iter": steps, "norm": norm.capitalize(), "eps": eps, "device": "cpu", "seed": seed}
        if targets is None:
            peer = APGDAttack(net, loss=loss, **settings)
        else:
            peer = APGDAttack_targeted(net, n_target_classes=targets, **settings)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of zero gradients
            theirs.append((net(peer.perturb(x, y)).argmax(-1) == y).float().mean().item())
        found = APGD(steps, loss=loss, targets=targets)(net, x, y, ThreatModel(norm, eps), seeded(seed))
        assert ThreatModel(norm, eps).contains(found, x).all()
        ours.append((net(found).argmax(-1) == y).float().mean().item())
    assert 0.3 < np.mean(theirs) < 0.7
    assert np.mean(ours) <= np.mean(theirs) + 0.005
