"""mixadv.game against loops, linear programs, fifty-digit arithmetic and automatic differentiation."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixadv.game import FiniteGame, Game, finite
from mixadv.lambda_solvers import LinearProgram
from oracles_game import (
    best_value,
    full_linear_program,
    motivating_example,
    random_losses,
    smoothed_value_in_decimals,
)

LAM = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
MASSES = torch.tensor([0.1, 0.2, 0.05, 0.4, 0.25], dtype=torch.float64)


@pytest.fixture(params=[1 << 20, 24], ids=["one chunk", "chunks of two examples"])
def chunk_entries(request, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK_ENTRIES_CPU", request.param)


@pytest.mark.usefixtures("chunk_entries")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_best_response_agree_with_loops(dtype, masked):
    losses = (
        (random_losses() > 0.3).to(dtype) if dtype in (torch.bool, torch.uint8) else (3 * random_losses()).to(dtype)
    )
    mask, masses = (MASK, MASSES) if masked else (None, None)
    game = FiniteGame(losses, mask, masses)
    expected = best_value(losses, LAM, masses, mask)
    assert game.value(LAM) == pytest.approx(expected, abs=1e-15)
    response = game.best_response(LAM)
    assert response.value == pytest.approx(expected, abs=1e-15)
    assert response.gradient.dtype == torch.float64
    assert (response.gradient @ LAM).item() == pytest.approx(expected, abs=1e-14)
    weights = MASSES if masked else torch.full((5,), 0.2, dtype=torch.float64)
    picked = sum(weights[i] * losses[i, response.choice[i]].double() for i in range(5))
    torch.testing.assert_close(response.gradient, picked, rtol=0, atol=1e-15)
    torch.testing.assert_close(game.best_response(LAM).gradient, picked, rtol=0, atol=1e-15)
    assert not masked or MASK[torch.arange(5), response.choice].all()
    alone = [best_value(losses, unit, masses, mask) for unit in torch.eye(3)]
    np.testing.assert_allclose(game.deterministic_values().numpy(), alone, atol=1e-15)


def test_ties_go_to_the_first_allowed_perturbation():
    losses = torch.zeros(2, 3, 2)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert FiniteGame(losses, mask).best_response(torch.tensor([0.5, 0.5])).choice.tolist() == [0, 1]


def test_max_loss_is_over_allowed_entries():
    losses = torch.tensor([[[1.0, -4.0], [math.nan, 9.0]]])
    assert FiniteGame(losses, torch.tensor([[True, False]])).max_loss == 4.0
    assert FiniteGame(losses[:, :1]).best_response(torch.tensor([1.0, 0.0])).max_loss == 4.0


def test_masked_losses_are_never_read():
    losses = random_losses()
    poisoned = losses.masked_fill(~MASK[..., None], math.nan)
    attack = MASK * (MASSES / MASK.sum(1))[:, None]
    clean, game = FiniteGame(losses, MASK, MASSES), FiniteGame(poisoned, MASK, MASSES)
    assert game.value(LAM) == clean.value(LAM)
    assert game.response_value(attack) == clean.response_value(attack)
    assert game.smoothed_value(LAM, 0.1) == clean.smoothed_value(LAM, 0.1)
    assert game.smoothness(0.1) == clean.smoothness(0.1)
    assert torch.equal(game.smoothed_gradient(LAM, 0.1), clean.smoothed_gradient(LAM, 0.1))
    assert torch.equal(game.deterministic_values(), clean.deterministic_values())


def test_motivating_example_in_fractions():
    losses, masses = motivating_example()
    game = FiniteGame(losses, masses=masses)
    half = torch.tensor([0.5, 0.5])
    assert game.deterministic_values().tolist() == [0.75, 0.75]
    assert game.value(half) == 0.5
    mixed = torch.tensor([[0.0, 0.25, 0.25], [0.25, 0.0, 0.0], [0.25, 0.0, 0.0]])
    assert game.response_value(mixed) == 0.5
    assert game.value(half) - game.response_value(mixed) == 0.0
    # The best pure attacker reaches only 1/4: the attacker must randomise too.
    pure = [[0.5 * (torch.arange(3) == j), *mixed[1:]] for j in range(3)]
    assert max(game.response_value(torch.stack(attack)) for attack in pure) == 0.25


def test_response_value_and_gap_by_hand():
    game = FiniteGame(torch.tensor([[[3.0, -1.0], [0.0, 1.0]]]))
    attack = torch.tensor([[0.5, 0.5]])
    assert game.response_value(attack) == 0.0
    assert game.value(torch.tensor([1.0, 0.0])) == 3.0
    assert game.value(torch.tensor([1.0, 0.0])) - game.response_value(attack) == 3.0


@pytest.mark.usefixtures("chunk_entries")
def test_weak_duality_holds_and_is_tight_at_the_linear_program():
    losses = random_losses(seed=4)
    game = FiniteGame(losses, MASK, MASSES)
    value, lam, attack = full_linear_program(losses.numpy(), MASSES.numpy(), MASK.numpy())
    assert game.value(torch.from_numpy(lam)) == pytest.approx(value, abs=1e-9)
    assert game.response_value(torch.from_numpy(attack)) == pytest.approx(value, abs=1e-9)
    assert game.deterministic_values().min() > value + 1e-3
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        lam = torch.rand(3, generator=generator, dtype=torch.float64)
        attack = torch.rand(5, 4, generator=generator, dtype=torch.float64) ** 3 * MASK
        attack *= (MASSES / attack.sum(1))[:, None]
        lam /= lam.sum()
        assert game.response_value(attack) <= value + 1e-12 <= game.value(lam) + 2e-12


def test_subgradient_inequality():
    game = FiniteGame(random_losses(), MASK, MASSES)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        lam, mu = torch.rand(2, 3, generator=generator, dtype=torch.float64)
        assert game.value(mu) >= game.value(lam) + (game.best_response(lam).gradient @ (mu - lam)).item() - 1e-14


@pytest.mark.usefixtures("chunk_entries")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("alpha", [1e-6, 1e-2, 1.0, 1e3])
def test_smoothed_value_to_the_last_digits(alpha, scale):
    losses = random_losses() * scale
    game = FiniteGame(losses, MASK, MASSES)
    expected = smoothed_value_in_decimals(losses, LAM, [alpha] * 5, MASSES, MASK)
    assert game.smoothed_value(LAM, alpha) == pytest.approx(expected, rel=3e-14, abs=0)
    slack = game.value(LAM) - game.smoothed_value(LAM, alpha)
    assert 0 <= slack <= alpha * math.log(4)


def test_smoothed_value_with_a_temperature_per_example():
    losses, alphas = random_losses(), torch.tensor([0.1, 1.0, 0.5, 3.0, 0.01])
    expected = smoothed_value_in_decimals(losses, LAM, alphas)
    assert FiniteGame(losses).smoothed_value(LAM, alphas) == pytest.approx(expected, rel=1e-14)


@pytest.mark.usefixtures("chunk_entries")
def test_smoothed_gradient_against_automatic_differentiation_and_finite_differences():
    losses, alpha = random_losses(), 0.3
    game = FiniteGame(losses, MASK, MASSES)

    def value(lam):
        scores = (losses @ lam / alpha).masked_fill(~MASK, -math.inf)
        return alpha * (MASSES * (scores.logsumexp(1) - MASK.sum(1).log())).sum()

    lam = LAM.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(lam), lam)
    gradient = game.smoothed_gradient(LAM, alpha)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)

    class Ours(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lam):
            ctx.save_for_backward(lam)
            return torch.tensor(game.smoothed_value(lam, alpha), dtype=torch.float64)

        @staticmethod
        def backward(ctx, upstream):
            return upstream * game.smoothed_gradient(ctx.saved_tensors[0], alpha)

    assert torch.autograd.gradcheck(Ours.apply, lam)
    attack = game.smoothed_response(LAM, alpha)
    torch.testing.assert_close(attack.sum(1), MASSES, rtol=0, atol=1e-15)
    assert (attack[~MASK] == 0).all()
    torch.testing.assert_close(torch.einsum("nm,nmk->k", attack, losses), gradient, rtol=0, atol=1e-14)


def test_smoothed_of_several_weights_in_one_pass():
    game = FiniteGame(random_losses(), MASK, MASSES)
    lams = torch.stack([LAM, torch.tensor([1.5, -0.75, 0.25], dtype=torch.float64)])
    values, smooth, gradients = game.smoothed(lams, 0.2)
    for r, lam in enumerate(lams):
        assert values[r].item() == pytest.approx(game.value(lam), abs=1e-15)
        assert smooth[r].item() == pytest.approx(game.smoothed_value(lam, 0.2), abs=1e-15)
        torch.testing.assert_close(gradients[r], game.smoothed_gradient(lam, 0.2), rtol=0, atol=1e-15)


@pytest.mark.usefixtures("chunk_entries")
@pytest.mark.parametrize("budget", [4e9, 0.0], ids=["with diameters", "centres only"])
@pytest.mark.parametrize("masked", [False, True])
def test_smoothness_bounds_the_gradient_and_is_the_least_of_the_bounds(budget, masked, monkeypatch):
    monkeypatch.setattr(finite, "_DIAMETER_BUDGET", budget)
    alpha, losses = 0.05, random_losses(seed=7)
    mask, masses = (MASK, MASSES) if masked else (torch.ones_like(MASK), torch.full((5,), 0.2).double())
    game = FiniteGame(losses, mask, masses)
    constant = game.smoothness(alpha)
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        lam, mu = torch.rand(2, 3, generator=generator, dtype=torch.float64)
        lam, mu = lam / lam.sum(), mu / mu.sum()
        mu = lam + 0.01 * (mu - lam)
        change = game.smoothed_gradient(lam, alpha) - game.smoothed_gradient(mu, alpha)
        # Only the part along the simplex moves the iterates.
        assert (change - change.mean()).norm() <= constant * (lam - mu).norm() * (1 + 1e-9)
    squared_norms = diameters = 0.0
    for i in range(5):
        points = (losses[i] - losses[i].mean(1, keepdim=True))[mask[i]]
        squared_norms += masses[i] * points.square().sum(1).max() / alpha
        diameters += masses[i] * torch.cdist(points, points).square().max() / (4 * alpha)
    assert constant <= squared_norms * (1 + 1e-12)
    if budget:
        assert constant <= diameters * (1 + 1e-12)


def test_smoothness_is_attained_where_two_perturbations_tie():
    game, alpha = FiniteGame(torch.tensor([[[3.0, -1.0], [0.0, 1.0]]])), 0.05
    # The centred losses differ by (5/2, -5/2), and at the tie each has probability 1/2.
    assert game.smoothness(alpha) == pytest.approx(12.5 / (4 * alpha))
    tie, step = torch.tensor([0.4, 0.6]), torch.tensor([1e-5, -1e-5])
    change = game.smoothed_gradient(tie + step, alpha) - game.smoothed_gradient(tie - step, alpha)
    slope = (change - change.mean()).norm().item() / (2 * step.norm().item())
    assert slope == pytest.approx(game.smoothness(alpha), rel=1e-2)


def test_losses_are_converted_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK_ENTRIES_CPU", 2048)
    losses = (random_losses(n=500, m=8, members=16) > 0).to(torch.uint8)
    lam = torch.full((16,), 1 / 16, dtype=torch.float64)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            parts = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(p.numel() for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point())
            return out

    with Watch():
        game = FiniteGame(losses)
        game.best_response(lam)
        game.deterministic_values()
        game.smoothed(torch.stack([lam, lam]), 0.1)
        game.smoothness(0.1)
    assert len(sizes) > 100
    assert max(sizes) <= 2048
    assert game.losses.data_ptr() == losses.data_ptr()


def test_a_game_of_a_hundred_million_entries():
    losses = torch.zeros(1000, 1000, 100, dtype=torch.uint8)
    losses[:, 7, 3] = 2
    game = FiniteGame(losses)
    response = game.best_response(torch.full((100,), 0.01))
    assert response.value == pytest.approx(0.02)
    assert response.choice.unique().tolist() == [7]


def test_a_finite_game_is_an_exact_game_and_its_own_pool():
    game = FiniteGame(random_losses())
    assert isinstance(game, Game)
    assert game.exact
    assert game.num_members == 3
    assert game.pool(LAM, 5, True) is game


def test_numpy_losses_and_non_contiguous_losses():
    losses = random_losses()
    swapped = losses.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert FiniteGame(swapped).value(LAM) == FiniteGame(losses.numpy()).value(LAM)
    assert FiniteGame(swapped).smoothed_value(LAM, 0.1) == pytest.approx(FiniteGame(losses).smoothed_value(LAM, 0.1))


@pytest.mark.parametrize("form", [np.array, torch.tensor, list])
def test_a_matrix_is_a_game_with_one_example(form):
    """Three moves against two members; the last move is forbidden. By hand: 3 l = 2 - l, so l = 1/2 and V = 3/2."""
    rows = [[3.0, 0.0], [1.0, 2.0], [9.0, 9.0]]
    allowed = torch.tensor([True, True, False])
    game = FiniteGame(form(rows), allowed)
    assert (game.num_examples, game.num_perturbations, game.num_members) == (1, 3, 2)
    found = LinearProgram().solve(game)
    assert found.weights.tolist() == pytest.approx([0.5, 0.5])
    assert found.value == pytest.approx(1.5)
    assert found.attack.tolist() == [pytest.approx([0.25, 0.75, 0.0])]
    assert FiniteGame(form(rows), allowed[None]).value(found.weights) == found.value
    assert FiniteGame(form(rows)).value(found.weights) == 9.0


def test_gradients_of_the_members_do_not_leak_in():
    losses = random_losses().requires_grad_()
    assert not FiniteGame(losses).best_response(LAM).gradient.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": torch.zeros(3)}, r"\[examples, perturbations, members\], or \[.*\], got shape \[3\]"),
        ({"losses": torch.zeros(0, 3, 2)}, "no examples"),
        ({"losses": torch.zeros(2, 0, 2)}, "no perturbations"),
        ({"losses": torch.zeros(2, 3, 0)}, "no members"),
        ({"losses": torch.zeros(2, 3, 2, dtype=torch.complex64)}, "must be real"),
        (
            {
                "losses": torch.zeros(9, 4, 3).index_put(
                    (torch.tensor(7), torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)
                )
            },
            r"losses\[7, 1, 2\] is nan",
        ),
        ({"losses": torch.full((2, 3, 2), -math.inf)}, r"losses\[0, 0, 0\] is -inf"),
        (
            {"losses": torch.zeros(2, 3, 2), "mask": torch.ones(2, 2).bool()},
            r"mask must be torch.bool \[2, 3\].*\[2, 2\]",
        ),
        ({"losses": torch.zeros(2, 3, 2), "mask": torch.ones(2, 3)}, r"mask must be torch.bool.*float32"),
        (
            {"losses": torch.zeros(2, 3, 2), "mask": torch.tensor([[True] * 3, [False] * 3])},
            "example 1 is fully masked",
        ),
        ({"losses": torch.zeros(2, 3, 2), "masses": torch.ones(3)}, r"masses must be \[2\].*\[3\]"),
        ({"losses": torch.zeros(2, 3, 2), "masses": torch.tensor([1.5, -0.5])}, r"masses\[1\] is -0.5"),
        ({"losses": torch.zeros(2, 3, 2), "masses": torch.tensor([math.nan, 0.5])}, r"masses\[0\] is nan"),
        ({"losses": torch.zeros(2, 3, 2), "masses": torch.tensor([1.0, 3.0])}, "sum to 1, got 4.0: divide"),
    ],
)
def test_construction_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr(finite, "_CHUNK_ENTRIES_CPU", 24)
    with pytest.raises(ValueError, match=message):
        FiniteGame(**arguments)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (torch.zeros(5, 3), r"attack must be \[5, 4\]"),
        (torch.full((5, 4), -0.1), r"attack\[0, 0\] is -0.1"),
        (torch.full((5, 4), math.nan), r"attack\[0, 0\] is nan"),
        (MASSES[:, None].expand(5, 4) / 4, r"attack\[0, 2\] is .* is masked"),
        (MASK / MASK.sum(1, keepdim=True), r"attack\[0\] sums to 1.* mass 0.1"),
    ],
)
def test_response_value_refuses(attack, message):
    with pytest.raises(ValueError, match=message):
        FiniteGame(random_losses(), MASK, MASSES).response_value(attack)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda game: game.value(torch.ones(4)), r"weights must be \[3\].*\[4\]"),
        (lambda game: game.value(torch.tensor([1.0, math.nan, 0.0])), "weights must be finite"),
        (lambda game: game.smoothed_value(LAM, 0.0), "alpha must be positive and finite, got 0.0"),
        (lambda game: game.smoothed_value(LAM, math.inf), "alpha must be positive and finite, got inf"),
        (lambda game: game.smoothed_gradient(LAM, torch.ones(3)), r"alpha must be one number or \[5\]"),
        (lambda game: game.smoothness(torch.tensor([1.0, 1, 1, -2, 1])), "got -2.0"),
    ],
)
def test_methods_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(FiniteGame(random_losses()))
