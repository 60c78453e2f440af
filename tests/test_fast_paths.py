"""Every fast path beside the plain one: gradients member by member, compiled members, what is recorded."""

import copy
import itertools

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn

from builders.networks import WEIGHTS, trained_member, untrained_mixture
from conftest import QUIET
from mixadv.attacks import APGD, ARC, PGD, AttackSuite, AveragedLoss, ExpectedLoss, Square, SubsetAttack
from mixadv.attacks.objectives import InnerLoss, TargetedLoss
from mixadv.attacks.search import value_and_gradient
from mixadv.data.stream import BatchStream
from mixadv.evaluation import curves, evaluate
from mixadv.lambda_solvers import Uniform
from mixadv.losses import AT, TRADES, ZeroOne
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining

BALL = ThreatModel("linf", 0.1)
# Compiled sums differ in their order: so far may losses differ over three steps, and points of accuracy at the end.
LOSS_TOLERANCE, ACCURACY_TOLERANCE = 1e-4, 0.005


def frozen_mixture(weights=WEIGHTS, width=4):
    return untrained_mixture("small_cnn", weights=weights, seed=2, width=width).eval().requires_grad_(False)


def batch(count=40):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def joint(mixture, objective, x, y, clean):
    """All members in one graph, by the definition."""
    leaf = x.clone().requires_grad_(True)
    logits = torch.stack([member(leaf) for member in mixture.members])
    value = objective(logits, y, mixture.weights, clean)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return logits.detach(), value.detach(), grad


# --- member by member --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [ExpectedLoss(), ExpectedLoss("dlr"), InnerLoss(TRADES(2.0)), AveragedLoss(), TargetedLoss(rank=2)],
    ids=["ce", "dlr", "trades", "averaged", "targeted"],
)
def test_the_gradient_member_by_member_is_that_of_one_graph(objective):
    mixture, (x, y) = frozen_mixture(), batch()
    clean = mixture.member_logits(x).detach() if objective.needs_clean else None
    for got, wanted in zip(
        value_and_gradient(mixture, objective, x + 0.01, y, clean),
        joint(mixture, objective, x + 0.01, y, clean),
        strict=True,
    ):
        assert torch.equal(got, wanted)
        assert not got.requires_grad


class Noting(nn.Module):
    """A member that notes in a list when its graph is made (+1) and when it is gone through (-1)."""

    def __init__(self, member, notes):
        super().__init__()
        self.member, self.notes = member, notes

    def forward(self, x):
        logits = self.member(x)
        if logits.requires_grad:
            self.notes.append(1)
            logits.register_hook(lambda gradient: self.notes.append(-1))
        return logits


@pytest.mark.parametrize(("objective", "most"), [(ExpectedLoss(), 1), (AveragedLoss(), 3)])
@pytest.mark.parametrize("attack", [PGD, APGD])
def test_an_expectation_holds_the_graph_of_one_member(attack, objective, most):
    mixture, (x, y) = frozen_mixture(), batch(6)
    notes = []
    wrapped = Mixture([Noting(member, notes) for member in mixture.members], WEIGHTS)
    attack(num_steps=2, objective=objective)(wrapped, x, y, BALL, torch.Generator().manual_seed(0))
    assert max(itertools.accumulate(notes)) == most
    assert sum(notes) == 0


def test_members_without_gradient_do_not_pull_but_count():
    mixture, (x, y) = frozen_mixture(), batch(5)

    class Step(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot((x.sum((1, 2, 3)) > 30).long(), 10).float()

    mixed = Mixture([mixture.members[0], Step()], [0.6, 0.4])
    logits, value, grad = value_and_gradient(mixed, ExpectedLoss(), x, y, None)
    assert torch.equal(grad, joint(mixed, ExpectedLoss(), x, y, None)[2])
    assert torch.equal(value, ExpectedLoss()(logits, y, mixed.weights))
    with pytest.raises(ValueError, match="no member is differentiable"):
        value_and_gradient(Mixture([Step(), Step()]), ExpectedLoss(), x, y, None)


# --- weight 0 ----------------------------------------------------------------------------------------------------


class Forbidden(nn.Module):
    """A member that must not be asked."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        raise AssertionError("a member of weight 0 was asked")


@pytest.mark.parametrize(
    "attack",
    [PGD(3), PGD(3, keep="last"), APGD(3), APGD(3, loss="dlr-targeted"), ARC(3), SubsetAttack(3), Square(10)],
    ids=["pgd", "pgd-last", "apgd", "apgd-t", "arc", "subsets", "square"],
)
def test_members_that_cannot_be_drawn_are_not_asked(attack):
    pair, (x, y) = frozen_mixture([0.7, 0.3]), batch(12)
    with_third = Mixture([pair.members[0], Forbidden(), pair.members[1]], [0.7, 0.0, 0.3])
    got = attack(with_third, x, y, BALL, torch.Generator().manual_seed(1))
    assert torch.equal(got, attack(pair, x, y, BALL, torch.Generator().manual_seed(1)))


# --- compiled members --------------------------------------------------------------------------------------------


def compiled_copy(mixture, **settings):
    torch._dynamo.reset()
    twin = copy.deepcopy(mixture)
    twin.compile(**settings)
    return twin


def test_batches_of_many_sizes_take_few_graphs():
    """Examples leave the search one by one, the last batch is short, weights change and become 0."""
    from torch._dynamo.utils import counters

    mixture = compiled_copy(frozen_mixture(), backend="eager")
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    for count in (32, 32, 31, 17, 32, 9, 5, 3, 2, 28):
        x, y = batch(count)
        PGD(3, keep="last")(mixture, x, y, BALL, generator)
        PGD(4)(mixture, x, y, ThreatModel("linf", 0.3), generator)
        APGD(4)(mixture, x, y, ThreatModel("linf", 0.3), generator)
    for weights in ([0.1, 0.9, 0.0], [0.0, 0.0, 1.0], WEIGHTS):
        mixture.set_weights(weights)
        PGD(3)(mixture, x, y, BALL, generator)
    # Full batches and others, each with and without gradient.
    assert counters["stats"]["unique_graphs"] == 4
    assert not any("limit" in reason for reason in counters["unimplemented"])


@pytest.mark.parametrize(
    "attack",
    [
        PGD(2),
        APGD(2),
        APGD(2, loss="dlr-targeted"),
        APGD(2, objective=AveragedLoss("dlr")),
        ARC(2),
        SubsetAttack(2),
        Square(4),
    ],
    ids=["pgd", "apgd", "apgd-t", "apgd-averaged", "arc", "subsets", "square"],
)
def test_every_attack_runs_on_compiled_members(attack):
    """ARC goes through one graph backwards several times, which compilers do not expect."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)) for _ in WEIGHTS]
    plain = Mixture(layers, WEIGHTS)
    # Enough images that some member gets right, for all to stay in the search.
    fast, (x, y) = compiled_copy(plain), batch(300)
    found = [
        attack(mixture, x, y, ThreatModel("linf", 1e-4), torch.Generator().manual_seed(0)) for mixture in (plain, fast)
    ]
    torch.testing.assert_close(found[1], found[0])


def fit_members(mixture, x, y):
    """Fit every member to clean images, for a moment."""
    for member in mixture.members:
        trained_member(member.train().requires_grad_(True), x, y, 60, lr=0.01, batch_size=len(x)).requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[1.0], WEIGHTS, [0.6, 0.0, 0.4]], ids=["one", "three", "zero"])
def test_compiled_members_attack_as_plain_ones(weights):
    """Losses over three steps; robust accuracy on 1,000 images; batches that are short."""
    plain, (x, y) = frozen_mixture(weights, width=8), batch(70)
    fast = compiled_copy(plain)
    for steps in (1, 2, 3):
        attack = PGD(steps, keep="last")
        losses = []
        for mixture in (plain, fast):
            points = attack(mixture, x, y, BALL, torch.Generator().manual_seed(4))
            losses.append(ExpectedLoss()(plain.member_logits(points), y, plain.weights))
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=LOSS_TOLERANCE)

    digits = load_digits()
    images = torch.as_tensor(digits.images[:1200, None] / 16, dtype=torch.float32)
    labels = torch.as_tensor(digits.target[:1200])
    fit_members(plain, images, labels)
    fast = compiled_copy(plain)
    batches = list(zip(images.split(250), labels.split(250), strict=True))
    attacks = {"pgd-10": PGD(10), "apgd-ce": APGD(10)}
    robust = []
    for mixture in (plain, fast):
        record = evaluate(mixture, batches, attacks, BALL, seed=0)
        robust.append(record.results({key: {} for key in attacks}).robust.value)
    assert 0.2 < robust[0] < 0.8
    assert abs(robust[0] - robust[1]) <= ACCURACY_TOLERANCE


class Doubtful(nn.Module):
    """Right where it is not traced by the compiler, else wrong."""

    def forward(self, x):
        # The label of an image is its first number.
        right = nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float() + 0 * x.sum()
        return -right if torch.compiler.is_compiling() else right


@pytest.fixture
def doubtful():
    """A compiled mixture that is right as written, images and labels."""
    torch._dynamo.reset()
    mixture = Mixture([Doubtful(), Doubtful()], [0.3, 0.7])
    mixture.compile(backend="eager")
    y = torch.tensor([0, 1, 1, 0, 1]).repeat(4)
    x = y.float().reshape(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    assert mixture.expected_accuracy(x, y).sum() == 0
    return mixture, x, y


TINY_BALL = ThreatModel("linf", 1e-6)


def test_what_is_recorded_comes_from_members_as_they_were_written(doubtful):
    mixture, x, y = doubtful
    record = evaluate(mixture, [(x, y)], {"pgd-2": PGD(2)}, TINY_BALL, seed=0)
    results = record.results({"pgd-2": {}})
    assert results.clean.value == 1
    assert results.robust.value == 1


def test_a_suite_judges_members_as_they_were_written(doubtful):
    mixture, x, y = doubtful
    found = AttackSuite({"pgd-2": PGD(2)})(mixture, x, y, TINY_BALL)
    assert found.clean.mean() == 1
    assert found.expected_accuracy.mean() == 1


def test_curves_judge_members_as_they_were_written(doubtful):
    mixture, x, y = doubtful
    found = curves(mixture, x, y, TINY_BALL, seed=0)
    assert found["eps"]["mixture"][0] == 1


def test_the_game_of_right_and_wrong_is_played_with_members_as_they_were_written(doubtful):
    mixture, x, y = doubtful
    assert MixtureGame(mixture, x, y, TINY_BALL, [PGD(1)], ZeroOne()).member_losses(x).sum() == 0
    assert MixtureGame(mixture, x, y, TINY_BALL, [PGD(1)], AT()).member_losses(x).mean() > 1


def test_validation_judges_members_as_they_were_written(doubtful):
    mixture, x, y = doubtful
    module = MixtureTraining(
        mixture,
        loss=AT(),
        threat_model=TINY_BALL,
        attack=PGD(1),
        validation_attack=PGD(1),
        solver=Uniform(),
        # The members have nothing to learn.
        optimizer=lambda parameters: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
    )
    trainer = pl.Trainer(**QUIET)
    trainer.validate(module, BatchStream((255 * x).byte(), y, len(y), shuffle=False), verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert found == dict.fromkeys(found, 1.0)
    assert len(found) == 3
