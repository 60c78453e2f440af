import itertools

import numpy as np
import pytest
import torch

from broken_defences import Then, measured_on, natural
from builders.data import digits_tensors, seeded
from builders.linear_problems import LinearByRow, LinearProblem, linear_problems
from builders.networks import WEIGHTS, trained_member, untrained_members
from mixadv.attacks import ARC, PGD, SubsetAttack
from mixadv.attacks.boundaries import nearest_boundary, squashed_at
from mixadv.attacks.subsets import heaviest_subsets
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import linear_mixture

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.3)


# --- which sets --------------------------------------------------------------------------------------------


def test_all_sets_by_decreasing_weight_where_they_fit():
    assert heaviest_subsets([0.5, 0.2, 0.3], 7) == [(0, 1, 2), (0, 2), (0, 1), (0,), (1, 2), (2,), (1,)]
    assert len(heaviest_subsets([0.25] * 4, 15)) == 15
    assert heaviest_subsets([1.0], 1) == [(0,)]


@pytest.mark.parametrize(("count", "limit"), [(5, 15), (6, 20), (9, 15), (5, 30), (7, 3)])
def test_beyond_that_the_heaviest_sets(count, limit):
    weights = np.random.default_rng(count).dirichlet(np.ones(count)).tolist()
    everything = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    heaviest = sorted(everything, key=lambda s: -sum(weights[k] for k in s))
    assert heaviest_subsets(weights, limit) == heaviest[:limit]
    assert SubsetAttack(max_subsets=limit).sets_of(count) == limit
    assert SubsetAttack(max_subsets=limit).sets_of(1) == 1


def test_many_members_cost_nothing_to_enumerate():
    chosen = heaviest_subsets([1 / 60] * 60, 100)
    assert len(set(chosen)) == 100
    assert chosen[0] == tuple(range(60))


# --- linear members: what is found, beside what there is ----------------------------------------------------


def compare(problems, attacks):
    """The share of instances where each attack, or one of those joined by a plus, reaches the exact minimum."""
    shares = {name: [] for name in (*attacks, "subsets + ARC")}
    for problem in problems:
        accuracy = {name: problem.attacked(attack) for name, attack in attacks.items()}
        for name in shares:
            shares[name].append(problem.solved(*(accuracy[part] for part in name.split(" + "))).mean())
    print({name: f"{np.mean(part):.4f} (worst group {min(part):.3f})" for name, part in shares.items()})
    return {name: np.mean(part) for name, part in shares.items()}


def test_it_finds_the_exact_optima():
    attacks = {"PGD": PGD(20, restarts=5), "subsets": SubsetAttack(), "ARC": ARC()}
    shares = compare(linear_problems(50, [0]), attacks)
    assert shares["subsets"] >= 0.98
    assert shares["subsets + ARC"] >= 0.99
    assert shares["PGD"] < 0.95


@pytest.mark.slow
def test_it_finds_the_exact_optima_of_two_thousand():
    attacks = {
        "PGD": PGD(20, restarts=5),
        "subsets": SubsetAttack(),
        "subsets twice": SubsetAttack(restarts=2),
        "ARC": ARC(restarts=5),
    }
    shares = compare(linear_problems(100, range(5)), attacks)
    assert shares["subsets"] >= 0.99
    assert shares["subsets twice"] >= 0.995
    assert shares["subsets + ARC"] >= 0.99
    assert shares["PGD"] < 0.95


def test_four_members_of_which_any_set_may_be_the_best():
    problem = LinearProblem(60, [0.1, 0.4, 0.2, 0.3], "linf", seed=7)
    assert len(np.unique(problem.best.round(6))) >= 8
    assert problem.solved(problem.attacked(SubsetAttack(restarts=2))).mean() >= 0.98


def test_the_scale_of_a_members_logits_does_not_matter():
    problem = LinearProblem(100, [0.6, 0.4], "linf", seed=8)
    rescaled = np.array([1e-3, 1e3])
    plain = problem.attacked(SubsetAttack())
    problem.W, problem.b = problem.W * rescaled[:, None], problem.b * rescaled
    np.testing.assert_allclose(problem.attacked(SubsetAttack()), plain)


def test_fooled_members_stop_pulling():
    """Two opposite members, the narrow way between them just wide enough: pulled by both, the point stays in reach."""
    W = np.array([[[1.0, 0.0], [-1.0, 0.05]]])
    b = np.array([[-0.5, 0.45]])
    mixture = Mixture([LinearByRow(W[:, k], b[:, k]) for k in range(2)], [0.5, 0.5])
    x, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    wide = ThreatModel("linf", 2.0, None)
    # Fooled are x_1 > 0.5 and x_1 < 0.45 + 0.05 x_2: together from x_2 > 1 on.
    found = SubsetAttack(num_steps=60, kappa=0.0)(mixture, x, y, wide)
    assert mixture.expected_accuracy(found, y).item() == 0
    assert found[0, 1] > 1


# --- networks ----------------------------------------------------------------------------------------------


def trained_cnn(seed, epochs, ball=None):
    """A small CNN on digits; with a ball, trained against PGD in it after three epochs on clean images."""
    x, y, _, _ = digits_tensors()
    (member,) = untrained_members(1, "small_cnn", seed=seed, width=8, hidden=64)
    attack = None if ball is None else PGD(4, 0.5, keep="last")
    return trained_member(member, x, y, epochs, seed=seed, attack=attack, ball=ball, clean_epochs=3)


def robust_accuracies(mixture, x, y, threat_model, attacks):
    found = {}
    for name, attack in attacks.items():
        points = attack(mixture, x, y, threat_model, seeded())
        assert threat_model.contains(points, x).all()
        found[name] = mixture.expected_accuracy(points, y).mean().item()
    print(threat_model.norm, {name: f"{100 * value:.2f} %" for name, value in found.items()})
    return found


def test_on_networks_it_finds_more_than_pgd():
    x, y = digits_tensors()[2:]
    members = [trained_cnn(seed, epochs=3) for seed in (0, 1)]
    mixture = Mixture(members, [0.6, 0.4])
    attacks = {"PGD-20": PGD(20), "ARC": ARC(num_steps=10), "subsets": SubsetAttack(num_steps=10)}
    found = robust_accuracies(mixture, x[:60], y[:60], ThreatModel("linf", 0.05), attacks)
    assert 0.2 < found["PGD-20"] < 0.9
    assert found["subsets"] <= found["PGD-20"]
    assert found["ARC"] <= found["PGD-20"]


@pytest.mark.slow
@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 0.15), ThreatModel("l2", 1.0)], ids=str)
def test_on_robust_networks_it_finds_more_than_pgd(threat_model):
    x, y = digits_tensors()[2:]
    half = ThreatModel(threat_model.norm, threat_model.eps / 2)
    members = [trained_cnn(seed, 10, model) for seed, model in ((1, threat_model), (2, half), (3, None))]
    mixture = Mixture(members, [0.45, 0.35, 0.2])
    attacks = {
        "clean": lambda mixture, x, y, threat_model, generator: x,
        "PGD-20": PGD(20),
        "PGD-20 x5": PGD(20, restarts=5),
        "published": ARC(variant="published", order="weights", decay=1, step_size=0.25),
        "ARC": ARC(),
        "subsets": SubsetAttack(),
    }
    found = robust_accuracies(mixture, x, y, threat_model, attacks)
    assert found["subsets"] <= found["PGD-20 x5"]
    assert found["ARC"] <= found["PGD-20"]


def test_sets_that_cannot_help_are_skipped():
    """Where all members can be fooled at once, the set of all is the first and the last."""
    W = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    mixture = linear_mixture(W, -0.5 * np.ones(3), WEIGHTS)
    x, y = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    seen = []
    mixture.members[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = SubsetAttack(num_steps=50, step_size=0.2, restarts=3)(mixture, x, y, ThreatModel("linf", 1.0, None))
    assert (mixture.expected_accuracy(found, y) == 0).all()
    assert len(seen) < 10


def test_sets_lighter_than_what_was_fooled_are_skipped():
    """Opposite members, never fooled together: once the heavier one is, the lighter one need not be attacked alone."""
    W, b = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([-0.5, -0.5])
    mixture = linear_mixture(W, b, [0.6, 0.4])
    x, y = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    asked = []
    mixture.members[1].register_forward_hook(lambda module, inputs, output: asked.append(output.requires_grad))
    found = SubsetAttack(num_steps=10)(mixture, x, y, ThreatModel("linf", 1.0, None))
    np.testing.assert_allclose(mixture.expected_accuracy(found, y), 0.4, atol=1e-6)
    # Once to see whether there is a gradient, once whether it is squashed, and ten steps for the pair.
    assert sum(asked) == 2 + 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"restarts": 0}, "restarts"),
        ({"max_subsets": 0}, "max_subsets"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": float("nan")}, "step_size"),
        ({"kappa": -0.1}, "kappa"),
        ({"kappa": float("inf")}, "kappa"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SubsetAttack(**settings)


# --- squashed logits ----------------------------------------------------------------------------------------


class Squashed(torch.nn.Module):
    """f(W x) with f applied to each logit."""

    def __init__(self, W, f):
        super().__init__()
        self.W, self.f = torch.nn.Parameter(W, requires_grad=False), f

    def forward(self, x):
        return self.f(x @ self.W.T)


@pytest.mark.parametrize("ball", [LINF, L2], ids=lambda ball: ball.norm)
def test_the_rescaled_boundary_of_squashed_logits_leads_where_unit_rows_do(ball):
    """The gradient of 20 tanh(w x) is parallel to w, so scaled to length 1 it is w / ||w||."""
    W = torch.randn(4, 6, generator=seeded(3), dtype=torch.float64)
    x = 2 * torch.randn(9, 6, generator=seeded(4), dtype=torch.float64)
    z = x @ W.T
    y = z.argmax(1)
    second = z.scatter(1, y[:, None], -torch.inf).argmax(1)
    rows = torch.arange(9) != 4
    found = nearest_boundary(Squashed(W, lambda z: 20 * torch.tanh(z)), x, y, ball, rescaled=rows)
    plain = nearest_boundary(Squashed(W, lambda z: 20 * torch.tanh(z)), x, y, ball)
    unit = W / W.norm(dim=1, keepdim=True)
    down = unit[second] - unit[y]
    expected = down.sign() if ball.norm == "linf" else down / down.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.direction[rows], expected[rows])
    torch.testing.assert_close(found.direction[4], plain.direction[4])
    assert not torch.equal(found.direction[rows], plain.direction[rows])
    torch.testing.assert_close(found.distance, plain.distance)


def test_logits_are_squashed_where_one_gradient_is_ten_times_another():
    """Logits (x_1, s x_2, -5): the gradients of the two that matter have the lengths 1 and s."""
    x, y = torch.tensor([[1.0, 1.0]]).repeat(4, 1), torch.tensor([0, 1, 0, 1])

    def member(slope):
        return lambda x: torch.stack([x[:, 0], slope * x[:, 1], 0 * x[:, 0] - 5], dim=1)

    for slope, squashed in ((0.11, False), (0.09, True), (0.0, False), (9.0, False), (11.0, True)):
        assert squashed_at(member(slope), x, y).tolist() == [squashed] * 4


def test_a_tanh_after_the_network_hardly_helps_it():
    x, y = measured_on()
    found = {}
    for name, net in (("plain", natural()), ("tanh", Then(natural(), lambda z: 20 * torch.tanh(z / 2)))):
        points = SubsetAttack()(net, x, y, LINF, seeded())
        found[name] = float(Mixture([net]).expected_accuracy(points, y).mean())
    assert found["tanh"] <= found["plain"] + 0.04
