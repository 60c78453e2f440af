"""The suite on a batch: the minimum over everything found, by hand and against the test loop."""

import numpy as np
import pytest
import torch
from torch import nn

from builders.networks import WEIGHTS
from mixadv.attacks import APGD, ARC, PGD, AttackSuite, Square, SubsetAttack, UniformNoise
from mixadv.attacks.suite import passes_of
from mixadv.errors import UserError
from mixadv.mixture import Mixture
from mixadv.seeding import derive_seed
from mixadv.shipped import protocols
from mixadv.threat_model import ThreatModel

BALL = ThreatModel("linf", 0.15)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(2)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3)]
    for member in members:
        for parameter in member.parameters():
            parameter.data.mul_(3)
    mixture = Mixture(members, WEIGHTS)
    x = torch.rand(40, 3, 2, 2)
    with torch.no_grad():
        y = mixture(x).argmax(1)
    return mixture, x, y


def accuracy(mixture, x, y):
    with torch.no_grad():
        right = torch.stack([member(x).argmax(1) == y for member in mixture.members]).double()
    return torch.tensor(WEIGHTS, dtype=torch.float64) @ right


ATTACKS = {"noise": UniformNoise(2), "pgd-5": PGD(5), "subsets": SubsetAttack(4)}


def test_the_result_is_the_minimum_over_all_points_of_all_passes(problem):
    mixture, x, y = problem
    record = AttackSuite(ATTACKS)(mixture, x, y, BALL, seed=3)
    parts = ("member 0", "member 1", "member 2", "averaged twin")
    assert list(record.by_attack) == [*ATTACKS, *(f"pgd-5 on {part}" for part in parts)]
    values = {"clean": accuracy(mixture, x, y), **record.by_attack}
    torch.testing.assert_close(record.clean, values["clean"], rtol=0, atol=1e-6)
    table = torch.stack(list(values.values()))
    torch.testing.assert_close(record.expected_accuracy, table.amin(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(accuracy(mixture, record.x_adv, y), record.expected_accuracy, rtol=0, atol=1e-6)
    assert BALL.contains(record.x_adv, x).all()
    names = list(values)
    for i, name in enumerate(record.found_by):
        first = next(key for key in names if abs(values[key][i] - table[:, i].min()) < 1e-6)
        assert name == first
    assert 0 < record.expected_accuracy.mean() < record.clean.mean()
    assert len(set(record.found_by)) > 2


def test_every_pass_is_the_attack_called_by_hand_on_its_target(problem):
    mixture, x, y = problem
    record = AttackSuite({"pgd-5": PGD(5)})(mixture, x, y, BALL, seed=3)
    targets = {"mixture": mixture, "member 1": Mixture([mixture.members[1]]), "averaged twin": Mixture([mixture])}
    for against, target in targets.items():
        generator = torch.Generator().manual_seed(derive_seed(3, "pgd-5", against, 0))
        points = PGD(5)(target, x, y, BALL, generator)
        key = "pgd-5" if against == "mixture" else f"pgd-5 on {against}"
        torch.testing.assert_close(record.by_attack[key], accuracy(mixture, points, y), rtol=0, atol=1e-6)


def test_another_attack_never_raises_the_result_and_disturbs_nobody(problem):
    mixture, x, y = problem
    few = AttackSuite({"pgd-5": PGD(5)})(mixture, x, y, BALL)
    many = AttackSuite({"noise": UniformNoise(3), "pgd-5": PGD(5), "arc": ARC(5), "square": Square(20)})(
        mixture, x, y, BALL
    )
    assert (many.expected_accuracy <= few.expected_accuracy).all()
    for key, values in few.by_attack.items():
        assert torch.equal(many.by_attack[key], values)


def test_a_single_model_meets_each_attack_once(problem):
    mixture, x, y = problem
    record = AttackSuite(ATTACKS)(mixture.members[0], x, y, BALL)
    assert list(record.by_attack) == list(ATTACKS)
    assert set(record.expected_accuracy.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", protocols())
def test_the_shipped_protocols_are_suites(name):
    suite = AttackSuite.from_protocol(name)
    assert suite.name == name
    for key, attack in suite.attacks.items():
        # The name of an attack begins with its algorithm: pgd-20, apgd-ce, subsets.
        assert key.split("-")[0].rstrip("s") in type(attack).__name__.lower()


@pytest.mark.parametrize(
    ("name", "attack", "expected"),
    [("fast", "pgd-20", PGD), ("strict", "square", Square), ("strict", "arc", ARC), ("study", "apgd-dlr", APGD)],
)
def test_what_a_shipped_protocol_holds(name, attack, expected):
    assert isinstance(AttackSuite.from_protocol(name).attacks[attack], expected)


def test_the_paper_protocol_is_the_papers():
    attacks = AttackSuite.from_protocol("paper").attacks
    assert {(key, a.loss, a.num_steps, a.restarts) for key, a in attacks.items()} == {
        ("apgd-ce", "ce", 100, 5),
        ("apgd-dlr", "dlr", 100, 5),
    }


def test_an_unknown_protocol_is_refused():
    with pytest.raises(UserError, match=f"choose one of {', '.join(protocols())}"):
        AttackSuite.from_protocol("gentle")


def test_what_is_no_suite_is_refused(problem):
    with pytest.raises(ValueError, match="at least one attack"):
        AttackSuite({})
    with pytest.raises(ValueError, match="attack pgd is 3"):
        AttackSuite({"pgd": 3})
    with pytest.raises(ValueError, match="another name"):
        AttackSuite({"clean": PGD(5)})
    mixture, x, y = problem

    def cheat(mixture, x, y, threat_model, generator):
        return x + 0.5

    with pytest.raises(RuntimeError, match="attack cheat left the threat model at example 0"):
        AttackSuite({"cheat": cheat})(mixture, x, y, ThreatModel("linf", 0.15, None))


def test_weights_of_others_are_passes_too(problem):
    mixture, _, _ = problem
    found = {one.key: one for one in passes_of({"arc": ARC(2)}, mixture, [[0.1, 0.1, 0.8]])}
    assert list(found) == ["arc", "arc on other weights 0"]
    np.testing.assert_allclose(found["arc on other weights 0"].target.weights, [0.1, 0.1, 0.8])
    assert found["arc"].target is mixture


def test_seeds_are_the_same_everywhere_and_share_nothing():
    assert derive_seed(0, "pgd-5", "mixture", 0) == 713071104648220752
    seeds = {derive_seed(*parts) for parts in [(0, 1), (1, 0), (0, "1"), ("0", 1), (0, 1, ""), (1,), (0,)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
