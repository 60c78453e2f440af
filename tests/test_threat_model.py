import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq

from mixadv.threat_model import ThreatModel

NORMS = ("linf", "l2")


def numpy_norm(delta, norm):
    flat = delta.double().numpy().reshape(len(delta), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


def perturbed(norm, eps, generator, dtype=torch.float64):
    """x and x + delta with ||delta|| in {0, eps/2, 3 eps}, away from the box."""
    x = 0.5 + 0.01 * torch.rand(3, 2, 4, 5, generator=generator, dtype=dtype)
    delta = torch.randn(x.shape, generator=generator, dtype=dtype)
    wanted = torch.tensor([0.0, eps / 2, 3 * eps], dtype=dtype)
    delta *= (wanted / torch.from_numpy(numpy_norm(delta, norm)).to(dtype)).reshape(3, 1, 1, 1)
    return x, x + delta


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_and_projection_per_example(norm, generator):
    eps = 0.06
    threat_model = ThreatModel(norm, eps)
    x, x_adv = perturbed(norm, eps, generator)
    np.testing.assert_allclose(threat_model.distance(x_adv, x), [0, eps / 2, 3 * eps], rtol=1e-10, atol=1e-15)
    projected = threat_model.project(x_adv, x)
    np.testing.assert_allclose(numpy_norm(projected - x, norm), [0, eps / 2, eps], rtol=1e-10, atol=1e-15)
    assert torch.equal(projected[:2], x_adv[:2])
    delta = (x_adv[2] - x[2]).numpy()
    nearest = np.clip(delta, -eps, eps) if norm == "linf" else delta / 3
    np.testing.assert_allclose((projected[2] - x[2]).numpy(), nearest, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.25, 2.0), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_is_feasible_and_idempotent(norm, bounds, dtype, generator):
    threat_model = ThreatModel(norm, 0.3, bounds)
    low, high = bounds or (-3.0, 3.0)
    x = low + (high - low) * torch.rand(40, 3, 8, 8, generator=generator, dtype=dtype)
    x_adv = x + torch.randn(x.shape, generator=generator, dtype=dtype)
    once = threat_model.project(x_adv, x)
    assert (numpy_norm(once - x, norm) <= 0.3 * (1 + 1e-5)).all()
    if bounds is not None:
        assert once.min() >= low
        assert once.max() <= high
    assert threat_model.contains(once, x).all()
    torch.testing.assert_close(threat_model.project(once, x), once, rtol=0, atol=1e-7)


def test_projection_with_eps_zero_is_the_centre(generator):
    x, x_adv = perturbed("l2", 1.0, generator)
    for norm in NORMS:
        assert torch.equal(ThreatModel(norm, 0).project(x_adv, x), x)
        assert torch.equal(ThreatModel(norm, 0).sample(x, generator), x)


def test_linf_samples_are_uniform_in_ball_and_box(generator):
    """Coordinates at 0.02, 0.5 and 0.9 with eps 0.15: cut below, not cut, cut above."""
    eps, n = 0.15, 20_000
    centre = torch.tensor([0.02, 0.5, 0.9], dtype=torch.float64)
    samples = ThreatModel("linf", eps).sample(centre.expand(n, 3), generator).numpy()
    for k, (low, high) in enumerate([(0.0, 0.17), (0.35, 0.65), (0.75, 1.0)]):
        assert stats.kstest(samples[:, k], stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(samples.T) - np.eye(3)).max() < 0.03


def test_l2_samples_are_uniform_in_the_ball_without_a_box(generator):
    """radius^d is uniform; the squared first coordinate of a uniform direction is Beta(1/2, (d-1)/2)."""
    eps, n, d = 2.5, 20_000, 6
    x = torch.full((n, 2, 3), 4.0, dtype=torch.float64)
    delta = (ThreatModel("l2", eps, None).sample(x, generator) - x).flatten(1).numpy()
    radius = np.linalg.norm(delta, axis=1)
    assert stats.kstest((radius / eps) ** d, "uniform").pvalue > 1e-3
    share = (delta[:, 1] / radius) ** 2
    assert stats.kstest(share, stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 1e-3
    assert abs(np.mean(delta[:, 4] > 0) - 0.5) < 0.02


def in_ball_and_box(centre, eps, count, rng):
    """Uniform points of the ball of radius eps cut with [0, 1]^d, by rejection from the cube around the centre."""
    found = np.zeros((0, len(centre)))
    while len(found) < count:
        points = centre + eps * rng.uniform(-1, 1, size=(4 * count, len(centre)))
        inside = (np.linalg.norm(points - centre, axis=1) <= eps) & (points >= 0).all(1) & (points <= 1).all(1)
        found = np.concatenate([found, points[inside]])
    return found[:count]


@pytest.mark.parametrize(
    ("centre", "eps"),
    [
        ([0.02], 0.3),  # cut on one side
        ([0.0, 0.0], 0.5),  # a corner
        ([0.1, 0.3], 0.5),
        ([0.05, 0.05], 0.9),  # wider than the box is far
        ([0.02, 0.9, 0.5], 0.6),
        ([0.0, 1.0, 0.05, 0.5], 0.4),
        ([0.3, 0.7, 0.1, 0.95, 0.5], 1.4),  # the box is narrower than the ball
    ],
)
def test_l2_samples_are_uniform_in_ball_and_box(centre, eps, generator):
    """Coordinates, radius and sums against rejection sampling; no points pile up on the faces."""
    n, centre = 12_000, np.array(centre)
    x = torch.from_numpy(centre).expand(n, -1)
    threat_model = ThreatModel("l2", eps)
    samples = threat_model.sample(x, generator)
    assert threat_model.contains(samples, x).all()
    samples, exact = samples.numpy(), in_ball_and_box(centre, eps, n, np.random.default_rng(5))
    assert ((samples == 0) | (samples == 1)).any(1).mean() < 1e-3
    for statistic in (*range(len(centre)), "radius", "sum"):
        one, other = (
            points[:, statistic]
            if isinstance(statistic, int)
            else (np.linalg.norm(points - centre, axis=1) if statistic == "radius" else points.sum(1))
            for points in (samples, exact)
        )
        assert stats.ks_2samp(one, other).pvalue > 1e-4, statistic


def test_l2_samples_in_many_dimensions(generator):
    """3,072 dimensions, many of them at or near a face: nearly no point of the ball lies in the box.

    There the law is known up to 1 / d: given that the length does not exceed eps, entries are nearly independent
    normals cut at the faces, with the variance for which the expected squared length is eps^2.
    """
    d, n, eps = 3072, 48, 0.5
    unit = eps / math.sqrt(d)
    gaps = unit * torch.tensor([0.0, 0.3, 1.0, 100.0], dtype=torch.float64).repeat_interleave(d // 4)
    x = gaps.expand(n, d)
    threat_model = ThreatModel("l2", eps)
    samples = threat_model.sample(x, generator)
    assert threat_model.contains(samples, x).all()
    assert (samples == 0).double().mean() < 1e-3
    delta = ((samples - x) / unit).numpy()

    def cut(gap, scale):
        return stats.truncnorm(-gap / scale, np.inf, scale=scale)

    def mean_square(scale):
        return np.mean([cut(gap, scale).moment(2) for gap in (0.0, 0.3, 1.0, 100.0)])

    scale = brentq(lambda s: mean_square(s) - 1, 0.5, 2)
    for k, gap in enumerate((0.0, 0.3, 1.0, 100.0)):
        part = delta[:, k * d // 4 : (k + 1) * d // 4].ravel()
        assert stats.kstest(part, cut(gap, scale).cdf).statistic < 0.01
    # d / 2 (1 - radius^2 / eps^2) is exponential up to 1 / d, as in the whole ball.
    slack = d / 2 * (1 - np.square(delta).sum(1) / d)
    assert stats.kstest(slack, "expon").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 1), (6, 7)])
def test_l2_samples_in_a_box_are_reproducible_and_keep_the_dtype(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(3)).round(decimals=1)
    threat_model = ThreatModel("l2", 0.7)
    first, same, other = (threat_model.sample(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == (x.shape, x.dtype)
    assert first.min() >= 0
    assert first.max() <= 1
    # Without a box, and where no point leaves it, the numbers are those of the plain ball.
    inner = torch.full_like(x, 0.5)
    small = [
        ThreatModel("l2", 0.1, bounds).sample(inner, torch.Generator().manual_seed(0)) for bounds in (None, (0, 1))
    ]
    assert torch.equal(*small)


@pytest.mark.parametrize("norm", NORMS)
def test_sampling_uses_only_the_generator_given(norm):
    x = torch.rand(4, 3, 5, 5)
    before = torch.get_rng_state()
    threat_model = ThreatModel(norm, 0.1)
    first, same, other = (threat_model.sample(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_ascent_step_linf_follows_the_sign():
    x = torch.full((2, 3), 0.5)
    grad = torch.tensor([[1e-30, -4.0, 0.0], [float("nan"), -1e-12, float("inf")]])
    moved = ThreatModel("linf", 0.1).ascent_step(x, grad, 0.25)
    expected = np.array([[0.75, 0.25, 0.5], [0.5, 0.25, 0.75]])
    np.testing.assert_allclose(moved.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_ascent_step_l2_has_the_length_asked_for(scale, generator):
    """Also where the squares of the gradient under- or overflow float32; a zero gradient stays."""
    x = torch.zeros(3, 2, 2, 2)
    grad = torch.randn(x.shape, generator=generator)
    grad[1] = 0
    steps = torch.tensor([0.1, 0.2, 0.4])
    moved = ThreatModel("l2", 1.0).ascent_step(x, grad * scale, steps)
    np.testing.assert_allclose(numpy_norm(moved, "l2"), [0.1, 0, 0.4], rtol=1e-5)
    direction = grad[2].double().numpy() / np.linalg.norm(grad[2].double().numpy())
    np.testing.assert_allclose(moved[2].numpy(), 0.4 * direction, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_check_catches_each_kind_of_violation(norm):
    eps = 0.1
    x = torch.tensor([0.5, 0.02, 0.99, 0.5, 0.5, 0.5, 0.5]).reshape(-1, 1).repeat(1, 4)
    x_adv = x.clone()
    x_adv[0, 1] += eps
    x_adv[1, 0] -= 0.03
    x_adv[2, 3] += 0.02
    x_adv[3, 2] += eps * 1.001
    x_adv[4, 2] = float("nan")
    x_adv[5, 0] = float("inf")
    x_adv[6] += 0.9 * eps
    inside = [True, False, False, False, False, False, norm == "linf"]
    assert ThreatModel(norm, eps).contains(x_adv, x).tolist() == inside
    # Without a box the second and third are fine.
    no_box = [True, True, True, False, False, False, norm == "linf"]
    assert ThreatModel(norm, eps, None).contains(x_adv, x).tolist() == no_box


@pytest.mark.parametrize("norm", NORMS)
def test_check_does_not_rely_on_the_other_operations(norm, monkeypatch):
    for name in ("distance", "project", "_norm", "_clamp"):
        monkeypatch.delattr(ThreatModel, name)
    x = torch.full((2, 3), 0.5)
    far = x + torch.tensor([[0.05], [0.5]])
    assert ThreatModel(norm, 0.1).contains(far, x).tolist() == [True, False]


def test_check_allows_what_rounding_costs_far_from_zero():
    x = torch.full((1, 8), 1000.3)
    threat_model = ThreatModel("linf", 0.1, None)
    assert threat_model.contains(threat_model.project(x + 1, x), x).all()
    assert not threat_model.contains(x + 0.101, x).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l1", 0.1), "unknown norm 'l1'"),
        (("linf", -0.1), "at least 0"),
        (("l2", float("nan")), "finite"),
        (("l2", float("inf")), "finite"),
        (("linf", 0.1, (1.0, 0.0)), "low < high"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(*arguments)


def test_wrong_shapes_are_refused():
    threat_model = ThreatModel("l2", 0.1)
    a, b = torch.zeros(3, 4), torch.zeros(3, 1)
    for operation in (threat_model.distance, threat_model.project, threat_model.contains):
        with pytest.raises(ValueError, match="shape"):
            operation(a, b)


def test_settings_are_plain_numbers():
    threat_model = ThreatModel("linf", 0, [0, 1])
    assert threat_model == ThreatModel("linf", 0.0, (0.0, 1.0))
    assert type(threat_model.eps) is float
    assert threat_model.bounds == (0.0, 1.0)


# --- a radius for each example -------------------------------------------------------------------------------

RADII = [0.3, 0.0, 0.05, 0.3, 1.5]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_each_example_may_have_its_own_radius(norm, bounds, generator):
    """Every operation does to example i what the ball of its own radius does."""
    threat_model = ThreatModel(norm, torch.tensor(RADII), bounds)
    x = torch.rand(5, 2, 3, 4, generator=generator)
    x_adv = x + torch.randn(x.shape, generator=generator)
    inside = x + 0.2 * torch.randn(x.shape, generator=generator) / 24**0.5
    projected, samples = threat_model.project(x_adv, x), threat_model.sample(x, generator)
    starts = threat_model.random_start(x, generator)
    assert threat_model.contains(starts, x).all()
    assert threat_model.contains(samples, x).all()
    assert threat_model.contains(projected, x).all()
    for i, radius in enumerate(RADII):
        one, row = ThreatModel(norm, float(torch.tensor(radius)), bounds), slice(i, i + 1)
        torch.testing.assert_close(projected[row], one.project(x_adv[row], x[row]), rtol=0, atol=1e-6)
        assert one.contains(samples[row], x[row]).all()
        for points in (x_adv, inside, x):
            assert threat_model.contains(points, x)[i] == one.contains(points[row], x[row])
    assert torch.equal(samples[1], x[1])
    assert torch.equal(starts[1], x[1])
    # The largest ball is filled, not only the smallest.
    assert threat_model.distance(samples, x)[0] > 0.1


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.4), ("l2", 0.7)])
def test_random_starts_are_samples_cut_to_the_box(norm, eps, generator):
    """Where the ball lies in the box a start is a sample; elsewhere an l2 start is a point of the ball, then cut."""
    x = torch.rand(40, 3, generator=generator)
    starts, points = (
        ThreatModel(norm, eps, bounds).random_start(x, torch.Generator().manual_seed(5)) for bounds in ((0, 1), None)
    )
    samples = ThreatModel(norm, eps, (-9, 9)).sample(x, torch.Generator().manual_seed(5))
    torch.testing.assert_close(points, samples, rtol=0, atol=1e-6)
    assert ThreatModel(norm, eps).contains(starts, x).all()
    assert (starts != points).any()
    if norm == "l2":
        assert torch.equal(starts, points.clamp(0, 1))


def test_radii_of_some_examples(generator):
    threat_model = ThreatModel("l2", RADII)
    assert threat_model.rows(slice(1, 4)) == ThreatModel("l2", RADII[1:4])
    assert threat_model.rows(torch.tensor([4, 0])) == ThreatModel("l2", [1.5, 0.3])
    assert ThreatModel("l2", 0.3).rows(slice(2)) == ThreatModel("l2", 0.3)
    parts = {ball.eps: rows.tolist() for rows, ball in threat_model.by_radius(torch.zeros(5, 2, dtype=torch.float64))}
    assert parts == {0.0: [1], 0.05: [2], 0.3: [0, 3], 1.5: [4]}
    assert threat_model != ThreatModel("l2", [*RADII[:4], 1.0])
    assert threat_model != ThreatModel("linf", RADII)
    assert hash(threat_model) == hash(ThreatModel("l2", np.array(RADII)))


def test_radii_that_do_not_fit_are_refused():
    for wrong, message in (([0.1, -0.1], "at least 0"), ([0.1, math.nan], "finite"), ([[0.1]], "one for each example")):
        with pytest.raises(ValueError, match=message):
            ThreatModel("linf", wrong)
    x = torch.rand(3, 4)
    for operation in (lambda t: t.project(x, x), lambda t: t.sample(x), lambda t: t.contains(x, x)):
        with pytest.raises(ValueError, match="2 radii for a batch of 3 examples"):
            operation(ThreatModel("l2", [0.1, 0.2]))
