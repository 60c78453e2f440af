import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attack_problems import Failing, Fragile, LinearProblem, Step, linear_problems, networks
from mixadv.attacks import ARC, PGD, ExpectedLoss, arc
from mixadv.attacks.boundaries import Boundary, nearest_boundary
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import linear_mixture

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.3)
ONE_STEP = ARC(num_steps=1, num_runner_ups=1, order="weights")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- boundaries --------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """C classes, logits x W^T + b."""

    def __init__(self, W, b):
        super().__init__()
        self.register_buffer("W", W)
        self.register_buffer("b", b)

    def forward(self, x):
        return x.flatten(1) @ self.W.T + self.b


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("leave_top", [True, False])
def test_the_nearest_boundary_of_a_linear_member(norm, leave_top):
    """Five classes in seven dimensions: the distances are quotients, and a step that long leads onto the boundary."""
    generator = seeded()
    W = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    b = torch.randn(5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (40,), generator=generator)
    member, threat_model = Linear(W, b), ThreatModel(norm, 1.0, None)
    logits = (x @ W.T + b).numpy()
    order = {g: nearest_boundary(member, x, y, threat_model, g, leave_top) for g in (1, 3, 4, 9)}
    for i in range(40):
        t = logits[i].argmax() if leave_top else y[i].item()
        rivals = [j for j in np.argsort(-logits[i]) if j != t]
        dual = {j: np.linalg.norm((W[t] - W[j]).numpy(), 1 if norm == "linf" else 2) for j in rivals}
        distance = {j: (logits[i, t] - logits[i, j]) / dual[j] for j in rivals}
        for g, found in order.items():
            nearest = min(rivals[:g], key=distance.get)
            assert found.distance[i].item() == pytest.approx(distance[nearest], rel=1e-9)
            np.testing.assert_allclose(found.normal[i], (W[nearest] - W[t]).numpy() / dual[nearest], atol=1e-12)
            on_it = (x[i] + found.distance[i] * found.direction[i]).numpy()
            assert np.linalg.norm(found.direction[i], np.inf if norm == "linf" else 2) == pytest.approx(1)
            lead = on_it @ (W[t] - W[nearest]).numpy() + (b[t] - b[nearest]).item()
            assert lead == pytest.approx(0, abs=1e-9)
    assert torch.equal(order[4].distance, order[9].distance)
    assert (order[3].distance < order[1].distance).any()
    assert (order[1].distance < 0).any() != leave_top
    np.testing.assert_allclose(order[1].logits, logits)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boundaries_of_members_that_are_very_sure_or_flat(norm):
    """Gradients whose squares underflow still have their distance; a constant member is infinitely far away."""
    tiny = torch.tensor([[0.0, 0.0], [3e-30, -4e-30]])
    member = Linear(tiny, torch.tensor([6e-30, 0.0]))
    x = torch.zeros(1, 2)
    found = nearest_boundary(member, x, torch.tensor([0]), ThreatModel(norm, 1.0, None))
    assert found.distance.item() == pytest.approx(6 / 7 if norm == "linf" else 6 / 5, rel=1e-5)
    flat = Linear(torch.zeros(2, 2), torch.tensor([1.0, 0.0]))
    for label, distance in ((0, float("inf")), (1, -float("inf"))):
        found = nearest_boundary(flat, x, torch.tensor([label]), ThreatModel(norm, 1.0, None))
        assert found.distance.item() == distance
        assert torch.equal(found.normal, x)
        assert torch.equal(found.direction, x)


def reached(n, d, v, beta, step, norm):
    turned = v + beta * d
    size = np.abs(turned).max() if norm == "linf" else np.linalg.norm(turned)
    return n @ turned * step / size


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_smallest_crossing_against_bisection(norm):
    """Steps in five dimensions, some of whose coordinates member k does not see."""
    random = np.random.default_rng(0)
    counts = {"turn": 0, "stay": 0, "far": 0}
    for _ in range(300):
        step = random.uniform(0.2, 3)
        w = random.normal(size=5) * (random.random(5) < 0.7)
        if not w.any():
            continue
        d = -np.sign(w) if norm == "linf" else -w / np.linalg.norm(w)
        n = -w / np.abs(w).sum() if norm == "linf" else d
        v = random.normal(size=5)
        v *= step / (np.abs(v).max() if norm == "linf" else np.linalg.norm(v))
        distance = step * random.uniform(-1.3, 1.3)
        tensors = [torch.as_tensor(a)[None] for a in (np.array(distance), n, d, np.zeros(2), np.array(False))]
        beta = arc.crossing_length(Boundary(*tensors), torch.as_tensor(v)[None], step, norm).item()
        target = distance + arc.OVERSHOOT * step
        if reached(n, d, v, 0, step, norm) >= target:
            assert beta == 0
            counts["stay"] += 1
        elif target >= step:
            assert beta == step
            counts["far"] += 1
        else:
            low, high = 0.0, step
            while reached(n, d, v, high, step, norm) < target:
                high *= 2
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (low, middle) if reached(n, d, v, middle, step, norm) >= target else (middle, high)
            assert beta == pytest.approx(high, rel=1e-4, abs=1e-9)
            counts["turn"] += 1
    assert min(counts.values()) > 20


def test_lengths_by_hand():
    n = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    v = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    boundary = Boundary(torch.tensor([0.5], dtype=torch.float64), n, n, torch.zeros(1, 2), torch.tensor([False]))
    # 2 / (2 - 0.5) |0.5 - 1.2| + 0.1
    assert arc.published_length(boundary, v, 2.0, 0.1).item() == pytest.approx(4 / 3 * 0.7 + 0.1)
    for length in (arc.published_length(boundary, 0 * v, 2.0, 0.1), arc.crossing_length(boundary, 0 * v, 2.0, "l2")):
        assert length.item() == 2.0
    far = replace(boundary, distance=torch.tensor([2.5], dtype=torch.float64))
    assert arc.published_length(far, v, 2.0, 0.1).item() == 2.0
    erring = replace(boundary, distance=torch.tensor([-0.5], dtype=torch.float64))
    assert arc.crossing_length(erring, 0 * v, 2.0, "l2").item() == 0.0


# --- linear members: what is found, beside what there is ----------------------------------------------------


def test_variants_on_pairs_that_one_point_fools(monkeypatch):
    """One step as long as eps, l2: the published step, the same with boundaries at x + delta, the smallest crossing."""
    problem = LinearProblem(1500, [0.6, 0.4], "l2", seed=1, distances=(0, 1))
    problem.keep(problem.best < 1e-6)
    assert len(problem.x) > 800
    attacks = {variant: replace(ONE_STEP, variant=variant) for variant in ("published", "exact")}
    rates = {name: problem.solved(problem.attacked(attack)).mean() for name, attack in attacks.items()}
    with monkeypatch.context() as patch:
        patch.setattr(arc, "crossing_length", lambda b, v, step, norm: arc.published_length(b, v, step, 0.05))
        rates["closed form at x + delta"] = problem.solved(problem.attacked(ONE_STEP)).mean()
    print(rates)
    assert 0.6 < rates["published"] < 0.8
    assert 0.8 < rates["closed form at x + delta"] < 0.92
    assert rates["exact"] > 0.99


def test_members_that_err_are_kept_erring():
    """Pairs whose lighter member errs at x; the heavier one turns the step, and the lighter one is to turn it back."""
    problem = LinearProblem(2000, [0.6, 0.4], "l2", seed=2, distances=(-1, 1))
    clean = problem.mixture.member_logits(problem.x).argmax(-1) == problem.y
    problem.keep((clean[0] & ~clean[1]).numpy() & (problem.best < 1e-6))
    assert len(problem.x) > 150
    assert problem.solved(problem.attacked(ONE_STEP)).mean() > 0.99
    assert problem.solved(problem.attacked(replace(ONE_STEP, variant="published"))).mean() < 0.9


def compare(problems, attacks):
    """The share of instances where each attack reaches the exact minimum, over all problems and the worst of them."""
    problems = list(problems)
    shares = {}
    for name, attack in attacks.items():
        solved = [problem.solved(problem.attacked(attack)) for problem in problems]
        shares[name] = (np.concatenate(solved).mean(), min(part.mean() for part in solved))
    print({name: f"{overall:.3f} (worst group {worst:.3f})" for name, (overall, worst) in shares.items()})
    return shares


def test_it_finds_most_exact_optima():
    shares = compare(linear_problems(50, [0]), {"PGD": PGD(20, restarts=5), "ARC": ARC(restarts=5)})
    assert shares["ARC"][0] >= 0.93
    assert shares["ARC"][0] > shares["PGD"][0]


@pytest.mark.slow
def test_it_finds_most_exact_optima_of_two_thousand():
    constant = ARC(restarts=5, decay=1)
    attacks = {
        "PGD": PGD(20, restarts=5),
        "ARC": ARC(restarts=5),
        "ARC by weights": ARC(restarts=5, order="weights"),
        "ARC of constant step": constant,
        "published": replace(constant, variant="published", order="weights"),
    }
    shares = compare(linear_problems(100, range(5)), attacks)
    assert shares["ARC"][0] >= 0.95
    assert shares["ARC"][1] >= 0.85
    assert shares["ARC"][0] > shares["ARC of constant step"][0] > shares["published"][0] > shares["PGD"][0]


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("variant", ["exact", "published"])
def test_a_linear_member_in_linf_has_a_closed_form(bounds, variant):
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
    found = ARC(num_steps=3, variant=variant)(mixture, x, y, threat_model, seeded())
    assert threat_model.contains(found, x).all()
    np.testing.assert_array_equal(mixture.expected_accuracy(found, y) > 0.5, right)
    assert 20 < right.sum() < 180


def test_a_linear_member_in_l2_has_a_closed_form():
    random = np.random.default_rng(1)
    W, b = random.normal(size=(1, 6)), np.array([0.3])
    x, y = random.normal(size=(200, 6)), random.integers(0, 2, 200)
    distance = np.where(y == 1, 1.0, -1.0) * (x @ W[0] + b[0]) / np.linalg.norm(W)
    mixture, x, y = linear_mixture(W, b), torch.as_tensor(x), torch.as_tensor(y)
    found = ARC(num_steps=1)(mixture, x, y, ThreatModel("l2", 0.8, None))
    np.testing.assert_array_equal(mixture.expected_accuracy(found, y) > 0.5, distance > 0.8)
    # Where nothing is to be had, the step went as far as it may, straight to the boundary.
    beyond = torch.as_tensor(distance > 0.8)
    to_boundary = mixture.member_logits(found)[0].diff(dim=1).squeeze(1).abs() / np.linalg.norm(W)
    torch.testing.assert_close(to_boundary[beyond], torch.as_tensor(distance)[beyond] - 0.8)


@pytest.mark.parametrize(("decay", "reach"), [(1, 1.2), (0.25, 0.7)])
def test_steps_add_up_and_shrink(decay, reach):
    """Three steps of 0.4, or of 0.4, 0.2 and 0.1, each kept though the accuracy stays until the last."""
    attack = ARC(num_steps=3, step_size=0.4, decay=decay)
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    for distance in (reach - 0.02, reach + 0.02):
        mixture = linear_mixture(np.array([[6.0, 8.0]]), np.array([10 * distance]))
        found = attack(mixture, x, y, ThreatModel("l2", 1.0, None))
        assert found.norm().item() == pytest.approx(min(reach, 1))
        assert (mixture.expected_accuracy(found, y).item() == 0) == (distance < min(reach, 1))


@pytest.mark.parametrize("variant", ["exact", "published"])
def test_identical_members_behave_as_one(variant):
    problem = LinearProblem(60, [1.0], "l2", seed=3)
    one = problem.mixture
    three = Mixture([one.members[0]] * 3, [0.2, 0.5, 0.3])
    attack = ARC(num_steps=5, variant=variant)
    accuracies = [
        mixture.expected_accuracy(attack(mixture, problem.x, problem.y, problem.threat_model, seeded()), problem.y)
        for mixture in (one, three)
    ]
    torch.testing.assert_close(accuracies[0], accuracies[1])
    np.testing.assert_allclose(accuracies[0], problem.best, atol=1e-6)


# --- networks ----------------------------------------------------------------------------------------------

EVERY = [
    ARC(num_steps=3, variant=variant, order=order)
    for variant, order in itertools.product(("exact", "published"), ("random", "weights"))
]


@pytest.mark.parametrize("attack", EVERY, ids=lambda a: f"{a.variant}-{a.order}")
@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_results_are_feasible_and_never_better_for_the_mixture(attack, threat_model):
    mixture, x, y = networks()
    x[0, 0], x[1, 1] = 0.0, 1.0
    found = attack(mixture, x, y, threat_model, seeded())
    assert threat_model.contains(found, x).all()
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, x.dtype, False)
    before, after = mixture.expected_accuracy(x, y), mixture.expected_accuracy(found, y)
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_more_restarts_never_help_the_defender():
    problem = LinearProblem(100, [0.45, 0.35, 0.2], "linf", seed=4)
    totals = [problem.attacked(ARC(num_steps=4, restarts=restarts)) for restarts in (1, 2, 6)]
    assert (totals[0] >= totals[1]).all()
    assert (totals[1] >= totals[2]).all()
    assert totals[0].sum() > totals[1].sum() > totals[2].sum()


def test_examples_that_cannot_get_worse_are_left_alone():
    """Half the labels are wrong for all members: these examples are looked at once, and come back as they are."""
    mixture, x, y = networks()
    answers = mixture.member_logits(x).argmax(-1)
    for i in (1, 3, 4):
        y[i] = next(c for c in range(4) if c not in answers[:, i])
    seen = []
    mixture.members[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    found = ARC(num_steps=2, step_size=1e-4, restarts=2)(mixture, x, y, LINF, seeded())
    assert torch.equal(found[[1, 3, 4]], x[[1, 3, 4]])
    # All at x, one to see whether there is a gradient, and the others from there on.
    assert seen[:2] == [6, 1]
    assert len(seen) > 6
    assert max(seen[2:]) == 3


def test_members_without_weight_are_not_asked():
    mixture, x, y = networks()
    mixture.set_weights([0.7, 0.0, 0.3])
    pair = Mixture([mixture.members[0], mixture.members[2]], [0.7, 0.3]).eval()
    expected = ARC(num_steps=3)(pair, x, y, L2, seeded())

    def refuse(module, inputs):
        raise AssertionError("asked")

    mixture.members[1].register_forward_pre_hook(refuse)
    torch.testing.assert_close(ARC(num_steps=3)(mixture, x, y, L2, seeded()), expected, rtol=0, atol=1e-5)


def state_of(mixture):
    return (
        [module.training for module in mixture.modules()],
        [p.requires_grad for p in mixture.parameters()],
        {name: value.clone() for name, value in mixture.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in mixture.parameters()],
    )


def assert_same(before, after):
    assert before[:2] == after[:2]
    torch.testing.assert_close(before[2:], after[2:], rtol=0, atol=0)


@pytest.mark.parametrize("passes", [None, 1, 2, 4])
def test_the_mixture_and_the_generator_are_left_as_found_also_after_an_exception(passes):
    mixture, x, y = networks()
    if passes is not None:
        mixture = Mixture([mixture.members[0], Failing(mixture.members[1], passes)])
    mixture.train()
    mixture.members[1].eval()
    next(mixture.members[0].parameters()).requires_grad_(False)
    next(mixture.members[1].parameters()).grad = torch.ones_like(next(mixture.members[1].parameters()))
    before, random = state_of(mixture), torch.get_rng_state()
    if passes is None:
        ARC(num_steps=2)(mixture, x, y, LINF, seeded())
    else:
        with pytest.raises(RuntimeError, match="out of order"):
            ARC(num_steps=2)(mixture, x, y, LINF, seeded())
    assert_same(before, state_of(mixture))
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_all_randomness_comes_from_the_generator():
    mixture, x, y = networks()
    attack = ARC(num_steps=2, restarts=2)
    first, same, other = (attack(mixture, x, y, L2, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_it_walks_where_gradients_are_switched_off_and_in_eval_mode():
    mixture, x, y = networks()
    outside = ARC(num_steps=2)(mixture, x, y, LINF, seeded())
    assert not torch.equal(outside, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ARC(num_steps=2)(mixture.train(), x.clone(), y.clone(), LINF, seeded()), outside)
    x.requires_grad_(True)
    assert torch.equal(ARC(num_steps=2)(mixture, x, y, LINF, seeded()), outside)
    assert x.grad is None


def test_it_works_under_autocast():
    mixture, x, y = networks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ARC(num_steps=2)(mixture, x, y, LINF, seeded())
    assert found.dtype == torch.float32
    assert LINF.contains(found, x).all()
    assert mixture.expected_accuracy(found, y).sum() < mixture.expected_accuracy(x, y).sum()


def test_a_plain_module_is_a_mixture_of_one():
    mixture, x, y = networks()
    member = mixture.members[1]
    plain, single = (ARC(num_steps=2)(m, x, y, LINF, seeded()) for m in (member, Mixture([member])))
    assert torch.equal(plain, single)


def test_eps_zero_and_empty_batches():
    mixture, x, y = networks()
    found = ARC()(mixture, x, y, ThreatModel("linf", 0.0))
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()
    assert ARC()(mixture, x[:0], y[:0], LINF).shape == (0, 3, 8, 8)


def test_among_equals_the_highest_margin_is_kept():
    """Out of reach of the boundary, no step counts for the accuracy; the point returned is the nearest to it."""
    mixture = linear_mixture(np.array([[1.0, 2.0]]), np.array([50.0]))
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    threat_model = ThreatModel("linf", 0.5, None)
    found = ARC(num_steps=4, restarts=3)(mixture, x, y, threat_model, seeded())
    torch.testing.assert_close(found, torch.tensor([[-0.5, -0.5]], dtype=torch.float64))
    margins = ExpectedLoss("margin")(mixture.member_logits(found), y, mixture.weights)
    assert margins.item() == pytest.approx(-48.5)


def test_members_without_gradient_count_but_do_not_turn():
    """The step member errs from one half on, and is fooled on the way that the linear one leads."""
    linear = linear_mixture(np.array([[1.0, 0.2]]), np.array([-0.65])).members[0]
    x, y = torch.tensor([[0.4, 0.5], [0.1, 0.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    mixture = Mixture([Step(), linear], [0.6, 0.4])
    found = ARC(num_steps=3)(mixture, x, y, ThreatModel("linf", 0.2), seeded())
    torch.testing.assert_close(mixture.expected_accuracy(found, y), torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="no member that may be drawn has a gradient"):
        ARC()(Step(), x, y, LINF)


def test_nan_gradients_are_reported():
    x = torch.tensor([[0.2, 0.5], [0.8, 0.5], [0.9, 0.3]])
    threat_model = ThreatModel("linf", 0.05)
    with pytest.warns(UserWarning, match="ARC met NaN gradients on 1 of 3 examples"):
        found = ARC(num_steps=3)(Fragile(), x, torch.ones(3, dtype=torch.long), threat_model)
    assert threat_model.contains(found, x).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "num_steps"),
        ({"num_runner_ups": 0}, "num_runner_ups"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": float("inf")}, "step_size"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.5}, "decay"),
        ({"order": "lambda"}, "random, weights"),
        ({"variant": "best"}, "exact, published"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ARC(**settings)


def test_wrong_batches_are_refused():
    mixture, x, y = networks()
    for bad_x, bad_y, message in [
        (x.half(), y, "float32"),
        (x, y[:-1], "do not match"),
        (255 * x, y, "outside the box"),
    ]:
        with pytest.raises(ValueError, match=message):
            ARC()(mixture, bad_x, bad_y, LINF)
