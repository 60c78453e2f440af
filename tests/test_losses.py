import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixadv import losses
from mixadv.losses import AT, TRADES, SmoothedZeroOne


@pytest.fixture
def batch():
    """Logits of L=3 members on B=5 inputs with C=4 classes, other logits, labels."""
    generator = torch.Generator().manual_seed(3)
    z = 3 * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    other = 2 * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    return z, other, torch.tensor([2, 0, 3, 1, 0])


def by_hand(z, y, function):
    """Apply `function(logits of one member and one example, label)` one at a time, in numpy."""
    z, y = z.numpy(), y.numpy()
    return np.array([[function(z[k, b], y[b]) for b in range(z.shape[1])] for k in range(z.shape[0])])


def test_cross_entropy_is_torchs(batch):
    z, _, y = batch
    expected = torch.stack([F.cross_entropy(member, y, reduction="none") for member in z])
    torch.testing.assert_close(losses.cross_entropy(z, y), expected)
    torch.testing.assert_close(losses.cross_entropy(z[1], y), expected[1])


def test_kl_divergence_is_torchs_and_keeps_the_order(batch):
    p, q, _ = batch
    expected = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(losses.kl_divergence(p, q), expected)
    assert not torch.allclose(losses.kl_divergence(q, p), expected)
    torch.testing.assert_close(losses.kl_divergence(p, p), torch.zeros(3, 5, dtype=torch.float64))


def test_kl_divergence_survives_certainty():
    p = torch.tensor([[1e4, 0.0, -1e4]])
    q = torch.tensor([[0.0, 0.0, 0.0]])
    torch.testing.assert_close(losses.kl_divergence(p, q), torch.tensor([np.log(3)], dtype=torch.float32))


def test_margin_and_dlr_by_hand(batch):
    z, _, y = batch

    def margin(logits, label):
        return max(np.delete(logits, label)) - logits[label]

    def dlr(logits, label):
        ranked = sorted(logits)[::-1]
        return margin(logits, label) / (ranked[0] - ranked[2])

    np.testing.assert_allclose(losses.margin(z, y), by_hand(z, y, margin))
    np.testing.assert_allclose(losses.dlr(z, y), by_hand(z, y, dlr), rtol=1e-9)
    np.testing.assert_allclose(losses.dlr(7 * z + 2, y), by_hand(z, y, dlr), rtol=1e-9)
    wrong = by_hand(z, y, lambda logits, label: float(np.argmax(logits) != label))
    assert 0 < wrong.mean() < 1
    np.testing.assert_array_equal(losses.zero_one(z, y), wrong)
    np.testing.assert_array_equal(losses.margin(z, y) > 0, wrong == 1)


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr"])
def test_gradients_of_the_losses(name, batch):
    z, _, y = batch
    assert torch.autograd.gradcheck(lambda logits: getattr(losses, name)(logits, y), z.requires_grad_(True))


def test_gradients_of_the_divergence_and_trades(batch):
    p, q, y = batch
    p.requires_grad_(True)
    q.requires_grad_(True)
    assert torch.autograd.gradcheck(losses.kl_divergence, (p, q))
    assert torch.autograd.gradcheck(lambda adv, clean: TRADES(2.5).outer(adv, clean, y), (p, q))


def test_all_ascend_when_the_right_class_loses(batch):
    z, _, y = batch
    worse = z.clone()
    worse[:, torch.arange(5), y] -= 0.5
    assert (losses.cross_entropy(worse, y) > losses.cross_entropy(z, y)).all()
    assert (losses.margin(worse, y) > losses.margin(z, y)).all()
    assert (AT().inner(worse, None, y) > AT().inner(z, None, y)).all()


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match="at least 3 classes"):
        losses.dlr(torch.randn(5, 2), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 2 classes"):
        losses.margin(torch.randn(5, 1), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("labels", [4, 6])
def test_labels_must_match_the_batch(labels):
    with pytest.raises(ValueError, match="expected"):
        losses.cross_entropy(torch.randn(3, 5, 4), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_first(batch, dtype):
    z, other, y = (t.to(dtype) if t.is_floating_point() else t for t in batch)
    for result, expected in [
        (losses.cross_entropy(z, y), losses.cross_entropy(z.double(), y)),
        (losses.margin(z, y), losses.margin(z.double(), y)),
        (losses.dlr(z, y), losses.dlr(z.double(), y)),
        (losses.kl_divergence(z, other), losses.kl_divergence(z.double(), other.double())),
    ]:
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_adversarial_training_is_cross_entropy_at_the_attacked_input(batch):
    adv, clean, y = batch
    expected = torch.stack([F.cross_entropy(member, y, reduction="none") for member in adv])
    for result in (AT().inner(adv, None, y), AT().outer(adv, None, y), AT().outer(adv, clean, y)):
        torch.testing.assert_close(result, expected)
    assert (AT().needs_clean, AT().start) == (False, "uniform")


def test_trades_by_its_formula(batch):
    adv, clean, y = batch
    p, q = clean.softmax(-1), adv.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    ce = torch.stack([F.cross_entropy(member, y, reduction="none") for member in clean])
    torch.testing.assert_close(TRADES().inner(adv, clean, y), divergence)
    torch.testing.assert_close(TRADES().outer(adv, clean, y), ce + 6 * divergence)
    torch.testing.assert_close(TRADES(0.0).outer(adv, clean, y), ce)
    torch.testing.assert_close(TRADES(3.0).outer(clean, clean, y), ce)
    assert (TRADES().needs_clean, TRADES().start) == (True, "gaussian")


def test_trades_outer_differentiates_the_clean_prediction(batch):
    """d/d clean of KL(p || q) is p_c (log p_c/q_c - KL), not zero."""
    adv, clean, y = (t[1] if t.ndim == 3 else t for t in batch)
    clean = clean.clone().requires_grad_(True)
    (whole,) = torch.autograd.grad(TRADES(2.0).outer(adv, clean, y).sum(), clean)
    p, q = clean.detach().softmax(-1), adv.softmax(-1)
    ratio = (p / q).log()
    expected = p - F.one_hot(y, 4) + 2 * p * (ratio - (p * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(whole, expected)


def test_trades_refuses_what_it_cannot_use(batch):
    adv, _, y = batch
    with pytest.raises(ValueError, match="clean logits"):
        TRADES().outer(adv, None, y)
    with pytest.raises(ValueError, match="clean logits"):
        TRADES().inner(adv, None, y)
    with pytest.raises(ValueError, match="beta"):
        TRADES(-1.0)
    with pytest.raises(ValueError, match="beta"):
        TRADES(float("nan"))


# --- the smoothed 0/1 loss -----------------------------------------------------------------------------------------


def test_the_smoothed_loss_by_hand_and_its_limit(batch):
    z, _, y = batch

    def lost(logits, label):
        """3 times the chance that logistic noise of scale 0.4 exceeds z_y - max_{j != y} z_j."""
        return 3 / (1 + np.exp((logits[label] - max(np.delete(logits, label))) / 0.4))

    loss = SmoothedZeroOne(temperature=0.4, scale=3.0)
    np.testing.assert_allclose(loss.outer(z, None, y), by_hand(z, y, lost))
    wrong = by_hand(z, y, lambda logits, label: float(np.argmax(logits) != label))
    np.testing.assert_allclose(SmoothedZeroOne(1e-3, scale=1.0).outer(z, None, y), wrong, atol=1e-9)
    torch.testing.assert_close(loss.inner(z, None, y), losses.cross_entropy(z, y))


def test_the_temperature_falls_geometrically():
    loss = SmoothedZeroOne(temperature=8.0, final_temperature=0.5)
    assert [loss.at(s).temperature for s in (0, 0.25, 0.5, 0.75, 1, 1.2)] == pytest.approx([8, 4, 2, 1, 0.5, 0.5])
    assert AT().at(0.3) == AT()


def test_the_gradient_of_a_linear_model_by_finite_differences():
    """Central differences of the mean loss in every parameter, float64."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.tensor([2, 0, 3, 1, 0])
    loss = SmoothedZeroOne().at(0.6)
    loss.outer(x @ W.T, None, y).mean().backward()
    for place in np.ndindex(4, 6):
        moved = [W.detach().clone() for _ in range(2)]
        for sign, other in zip((1, -1), moved, strict=True):
            other[place] += sign * 1e-6
        up, down = (float(loss.outer(x @ other.T, None, y).mean()) for other in moved)
        assert float(W.grad[place]) == pytest.approx((up - down) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["temperature", "final_temperature", "scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_smoothed_loss_needs_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be positive and finite"):
        SmoothedZeroOne(**{name: value})
