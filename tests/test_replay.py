"""The suite against other people's attacks, and the laws that exact measurements of a mixture obey."""

import json
import warnings
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import digits_tensors, seeded
from builders.networks import Watched, assert_left_as_found, patchwork_mixture, trained_member, untrained_members
from mixadv import load_mixture
from mixadv.attacks import ARC, PGD, AttackSuite, ExpectedLoss, Square, SubsetAttack
from mixadv.evaluation import evaluate
from mixadv.instantiate import instantiate
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)
BALLS = pytest.mark.parametrize("ball", [LINF, L2], ids=lambda ball: ball.norm)
# No two sets of members weigh the same, so that only another set of members makes another expected accuracy.
WEIGHTS = [0.45, 0.35, 0.2]
# What the same set of members may differ by: rounding in float64.
SLACK = 1e-9


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks so small that threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mixture():
    """Three members that err differently: trained against linf, against nothing (and smooth), against l2."""

    def dense(seed, hidden, activation):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), activation, nn.Linear(hidden, 10))

    x, y, _, _ = digits_tensors()
    attacked = {"lr": 4e-3, "attack": PGD(2, 0.7, keep="last"), "clean_epochs": 1}
    with torch.random.fork_rng([]):
        (convolutional,) = untrained_members(1, "small_cnn", seed=0, width=4, hidden=24)
        smooth, rough = dense(1, 48, nn.Tanh()), dense(2, 64, nn.ReLU())
    members = [
        trained_member(convolutional, x, y, 6, ball=LINF, **attacked),
        trained_member(smooth, x, y, 8, seed=1, lr=4e-3),
        trained_member(rough, x, y, 8, seed=2, ball=L2, **attacked),
    ]
    return Mixture(members, WEIGHTS)


# --- other people's attacks, replayed -----------------------------------------------------------------------


class Averaged(nn.Module):
    """Logits log sum_k lambda_k softmax(f_k(x)), in float64, where the sum of small numbers is no zero."""

    def __init__(self, members, lam):
        super().__init__()
        self.members, self.lam = nn.ModuleList(members), lam

    def forward(self, x):
        probabilities = [w * member(x).double().softmax(-1) for w, member in zip(self.lam, self.members, strict=True)]
        return sum(probabilities).log().float()


def lam_of(mixture):
    lam = mixture.weights.double().numpy()
    return lam / lam.sum()


def foolbox_pgd(net, x, y, ball, step_size, steps, seed=0):
    """The last iterate of foolbox's PGD, from a random start; from x where the seed is None."""
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports from places that SciPy has moved away from
        import foolbox

        if seed is not None:
            torch.manual_seed(seed)
        attack = foolbox.attacks.LinfPGD if ball.norm == "linf" else foolbox.attacks.L2PGD
        attack = attack(rel_stepsize=step_size, steps=steps, random_start=seed is not None)
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        return attack(model, x, y, epsilons=ball.eps)[0].detach()


def points_of_others(net, x, y, ball, steps, queries, restarts=1):
    """What pyautoattack and foolbox find against one classifier: name -> points of the shape of x."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.square import SquareAttack

    norm = ball.norm.capitalize()
    common = {"norm": norm, "eps": ball.eps, "device": "cpu", "n_restarts": restarts}
    points = {}
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zero gradients
        for loss in ("ce", "dlr"):
            attack = APGDAttack(net, n_iter=steps, loss=loss, **common)
            points[f"APGD-{loss}"] = attack.perturb(x, y)
            # The first result has x itself where nothing was fooled; a point of high loss may fool other members.
            points[f"highest {loss}"] = attack.attack_single_run(x, y)[0]
        points["Square"] = SquareAttack(net, n_queries=queries, **common).perturb(x, y)
    for size in (0.1, 0.25):
        points[f"PGD {size}"] = foolbox_pgd(net, x, y, ball, size, steps)
    return {name: found.detach() for name, found in points.items()}


def assert_inside(points, x, ball):
    """To 1e-6, in float64, from the definition."""
    delta = (points.double() - x.double()).flatten(1).numpy()
    size = np.abs(delta).max(1) if ball.norm == "linf" else np.sqrt((delta**2).sum(1))
    assert size.max() <= ball.eps + 1e-6
    assert points.min() >= -1e-6
    assert points.max() <= 1 + 1e-6


def right(mixture, points, y):
    """Whether each member answers with the label, [L, N] bool."""
    with torch.no_grad():
        return np.stack([(member(points).argmax(1) == y).numpy() for member in mixture.members])


def replayed(mixture, x, y, ball, steps, queries, restarts=1):
    """Others attack each member and the averaged twin; every point is replayed on the mixture.

    Returns: name -> exact expected accuracy of the mixture at the points, [N].
    """
    lam = lam_of(mixture)
    sums = sorted(sum(s) for n in range(len(lam) + 1) for s in combinations(lam, n))
    assert min(b - a for a, b in pairwise(sums)) > 1000 * SLACK
    twin = Averaged(mixture.members, lam).eval()
    np.testing.assert_allclose(twin(x).detach(), mixture(x).detach(), atol=1e-4)
    targets = {"averaged twin": twin} | {f"member {k}": member for k, member in enumerate(mixture.members)}
    found = {}
    with mixture.attack_mode():
        for target, net in targets.items():
            for name, points in points_of_others(net, x, y, ball, steps, queries, restarts).items():
                assert_inside(points, x, ball)
                found[f"{name} on {target}"] = lam @ right(mixture, points, y)
    return found


def assert_nobody_finds_more(name, mixture, x, y, ball, others):
    """Per example, the suite of a protocol is at or below every point that others found.

    Both sides start at random, and a point that few starts lead to may be missed: on one image at most. There the
    strict protocol, with other seeds, finds as much as the others.
    """
    record = AttackSuite.from_protocol(name)(mixture, x, y, ball)
    lowest = np.min(list(others.values()), axis=0)
    ours = record.expected_accuracy.numpy()
    above = np.flatnonzero(ours > lowest + SLACK)
    print(
        f"\n{name}, {ball.norm} {ball.eps:g}: clean {record.clean.mean():.4f}, suite {ours.mean():.4f}, others "
        f"{lowest.mean():.4f} ({len(others)} points for each of {len(x)} images, the best of them alone "
        f"{min(v.mean() for v in others.values()):.4f}); suite below on {(ours < lowest - SLACK).sum()} images, above "
        f"on {above.tolist()} by {(ours - lowest)[above].round(3).tolist()}"
    )
    assert ours.mean() <= lowest.mean()
    assert len(above) <= 1, (above, ours[above], lowest[above])
    if len(above):
        strict = AttackSuite.from_protocol("strict")
        again = (strict(mixture, x[above], y[above], ball, seed=seed).expected_accuracy.item() for seed in range(1, 6))
        assert any(accuracy <= lowest[above] + SLACK for accuracy in again)
    return record, lowest


@BALLS
def test_points_of_others_replayed(mixture, ball):
    """The fast protocol against short runs of APGD, Square and PGD by others."""
    x, y = digits_tensors()[2][:40], digits_tensors()[3][:40]
    others = replayed(mixture, x, y, ball, steps=10, queries=40)
    record, lowest = assert_nobody_finds_more("fast", mixture, x, y, ball, others)
    assert 0.1 < lowest.mean() < record.clean.mean() - 0.2
    # An attack on the mixture alone, with five restarts, would not have passed.
    assert (record.by_attack["pgd-20"].numpy() > lowest + SLACK).sum() >= 2


@pytest.mark.slow
@BALLS
def test_points_of_others_replayed_against_the_strict_protocol(mixture, ball):
    x, y = digits_tensors()[2:]
    others = replayed(mixture, x, y, ball, steps=100, queries=1000, restarts=2)
    assert_nobody_finds_more("strict", mixture, x, y, ball, others)


@pytest.mark.slow
def test_points_of_others_replayed_on_the_quickstart(command, tmp_path):
    """The mixture that `make quickstart` trains, with ball and data as its config.json says, on all test images."""
    finished = command("experiment=quickstart", "name=quickstart")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "train" / "quickstart" / "mixture"
    config = json.loads((path / "config.json").read_text())
    data = instantiate(config["data"], "data")
    data.prepare_data()
    data.setup("test")
    x, y = data.test_images / 255, data.test_labels
    assert len(x) == 360
    mixture, ball = load_mixture(path).eval(), ThreatModel(**config["threat_model"])
    others = replayed(mixture, x, y, ball, steps=100, queries=1000, restarts=2)
    assert_nobody_finds_more("strict", mixture, x, y, ball, others)


@BALLS
def test_as_strong_as_foolbox_at_equal_steps(mixture, ball):
    """PGD on single networks, equal steps of equal size: the same points from x, half a point at most from a start."""
    x, y = (
        torch.cat([digits_tensors()[2], digits_tensors()[0]])[:500],
        torch.cat([digits_tensors()[3], digits_tensors()[1]])[:500],
    )
    ours, peer = [], []
    for member in mixture.members:

        def accuracy(points, member=member):
            return (member(points).argmax(1) == y).double().mean().item()

        theirs = foolbox_pgd(member, x, y, ball, 0.25, steps=10, seed=None)
        found = PGD(10, 0.25, start="none", keep="last")(member, x, y, ball)
        # Where a gradient is all but zero, its sign is rounding.
        assert ((found - theirs).flatten(1).abs().amax(1) < 1e-4).float().mean() >= 0.99
        assert accuracy(found) <= accuracy(theirs) + 0.005
        assert 0.3 < accuracy(theirs) < 0.8
        for seed in range(2):
            theirs = foolbox_pgd(member, x, y, ball, 0.25, steps=10, seed=seed)
            assert_inside(theirs, x, ball)
            peer.append(accuracy(theirs))
            ours.append(accuracy(PGD(10, 0.25)(member, x, y, ball, seeded(seed))))
    print(f"\n{ball.norm}: ours {np.round(ours, 4)}, mean {np.mean(ours):.4f}; foolbox {peer}, {np.mean(peer):.4f}")
    assert np.mean(ours) <= np.mean(peer) + 0.005


# --- exact expectations -------------------------------------------------------------------------------------


def test_expected_accuracy_is_the_frequency_of_a_million_draws(mixture):
    """Within five standard deviations, for each example and in total; certain answers agree exactly."""
    x, y = digits_tensors()[2][:50], digits_tensors()[3][:50]
    x = PGD(5, restarts=2)(mixture, x, y, LINF, seeded())
    exact = mixture.expected_accuracy(x, y).numpy()
    variance = (exact * (1 - exact)).clip(min=0)  # of one draw; rounding may make 1 a little more
    table = right(mixture, x, y)
    draws = 20_000
    member = np.random.default_rng(0).choice(3, p=lam_of(mixture), size=(draws, len(x)))
    frequency = table[member, np.arange(len(x))].mean(0)
    assert member.size == 1_000_000
    assert (np.abs(frequency - exact) <= 5 * np.sqrt(variance / draws) + SLACK).all()
    assert abs(frequency.mean() - exact.mean()) <= 5 * np.sqrt(variance.sum() / draws) / len(x)
    # Most of the subsets of members occur, so that mistaken weights would have been seen.
    assert len(np.unique(exact.round(6))) >= 5
    # And the mixture's own draws.
    generator = seeded(1)
    answers = torch.stack([mixture.predict(x, generator) for _ in range(300)])
    frequency = (answers == y).double().mean(0).numpy()
    assert (np.abs(frequency - exact) <= 5 * np.sqrt(variance / 300) + SLACK).all()


class Remembering:
    """An attack whose points, all of them, are kept: [P][N, ...], also those of passes against single members."""

    def __init__(self, attack):
        self.attack, self.points = attack, []

    def __call__(self, *args):
        self.points.append(self.attack(*args))
        return self.points[-1]


def test_a_mixture_is_worth_at_least_its_members_at_their_worst(mixture):
    """min_x' sum_k lambda_k c_k(x') >= sum_k lambda_k min_x' c_k(x') over one pool of points, per example."""
    x, y = digits_tensors()[2][:200], digits_tensors()[3][:200]
    attacks = {"pgd": Remembering(PGD(5)), "margin": Remembering(PGD(5, objective=ExpectedLoss("margin")))}
    record = evaluate(mixture, [(x, y)], attacks, LINF, other_weights=[[0.1, 0.8, 0.1]])
    pool = [x, *attacks["pgd"].points, *attacks["margin"].points]
    assert len(pool) == 1 + 2 * (1 + 3 + 1 + 1)
    correct = np.stack([right(mixture, points, y) for points in pool])
    lam = lam_of(mixture)
    worst = (correct * lam[:, None]).sum(1).min(0)
    members = correct.all(0)
    np.testing.assert_allclose(record.worst_case(), worst, rtol=0, atol=SLACK)
    np.testing.assert_array_equal(record.members_worst_case(), members)
    gap = record.worst_case() - lam @ record.members_worst_case()
    assert (gap >= -SLACK).all()
    # Here no point fools them all together that fools each of them alone, elsewhere one does.
    assert (gap > 0.1).sum() >= 3
    assert (np.abs(gap) <= SLACK).sum() >= 3
    suite = AttackSuite({"pgd": PGD(5)})(mixture, x, y, LINF)
    assert suite.expected_accuracy.mean() < suite.clean.mean() - 0.2
    at_worst = lam @ right(mixture, suite.x_adv, y)
    np.testing.assert_allclose(suite.expected_accuracy, at_worst, rtol=0, atol=SLACK)


class Threshold(nn.Module):
    """Two classes; class 0 where sign * x_0 is below the bound. Steep enough to have a gradient worth climbing."""

    def __init__(self, bound, sign=1.0):
        super().__init__()
        self.bound, self.sign = bound, sign

    def forward(self, x):
        score = 20 * (self.sign * x[:, 0] - self.bound)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_where_one_point_is_worst_for_all_the_mixture_is_worth_its_members():
    """Thresholds that one direction crosses: x_0 + eps is worst for all. Turning one member makes them conflict."""
    x = torch.tensor([[0.2, 0.5], [0.35, 0.4], [0.45, 0.3], [0.48, 0.2], [0.58, 0.9]])
    y, ball = torch.zeros(5, dtype=torch.long), ThreatModel("linf", 0.1)
    attacks = {"pgd": PGD(10), "margin": PGD(10, objective=ExpectedLoss("margin"))}
    record = evaluate(Mixture([Threshold(b) for b in (0.4, 0.5, 0.65)], WEIGHTS), [(x, y)], attacks, ball)
    expected = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(record.members_worst_case(), expected)
    np.testing.assert_allclose(record.worst_case(), WEIGHTS @ expected, rtol=0, atol=1e-7)

    turned = Mixture([Threshold(0.5), Threshold(-0.4, -1.0), Threshold(0.9)], WEIGHTS)
    record = evaluate(turned, [(x, y)], attacks, ball)
    gap = record.worst_case() - record.weights @ record.members_worst_case()
    # At 0.45 and 0.48 one member falls to the right, another to the left: the attacker gets the heavier one alone.
    np.testing.assert_allclose(gap, [0, 0, 0.35, 0.35, 0], rtol=0, atol=1e-7)


# --- more work ----------------------------------------------------------------------------------------------

MORE = {
    "ARC restarts": (ARC(num_steps=1, step_size=0.5), "restarts", (1, 2, 4)),
    "ARC steps of one size": (ARC(step_size=0.3, decay=1, order="weights"), "num_steps", (1, 3, 8)),
    "subsets restarts": (SubsetAttack(num_steps=2, step_size=0.3), "restarts", (1, 3)),
    "Square restarts": (Square(num_queries=15), "restarts", (1, 3)),
    "PGD steps of one size": (PGD(step_size=0.1), "num_steps", (2, 5, 15)),
    "PGD steps on the margin": (PGD(step_size=0.1, objective=ExpectedLoss("margin")), "num_steps", (2, 5, 15)),
}


@BALLS
@pytest.mark.parametrize("name", MORE)
def test_more_never_helps_the_defender(mixture, ball, name):
    """For each example: what is longer begins as what is shorter, with the same random numbers, and keeps the worst."""
    x, y = digits_tensors()[2][:40], digits_tensors()[3][:40]
    attack, setting, amounts = MORE[name]
    found = []
    for amount in amounts:
        points = replace(attack, **{setting: amount})(mixture, x, y, ball, seeded())
        assert_inside(points, x, ball)
        found.append(lam_of(mixture) @ right(mixture, points, y))
    for less, more in pairwise(found):
        assert (more <= less + SLACK).all()
    assert found[-1].mean() < found[0].mean()


@BALLS
def test_more_steps_never_lower_the_objective(mixture, ball):
    x, y = digits_tensors()[2][:40], digits_tensors()[3][:40]
    values = []
    for steps in (2, 5, 15):
        points = PGD(steps, 0.1, keep="objective")(mixture, x, y, ball, seeded())
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(member(points), y, reduction="none") for member in mixture.members]
        values.append(lam_of(mixture) @ torch.stack(losses).double().numpy())
    for less, more in pairwise(values):
        assert (more >= less - 1e-6).all()
    assert values[-1].mean() > values[0].mean()


@BALLS
def test_more_queries_find_more(mixture, ball):
    """Square plans its windows for the number of queries: more find more in total, not for each example."""
    x, y = digits_tensors()[2][:48], digits_tensors()[3][:48]
    means = [mixture.expected_accuracy(Square(n)(mixture, x, y, ball, seeded()), y).mean() for n in (8, 30, 120)]
    assert means[0] - 0.01 > means[1]
    assert means[1] - 0.01 > means[2]


# --- everything as it was -----------------------------------------------------------------------------------


def short(attack):
    """The same attack with less work."""
    small = {"num_steps": 3, "num_queries": 4, "num_samples": 3, "restarts": 2, "targets": 2}
    return replace(attack, **{k: v for k, v in small.items() if getattr(attack, k, None) is not None})


STRICT = {name: short(attack) for name, attack in AttackSuite.from_protocol("strict").attacks.items()}
SUITE = AttackSuite({name: STRICT[name] for name in ("noise", "pgd-50", "arc")})


@BALLS
def test_a_suite_leaves_everything_as_it_was_also_when_a_member_fails(ball):
    """Modes, parameters, gradients, batch norm, the global random numbers; the ball is too small to end the work."""
    x, ball = digits_tensors()[2][:5].clone(), replace(ball, eps=ball.eps / 1000)
    with torch.no_grad():
        y = patchwork_mixture(Watched).eval().members[2](x).argmax(1)
    images, labels = x.clone(), y.clone()
    assert_left_as_found(patchwork_mixture, lambda mixture: SUITE(mixture, x, y, ball))
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
