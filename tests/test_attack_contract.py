"""What every attack of `mixadv.attacks` promises. A new attack gets one line in CASES; its own file tests the rest."""

import dataclasses
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import digits_tensors, seeded
from builders.linear_problems import linear_examples
from builders.networks import (
    WEIGHTS,
    Fragile,
    Step,
    Watched,
    assert_left_as_found,
    disagreeing_mixture,
    patchwork_mixture,
)
from builders.refusals import refusal
from mixadv.attacks import APGD, ARC, PGD, LatticeClimber, Square, SubsetAttack, UniformNoise
from mixadv.attacks.search import SearchAttack
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import linear_mixture

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)


@dataclass(frozen=True)
class Case:
    """An attack that takes little time.

    steps: of the gradient, how many lead to the point nearest to the boundary of a linear member; None: it needs none.
    fixed: settings under which it draws no random numbers; None where there are none.
    worst: whether it returns the worst point that it has seen for each example, x included, or the last one.
    """

    attack: SearchAttack
    steps: int | None
    fixed: dict | None
    worst: bool = True


CASES = {
    "noise": Case(UniformNoise(20), steps=None, fixed=None),
    "pgd": Case(PGD(4), steps=40, fixed={"start": "none"}),
    "pgd-last": Case(PGD(4, keep="last"), steps=40, fixed={"start": "none"}, worst=False),
    "apgd-ce": Case(APGD(4), steps=40, fixed={"start": "none"}),
    "apgd-dlr": Case(APGD(4, loss="dlr"), steps=40, fixed={"start": "none"}),
    "apgd-targeted": Case(APGD(4, loss="dlr-targeted", targets=2), steps=40, fixed={"start": "none"}),
    "arc": Case(ARC(3), steps=1, fixed={"order": "weights"}),
    "arc-published": Case(ARC(3, variant="published"), steps=1, fixed={"order": "weights"}),
    "climber": Case(LatticeClimber(8, steps_per_set=4), steps=40, fixed=None),
    "subsets": Case(SubsetAttack(3), steps=1, fixed={}),
    "square": Case(Square(30), steps=None, fixed=None),
}


def cases(chosen=lambda case: True):
    return pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items() if chosen(c)])


every = cases()
keeping_the_worst = cases(lambda case: case.worst)
with_gradient = cases(lambda case: case.steps is not None)
without_gradient = cases(lambda case: case.steps is None)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])
balls = pytest.mark.parametrize("ball", [LINF, L2], ids=["linf", "l2"])


def many_linear_examples():
    """Three linear members and 200 points, at some of which one start of a short attack misses the optimum."""
    random = np.random.default_rng(4)
    mixture = linear_mixture(random.normal(size=(3, 6)), random.normal(size=3) / 4, [0.45, 0.35, 0.2])
    return mixture, torch.as_tensor(random.uniform(size=(200, 6))), torch.as_tensor(random.integers(0, 2, 200))


def test_every_attack_has_its_case():
    ours, todo = set(), [SearchAttack]
    while todo:
        todo += (found := todo.pop().__subclasses__())
        ours.update(attack for attack in found if attack.__module__.startswith("mixadv."))
    assert {type(case.attack) for case in CASES.values()} == ours, "a new attack gets a line in CASES"


# --- what comes back ---------------------------------------------------------------------------------------


@every
@balls
def test_results_lie_in_ball_and_box(case, ball):
    mixture, x, y = disagreeing_mixture("linear")
    x[0, 0], x[1, 1] = 0.0, 1.0
    found = case.attack(mixture, x, y, ball, seeded())
    assert ball.contains(found, x).all()
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
    assert mixture.expected_accuracy(found, y).sum() < mixture.expected_accuracy(x, y).sum()


@every
@norms
def test_each_example_may_have_its_own_radius(case, norm):
    """The examples of each radius get what an attack on them alone finds; eps = 0 leaves x."""
    mixture, x, y = disagreeing_mixture("linear")
    x, y = torch.cat([x, x.flip(2)]), torch.cat([y, y])
    big = 0.1 if norm == "linf" else 0.6
    radii = [big, 0.0, big / 4, big, big / 4, 0.0]
    radii = torch.tensor((radii * len(x))[: len(x)])
    ball = ThreatModel(norm, radii)
    found = case.attack(mixture, x, y, ball, seeded())
    assert ball.contains(found, x).all()
    assert torch.equal(found[radii == 0], x[radii == 0])
    draws, alone = seeded(), {}
    for radius in (big / 4, big):
        rows = radii == torch.tensor(radius)
        one = ThreatModel(norm, float(torch.tensor(radius)))
        alone[radius] = case.attack(mixture, x[rows], y[rows], one, draws)
        assert torch.equal(found[rows], alone[radius])
    assert ball.distance(found, x)[radii == big].max() > big / 2
    with pytest.raises(ValueError, match="radii for a batch of"):
        case.attack(mixture, x, y, ThreatModel(norm, radii[1:]), seeded())


@keeping_the_worst
@pytest.mark.parametrize("ball", [LINF, L2, ThreatModel("linf", 0.001)], ids=str)
def test_results_are_never_better_for_the_mixture(case, ball):
    mixture, x, y = disagreeing_mixture()
    # No member is right on the second example, and only some are on the first.
    answers = mixture.member_logits(x).argmax(-1)
    y[0], y[1] = answers[1, 0], next(c for c in range(4) if c not in answers[:, 1])
    found = case.attack(mixture, x, y, ball, seeded())
    assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()


@every
@norms
def test_nothing_is_found_below_the_exact_optimum_of_linear_members(case, norm):
    mixture, points, labels, ball, best = linear_examples(norm)
    found = case.attack(mixture, points, labels, ball, seeded())
    assert ball.contains(found, points).all()
    accuracy, clean = (mixture.expected_accuracy(at, labels).numpy() for at in (found, points))
    assert (accuracy >= best - 1e-6).all()
    assert accuracy.mean() < clean.mean()


@with_gradient
@pytest.mark.parametrize(("norm", "bounds"), [("linf", None), ("linf", (0.0, 1.0)), ("l2", None)])
def test_a_single_linear_member_is_fooled_exactly_where_it_can_be(case, norm, bounds):
    """Elsewhere the point returned is the one nearest to the boundary, among points of equal accuracy."""
    random = np.random.default_rng(0)
    W, b = random.normal(size=(1, 6)), np.array([0.3])
    x, y = random.uniform(size=(200, 6)), random.integers(0, 2, 200)
    sign = np.where(y == 1, 1.0, -1.0)
    eps = 0.2 if norm == "linf" else 0.4
    step = np.sign(W[0]) if norm == "linf" else W[0] / np.linalg.norm(W)
    nearest = x - eps * sign[:, None] * step
    nearest = nearest if bounds is None else nearest.clip(*bounds)
    margin = sign * (nearest @ W[0] + b[0])
    assert 20 < (margin > 0).sum() < 180
    ball, mixture = ThreatModel(norm, eps, bounds), linear_mixture(W, b)
    points, labels = torch.as_tensor(x), torch.as_tensor(y)
    found = replace(case.attack, num_steps=case.steps)(mixture, points, labels, ball, seeded())
    assert ball.contains(found, points).all()
    np.testing.assert_array_equal(mixture.expected_accuracy(found, labels) > 0.5, margin > 0)
    left = sign * (found.numpy() @ W[0] + b[0])
    np.testing.assert_allclose(left[margin > 0], margin[margin > 0], atol=1e-6)


@every
@norms
def test_identical_members_behave_as_one(case, norm):
    random = np.random.default_rng(3)
    W, b = random.normal(size=(1, 6)), np.array([0.1])
    x, y = torch.as_tensor(random.normal(size=(60, 6))), torch.as_tensor(random.integers(0, 2, 60))
    one = linear_mixture(W, b)
    three = Mixture([one.members[0]] * 3, [0.2, 0.5, 0.3])
    ball = ThreatModel(norm, 0.4, None)
    accuracies = [m.expected_accuracy(case.attack(m, x, y, ball, seeded()), y) for m in (one, three)]
    torch.testing.assert_close(accuracies[0], accuracies[1])
    assert 0 < accuracies[0].sum() < one.expected_accuracy(x, y).sum()


@cases(lambda case: case.worst and hasattr(case.attack, "restarts"))
@norms
def test_more_restarts_never_help_the_defender(case, norm):
    mixture, x, y = many_linear_examples()
    ball = ThreatModel(norm, 0.4, None)
    one, two, six = (
        mixture.expected_accuracy(replace(case.attack, restarts=restarts)(mixture, x, y, ball, seeded()), y)
        for restarts in (1, 2, 6)
    )
    assert (two <= one).all()
    assert (six <= two).all()
    assert six.sum() < one.sum()


@cases(lambda case: case.fixed is not None)
@norms
def test_an_example_is_attacked_alone_as_in_its_batch(case, norm):
    """Where nothing is random: alone, and in another order, every example ends at the same point."""
    random = np.random.default_rng(5)
    mixture = linear_mixture(random.normal(size=(3, 6)), random.normal(size=3) / 4, WEIGHTS)
    x, y = torch.as_tensor(random.uniform(size=(12, 6))), torch.as_tensor(random.integers(0, 2, 12))
    attack, ball = replace(case.attack, **case.fixed), ThreatModel(norm, 0.2)
    together = attack(mixture, x, y, ball, seeded())
    assert ball.contains(together, x).all()
    assert not torch.equal(together, x)
    for i in range(12):
        alone = attack(mixture, x[i : i + 1], y[i : i + 1], ball, seeded())
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)
    torch.testing.assert_close(attack(mixture, x.flip(0), y.flip(0), ball), together.flip(0), rtol=0, atol=1e-9)


# --- what is left alone ------------------------------------------------------------------------------------


@every
def test_eps_zero_empty_batches_and_batches_of_one(case):
    mixture, x, y = disagreeing_mixture("linear")
    for norm in ("linf", "l2"):
        found = case.attack(mixture, x, y, ThreatModel(norm, 0.0))
        assert torch.equal(found, x)
        assert found.data_ptr() != x.data_ptr()
    for ball in (LINF, L2):
        assert case.attack(mixture, x[:0], y[:0], ball).shape == (0, 3, 8, 8)
        assert case.attack(mixture, x[:1], y[:1], ball).shape == (1, 3, 8, 8)


@keeping_the_worst
def test_examples_that_cannot_get_worse_are_left_alone(case):
    """Half the labels are wrong for all members: these examples are evaluated once, and come back as they are."""
    mixture, x, y = disagreeing_mixture()
    answers = mixture.member_logits(x).argmax(-1)
    for i in (1, 3, 4):
        y[i] = next(c for c in range(4) if c not in answers[:, i])
    seen = []
    mixture.members[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = case.attack(mixture, x, y, ThreatModel("linf", 1e-5), seeded())
    assert torch.equal(found[[1, 3, 4]], x[[1, 3, 4]])
    assert seen[0] == 6
    # Some attacks ask one example first whether there is a gradient.
    assert seen[1] in (1, 3)
    assert max(seen[1:]) == 3
    assert len(seen) > 4


@every
def test_members_without_weight_are_not_asked(case):
    mixture, x, y = disagreeing_mixture()
    mixture.set_weights([0.7, 0.0, 0.3])
    pair = Mixture([mixture.members[0], mixture.members[2]], [0.7, 0.3]).eval()
    expected = case.attack(pair, x, y, L2, seeded())

    def refuse(module, inputs):
        raise AssertionError("asked")

    mixture.members[1].register_forward_pre_hook(refuse)
    torch.testing.assert_close(case.attack(mixture, x, y, L2, seeded()), expected, rtol=0, atol=1e-5)
    assert not torch.equal(expected, x)


@every
@balls
def test_mixture_and_random_numbers_are_left_as_found_also_when_a_member_fails(case, ball):
    """The ball is too small to fool anybody, which would end the work."""
    x, ball = digits_tensors()[2][:5].clone(), replace(ball, eps=ball.eps / 1000)
    with torch.no_grad():
        y = patchwork_mixture(Watched).eval().members[2](x).argmax(1)
    images, labels = x.clone(), y.clone()
    assert_left_as_found(patchwork_mixture, lambda mixture: case.attack(mixture, x, y, ball, seeded()))
    assert torch.equal(x, images)
    assert torch.equal(y, labels)


# --- where it works ----------------------------------------------------------------------------------------


@every
@norms
def test_all_randomness_comes_from_the_generator(case, norm):
    mixture, x, y = many_linear_examples()
    ball, before = ThreatModel(norm, 0.4, None), torch.get_rng_state()
    # Some attacks start at x, and draw from their second start on.
    attack = replace(case.attack, restarts=2) if hasattr(case.attack, "restarts") else case.attack
    first, same, other = (attack(mixture, x, y, ball, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@every
def test_the_mixture_is_attacked_in_eval_mode(case):
    """Batch norm and dropout would answer otherwise, and differently at each call."""
    mixture, x, y = disagreeing_mixture()
    mixture = Mixture([nn.Sequential(member, nn.Dropout(0.5)) for member in mixture.members], WEIGHTS)
    reference = case.attack(mixture.eval(), x, y, LINF, seeded())
    assert torch.equal(case.attack(mixture.train(), x, y, LINF, seeded()), reference)
    assert not torch.equal(reference, x)


@every
def test_it_works_where_gradients_are_switched_off_and_asks_none_of_the_images(case):
    mixture, x, y = disagreeing_mixture()
    outside = case.attack(mixture, x, y, LINF, seeded())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(case.attack(mixture, x.clone(), y.clone(), LINF, seeded()), outside)
    x.requires_grad_(True)
    found = case.attack(mixture, x, y, LINF, seeded())
    assert torch.equal(found, outside)
    assert not found.requires_grad
    assert x.grad is None


@every
@balls
def test_it_works_under_autocast(case, ball):
    mixture, x, y = disagreeing_mixture("linear")
    seen = set()
    mixture.members[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.attack(mixture, x, y, ball, seeded())
    assert seen == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert ball.contains(found, x).all()
    assert mixture.expected_accuracy(found, y).sum() < mixture.expected_accuracy(x, y).sum()


@every
def test_a_plain_module_is_a_mixture_of_one(case):
    mixture, x, y = disagreeing_mixture()
    member = mixture.members[1].train()
    plain = case.attack(member, x, y, LINF, seeded())
    assert all(module.training for module in member.modules())
    assert torch.equal(plain, case.attack(Mixture([member]), x, y, LINF, seeded()))
    assert not torch.equal(plain, x)


# --- members without gradient ------------------------------------------------------------------------------


@with_gradient
def test_members_without_gradient_count_but_do_not_pull(case):
    """The step member errs from one half on, and is fooled on the way that the linear one leads."""
    linear = linear_mixture(np.array([[1.0, 0.2]]), np.array([-0.65])).members[0]
    x, y = torch.tensor([[0.4, 0.5], [0.1, 0.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    mixture, ball = Mixture([Step(), linear], [0.6, 0.4]), ThreatModel("linf", 0.2)
    found = replace(case.attack, num_steps=10)(mixture, x, y, ball, seeded())
    torch.testing.assert_close(mixture.expected_accuracy(found, y), torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"no member .*(gradient|differentiable)"):
        case.attack(Step(), x, y, LINF)


@without_gradient
def test_members_need_no_gradient(case):
    x = torch.tensor([[0.1], [0.45], [0.48], [0.9]])
    found = case.attack(Step(), x, torch.zeros(4, dtype=torch.long), LINF, seeded())
    assert torch.equal(found[:, 0] > 0.5, torch.tensor([False, True, True, True]))
    assert torch.equal(found[3], x[3])


@cases(lambda case: case.steps is not None and case.worst)
def test_nan_gradients_are_reported(case):
    x = torch.tensor([[0.2, 0.5], [0.8, 0.5], [0.9, 0.3]])
    y, ball = torch.ones(3, dtype=torch.long), ThreatModel("linf", 0.05)
    with pytest.warns(UserWarning, match=f"{type(case.attack).__name__} met NaN gradients on 1 of 3 examples"):
        found = case.attack(Fragile(), x, y, ball)
    assert ball.contains(found, x).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.attack(Fragile(), x[1:], y[1:], ball)


# --- refusals ----------------------------------------------------------------------------------------------


@every
def test_wrong_batches_are_refused(case):
    mixture, x, y = disagreeing_mixture("linear")
    for bad_x, bad_y, message in [
        (x.half(), y, "float32"),
        ((255 * x).to(torch.uint8), y, "float32"),
        (x, y[:-1], "labels have shape (5,): expected (6,)"),
        (x[:, 0, 0, 0], y, "expected a batch"),
        (x, y + 4, "is none of the 4 classes"),
        (x, y - 4, "is none of the 4 classes"),
        (x, y[:, None], "labels have shape (6, 1)"),
        (x, y.float(), "labels"),
        (x, y > 1, "labels"),
        # For training it is not asked, because the answer would wait for the device.
        *([(255 * x, y, "outside the box"), (x / 0, y, "not finite")] if case.attack.checks_box else []),
    ]:
        assert message in refusal(case.attack, mixture, bad_x, bad_y, LINF, error=ValueError)


@every
def test_settings_out_of_range_are_refused_by_name(case):
    for field in dataclasses.fields(case.attack):
        value = getattr(case.attack, field.name)
        wrong = {int: [-1], float: [-1.0, float("nan"), float("inf")], str: ["nonsense"]}.get(type(value), [])
        for bad in wrong:
            message = refusal(replace, case.attack, error=ValueError, **{field.name: bad})
            assert message.startswith((field.name, f"unknown {field.name} 'nonsense': choose one of")), message
