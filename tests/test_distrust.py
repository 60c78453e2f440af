"""Broken defences raise the flags that fit, sound models raise none, and thresholds lie where they are said to lie."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from broken_defences import (
    BALL,
    BROKEN,
    CARELESS,
    SOUND,
    First,
    Then,
    evaluated_defence,
    images_for,
    measured_on,
    natural,
    robust,
)
from builders.networks import Step
from mixadv.attacks.subsets import SubsetAttack
from mixadv.evaluation import EvaluationRecord
from mixadv.evaluation.distrust import CHECKS_OF_RECORD, FLAGS, checks_made, distrust, flags_above
from mixadv.mixture import Mixture
from mixadv.report.page import CHECKS
from mixadv.results import CeilingRow
from mixadv.threat_model import ThreatModel

NAMES = [
    *("non-finite-logits", "zero-gradients", "saturated-logits", "probabilities", "random-outputs", "batch-dependent"),
    *("black-box-beats-white-box", "noise-beats-pgd", "more-steps-do-not-hurt", "larger-eps-does-not-hurt"),
    *("ce-and-dlr-disagree", "white-box-attacks-disagree", "robust-above-clean", "survives-grey"),
    *("above-the-ceiling", "search-not-exhaustive"),
]

# What each must raise at least; what else it raises is true of it as well.
FITTING = {
    "rounded logits": {
        *("zero-gradients", "black-box-beats-white-box", "more-steps-do-not-hurt", "survives-grey"),
    },
    "quantised input": {"zero-gradients", "black-box-beats-white-box", "noise-beats-pgd", "survives-grey"},
    "logits times 10,000": {"ce-and-dlr-disagree"},
    "noise on the input": {"random-outputs"},
    "noise on the weights": {"random-outputs"},
    "softmax": {"probabilities"},
    "train-mode batch norm": {"batch-dependent"},
    "wrong normalisation": {"ce-and-dlr-disagree"},
    "label in the margin": {"survives-grey"},
    "tanh of the logits": {"saturated-logits"},
    "mild tanh of the logits": {"saturated-logits"},
    "tanh of the logits, tiny": {"saturated-logits", "ce-and-dlr-disagree"},
    "detached where sure": {"black-box-beats-white-box"},
    "k winners take all": {"black-box-beats-white-box"},
    "rounded frequencies": {"zero-gradients", "black-box-beats-white-box", "survives-grey"},
    "misleading gradient": {"black-box-beats-white-box", "more-steps-do-not-hurt", "survives-grey"},
}
# Flags that compare attacks which protocol=fast does not have, and the one that sees there what they see.
NOT_IN_FAST = {"noise-beats-pgd"}
IN_FAST = {"ce-and-dlr-disagree": "white-box-attacks-disagree"}
# Flags about gradients say nothing about members that have good ones.
NOT_FITTING = {
    "softmax": {"zero-gradients", "random-outputs", "batch-dependent"},
    "train-mode batch norm": {"zero-gradients", "random-outputs", "probabilities"},
    "noise on the input": {"zero-gradients", "batch-dependent", "probabilities"},
    "label in the margin": {"zero-gradients"},
}


@cache
def sound(name):
    """The sound model of that name, trained once."""
    return SOUND[name]()


def flags(mixture, images=None, record=None, ball=BALL, **options):
    """Name -> evidence."""
    x, y = measured_on() if images is None else images
    mixture = mixture if isinstance(mixture, Mixture) else Mixture([mixture])
    raised = distrust(mixture, x, y, ball, record, **options)
    assert [flag.remedy for flag in raised] == [FLAGS[flag.name] for flag in raised]
    return {flag.name: flag.evidence for flag in raised}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_defences_raise_a_flag_that_fits(name):
    images = images_for(name)
    mixture = Mixture([BROKEN[name]()])
    found = flags(mixture, images, evaluated_defence(mixture, images))
    assert set(found) >= FITTING[name], found
    assert not set(found) & NOT_FITTING.get(name, set()), found
    assert list(found) == [one for one in NAMES if one in found]
    for evidence in found.values():
        assert re.search(r"\d", evidence), evidence
        assert evidence.endswith(".")
        assert "\n" not in evidence


@pytest.mark.parametrize("name", BROKEN)
def test_broken_defences_raise_a_flag_in_the_default_protocol(name):
    images = images_for(name)
    mixture = Mixture([BROKEN[name]()])
    found = flags(mixture, images, evaluated_defence(mixture, images, "fast"))
    assert set(found) >= {IN_FAST.get(flag, flag) for flag in FITTING[name] - NOT_IN_FAST}, found


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_broken_defences_raise_a_flag_in_the_strict_protocol(name):
    images = images_for(name)
    mixture = Mixture([BROKEN[name]()])
    record = evaluated_defence(mixture, images, "strict")
    found = flags(mixture, images, record)
    print(name, f"{record.worst_case().mean():.1%}", list(found))
    assert set(found) >= FITTING[name], found


@pytest.mark.parametrize("attacks", [None, "fast", pytest.param("strict", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SOUND)
def test_sound_models_raise_no_flag(name, attacks):
    mixture = sound(name)
    assert flags(mixture, record=evaluated_defence(mixture, attacks=attacks)) == {}


@pytest.mark.parametrize("name", ["very sure", "logits times 10,000", "wrong normalisation"])
def test_cross_entropy_alone_is_not_enough_against_those_who_are_very_sure(name):
    mixture = SOUND[name]() if name in SOUND else Mixture([BROKEN[name]()])
    record = evaluated_defence(mixture, attacks=CARELESS)
    found = flags(mixture, record=record)
    assert set(found) == {"zero-gradients"}
    assert "cross-entropy" in found["zero-gradients"]
    # The gradient of the margin is sound, and without a record nobody has relied on the other.
    assert flags(mixture) == {}
    # Where no image survives there is nothing to overstate.
    record.found["pgd-20"][:] = 0
    assert flags(mixture, record=record) == {}


def test_the_member_without_gradient_is_named():
    stepped = First(natural(1), lambda x: (x * 4).round() / 4)
    found = flags(Mixture([natural(), stepped, robust()], [0.3, 0.3, 0.4]))
    assert found["zero-gradients"].startswith("member 1: ")
    assert "member 1: " in found["more-steps-do-not-hurt"]
    assert not any(f"member {k}:" in evidence for evidence in found.values() for k in (0, 2))


def test_random_and_batch_dependent_members_are_named():
    class Centred(nn.Module):
        def forward(self, z):
            return z - z.mean(0)

    noisy = Then(natural(), nn.Dropout(0.5))
    noisy.f.train = lambda mode=True: noisy.f
    found = flags(Mixture([robust(), nn.Sequential(natural(), Centred()), noisy], [0.3, 0.3, 0.4]))
    assert found["random-outputs"].startswith("member 2: ")
    assert "still in train mode: 2.f" in found["random-outputs"]
    assert found["batch-dependent"].startswith("member 1: ")


class Backwards(nn.Module):
    """The image, but its gradient points the other way."""

    def forward(self, x):
        return 2 * x.detach() - x


def test_a_gradient_that_misleads_is_found_by_its_steps():
    found = flags(nn.Sequential(Backwards(), natural()))
    assert set(found) == {"more-steps-do-not-hurt", "larger-eps-does-not-hurt", "survives-grey"}


def test_members_that_cannot_be_differentiated_are_not_climbed():
    x = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    found = flags(Step(), (x, (x[:, 0] > 0.5).long()))
    assert "zero-gradients" in found
    assert "100.0%" in found["zero-gradients"]


# --- thresholds, on a linear model whose gradient is known -----------------------------------------------------


def points(count=60, classes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 4, generator=generator), torch.arange(count) % classes


class Linear(nn.Module):
    """logits = offset + slope W x, in float32."""

    def __init__(self, slope=1.0, offset=0.0):
        super().__init__()
        W = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
        self.W, self.slope, self.offset = nn.Parameter(W), slope, offset

    def forward(self, x):
        return self.offset + self.slope * (x @ self.W.T)


@pytest.mark.parametrize(
    ("slope", "offset", "vanishes"),
    [(1.0, 0.0, False), (1e-12, 0.0, False), (1e4, 0.0, False), (1.0, 1e3, False), (1e-7, 1.0, True), (0.0, 1.0, True)],
)
def test_a_gradient_vanishes_relative_to_the_rounding_of_the_logits(slope, offset, vanishes):
    """What counts is whether the logits can be seen to move, not how large they are."""
    assert ("zero-gradients" in flags(Linear(slope, offset), points())) is vanishes


@pytest.mark.parametrize(("without", "flagged"), [(3, False), (4, True)])
def test_more_than_five_percent_must_be_without_gradient(without, flagged):
    class Sometimes(Linear):
        def forward(self, x):
            z = super().forward(x)
            # The last coordinate is 0.9 or 0.2, and the ball small.
            return torch.where(x[:, 3:] > 0.75, z.detach(), z)

    x, y = points(60)
    x[:, 3] = 0.2
    x[:without, 3] = 0.9
    assert ("zero-gradients" in flags(Sometimes(), (x, y), ball=ThreatModel("linf", 0.05))) is flagged


class Slopes(nn.Module):
    """Four logits, each a coordinate times a slope of its own, plus the same large number for all."""

    def __init__(self, slope):
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([slope, slope, slope, 1.0]))

    def forward(self, x):
        return self.slopes * x + 100 * x.sum(1, keepdim=True)


@pytest.mark.parametrize(("slope", "flagged"), [(0.08, False), (0.06, True), (0.0, True), (1.0, False)])
def test_logits_saturate_where_gradients_of_classes_differ_tenfold(slope, flagged):
    """For label 0 the gradients of f_c - f_0 have norms sqrt(2) slope and sqrt(1 + slope^2)."""
    found = flags(Slopes(slope), points(60, 4))
    assert ("saturated-logits" in found) is flagged
    if flagged:
        assert found["saturated-logits"].startswith("member 0: on 75.0% of the images")


@pytest.mark.parametrize(("small", "flagged"), [(15, False), (16, True)])
def test_a_quarter_of_the_images_may_be_saturated(small, flagged):
    x, y = points(60)
    y = torch.where(torch.arange(60) < small, y, 3)
    assert ("saturated-logits" in flags(Slopes(0.01), (x, y))) is flagged


def test_members_of_two_classes_have_no_classes_to_compare():
    class Two(Linear):
        def forward(self, x):
            return torch.tanh(20 * super().forward(x)[:, :2])

    x, y = points(60, 2)
    assert "saturated-logits" not in flags(Two(), (x, y))


@pytest.mark.parametrize(("noise", "flagged"), [(0.003, False), (0.05, True)])
def test_outputs_may_move_by_rounding_and_no_more(noise, flagged):
    class Noisy(nn.Module):
        def forward(self, x):
            z = natural()(x)
            spread = (z.amax(1) - z.amin(1))[:, None]
            return z + noise * spread * torch.randn(len(z), 1).clamp(-1, 1) * torch.eye(10)[0]

    assert ("random-outputs" in flags(Noisy())) is flagged


def test_tiny_balls_raise_no_flag():
    """Accuracy cannot fall where no image is near a boundary, but the loss rises."""
    assert flags(natural(), ball=ThreatModel("linf", 1e-4)) == {}
    assert flags(natural(), ball=ThreatModel("l2", 0.3)) == {}
    assert flags(natural(), ball=ThreatModel("linf", 0.0)) == {}


def test_without_a_box_nothing_is_grey():
    found = flags(First(natural(), lambda x: x.round()), ball=ThreatModel("linf", 0.1, None))
    assert "zero-gradients" in found
    assert "survives-grey" not in found


def test_grey_is_where_the_largest_class_is_all_one_can_have():
    class Remembers(nn.Module):
        """Answers by the place in the batch where all images are the same."""

        def forward(self, x):
            same = x.flatten(1).std(1, keepdim=True) == 0
            return natural()(x) + same * 1e3 * nn.functional.one_hot(y[: len(x)], 10)

    x, y = measured_on()
    found = flags(Remembers(), ball=BALL)
    share = np.bincount(y).max() / len(y)
    assert "100.0% at constant grey" in found["survives-grey"]
    assert f"at most {share:.1%}" in found["survives-grey"]
    # Nine in ten of one class: always answering with it is no cheating.
    assert "survives-grey" not in flags(nn.Sequential(natural(), Always()), (x, torch.full_like(y, 3)))


class Always(nn.Module):
    """Adds so much to class 3 that it always wins."""

    def forward(self, z):
        return z + 1e3 * torch.eye(10)[3]


# --- contradictions in a record --------------------------------------------------------------------------------


def record(count=200, **found):
    """Two members with weights 1/4 and 3/4; pass -> (how many images both get wrong, further images member 0 does)."""
    passes = {}
    for key, (both, first) in found.items():
        correct = np.ones((2, count), dtype=np.uint8)
        correct[:, :both] = 0
        correct[0, both : both + first] = 0
        passes[key.replace("__", " on member ").replace("_", "-")] = correct
    clean = np.ones((2, count), dtype=np.uint8)
    return EvaluationRecord(
        np.array([0.25, 0.75]), np.zeros(count), clean, clean[0], passes, {key: c[0] for key, c in passes.items()}
    )


def contradictions(record):
    return flags(Linear(), points(12), record)


@pytest.mark.parametrize(
    ("found", "name", "evidence"),
    [
        ({"pgd": (50, 0), "square": (52, 0)}, None, ""),
        ({"pgd": (50, 0), "square": (53, 0)}, "black-box-beats-white-box", "square found what pgd missed on 3 of 200"),
        ({"pgd": (50, 0), "square": (50, 3)}, "black-box-beats-white-box", "3 of 200"),
        ({"pgd": (50, 0), "square": (53, 0), "subsets": (54, 0)}, None, ""),
        # What was found against a member counts for the attack.
        ({"pgd": (50, 0), "square": (53, 0), "pgd__1": (60, 0)}, None, ""),
        ({"square": (53, 0)}, None, ""),
        ({"pgd_20": (50, 0), "noise": (53, 0)}, "noise-beats-pgd", "noise found what pgd-20 missed on 3 of 200"),
        ({"pgd": (50, 0), "apgd_ce": (60, 0), "noise": (53, 0)}, "noise-beats-pgd", "3 of 200"),
        ({"apgd_ce": (50, 0), "noise": (53, 0)}, None, ""),
        ({"apgd_ce": (60, 0), "apgd_dlr": (62, 0)}, None, ""),
        # 11 images are 5.5 points, but 95 % intervals of 200 images reach further.
        ({"apgd_ce": (60, 0), "apgd_dlr": (71, 0)}, None, ""),
        (
            {"apgd_ce": (60, 0), "apgd_dlr": (90, 0)},
            "ce-and-dlr-disagree",
            "apgd-ce leave 70.0% accuracy, apgd-dlr 55.0%",
        ),
        ({"apgd_ce": (90, 0), "apgd_dlr": (60, 0)}, "ce-and-dlr-disagree", "apgd-ce leave 55.0% accuracy"),
        # A quarter of 15 points.
        ({"apgd_ce": (60, 0), "apgd_dlr": (60, 30)}, None, ""),
        ({"apgd_ce": (60, 0), "apgd_dlr": (61, 0), "apgd_dlr_targeted": (90, 0)}, None, ""),
        ({"apgd_ce": (60, 0), "apgd_dlr_targeted": (90, 0)}, "ce-and-dlr-disagree", "apgd-dlr-targeted 55.0%"),
        ({"pgd": (0, 0), "apgd_ce": (0, 0), "pgd__0": (20, 0), "apgd_ce__0": (50, 0)}, None, ""),
        (
            {"pgd": (0, 0), "apgd_ce": (0, 0), "pgd__0": (20, 0), "apgd_ce__0": (30, 24)},
            "white-box-attacks-disagree",
            "member 0: pgd leaves 90.0% accuracy, apgd-ce 73.0%.",
        ),
        # Member 1 alone is attacked by one of them only.
        ({"pgd": (0, 0), "apgd_ce": (0, 0), "pgd__1": (20, 0), "apgd_ce__0": (54, 0)}, None, ""),
        # "force" has no cross-entropy in it.
        ({"force": (60, 0), "apgd_dlr": (90, 0)}, None, ""),
    ],
)
def test_attacks_that_contradict_one_another(found, name, evidence):
    raised = contradictions(record(**found))
    assert set(raised) == ({name} if name else set())
    assert evidence in raised.get(name, "")


def test_one_image_is_no_contradiction_in_a_small_set():
    assert contradictions(record(20, pgd=(5, 0), square=(6, 0))) == {}
    assert set(contradictions(record(20, pgd=(5, 0), square=(7, 0)))) == {"black-box-beats-white-box"}


@pytest.mark.parametrize(("wrong", "flagged"), [(0, False), (3, False), (40, True)])
def test_accuracy_that_an_attack_raises(wrong, flagged):
    one = record(pgd=(0, 0))
    one.clean[:, :wrong] = 0
    raised = contradictions(one)
    assert set(raised) == ({"robust-above-clean"} if flagged else set())
    if flagged:
        assert raised["robust-above-clean"] == "clean accuracy is 80.0%, under attack it is 100.0% (pgd)."


@pytest.mark.parametrize(
    ("deterministic", "randomised", "evidence"),
    [
        # Member 0 is right on 30 % of the images, member 1 and the twin on 50 %, the mixture on 45 %.
        (0.5, 0.45, []),
        (0.5, None, []),
        (0.4, 0.45, ["member 1", "the averaged twin"]),
        (0.29, 0.44, ["member 0", "member 1", "the averaged twin", "the mixture"]),
        (None, 0.44, ["the mixture"]),
    ],
)
def test_more_than_any_classifier_can_reach_is_an_attack_that_failed(deterministic, randomised, evidence):
    one = record(pgd=(100, 40))
    one.ensemble["pgd"] = one.found["pgd"][1]
    found = flags_above(one, CeilingRow(deterministic_upper=deterministic, randomised_upper=randomised))
    assert [flag.name for flag in found] == (["above-the-ceiling"] if evidence else [])
    said = found[0].evidence if found else ""
    assert re.findall(r"(?:^|; )([\w ]+) is right at all points found", said) == evidence
    if "the mixture" in evidence:
        assert "the mixture is right at all points found on 45.0% of the images, but no mixture can be" in said


# --- manners ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_and_only_the_seed_counts():
    noisy = BROKEN["noise on the weights"]()
    mixture = Mixture([noisy]).train()
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    images = [each[:20] for each in measured_on()]
    first = flags(mixture, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in mixture.modules())
    assert all(p.requires_grad for p in mixture.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixture.state_dict().items())
    mixture.eval()
    torch.manual_seed(8)
    assert flags(mixture, images) == first
    assert flags(mixture, images, seed=1) != first


def test_no_images_are_refused():
    x, y = points(12)
    with pytest.raises(ValueError, match="no images to check"):
        distrust(Mixture([Linear()]), x[:0], y[:0], BALL)


# --- which checks were made ----------------------------------------------------------------------------------

COMPARING = {
    *("black-box-beats-white-box", "noise-beats-pgd", "ce-and-dlr-disagree", "white-box-attacks-disagree"),
    *("robust-above-clean", "above-the-ceiling", "search-not-exhaustive"),
}


@pytest.mark.parametrize(
    ("attacks", "made"),
    [
        ([], []),
        (["pgd_20"], ["robust-above-clean"]),
        (["noise", "square"], ["robust-above-clean"]),
        (["noise", "pgd_20"], ["noise-beats-pgd", "robust-above-clean"]),
        (["noise", "apgd_ce"], ["robust-above-clean"]),
        (["square", "apgd_ce"], ["black-box-beats-white-box", "robust-above-clean"]),
        (["apgd_ce", "apgd_dlr"], ["ce-and-dlr-disagree", "robust-above-clean"]),
        (["pgd_20", "pgd_20__0", "apgd_ce", "noise__0"], ["robust-above-clean"]),
        (["pgd_20", "pgd_20__1", "apgd_ce", "apgd_ce__1"], ["white-box-attacks-disagree", "robust-above-clean"]),
    ],
)
def test_a_check_is_made_where_its_attacks_ran(attacks, made):
    found = checks_made(Mixture([natural(), natural(1)]), record(**dict.fromkeys(attacks, (0, 0))), {})
    assert [name for name in found if name in COMPARING] == made
    assert [name for name in NAMES if name not in COMPARING] == [name for name in found if name not in COMPARING]


def test_sets_of_members_are_counted_where_several_can_be_drawn():
    attacks = {"subsets": SubsetAttack()}
    for weights, made in (([0.5, 0.5], True), ([0.0, 1.0], False)):
        found = checks_made(Mixture([natural(), natural(1)], weights), record(), attacks)
        assert ("search-not-exhaustive" in found) == made


def test_what_a_report_explains_are_the_checks():
    assert list(CHECKS) == NAMES
    assert set(CHECKS_OF_RECORD) <= set(NAMES)


# --- the page --------------------------------------------------------------------------------------------------


def test_every_flag_has_its_heading_and_its_remedy():
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text()
    assert list(FLAGS) == NAMES
    section = page.split("\n## Flags\n")[1].split("\n## ")[0]
    parts = dict(part.split("\n", 1) for part in section.split("\n### ")[1:])
    assert list(parts) == NAMES
    for name, text in parts.items():
        explained, remedy = " ".join(text.split()).split(" Remedy: ")
        assert remedy == FLAGS[name]
        assert len(explained.split()) > 15
