"""Answers that are not there are wrong, and labels are class numbers: the same in every public face."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from builders.refusals import refusal
from mixadv.attacks import ARC, PGD, AttackSuite, Square, SubsetAttack
from mixadv.correctness import as_labels, check_classes, correct
from mixadv.evaluation import curves, distrust, evaluate, flags_of_record
from mixadv.losses import ZeroOne, cross_entropy, zero_one
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.threat_model import ThreatModel

WEIGHTS = [0.5, 0.2, 0.3]
BALL = ThreatModel("linf", 0.02)
NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
INTEGERS = pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)


class Gap(nn.Module):
    """A linear classifier whose logit of `column` is `value` for images brighter than `level`."""

    def __init__(self, seed, level, value, column):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.net = nn.Linear(12, 4)
        for parameter in self.net.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.level, self.value, self.column = level, value, column

    def forward(self, x):
        bright = x.flatten(1).mean(1, keepdim=True) > self.level
        hole = bright & (torch.arange(4) == self.column)
        return torch.where(hole, self.value, self.net(x.flatten(1)))


def bright_and_dark(count=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 3, 2, 2, generator=generator)
    # Half of the images are bright; shifted apart, so that no point of the ball changes that.
    x = 0.4 * x + torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, 0.55, 0.05)
    return x, torch.randint(4, (count,), generator=generator)


def mixture_with_gaps(value):
    """Member 0 answers everything, member 1 nothing bright, member 2 not even dark images."""
    return Mixture([Gap(0, 2.0, value, 0), Gap(1, 0.5, value, 1), Gap(2, -1.0, value, 3)], WEIGHTS).eval()


def by_hand(mixture, x, y):
    """Whether each member is right, in loops; the members' finite logits come from their inner networks."""
    right = np.zeros((3, len(x)), dtype=bool)
    for k, member in enumerate(mixture.members):
        for i, image in enumerate(x):
            scores = (member.net.weight @ image.flatten() + member.net.bias).tolist()
            gap = float(image.mean()) > member.level
            right[k, i] = not gap and max(range(4), key=scores.__getitem__) == int(y[i])
    return right


@NOT_FINITE
@pytest.mark.filterwarnings("ignore:.*NaN gradients")
def test_members_without_an_answer_are_wrong_in_every_face(value):
    mixture = mixture_with_gaps(value)
    x, y = bright_and_dark()
    # Labels at which argmax would land on the hole, too: NaN and +inf are argmax's answer.
    y[::5] = 1
    right = by_hand(mixture, x, y)
    assert 0 < right[0].sum() < 40
    assert right[1].sum() > 0
    assert not right[1][::2].any()
    assert not right[2].any()
    lam = np.asarray(WEIGHTS)
    np.testing.assert_array_equal(correct(mixture.member_logits(x), y), right)
    np.testing.assert_allclose(mixture.expected_accuracy(x, y), lam @ right, atol=1e-12)
    np.testing.assert_array_equal(zero_one(mixture.member_logits(x), y), 1 - right)
    game = MixtureGame(mixture, x, y, BALL, [PGD(2)], ZeroOne())
    np.testing.assert_array_equal(game.member_losses(x), 1 - right)
    record = evaluate(mixture, [(x[:25], y[:25]), (x[25:], y[25:])], {"square": Square(5)}, BALL)
    np.testing.assert_array_equal(record.clean, right)
    bright = np.arange(40) % 2 == 0
    np.testing.assert_array_equal(record.unanswered["clean"], np.stack([0 * bright, bright, np.ones(40)]))
    assert (record.worst_case() <= lam @ right + 1e-12).all()
    # Member 2 takes part everywhere. Its -inf is a probability of 0; with NaN and +inf there is no average.
    probabilities = mixture.member_logits(x).detach().double().softmax(-1).numpy()
    average = np.einsum("k,kbc->bc", lam, probabilities)
    twin = (average.argmax(1) == y.numpy()) & (value == -math.inf)
    np.testing.assert_array_equal(mixture.ensemble_accuracy(x, y), twin)
    np.testing.assert_array_equal(record.ensemble_clean, twin)
    both = curves(mixture, x, y, BALL)
    assert math.isfinite(both["steps"]["members"][0][0])
    assert both["steps"]["members"][2][0] is None
    json.dumps(both, allow_nan=False)
    found = both["eps"]
    assert found["mixture"][0] == pytest.approx((lam @ right).mean())
    assert found["members"][0][0] == pytest.approx(right[0].mean())
    assert found["members"][2] == [0.0] * 7
    assert found["averaged_twin"][0] == pytest.approx(twin.mean())


@NOT_FINITE
def test_a_drawn_member_without_an_answer_gives_no_label(value):
    mixture = mixture_with_gaps(value)
    x, y = bright_and_dark()
    drawn = mixture.sample_members(40, torch.Generator().manual_seed(5))
    labels = mixture.predict(x, torch.Generator().manual_seed(5))
    right = by_hand(mixture, x, y)
    np.testing.assert_array_equal((labels == y).numpy(), right[drawn, np.arange(40)])
    assert (labels[drawn == 2] == -1).all()
    assert (labels[drawn == 0] >= 0).all()


def test_a_member_that_is_never_drawn_has_no_say_in_the_average():
    mixture = mixture_with_gaps(math.nan)
    x, _ = bright_and_dark()
    alone = Mixture([mixture.members[0]])
    mixture.set_weights([1.0, 0.0, 0.0])
    torch.testing.assert_close(mixture(x), alone(x))


@pytest.mark.parametrize("attack", [PGD(3), ARC(2), SubsetAttack(2), Square(20)], ids=lambda a: type(a).__name__)
@pytest.mark.filterwarnings("ignore:.*NaN gradients")
def test_attacks_take_points_without_an_answer_as_wrong(attack):
    """A network without any answer has no robust accuracy, whatever the label."""
    x, _ = bright_and_dark(8)
    for label in range(4):
        y = torch.full((8,), label)
        record = AttackSuite({"attack": attack})(Mixture([Gap(2, -1.0, math.nan, 0)]), x, y, BALL)
        assert record.clean.tolist() == record.expected_accuracy.tolist() == [0.0] * 8


@pytest.mark.filterwarnings("ignore:.*NaN gradients")
def test_the_flag_counts_images_of_each_member():
    mixture = mixture_with_gaps(math.nan)
    x, y = bright_and_dark()
    record = evaluate(mixture, [(x, y)], {"square": Square(5)}, BALL)
    (flag,) = flags_of_record(record)
    assert flag.name == "non-finite-logits"
    assert "member 1: logits that are not finite on 20 clean images, and at some measured point of 20 of 40" in (
        flag.evidence
    )
    assert "member 2: logits that are not finite on 40 clean images" in flag.evidence
    assert "member 0" not in flag.evidence
    assert "non-finite-logits" in [one.name for one in distrust(mixture, x, y, BALL, record)]
    sound = Mixture([mixture.members[0]])
    assert flags_of_record(evaluate(sound, [(x, y)], {"square": Square(5)}, BALL)) == []


def test_an_attack_that_finds_the_gap_is_told_apart_from_clean_images():
    """No clean image lies in the gap; the points of the attack do."""
    x, y = bright_and_dark()
    mean = float(x[::2].mean((1, 2, 3)).max())
    brighter = mixture_with_gaps(math.nan).members[0]
    brighter.level = mean + 0.005

    def up(mixture, x, y, threat_model, generator):
        return threat_model.project(x + threat_model.eps, x)

    record = evaluate(Mixture([brighter]), [(x, y)], {"up": up}, BALL)
    lost = (x + 0.02).mean((1, 2, 3)) > brighter.level
    assert 0 < lost.sum() < 20
    np.testing.assert_array_equal(record.unanswered["up"][0], lost)
    assert not record.found["up"][0][lost].any()
    (flag,) = flags_of_record(record)
    assert f"on 0 clean images, and at some measured point of {int(lost.sum())} of 40 images" in flag.evidence


# --- labels ------------------------------------------------------------------------------------------------


@INTEGERS
def test_labels_of_any_integer_type_mean_the_same(dtype):
    mixture = mixture_with_gaps(0.0)
    x, y = bright_and_dark(10)
    assert as_labels(y.to(dtype), 10).dtype == torch.long
    for call in (
        lambda y: PGD(2)(mixture, x, y, BALL, torch.Generator().manual_seed(0)),
        lambda y: AttackSuite({"pgd": PGD(2)})(mixture, x, y, BALL).expected_accuracy,
        lambda y: mixture.expected_accuracy(x, y),
        lambda y: mixture.ensemble_accuracy(x, y),
        lambda y: torch.tensor(curves(mixture, x, y, BALL)["eps"]["mixture"]),
        lambda y: MixtureGame(mixture, x, y, BALL, [PGD(2)], ZeroOne()).member_losses(x),
        lambda y: torch.from_numpy(evaluate(mixture, [(x, y)], {"pgd": PGD(2)}, BALL).worst_case()),
    ):
        torch.testing.assert_close(call(y.to(dtype)), call(y), rtol=0, atol=0)


FACES = {
    "expected_accuracy": lambda mixture, x, y: mixture.expected_accuracy(x, y),
    "ensemble_accuracy": lambda mixture, x, y: mixture.ensemble_accuracy(x, y),
    "suite": lambda mixture, x, y: AttackSuite({"pgd": PGD(2)})(mixture, x, y, BALL),
    "evaluate": lambda mixture, x, y: evaluate(mixture, [(x, y)], {"pgd": PGD(2)}, BALL),
    "curves": lambda mixture, x, y: curves(mixture, x, y, BALL),
    "distrust": lambda mixture, x, y: distrust(mixture, x, y, BALL),
    "game": lambda mixture, x, y: MixtureGame(mixture, x, y, BALL, [PGD(2)], ZeroOne()),
}


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_labels_that_are_no_classes_are_refused_in_one_sentence(face):
    mixture = mixture_with_gaps(0.0)
    x, y = bright_and_dark(10)
    for bad, message in [
        (y + 4, "is none of the 4 classes, which are numbered from 0 to 3"),
        (y - 4, "is none of the 4 classes"),
        (y[:, None], "labels have shape (10, 1): expected (10,)"),
        (y[:7], "labels have shape (7,)"),
        (y.float(), "labels are torch.float32"),
        (y > 1, "labels are torch.bool"),
        (y.tolist(), "labels are a list"),
    ]:
        said = refusal(face, mixture, x, bad, error=ValueError)
        assert message in said
        assert "\n" not in said


def test_losses_refuse_labels_that_are_no_classes():
    logits = torch.zeros(3, 5, 4)
    for loss in (cross_entropy, zero_one):
        assert "label 4 is none" in refusal(loss, logits, torch.tensor([0, 1, 2, 3, 4]), error=ValueError)
        assert "label -1 is none" in refusal(loss, logits, torch.tensor([0, 1, -1, 3, 0]), error=ValueError)
    check_classes(torch.zeros(0, dtype=torch.long), 4)
