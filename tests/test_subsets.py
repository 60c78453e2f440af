import itertools

import numpy as np
import pytest
import torch
from torch import nn

from attack_problems import WEIGHTS, Failing, Fragile, LinearByRow, LinearProblem, Step, linear_problems, networks
from mixadv.attacks import ARC, PGD, ExpectedLoss, SubsetAttack
from mixadv.attacks.subsets import subsets_by_weight
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel
from oracles_linear import linear_mixture

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- which sets --------------------------------------------------------------------------------------------


def test_all_sets_by_decreasing_weight_where_they_fit():
    assert subsets_by_weight([0.5, 0.2, 0.3], 7) == [(0, 1, 2), (0, 2), (0, 1), (0,), (1, 2), (2,), (1,)]
    assert len(subsets_by_weight([0.25] * 4, 15)) == 15
    assert subsets_by_weight([1.0], 1) == [(0,)]


@pytest.mark.parametrize(("count", "limit"), [(5, 15), (6, 20), (9, 15), (5, 30), (7, 3)])
def test_beyond_that_single_members_the_heaviest_sets_and_random_ones(count, limit):
    weights = np.random.default_rng(count).dirichlet(np.ones(count)).tolist()
    chosen = subsets_by_weight(weights, limit, seeded())
    assert len(chosen) == len(set(chosen)) == max(limit, count + 1)
    assert {(k,) for k in range(count)} <= set(chosen)
    everything = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    heaviest = sorted(everything, key=lambda s: -sum(weights[k] for k in s))
    assert set(heaviest[: max(1, (limit - count + 1) // 2)]) <= set(chosen)
    totals = [sum(weights[k] for k in s) for s in chosen]
    assert totals == sorted(totals, reverse=True)
    assert subsets_by_weight(weights, limit, seeded()) == chosen
    if count + 4 < limit < 2**count - 2:
        assert subsets_by_weight(weights, limit, seeded(1)) != chosen


def test_many_members_cost_nothing_to_enumerate():
    chosen = subsets_by_weight([1 / 60] * 60, 100, seeded())
    assert len(chosen) == 100
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


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_a_linear_member_in_linf_has_a_closed_form(bounds):
    """Fooled exactly where the corner of ball and box that its weights point to is beyond the boundary."""
    random = np.random.default_rng(0)
    W, b = random.normal(size=(1, 6)), np.array([0.3])
    x, y = random.uniform(size=(200, 6)), random.integers(0, 2, 200)
    sign = np.where(y == 1, 1.0, -1.0)
    corner = x - 0.2 * sign[:, None] * np.sign(W)
    corner = corner if bounds is None else corner.clip(0, 1)
    right = sign * (corner @ W[0] + b[0]) >= 0
    threat_model = ThreatModel("linf", 0.2, bounds)
    mixture, x, y = linear_mixture(W, b), torch.as_tensor(x), torch.as_tensor(y)
    found = SubsetAttack(num_steps=3)(mixture, x, y, threat_model)
    assert threat_model.contains(found, x).all()
    np.testing.assert_array_equal(mixture.expected_accuracy(found, y) > 0.5, right)
    assert 20 < right.sum() < 180


def test_a_linear_member_in_l2_has_a_closed_form():
    random = np.random.default_rng(1)
    W, b = random.normal(size=(1, 6)), np.array([0.3])
    x, y = random.normal(size=(200, 6)), random.integers(0, 2, 200)
    distance = np.where(y == 1, 1.0, -1.0) * (x @ W[0] + b[0]) / np.linalg.norm(W)
    mixture, x, y = linear_mixture(W, b), torch.as_tensor(x), torch.as_tensor(y)
    found = SubsetAttack(num_steps=1)(mixture, x, y, ThreatModel("l2", 0.8, None))
    np.testing.assert_array_equal(mixture.expected_accuracy(found, y) > 0.5, distance > 0.8)
    # Where nothing is to be had, the step went as far as it may, straight to the boundary.
    beyond = torch.as_tensor(distance > 0.8)
    to_boundary = mixture.member_logits(found)[0].diff(dim=1).squeeze(1).abs() / np.linalg.norm(W)
    torch.testing.assert_close(to_boundary[beyond], torch.as_tensor(distance)[beyond] - 0.8)


def test_identical_members_behave_as_one():
    problem = LinearProblem(60, [1.0], "l2", seed=3)
    one = problem.mixture
    three = Mixture([one.members[0]] * 3, [0.2, 0.5, 0.3])
    for mixture in (one, three):
        found = SubsetAttack()(mixture, problem.x, problem.y, problem.threat_model, seeded())
        np.testing.assert_allclose(mixture.expected_accuracy(found, problem.y), problem.best, atol=1e-6)


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


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_results_are_feasible_and_never_better_for_the_mixture(threat_model):
    mixture, x, y = networks()
    x[0, 0], x[1, 1] = 0.0, 1.0
    found = SubsetAttack(num_steps=3, restarts=2)(mixture, x, y, threat_model, seeded())
    assert threat_model.contains(found, x).all()
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
    before, after = mixture.expected_accuracy(x, y), mixture.expected_accuracy(found, y)
    assert (after <= before).all()
    assert after.sum() < before.sum()


def digits():
    from mixadv.data.digits import Digits

    corpus = Digits().load()
    return [part.float() / 255 if part.ndim == 4 else part for part in (
        corpus.train_images, corpus.train_labels, corpus.test_images, corpus.test_labels)]  # fmt: skip


def trained_cnn(seed, x, y, epochs, threat_model=None):
    """A small CNN; with a threat model, trained against PGD after three epochs on clean images."""
    torch.manual_seed(seed)
    net = build_member("small_cnn", num_classes=10, image_shape=(1, 8, 8), width=8, hidden=64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    generator = seeded(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            images = x[rows]
            if threat_model is not None and epoch >= 3:
                images = PGD(4, 0.5, keep="last")(net, images, y[rows], threat_model, generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), y[rows]).backward()
            optimizer.step()
    return net.eval()


def robust_accuracies(mixture, x, y, threat_model, attacks):
    found = {}
    for name, attack in attacks.items():
        points = attack(mixture, x, y, threat_model, seeded())
        assert threat_model.contains(points, x).all()
        found[name] = mixture.expected_accuracy(points, y).mean().item()
    print(threat_model.norm, {name: f"{100 * value:.2f} %" for name, value in found.items()})
    return found


def test_on_networks_it_finds_more_than_pgd():
    x, y, x_test, y_test = digits()
    members = [trained_cnn(seed, x, y, epochs=3) for seed in (0, 1)]
    mixture = Mixture(members, [0.6, 0.4])
    attacks = {"PGD-20": PGD(20), "ARC": ARC(num_steps=10), "subsets": SubsetAttack(num_steps=10)}
    found = robust_accuracies(mixture, x_test[:60], y_test[:60], ThreatModel("linf", 0.05), attacks)
    assert 0.2 < found["PGD-20"] < 0.9
    assert found["subsets"] <= found["PGD-20"]
    assert found["ARC"] <= found["PGD-20"]


@pytest.mark.slow
@pytest.mark.parametrize("threat_model", [ThreatModel("linf", 0.15), ThreatModel("l2", 1.0)], ids=str)
def test_on_robust_networks_it_finds_more_than_pgd(threat_model):
    x, y, x_test, y_test = digits()
    half = ThreatModel(threat_model.norm, threat_model.eps / 2)
    members = [trained_cnn(seed, x, y, 10, model) for seed, model in ((1, threat_model), (2, half), (3, None))]
    mixture = Mixture(members, [0.45, 0.35, 0.2])
    attacks = {
        "clean": lambda mixture, x, y, threat_model, generator: x,
        "PGD-20": PGD(20),
        "PGD-20 x5": PGD(20, restarts=5),
        "published": ARC(variant="published", order="weights", decay=1, step_size=0.25),
        "ARC": ARC(),
        "subsets": SubsetAttack(),
    }
    found = robust_accuracies(mixture, x_test, y_test, threat_model, attacks)
    assert found["subsets"] <= found["PGD-20 x5"]
    assert found["ARC"] <= found["PGD-20"]


def test_more_restarts_never_help_the_defender():
    problem = LinearProblem(150, [0.45, 0.35, 0.2], "linf", seed=4)
    totals = [problem.attacked(SubsetAttack(num_steps=4, restarts=restarts)) for restarts in (1, 2, 6)]
    assert (totals[0] >= totals[1]).all()
    assert (totals[1] >= totals[2]).all()
    assert totals[0].sum() > totals[2].sum()


def test_what_cannot_get_worse_is_left_alone():
    """Half the labels are wrong for all members: these examples are looked at once, and come back as they are."""
    mixture, x, y = networks()
    answers = mixture.member_logits(x).argmax(-1)
    for i in (1, 3, 4):
        y[i] = next(c for c in range(4) if c not in answers[:, i])
    seen = []
    mixture.members[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = SubsetAttack(num_steps=2, step_size=1e-4)(mixture, x, y, LINF, seeded())
    assert torch.equal(found[[1, 3, 4]], x[[1, 3, 4]])
    # All at x, one to see whether there is a gradient, and the others from there on.
    assert seen[:2] == [6, 1]
    assert max(seen[2:]) == 3
    assert len(seen) > 10


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
    # Once to see whether there is a gradient, and ten steps for the pair.
    assert sum(asked) == 1 + 10


def test_members_without_weight_are_not_asked():
    mixture, x, y = networks()
    mixture.set_weights([0.7, 0.0, 0.3])
    pair = Mixture([mixture.members[0], mixture.members[2]], [0.7, 0.3]).eval()
    expected = SubsetAttack(num_steps=3)(pair, x, y, L2, seeded())

    def refuse(module, inputs):
        raise AssertionError("asked")

    mixture.members[1].register_forward_pre_hook(refuse)
    torch.testing.assert_close(SubsetAttack(num_steps=3)(mixture, x, y, L2, seeded()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("passes", [None, 1, 2, 4])
def test_the_mixture_and_the_generator_are_left_as_found_also_after_an_exception(passes):
    mixture, x, y = networks()
    if passes is not None:
        mixture = Mixture([mixture.members[0], Failing(mixture.members[1], passes)])
    mixture.train()
    mixture.members[1].eval()
    next(mixture.members[0].parameters()).requires_grad_(False)
    flags = [module.training for module in mixture.modules()]
    frozen = [p.requires_grad for p in mixture.parameters()]
    state = {name: value.clone() for name, value in mixture.state_dict().items()}
    random = torch.get_rng_state()
    if passes is None:
        SubsetAttack(num_steps=2)(mixture, x, y, LINF, seeded())
    else:
        with pytest.raises(RuntimeError, match="out of order"):
            SubsetAttack(num_steps=2)(mixture, x, y, LINF, seeded())
    assert [module.training for module in mixture.modules()] == flags
    assert [p.requires_grad for p in mixture.parameters()] == frozen
    assert all(torch.equal(value, state[name]) for name, value in mixture.state_dict().items())
    assert all(p.grad is None for p in mixture.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_all_randomness_comes_from_the_generator():
    mixture, x, y = networks()
    attack = SubsetAttack(num_steps=2, step_size=0.1, restarts=2)
    first, same, other = (attack(mixture, x, y, L2, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_it_descends_where_gradients_are_switched_off_and_in_eval_mode():
    mixture, x, y = networks()
    outside = SubsetAttack(num_steps=2)(mixture, x, y, LINF, seeded())
    assert not torch.equal(outside, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = SubsetAttack(num_steps=2)(mixture.train(), x.clone(), y.clone(), LINF, seeded())
        assert torch.equal(found, outside)
    x.requires_grad_(True)
    assert torch.equal(SubsetAttack(num_steps=2)(mixture, x, y, LINF, seeded()), outside)
    assert x.grad is None


def test_it_works_under_autocast():
    mixture, x, y = networks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SubsetAttack(num_steps=2)(mixture, x, y, LINF, seeded())
    assert found.dtype == torch.float32
    assert LINF.contains(found, x).all()
    assert mixture.expected_accuracy(found, y).sum() < mixture.expected_accuracy(x, y).sum()


def test_a_plain_module_is_a_mixture_of_one():
    mixture, x, y = networks()
    member = mixture.members[1]
    plain, single = (SubsetAttack(num_steps=2)(m, x, y, LINF, seeded()) for m in (member, Mixture([member])))
    assert torch.equal(plain, single)


def test_eps_zero_and_empty_batches():
    mixture, x, y = networks()
    found = SubsetAttack()(mixture, x, y, ThreatModel("linf", 0.0))
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()
    assert SubsetAttack()(mixture, x[:0], y[:0], LINF).shape == (0, 3, 8, 8)


def test_among_equals_the_highest_margin_is_kept():
    """Out of reach of the boundary, no step counts for the accuracy; the point returned is the nearest to it."""
    mixture = linear_mixture(np.array([[1.0, 2.0]]), np.array([50.0]))
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    found = SubsetAttack(num_steps=4, restarts=3)(mixture, x, y, ThreatModel("linf", 0.5, None), seeded())
    torch.testing.assert_close(found, torch.tensor([[-0.5, -0.5]], dtype=torch.float64))
    margins = ExpectedLoss("margin")(mixture.member_logits(found), y, mixture.weights)
    assert margins.item() == pytest.approx(-48.5)


def test_members_without_gradient_count_but_do_not_pull():
    """The step member errs from one half on, and is fooled on the way that the linear one leads."""
    linear = linear_mixture(np.array([[1.0, 0.2]]), np.array([-0.65])).members[0]
    x, y = torch.tensor([[0.4, 0.5], [0.1, 0.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    mixture = Mixture([Step(), linear], [0.6, 0.4])
    found = SubsetAttack(num_steps=3)(mixture, x, y, ThreatModel("linf", 0.2), seeded())
    torch.testing.assert_close(mixture.expected_accuracy(found, y), torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="no member that may be drawn has a gradient"):
        SubsetAttack()(Step(), x, y, LINF)


def test_nan_gradients_are_reported():
    x = torch.tensor([[0.2, 0.5], [0.8, 0.5], [0.9, 0.3]])
    threat_model = ThreatModel("linf", 0.05)
    with pytest.warns(UserWarning, match="SubsetAttack met NaN gradients on 1 of 3 examples"):
        found = SubsetAttack(num_steps=3)(Fragile(), x, torch.ones(3, dtype=torch.long), threat_model)
    assert threat_model.contains(found, x).all()


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


def test_wrong_batches_are_refused():
    mixture, x, y = networks()
    for bad_x, bad_y, message in [
        (x.half(), y, "float32"),
        (x, y[:-1], "do not match"),
        (255 * x, y, "outside the box"),
    ]:
        with pytest.raises(ValueError, match=message):
            SubsetAttack()(mixture, bad_x, bad_y, LINF)
