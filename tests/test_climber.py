"""The climber on sets of members: exact optima of linear members, its cost, its starts, and where it runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from builders.data import digits_tensors, seeded
from builders.linear_problems import ManyLinearMembers
from builders.networks import untrained_members
from mixadv.attacks import ARC, PGD, AttackSuite, LatticeClimber, SubsetAttack
from mixadv.attacks.suite import passes_of
from mixadv.evaluation import distrust
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import linear_mixture

BALL = ThreatModel("linf", 1.0, None)


def opposite_pairs(pairs, count, seed=0, decades=0.0):
    """2 pairs members in `pairs` dimensions: of each pair one is fooled where x_j > 0.5, the other where x_j < -0.5.

    A point fools at most one of each pair, and any choice can be fooled together. So the least expected accuracy is the
    sum of the lighter weights, and 3^pairs patterns occur.
    """
    random = np.random.default_rng(seed)
    W = np.kron(np.eye(pairs), [[1.0], [-1.0]])
    scale = 10 ** random.uniform(-decades / 2, decades / 2, 2 * pairs)
    lam = random.dirichlet(np.ones(2 * pairs))
    mixture = linear_mixture(scale[:, None] * W, -0.5 * scale, lam)
    x = torch.as_tensor(random.uniform(-0.2, 0.2, (count, pairs)))
    least = lam.reshape(pairs, 2).min(1).sum()
    return mixture, x, torch.zeros(count, dtype=torch.long), least


def test_it_comes_close_to_the_one_best_choice_among_sixteen_members():
    mixture, x, y, least = opposite_pairs(8, 10, decades=6.0)
    reached = {}
    for name, attack in {"climber": LatticeClimber(300), "subsets": SubsetAttack(20)}.items():
        found = attack(mixture, x, y, BALL, seeded())
        assert BALL.contains(found, x).all()
        reached[name] = mixture.expected_accuracy(found, y).numpy()
        assert (reached[name] >= least - 1e-9).all()
    print({name: f"{100 * (part.mean() - least):.2f} points above" for name, part in reached.items()})
    assert reached["climber"].mean() < least + 0.03
    assert reached["subsets"].mean() > least + 0.04


@pytest.mark.parametrize(("L", "d", "norm", "eps"), [(4, 20, "linf", 0.1), (8, 24, "linf", 0.1), (8, 24, "l2", 0.3)])
def test_it_comes_close_to_the_exact_optimum_of_linear_members(L, d, norm, eps):
    problem = ManyLinearMembers(L, d, norm, eps, 10, seed=5)
    ball = problem.threat_model
    found = LatticeClimber(200)(problem.mixture, problem.x, problem.y, ball, seeded())
    assert ball.contains(found, problem.x).all()
    above = problem.mixture.expected_accuracy(found, problem.y).numpy() - problem.best
    assert above.mean() < 0.015


def test_the_scale_of_a_members_logits_does_not_matter():
    plain, x, y, _ = opposite_pairs(4, 15)
    scaled = opposite_pairs(4, 15, decades=6.0)[0]
    scaled.set_weights(plain.weights)
    reached = [m.expected_accuracy(LatticeClimber(60)(m, x, y, BALL, seeded()), y) for m in (plain, scaled)]
    torch.testing.assert_close(reached[0], reached[1])


def test_it_begins_at_the_points_of_others():
    mixture, x, y, least = opposite_pairs(8, 6, seed=2)
    signs = torch.as_tensor(np.where(mixture.weights.numpy().reshape(8, 2).argmax(1) == 0, 1.0, -1.0))
    best = (0.6 * signs).expand(6, -1).clone()
    short = LatticeClimber(1)
    alone = mixture.expected_accuracy(short(mixture, x, y, BALL, seeded()), y)
    assert (alone > least + 0.01).all()
    for starts in (best, torch.stack([x, best])):
        found = short(mixture, x, y, BALL, seeded(), starts=starts)
        np.testing.assert_allclose(mixture.expected_accuracy(found, y), least, atol=1e-9)


def test_better_starts_are_climbed_from():
    """Seven of eight pairs are won at the start; only the eighth is left."""
    mixture, x, y, least = opposite_pairs(8, 6, seed=2)
    signs = torch.as_tensor(np.where(mixture.weights.numpy().reshape(8, 2).argmax(1) == 0, 1.0, -1.0))
    almost = (0.6 * signs).expand(6, -1).clone()
    almost[:, 3] = 0.0
    found = LatticeClimber(150)(mixture, x, y, BALL, seeded(), starts=almost)
    reached = mixture.expected_accuracy(found, y)
    assert (reached < mixture.expected_accuracy(almost, y) - 1e-6).all()
    assert (reached <= least + 1e-9).double().mean() >= 0.5


@pytest.mark.parametrize("count", [3, 9])
def test_the_cost_is_linear_in_the_members(count):
    """At most num_steps + 4 forward and num_steps + 1 backward passes of each member for each image."""
    x, y = (part[:8] for part in digits_tensors()[2:])
    mixture = Mixture(untrained_members(count, "small_cnn", seed=4, width=2))
    with torch.no_grad():
        y = mixture.eval().member_logits(x).argmax(-1)[0]
    images = {"forward": 0, "backward": 0}

    def seen(member, inputs, logits):
        images["forward"] += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: images.__setitem__("backward", images["backward"] + len(gradient)))

    for member in mixture.members:
        member.register_forward_hook(seen)
    # The ball is too small to fool everybody, which would end the work.
    LatticeClimber(30)(mixture, x, y, ThreatModel("linf", 1e-4), seeded())
    assert 30 * count * 8 <= images["forward"] <= (30 + 4) * count * 8
    assert 0 < images["backward"] <= (30 + 1) * count * 8
    assert images["backward"] < images["forward"]


def test_members_that_no_image_pulls_are_not_differentiated():
    """Members that are fooled everywhere belong to every pattern, but no set needs to pull them."""
    W = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    mixture = linear_mixture(W, [-0.5, -2.0, 1.0], [0.3, 0.6, 0.1])
    x, y = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    asked = []
    mixture.members[2].register_forward_hook(lambda module, inputs, output: asked.append(output.requires_grad))
    found = LatticeClimber(40)(mixture, x, y, BALL, seeded())
    np.testing.assert_allclose(mixture.expected_accuracy(found, y), 0.6)
    assert len(asked) > 20
    assert sum(asked) < len(asked) / 2


# --- where it runs -----------------------------------------------------------------------------------------


def test_it_runs_after_all_others():
    mixture = opposite_pairs(2, 1)[0]
    attacks = {"climber": LatticeClimber(5), "pgd": PGD(2), "subsets": SubsetAttack(2)}
    keys = [one.key for one in passes_of(attacks, mixture, [[0.1, 0.2, 0.3, 0.4]])]
    assert len(keys) == len(set(keys)) == 3 + 5 + 3
    assert keys[-2:] == ["climber", "climber on other weights 0"]


def test_in_a_suite_it_never_ends_above_the_others():
    mixture, x, y, _ = opposite_pairs(4, 12, seed=3)
    suite = AttackSuite({"climber": LatticeClimber(2), "arc": ARC(10), "subsets": SubsetAttack(10)})
    record = suite(mixture, x, y, BALL)
    others = torch.stack([record.by_attack[name] for name in ("arc", "subsets")]).amin(0)
    assert (record.by_attack["climber"] <= others).all()
    assert others.mean() < record.clean.mean()


def noted(members, attacks):
    mixture, x, y, _ = opposite_pairs(members // 2, 12)
    if members % 2:
        weights = [0.0, *[1 / members] * members]
        mixture, x, y, _ = opposite_pairs((members + 1) // 2, 12)
        mixture.set_weights(weights)
    flags = distrust(mixture, x, y, BALL, attacks=attacks)
    return [flag.evidence for flag in flags if flag.name == "search-not-exhaustive"]


def test_a_note_says_how_far_a_search_over_sets_went():
    both = {"sub": SubsetAttack(), "climb": LatticeClimber(100, steps_per_set=19)}
    assert noted(6, both) == [
        "of the 63 sets of 6 members sub tried 15, climb at least 5, chosen for each image that can get worse."
    ]
    # Members of weight 0 do not count.
    assert noted(5, {"climb": both["climb"]})[0].startswith("of the 31 sets of 5 members climb at least 5")
    assert noted(4, both) == []
    assert noted(6, {"all": SubsetAttack(max_subsets=63), **both}) == []
    assert noted(6, {"arc": ARC()}) == []


def test_every_image_is_searched_at_least_so_often():
    """Where nothing can be fooled, a set ends after its steps: the number of the note is reached exactly."""
    mixture, x, y, _ = opposite_pairs(3, 2)
    attack, sampled = LatticeClimber(49, steps_per_set=4), []
    ball = ThreatModel("linf", 0.1, None)

    class Counting(ThreatModel):
        def random_start(self, x, generator=None):
            sampled.append(len(x))
            return super().random_start(x, generator)

    attack(mixture, x, y, Counting(ball.norm, ball.eps, None), seeded())
    assert attack.searches == len(sampled) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"steps_per_set": 0}, "steps_per_set"),
        ({"step_size": 0.0}, "step_size"),
        ({"momentum": 1.0}, "momentum is 1.0: it must be at least 0 and below 1"),
        ({"kappa": float("inf")}, "kappa"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(LatticeClimber(), **settings)
