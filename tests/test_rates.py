"""The solvers' rates: Algorithm 1, the entropic relaxation, and both at extreme scales, against the theory."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from mixadv.game import BestResponse, FiniteGame
from mixadv.lambda_solvers import AcceleratedEntropic, OracleSubgradient
from mixadv.simplex import is_distribution, project_simplex
from oracles_game import best_value, full_linear_program, random_losses, smoothed_minimum

# (N, m, L, seed): several members share the optimum, with unequal weights.
GAMES = [(6, 5, 4, 0), (5, 4, 3, 11), (1, 9, 5, 2)]
STEPS = [1, 4, 16, 64, 256, 1024]


@cache
def solved(shape):
    """The game, V by linear programming, and the pure strategy that is worst alone: the farthest start."""
    game = FiniteGame(random_losses(*shape))
    value, lam, _ = full_linear_program(game.losses.numpy())
    assert np.sort(lam)[-2] > 0.1
    worst = torch.eye(game.num_members, dtype=torch.float64)[game.deterministic_values().argmax()]
    return game, value, worst


def slope(steps, errors):
    """Of the line through (log T, log error)."""
    return np.polyfit(np.log(steps), np.log(np.maximum(errors, 1e-16)), 1)[0]


# --- Algorithm 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "steps"), [(GAMES[0], [*STEPS, 4096]), (GAMES[1], STEPS), (GAMES[2], STEPS[:-1])])
def test_algorithm_1_and_its_certificate_keep_the_bound_at_every_number_of_steps(shape, steps):
    """best - V, R(average) - V and the certified gap are all <= 2 M sqrt(L / T), and fall as T^(-1/2) or faster.

    One sum bounds the three: sum_t g_t·(lam_t - mu) <= ||lam_0 - mu||^2 / (2 eta) + eta T M^2 L / 2 for every mu.
    """
    game, value, worst = solved(shape)
    errors, averages, gaps = [], [], []
    for T in steps:
        found = OracleSubgradient(T).solve(game, worst)
        errors.append(found.value - value)
        averages.append(game.value(found.average_weights) - value)
        gaps.append(found.gap)
        assert found.value == pytest.approx(best_value(game.losses.numpy(), found.weights.tolist()), abs=1e-13)
        assert len(found.history["value"]) == len(found.history["weights"]) == T + 1
    bounds = [2 * game.max_loss * math.sqrt(game.num_members / T) for T in steps]
    for name, series in (("best", errors), ("average", averages), ("gap", gaps)):
        assert (np.array(series) >= -1e-9).all(), name
        assert (np.array(series) <= bounds).all(), name
        assert slope(steps[1:], series[1:]) <= -0.5 + 0.05, name
    # The certificate is worth its name: it covers the error, and is itself small in the end.
    assert (np.array(gaps) >= np.array(errors) - 1e-9).all()
    assert gaps[-1] < 0.05 * gaps[0]


def test_the_rate_of_algorithm_1_is_attained():
    """Matching pennies, R(p) = |2p - 1|, from p = 1/2 + eta/2: every iterate is eta = sqrt(2/T) above V = 0."""
    game = FiniteGame(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]))
    errors = []
    for T in STEPS[1:-1]:
        p = 0.5 + 0.5 * math.sqrt(2 / T)
        found = OracleSubgradient(T).solve(game, torch.tensor([p, 1 - p], dtype=torch.float64))
        assert found.value == pytest.approx(math.sqrt(2 / T), rel=1e-9)
        errors.append(found.value)
    assert slope(STEPS[1:-1], errors) == pytest.approx(-0.5, abs=1e-6)


@dataclass
class Sloppy:
    """Per example the attacker plays the poorest of the perturbations that are within delta of the best."""

    losses: torch.Tensor
    delta: float
    exact: bool = False

    def __post_init__(self):
        self.played = torch.zeros(self.losses.shape[:2], dtype=torch.bool)
        self.shortfalls = []

    @property
    def num_members(self):
        return self.losses.shape[2]

    def best_response(self, lam):
        scores = self.losses @ lam
        best = scores.amax(1, keepdim=True)
        choice = scores.masked_fill(scores < best - self.delta, math.inf).argmin(1)
        rows = torch.arange(len(choice))
        self.played[rows, choice] = True
        self.shortfalls.append((best[:, 0] - scores[rows, choice]).max().item())
        gradient = self.losses[rows, choice].mean(0)
        return BestResponse(gradient, (gradient @ lam).item(), self.losses.abs().max().item(), choice)

    def known(self):
        return FiniteGame(self.losses, self.played)


@pytest.mark.parametrize("delta", [0.05, 0.4])
@pytest.mark.parametrize("shape", GAMES[:2])
def test_algorithm_1_with_approximate_responses_keeps_the_bound_with_twice_delta(shape, delta):
    exact, value, worst = solved(shape)
    errors = []
    for T in STEPS[:-1]:
        game = Sloppy(exact.losses, delta)
        found = OracleSubgradient(T).solve(game, worst)
        reached = exact.value(found.weights)
        errors.append(reached - value)
        assert errors[-1] <= 2 * delta + 2 * exact.max_loss * math.sqrt(exact.num_members / T)
        # What it reports is low by delta at most, and it claims no gap.
        assert reached - delta - 1e-12 <= found.value <= reached + 1e-12
        assert found.gap is None
        assert found.lower_bound <= value + 1e-12
    assert errors[-1] <= 2 * delta
    assert 0 < max(game.shortfalls) <= delta + 1e-12


def test_the_delta_of_approximate_responses_cannot_be_dropped():
    """l = (0, 0) or (delta, 0): the poor answer (0, 0) teaches nothing, and e_1 stays delta above V = 0."""
    delta = 0.3
    game = Sloppy(torch.tensor([[[0.0, 0.0], [delta, 0.0]]], dtype=torch.float64), delta)
    found = OracleSubgradient(100).solve(game, torch.tensor([1.0, 0.0]))
    assert FiniteGame(game.losses).value(found.weights) == delta
    assert full_linear_program(game.losses.numpy())[0] == 0.0
    assert found.value == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_algorithm_1_on_more_games(seed):
    generator = torch.Generator().manual_seed(seed)
    n, m, members = (int(torch.randint(1, high, (1,), generator=generator)) for high in (12, 9, 9))
    game = FiniteGame(random_losses(n, m, members, 100 + seed))
    value = full_linear_program(game.losses.numpy())[0]
    for start in (None, torch.eye(members)[game.deterministic_values().argmax()]):
        for T in [*STEPS, 4096]:
            found = OracleSubgradient(T).solve(game, start)
            bound = 2 * game.max_loss * math.sqrt(members / T)
            assert value - 1e-9 <= found.value <= value + bound
            assert found.gap <= bound
            assert game.value(found.average_weights) <= value + bound


# --- the entropic relaxation ---------------------------------------------------------------------------------------


@cache
def relaxed(shape, alpha, num_steps):
    """A run from the worst vertex, its errors F(lam_t) - min F by scipy, and ||lam_0 - lam*||^2."""
    game, _, worst = solved(shape)
    found = AcceleratedEntropic(alpha, num_steps).solve(game, worst)
    minimum, lam = smoothed_minimum(game.losses.numpy(), alpha)
    errors = np.array(found.history["smoothed_value"]) - minimum
    return game, found, errors, ((worst.numpy() - lam) ** 2).sum()


@pytest.mark.parametrize("alpha", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("shape", GAMES[1:])
def test_accelerated_gradient_keeps_its_bounds_and_its_order(shape, alpha):
    """F(lam_T) - min F <= 2 C ||lam_0 - lam*||^2 / (T + 1)^2, and 100 C / T^2 for certain, restarts or not."""
    game, _, errors, distance = relaxed(shape, alpha, 300)
    C, steps = game.smoothness(alpha), np.arange(1, 301)
    assert (errors >= -1e-8).all()
    assert (errors[1:] <= 100 * C / steps**2).all()
    # Restarts void the proof of the sharper bound, but not the bound on these games.
    assert (errors[1:] <= 2 * C * distance / (steps + 1) ** 2 + 1e-8).all()


@pytest.mark.parametrize("alpha", [1e-1, 1e-2])
@pytest.mark.parametrize("shape", GAMES[1:])
def test_the_error_of_accelerated_gradient_falls_as_the_square_of_the_steps_or_faster(shape, alpha):
    """From where the descent begins, half of the error gone, down to a thousandth of it."""
    errors = relaxed(shape, alpha, 300)[2]
    begun, ended = (int((errors < part * errors[0]).argmax()) for part in (0.5, 1e-3))
    assert 1 < begun < ended - 2
    assert slope(np.arange(begun, ended + 1), errors[begun : ended + 1]) <= -2 + 0.1


def test_acceleration_does_not_live_on_strong_convexity():
    """F of about the mean of (lam_i - lam_(i+1))^2 / (2 alpha): a chain, on which plain descent creeps as 1/T."""
    L, alpha, T = 40, 2.0, 128
    chain = torch.eye(L, dtype=torch.float64)[:-1] - torch.eye(L, dtype=torch.float64)[1:]
    game = FiniteGame(torch.stack([chain, -chain], dim=1))
    lam = plain = torch.eye(L, dtype=torch.float64)[0]
    found = AcceleratedEntropic(alpha, T).solve(game, lam)
    steps, errors, creeping = np.arange(8, T + 1), found.history["smoothed_value"][8:], []
    for _ in range(T + 1):
        creeping.append(game.smoothed_value(plain, alpha))
        plain = project_simplex(plain - game.smoothed_gradient(plain, alpha) / game.smoothness(alpha))
    assert slope(steps, errors) <= -2
    assert -1.3 <= slope(steps, creeping[8:]) <= -0.7


def test_steps_do_not_depend_on_how_many_will_follow():
    """So the history at t is a run of t steps, which the bounds over T above rely on."""
    game, found, _, _ = relaxed(GAMES[1], 1e-2, 300)
    start = torch.tensor(found.history["weights"][0], dtype=torch.float64)
    for T in (1, 9, 33):
        shorter = AcceleratedEntropic(1e-2, T).solve(game, start)
        assert shorter.history["weights"] == found.history["weights"][: T + 1]


MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
MASSES = torch.tensor([0.1, 0.2, 0.05, 0.4, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1e-3, 1e-1, 10.0])
def test_the_relaxation_is_below_the_value_by_at_most_alpha_log_m(alpha):
    game = FiniteGame(random_losses(seed=11), MASK, MASSES)
    found = AcceleratedEntropic(alpha, 50).solve(game)
    allowed = sum(mass * math.log(count) for mass, count in zip(MASSES.tolist(), MASK.sum(1).tolist(), strict=True))
    slack = np.array(found.history["value"]) - np.array(found.history["smoothed_value"])
    assert (slack >= 0).all()
    assert (slack <= alpha * allowed + 1e-15).all()
    assert slack.max() > 0.01 * alpha


def test_the_bounds_on_the_relaxation_are_attained():
    lam, alpha = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.05
    equal = FiniteGame(random_losses()[:, :1].expand(5, 4, 3))
    assert equal.value(lam) - equal.smoothed_value(lam, alpha) == pytest.approx(0.0, abs=1e-15)
    losses = torch.zeros(5, 4, 3)
    losses[:, 2] = 100 * alpha
    alone = FiniteGame(losses)
    assert alone.value(lam) - alone.smoothed_value(lam, alpha) == pytest.approx(alpha * math.log(4), rel=1e-12)


@pytest.mark.parametrize("shape", GAMES)
def test_the_value_is_reached_as_alpha_falls_if_the_steps_grow_as_its_inverse(shape):
    """R(lam_T) - V <= alpha log m + 100 C / T^2, C of order 1/alpha: T of order 1/alpha balances the two."""
    game, value, worst = solved(shape)
    errors = []
    for alpha in (1e-1, 3e-2, 1e-2):
        T = round(2 / alpha)
        found = AcceleratedEntropic(alpha, T).solve(game, worst)
        bound = alpha * math.log(game.num_perturbations) + 100 * game.smoothness(alpha) / T**2
        assert -1e-9 <= found.value - value <= bound
        assert game.value(torch.tensor(found.history["weights"][-1])) - value <= bound
        errors.append(found.value - value)
    assert errors[-1] < 1e-2


@pytest.mark.parametrize("shape", GAMES)
def test_steps_that_grow_as_the_inverse_root_of_alpha_only_hold_the_level(shape):
    """C / T^2 is then the same at every alpha: a smaller alpha is no longer worse in order, but no better."""
    game, value, worst = solved(shape)
    bounds, errors = [], []
    for alpha in (4e-2, 1e-2, 2.5e-3):
        T = round(4 / math.sqrt(alpha))
        bounds.append(game.smoothness(alpha) / T**2)
        errors.append(AcceleratedEntropic(alpha, T).solve(game, worst).value - value)
    np.testing.assert_allclose(bounds, bounds[0], rtol=1e-12)
    assert max(errors) < 0.5
    assert errors[-1] > 0.02


@pytest.mark.parametrize("shape", GAMES)
def test_continuation_reaches_the_value_in_a_few_steps_per_temperature(shape):
    game, value, lam = solved(shape)
    errors = []
    for alpha in (1e-1, 1e-2, 1e-3, 1e-4):
        found = AcceleratedEntropic(alpha, 45).solve(game, lam)
        lam = found.weights
        errors.append(found.value - value)
    # The start is an iterate, so the value never rises along the way.
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3
    cold = AcceleratedEntropic(1e-4, 180).solve(game, solved(shape)[2])
    assert errors[-1] < 0.05 * (cold.value - value)


def test_at_a_fixed_number_of_steps_a_smaller_temperature_can_be_worse():
    game, value, worst = solved(GAMES[0])
    errors = [AcceleratedEntropic(alpha, 50).solve(game, worst).value - value for alpha in (1e-1, 1e-2, 1e-3)]
    assert errors[0] < 1e-3
    assert errors[1] > 10 * errors[0]
    assert errors[2] > 10 * errors[1]


# --- extreme scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1.0, 1e3])
def test_entropic_is_safe_at_any_temperature_scale_and_level(alpha, scale, shift):
    """Finite, on the simplex, silent (warnings are errors); units of the losses and a common level do not matter."""
    plain, losses = random_losses(seed=5), (random_losses(seed=5) + shift) * scale
    for temperature in (alpha, alpha * scale):
        found = AcceleratedEntropic(temperature, 15).solve(FiniteGame(losses))
        assert all(np.isfinite(series).all() for series in found.history.values())
        assert all(is_distribution(torch.tensor(w, dtype=torch.float64), 1e-12) for w in found.history["weights"])
        assert is_distribution(found.weights, 1e-12)
        assert math.isfinite(found.value)
        assert found.gap >= 0
        slack = np.array(found.history["value"]) - np.array(found.history["smoothed_value"])
        rounding = 4e-16 * abs(losses).max().item()
        assert (slack >= -rounding).all()
        assert (slack <= temperature * math.log(4) + rounding).all()
    reference = AcceleratedEntropic(alpha, 15).solve(FiniteGame(plain))
    np.testing.assert_allclose(found.history["weights"], reference.history["weights"], atol=1e-8)
    np.testing.assert_allclose(found.weights, reference.weights, atol=1e-8)
    assert found.value / scale - shift == pytest.approx(reference.value, abs=1e-11 + 1e-15 * shift)


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_algorithm_1_is_safe_at_any_scale_and_level(scale, shift):
    """With a step of one's own a common level does not matter; the theory's step depends on it through M."""
    plain, losses = random_losses(seed=5), (random_losses(seed=5) + shift) * scale
    found = OracleSubgradient(40, step_size=0.1 / scale).solve(FiniteGame(losses))
    reference = OracleSubgradient(40, step_size=0.1).solve(FiniteGame(plain))
    np.testing.assert_allclose(found.history["weights"], reference.history["weights"], atol=1e-9)
    assert found.value / scale - shift == pytest.approx(reference.value, abs=1e-11 + 1e-15 * shift)
    theirs = OracleSubgradient(40).solve(FiniteGame(losses))
    assert theirs.history["step_size"] == [2 / (losses.abs().max().item() * math.sqrt(3 * 40))] * 41
    assert all(is_distribution(torch.tensor(w, dtype=torch.float64), 1e-12) for w in theirs.history["weights"])


# --- what is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "entries"),
    [(OracleSubgradient(37), 38), (AcceleratedEntropic(2e-2, 37), 38)],
    ids=["Algorithm 1", "entropic"],
)
def test_histories_agree_with_the_game_they_record(solver, entries):
    game = FiniteGame(random_losses(seed=11), MASK, MASSES)
    found = solver.solve(game)
    assert {len(series) for series in found.history.values()} == {entries}
    values = [best_value(game.losses.numpy(), lam, MASSES.tolist(), MASK.numpy()) for lam in found.history["weights"]]
    np.testing.assert_allclose(found.history["value"], values, atol=1e-14)
    np.testing.assert_allclose(found.history["best_value"], np.minimum.accumulate(values), atol=1e-14)
    assert (np.diff(found.history["best_value"]) <= 0).all()
    assert found.history["best_value"][-1] == found.value
    assert found.weights.tolist() == found.history["weights"][int(np.argmin(found.history["value"]))]
    weights = torch.tensor(found.history["weights"], dtype=torch.float64)
    assert is_distribution(weights, 1e-14)
    if found.average_weights is not None:
        assert is_distribution(found.average_weights, 1e-14)
        torch.testing.assert_close(found.average_weights, weights.mean(0), rtol=0, atol=1e-14)
        # R is convex: the average is no worse than the mean of the values.
        assert game.value(found.average_weights) <= np.mean(found.history["value"]) + 1e-14
