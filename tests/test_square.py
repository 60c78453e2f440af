import itertools

import numpy as np
import pytest
import torch
from torch import nn

from builders.data import digits_tensors, seeded
from builders.linear_problems import linear_examples
from builders.networks import WEIGHTS, disagreeing_mixture, network_on_digits
from mixadv.attacks import PGD, ExpectedLoss, InnerLoss, Square
from mixadv.attacks.square import _bumps
from mixadv.losses import TRADES
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import Affine

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.6)
MARGIN = ExpectedLoss("margin")


class Flat(nn.Module):
    """A network on images as one on their pixels in any other shape."""

    def __init__(self, member, shape):
        super().__init__()
        self.member, self.shape = member, shape

    def forward(self, x):
        return self.member(x.reshape(len(x), *self.shape))


class Watch(nn.Module):
    """Constant logits, right for label 0 and unmoved by anything; keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(x.clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


# --- strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps", "queries", "seeds"), [("linf", 0.1, 120, 2), ("l2", 0.5, 60, 2)])
def test_it_is_at_least_as_strong_as_the_reference(norm, eps, queries, seeds):
    """Against pyautoattack at equal queries, over seeds: no more than half a point of accuracy is left."""
    from pyautoattack.square import SquareAttack

    mixture, (x, y) = Mixture([network_on_digits()]), (part[:300] for part in digits_tensors()[2:])
    threat_model = ThreatModel(norm, eps)
    ours, peer = [], []
    for seed in range(seeds):
        found = Square(queries)(mixture, x, y, threat_model, seeded(seed))
        assert threat_model.contains(found, x).all()
        ours.append(mixture.expected_accuracy(found, y).mean().item())
        # It counts the start apart.
        reference = SquareAttack(
            mixture.members[0], norm={"linf": "Linf", "l2": "L2"}[norm], n_queries=queries - 1, eps=eps, seed=seed
        )
        with torch.random.fork_rng():
            peer.append(mixture.expected_accuracy(reference.perturb(x, y), y).mean().item())
    assert np.mean(ours) <= np.mean(peer) + 0.005, (ours, peer)
    # The comparison is made where it means something.
    assert 0.3 < np.mean(ours) < 0.7
    # Gradients know more: what is found is plausible, not only low.
    white = PGD(20)(mixture, x, y, threat_model, seeded())
    assert np.mean(ours) > mixture.expected_accuracy(white, y).mean() - 0.02


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_the_best_corner_is_found_in_linf(bounds):
    """Linear members: the expected margin has its maximum where each pixel follows the averaged weights."""
    generator = seeded(1)
    w = torch.randn(3, 24, generator=generator, dtype=torch.float64)
    x = torch.rand(5, 24, generator=generator, dtype=torch.float64)
    # Far from every boundary: nothing is closed early.
    mixture = Mixture([Flat(Affine(row, 40.0), (24,)) for row in w], WEIGHTS)
    y = torch.ones(5, dtype=torch.long)
    found = Square(400)(mixture, x.reshape(5, 2, 3, 4), y, ThreatModel("linf", 0.2, bounds), seeded())
    corner = x - 0.2 * (torch.tensor(WEIGHTS, dtype=torch.float64) @ w).sign()
    corner = corner if bounds is None else corner.clamp(*bounds)
    torch.testing.assert_close(found.reshape(5, 24), corner)


def test_a_good_part_of_the_best_margin_is_found_in_l2():
    """Smooth linear members. In 81 dimensions the best of 400 random directions has a third of the largest gain."""
    down, across = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    waves = [torch.sin(down / 2 + across / 3), torch.cos(across / 2), torch.sin(down / 3)]
    w = torch.stack(waves).double().reshape(3, 81)
    x = torch.rand(5, 1, 9, 9, generator=seeded(1), dtype=torch.float64)
    mixture = Mixture([Flat(Affine(row, 60.0), (81,)) for row in w], WEIGHTS)
    found = Square(400)(mixture, x, torch.ones(5, dtype=torch.long), ThreatModel("l2", 0.7, None), seeded())
    slope = -torch.tensor(WEIGHTS, dtype=torch.float64) @ w
    gain = (found - x).flatten(1) @ slope / (0.7 * slope.norm())
    assert (gain <= 1 + 1e-9).all()
    assert (gain >= 0.5).all(), gain


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_mixtures_of_linear_members_lose_what_they_can_lose(norm):
    """Close to the exact worst case over all sets of members on average."""
    mixture, points, labels, threat_model, best = linear_examples(norm)
    found = mixture.expected_accuracy(Square(300)(mixture, points, labels, threat_model, seeded()), labels).numpy()
    clean = mixture.expected_accuracy(points, labels).numpy()
    assert clean.mean() - best.mean() > 0.2
    assert found.mean() - best.mean() < 0.25 * (clean.mean() - best.mean())


# --- the moves ---------------------------------------------------------------------------------------------

# Of 10,000 queries: those of a size begin after these.
AFTER = {0: 0.8, 10: 0.4, 50: 0.2, 200: 0.1, 500: 0.05, 1000: 0.025, 2000: 0.0125, 4000: 0.00625, 6000: 0.003125}


def share(query, num_queries):
    return [share for after, share in AFTER.items() if query / num_queries * 10_000 > after or after == 0][-1]


def test_windows_in_linf():
    """The member never answers differently, so every query is the start with one window changed."""
    watch = Watch()
    x = torch.rand(16, 1, 12, 12, generator=seeded(3)) * 0.5 + 0.25
    Square(400)(watch, x, torch.zeros(16, dtype=torch.long), LINF, seeded())
    at_x, start, *queries = watch.asked
    assert torch.equal(at_x, x)
    assert len(queries) == 399
    torch.testing.assert_close((start - x).abs(), torch.full_like(x, 0.1))
    stripes = (start - x).sign()
    assert (stripes == stripes[:, :, :1]).all()
    assert 0.4 < (stripes > 0).float().mean() < 0.6
    places = set()
    for number, query in enumerate(queries, 1):
        side = max(1, round(np.sqrt(share(number, 400) * 144)))
        torch.testing.assert_close((query - x).abs(), torch.full_like(x, 0.1))
        changed = (query != start)[:, 0]
        new = torch.where(changed, (query - x).sign()[:, 0], 0).flatten(1)
        assert (new.amin(1) * new.amax(1) == 0).all(), "two signs in one window"
        # Of the window, the columns that had the other sign show, at full height; a query that shows none is wasted.
        for i, lines in enumerate((changed.any(2), changed.any(1))):
            first, last = lines.int().argmax(1), 11 - lines.flip(1).int().argmax(1)
            assert (last - first <= side - 1).all()
            assert i or ((lines.sum(1) == side) & (last - first == side - 1)).all()
        if side == 1:
            places |= set(changed.flatten(1).int().argmax(1).tolist())
    assert places == set(range(144))
    # Each example has windows of its own.
    assert (queries[300] != start).flatten(1).float().unique(dim=0).shape[0] > 10


def test_windows_in_l2():
    watch = Watch()
    x = torch.rand(12, 2, 20, 20, generator=seeded(3), dtype=torch.float64)
    threat_model = ThreatModel("l2", 3.0, None)
    Square(200, p_init=0.3)(watch, x, torch.zeros(12, dtype=torch.long), threat_model, seeded())
    _, start, *queries = watch.asked
    torch.testing.assert_close(threat_model.distance(start, x), torch.full((12,), 3.0, dtype=torch.float64))
    assert (start != x).all()
    apart = set()
    for number, query in enumerate(queries, 1):
        side = round(np.sqrt(0.3 / 0.8 * share(number, 200) * 400))
        side = max(3, side + (side + 1) % 2)
        # What the windows lose in one place they spend in the other.
        torch.testing.assert_close(threat_model.distance(query, x), torch.full((12,), 3.0, dtype=torch.float64))
        changed = (query != start).any(1)
        assert (changed.sum((1, 2)) <= 2 * side**2).all()
        assert (changed.sum((1, 2)) >= side**2 - 1).all()
        emptied = (query == x).all(1)
        apart |= set(emptied.sum((1, 2)).tolist()) if side == 3 else set()
    # Two windows of 3 by 3 overlap in any way, and mostly not at all.
    assert {0, 3, 5, 6, 8, 9} <= apart <= set(range(10))


def test_what_the_box_takes_is_spent_elsewhere():
    """Bumps below zero are cut off in the left half; a query in the right half alone brings the norm back to eps."""
    watch = Watch()
    x = torch.full((24, 2, 8, 24), 0.5, dtype=torch.float64)
    x[..., :12] = 0.0
    threat_model = ThreatModel("l2", 0.4)
    Square(40, p_init=0.05)(watch, x, torch.zeros(24, dtype=torch.long), threat_model, seeded())
    _, start, *queries = watch.asked
    assert (threat_model.distance(start, x) < 0.39).all()
    seen = 0
    for query in queries:
        inside = (query == start)[..., :12].flatten(1).all(1)
        distance = threat_model.distance(query, x)[inside]
        torch.testing.assert_close(distance, torch.full_like(distance, 0.4))
        seen += int(inside.sum())
    assert seen > 50


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_search_climbs_the_expected_margin(restarts):
    """Each query changes one window of the point of the highest objective so far, fooled members or not."""
    generator = seeded(8)
    watch = Watch()
    members = [Affine(3 * torch.randn(64, generator=generator), torch.tensor(-1.0)) for _ in range(3)]
    x = torch.rand(10, 1, 8, 8, generator=generator)
    for member in members:
        with torch.no_grad():
            member.bias -= member(x.flatten(1))[:, 1].mean()
    lam = [0.25, 0.4, 0.1, 0.25]
    mixture = Mixture([Flat(watch, (1, 8, 8)), *(Flat(member, (64,)) for member in members)], lam)
    y = torch.zeros(10, dtype=torch.long)
    found = Square(150, restarts=restarts)(mixture, x, y, LINF, seeded())

    def score(points):
        with torch.no_grad():
            margins = torch.stack([points.flatten(1) @ member.weight + member.bias for member in members])
        return torch.tensor(lam[1:]) @ margins, torch.tensor(lam[1:]) @ (margins <= 0).float()

    conflicts = 0
    points = watch.asked[1:]
    for first in range(0, 150 * restarts, 150):
        base, (best, right) = points[first], score(points[first])
        for number, query in enumerate(points[first + 1 : first + 150], 1):
            side = max(1, round(np.sqrt(share(number, 150) * 64)))
            changed = (query != base)[:, 0]
            for lines in (changed.any(2), changed.any(1)):
                assert (7 - lines.flip(1).int().argmax(1) - lines.int().argmax(1) <= side - 1).all()
            value, still_right = score(query)
            conflicts += int(((value - best) * (still_right - right) > 1e-6).sum())
            better = value > best
            base = torch.where(better[:, None, None, None], query, base)
            best, right = torch.where(better, value, best), torch.where(better, still_right, right)
    # The two orders differ here, and what is returned goes by accuracy.
    assert conflicts > 5
    accuracies = torch.stack([score(point)[1] for point in watch.asked])
    torch.testing.assert_close(score(found)[1], accuracies.amin(0))


@pytest.mark.parametrize("size", [(5, 5), (3, 3), (7, 7), (9, 9)])
def test_bumps_follow_the_formula(size):
    """Section 4.3 of the paper, term by term: indices from 1, n half the height of the window."""
    side = size[0]

    def pyramid(rows, columns):
        n = rows // 2
        value = np.zeros((rows, columns))
        for r, s in itertools.product(range(1, rows + 1), range(1, columns + 1)):
            reach = n - max(abs(r - rows // 2 - 1), abs(s - columns // 2 - 1))
            value[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(reach + 1))
        return value

    pattern = np.concatenate([pyramid(side, side // 2), -pyramid(side, side - side // 2)], axis=1)
    pattern /= np.linalg.norm(pattern)
    above, beside = _bumps(*size, torch.zeros(1, dtype=torch.float64))
    np.testing.assert_allclose(beside, pattern, atol=1e-12)
    np.testing.assert_allclose(above, pattern.T, atol=1e-12)


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_flat_inputs_are_one_row_of_pixels(threat_model):
    mixture, x, y = disagreeing_mixture("linear", (1, 1, 12))
    image = Square(40)(mixture, x, y, threat_model, seeded())
    for shape in ((12,), (1, 12)):
        flat = Mixture([Flat(member, (1, 1, 12)) for member in mixture.members], WEIGHTS)
        found = Square(40)(flat, x.reshape(6, *shape), y, threat_model, seeded())
        assert torch.equal(found.reshape(x.shape), image)
    assert (mixture.expected_accuracy(image, y) < mixture.expected_accuracy(x, y)).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 6, 15), (2, 9, 4), (1, 1, 1), (1, 2, 2), (3, 1, 7)])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (-1.0, 2.0)])
def test_any_image_is_searched_inside_ball_and_box(norm, shape, bounds):
    watch = Watch()
    x = torch.rand(20, *shape, generator=seeded(2))
    x[0] = 0.0
    threat_model = ThreatModel(norm, 0.4, bounds)
    found = Square(60, p_init=1.0)(watch, x, torch.zeros(20, dtype=torch.long), threat_model, seeded())
    assert len(watch.asked) == 61
    assert all(threat_model.contains(asked, x).all() for asked in watch.asked)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    changed = torch.stack([(asked != watch.asked[1])[1:].any(1).any(0) for asked in watch.asked[2:]]).any(0)
    assert changed.all(), "some pixel is never tried"


# --- queries, answers, refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("threat_model", [LINF, L2], ids=str)
def test_among_equals_the_margin_never_falls(threat_model):
    mixture, x, y = disagreeing_mixture()
    found = Square(60)(mixture, x, y, threat_model, seeded())
    before, after = mixture.expected_accuracy(x, y), mixture.expected_accuracy(found, y)
    assert after.mean() < before.mean() - 0.1
    with torch.no_grad():
        margins = [MARGIN(mixture.member_logits(point), y, mixture.weights) for point in (x, found)]
    same = after == before
    assert same.any()
    assert (margins[1] >= margins[0])[same].all()


def test_queries_are_counted_and_fooled_examples_left_alone():
    mixture, x, y = disagreeing_mixture()
    sizes = []
    mixture.members[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    y = y.clone()
    y[2] = (mixture.member_logits(x).argmax(-1)[:, 2].bincount(minlength=4) == 0).nonzero()[0]
    still_right = int((mixture.expected_accuracy(x, y) > 0).sum())
    assert 2 < still_right < 6
    sizes.clear()
    found = Square(30, restarts=2)(mixture, x, y, LINF, seeded())
    assert sizes[0] == 6
    assert sizes[1] == still_right
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 61
    assert torch.equal(found[2], x[2])
    watch = Watch()
    Square(7, restarts=3)(watch, x, torch.zeros(6, dtype=torch.long), LINF, seeded())
    assert len(watch.asked) == 1 + 3 * 7
    # A member without weight is not asked, and does not keep an example open.
    pair = Mixture([watch, Affine(torch.zeros(192), torch.tensor(1.0))], [0.0, 1.0])
    watch.asked.clear()
    Square(7)(pair, x.flatten(1), torch.zeros(6, dtype=torch.long), LINF, seeded())
    assert not watch.asked


class Quantised(nn.Module):
    """Logits of inputs rounded to eighths, or with `hard` the answer alone: the gradient is zero, or none at all."""

    def __init__(self, weight, bias, hard):
        super().__init__()
        self.weight, self.bias, self.hard = weight, bias, hard

    def forward(self, x):
        score = torch.round(x.flatten(1).detach() * 8) / 8 @ self.weight + self.bias
        score = (score > 0).to(score) - 0.5 if self.hard else score
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("hard", [False, True])
def test_members_need_no_gradient(hard):
    generator = seeded(4)
    weight = torch.randn(3, 16, generator=generator)
    x = torch.rand(60, 1, 4, 4, generator=generator)
    mixture = Mixture([Quantised(w, -w.sum() / 2, hard) for w in weight], WEIGHTS)
    y = mixture(x).argmax(-1)
    with pytest.raises(ValueError, match="no gradient"):
        PGD(1)(mixture, x, y, LINF)
    with torch.enable_grad():
        found = Square(200)(mixture, x, y, LINF, seeded())
    before, after = mixture.expected_accuracy(x, y).mean(), mixture.expected_accuracy(found, y).mean()
    assert LINF.contains(found, x).all()
    assert after < before - 0.1
    assert not found.requires_grad


def test_no_graph_is_built():
    mixture, x, y = disagreeing_mixture()
    tracked, leaf = [], torch.ones(1, requires_grad=True)
    mixture.members[1].register_forward_hook(lambda _, inputs, output: tracked.append((leaf * output).requires_grad))
    x.requires_grad_(True)
    Square(5)(mixture, x, y, LINF, seeded())
    assert len(tracked) > 3
    assert not any(tracked)
    assert x.grad is None


def test_other_objectives():
    mixture, x, y = disagreeing_mixture()
    for objective in (ExpectedLoss("ce"), InnerLoss(TRADES())):
        found = Square(20, objective=objective)(mixture, x, y, LINF, seeded())
        assert (mixture.expected_accuracy(found, y) <= mixture.expected_accuracy(x, y)).all()
        assert not torch.equal(found, x)


class NotANumber(nn.Module):
    """Logits NaN wherever the mean of the input has moved up."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, x):
        score = torch.where(x.flatten(1).mean(1) > self.mean, torch.nan, x.flatten(1).mean(1))
        return torch.stack([score + 5, score], dim=1)


def test_answers_that_are_not_numbers_stop_nothing():
    x = torch.full((8, 1, 4, 4), 0.5)
    found = Square(40)(NotANumber(0.5), x, torch.zeros(8, dtype=torch.long), LINF, seeded())
    assert LINF.contains(found, x).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 0}, "num_queries"),
        ({"restarts": 0}, "restarts"),
        ({"p_init": 0.0}, "p_init"),
        ({"p_init": 1.5}, "p_init"),
        ({"p_init": float("nan")}, "p_init"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Square(**settings)


def test_volumes_are_refused():
    mixture, x, y = disagreeing_mixture("linear")
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        Square(1)(mixture, x[:, None], y, LINF)
