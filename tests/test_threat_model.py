import numpy as np
import pytest
import torch
from scipy import stats

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


def test_l2_samples_are_clamped_to_the_box(generator):
    """At a corner of the square three quarters of the disc lie outside: their points sit on the faces."""
    n = 20_000
    x = torch.zeros(n, 2, dtype=torch.float64)
    threat_model = ThreatModel("l2", 0.5)
    samples = threat_model.sample(x, generator)
    assert threat_model.contains(samples, x).all()
    assert abs((samples == 0).any(1).double().mean().item() - 0.75) < 0.02
    assert "no longer uniform" in " ".join(ThreatModel.sample.__doc__.split())


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
