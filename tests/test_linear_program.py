"""LinearProgram against the full linear program, closed forms, the theorems' bounds and the other solvers."""

import math
import time
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixadv.game import BestResponse, FiniteGame, Game
from mixadv.lambda_solvers import AcceleratedEntropic, LambdaSolver, LinearProgram, OracleSubgradient
from mixadv.lambda_solvers.cutting_planes import CuttingPlanes
from mixadv.lambda_solvers.grouping import Grouping
from mixadv.simplex import is_distribution
from oracles_game import best_value, full_linear_program, motivating_example, random_losses

BOTH_CUTS = [LinearProgram(cuts="examples"), LinearProgram(cuts="aggregated", num_groups=4)]


def random_game(seed, most_rows):
    """Losses [N, m, L], mask and masses of some shape and kind; L 1-16, N 1-200, m 1-30, N m <= most_rows."""
    rng = np.random.default_rng(seed)
    members, m = int(rng.integers(1, 17)), int(rng.integers(1, 31))
    n = min(int(np.exp(rng.uniform(0, np.log(201)))), most_rows // m)
    losses = rng.normal(size=(n, m, members)) + 0.3 * rng.normal(size=members)
    kind = rng.integers(5)
    if kind == 0:
        losses = (losses > 0.5).astype(float)
    elif kind == 1:
        losses = rng.integers(-2, 3, size=losses.shape).astype(float)
    elif kind == 2:
        losses *= np.exp(2 * rng.normal(size=(n, 1, 1)))
    elif kind == 3:
        losses *= rng.random(losses.shape) < 0.3
    if members > 1 and rng.random() < 0.2:
        losses[..., 1] = losses[..., 0]
    if rng.random() < 0.2:
        losses[..., -1] = rng.normal()
    if rng.random() < 0.2:
        losses = losses[rng.integers(n, size=n)]
    if rng.random() < 0.2:
        losses = losses[:, rng.integers(m, size=m)]
    if rng.random() < 0.05:
        losses[:] = 0
    mask = masses = None
    if rng.random() < 0.5:
        mask = rng.random((n, m)) < 0.7
        mask[np.arange(n), rng.integers(m, size=n)] = True
    if rng.random() < 0.5:
        # Where masses are below its tolerances the full program's duals are no strategy.
        masses = rng.dirichlet(np.full(n, 0.3)) + 1e-6
        masses /= masses.sum()
        if n > 1 and rng.random() < 0.5:
            masses[masses.argmin()] = 0
            masses /= masses.sum()
    return losses, mask, masses


def play(losses, mask=None, masses=None):
    return FiniteGame(
        torch.as_tensor(losses),
        None if mask is None else torch.as_tensor(mask),
        None if masses is None else torch.as_tensor(masses),
    )


def check_equilibrium(found, losses, mask=None, masses=None, tolerance=1e-9):
    """Feasibility, weak duality and complementary slackness of (lam, Q), in numpy on the game's own numbers."""
    losses = np.asarray(losses, dtype=float)
    n, m, _ = losses.shape
    allowed = np.ones((n, m), dtype=bool) if mask is None else np.asarray(mask)
    masses = np.full(n, 1 / n) if masses is None else np.asarray(masses)
    size = np.abs(losses[allowed]).max()
    losses = np.where(allowed[..., None], losses, 0.0)
    lam, attack = found.weights.numpy(), found.attack.numpy()
    assert lam.dtype == attack.dtype == np.float64
    assert is_distribution(found.weights, atol=1e-14)
    assert (lam >= 0).all()
    assert (attack >= 0).all()
    assert not attack[~allowed].any()
    np.testing.assert_allclose(attack.sum(1), masses, rtol=1e-12, atol=0)
    scores = np.where(allowed, losses @ lam, -np.inf)
    payoffs = np.einsum("nm,nmk->k", attack, losses)
    value, bound = masses @ scores.max(1), payoffs.min()
    assert found.value == pytest.approx(value, rel=1e-12, abs=1e-13 * size)
    assert found.lower_bound == pytest.approx(bound, rel=1e-12, abs=1e-13 * size)
    assert value >= bound - 1e-13 * size
    assert 0 <= found.gap <= tolerance * size
    # Members in use have the least payoff, perturbations in use the largest score.
    assert lam @ (payoffs - bound) <= tolerance * size
    slack = np.where(allowed, scores.max(1, keepdims=True) - scores, 0.0)
    assert (attack * slack).sum() <= tolerance * size
    return size


def check_random_game(seed, most_rows=6000):
    losses, mask, masses = random_game(seed, most_rows)
    n, m, members = losses.shape
    game = play(losses, mask, masses)
    found = LinearProgram().solve(game)
    size = check_equilibrium(found, losses, mask, masses)
    assert found.status == "converged"
    held = np.ones(n, dtype=bool) if masses is None else masses > 0
    value, _, _ = full_linear_program(
        losses[held], None if masses is None else masses[held], None if mask is None else mask[held]
    )
    assert found.value == pytest.approx(value, rel=0, abs=1e-8 * size)
    assert found.lower_bound == pytest.approx(value, rel=0, abs=1e-8 * size)
    assert found.value <= game.deterministic_values().min().item() + 1e-12 * size
    other = LinearProgram(cuts="aggregated", num_groups=1 + seed % 7).solve(game)
    assert other.value == pytest.approx(value, rel=0, abs=1e-8 * size)
    assert other.gap <= 1e-9 * size
    # Algorithm 1 within its theorem's bound, the entropic solver within alpha log m and its own error of V.
    steps = 60
    oracle = OracleSubgradient(steps).solve(game)
    assert value - 1e-9 * size <= oracle.value <= value + 2 * size * math.sqrt(members / steps) + 1e-9 * size
    if size > 0:
        alpha = 0.02 * size
        entropic = AcceleratedEntropic(alpha, steps).solve(game)
        slack = alpha * math.log(m) + min(entropic.history["smoothed_gap"])
        assert value - 1e-9 * size <= entropic.value <= value + slack + 1e-9 * size


@pytest.mark.parametrize("seed", range(40))
def test_random_games_against_the_full_linear_program(seed):
    check_random_game(seed, most_rows=800)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_a_thousand_random_games_against_the_full_linear_program(block):
    for seed in range(100 + 50 * block, 150 + 50 * block):
        check_random_game(seed)


# --- games that are known by heart ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", BOTH_CUTS)
@pytest.mark.parametrize(
    ("losses", "weights", "attack", "value"),
    [
        ([[1, 0], [0, 1]], [1 / 2, 1 / 2], [1 / 2, 1 / 2], 1 / 2),
        ([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], [1 / 3] * 3, [1 / 3] * 3, 0),
        ([[3, -1], [0, 1]], [0.4, 0.6], [0.2, 0.8], 0.6),
        ([[3, 0], [-1, 1]], [0.2, 0.8], [0.4, 0.6], 0.6),
        # Biased rock, paper, scissors: a win with rock counts twice.
        ([[0, 1, -2], [-1, 0, 1], [2, -1, 0]], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25], 0),
    ],
    ids=["matching pennies", "rock-paper-scissors", "two by two", "transposed", "biased"],
)
@pytest.mark.parametrize("lam0", [None, 0])
def test_matrix_games(solver, losses, weights, attack, value, lam0):
    game = FiniteGame(torch.tensor([losses], dtype=torch.float64))
    start = None if lam0 is None else torch.eye(len(weights))[lam0]
    found = solver.solve(game, lam0=start)
    check_equilibrium(found, game.losses)
    np.testing.assert_allclose(found.weights, weights, atol=1e-12)
    np.testing.assert_allclose(found.attack, [attack], atol=1e-12)
    assert found.value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("solver", BOTH_CUTS)
@pytest.mark.parametrize("lam0", [None, torch.tensor([0.9, 0.1])])
def test_motivating_example(solver, lam0):
    losses, masses = motivating_example()
    found = solver.solve(FiniteGame(losses, masses=masses), lam0=lam0)
    check_equilibrium(found, losses, masses=masses)
    np.testing.assert_allclose(found.weights, [0.5, 0.5], atol=1e-15)
    assert found.value == pytest.approx(0.5, abs=1e-15)
    # The attacker must randomise too: the mass at 0 goes to -1/2 and to +1/2, half each.
    np.testing.assert_allclose(found.attack[0], [0, 0.25, 0.25], atol=1e-15)


@pytest.mark.parametrize("solver", BOTH_CUTS)
def test_dominated_members_get_no_weight(solver):
    losses = random_losses(n=30, m=6, members=4, seed=3)
    losses[..., 1] = losses[..., 0] + 0.5
    losses[..., 3] = losses[..., 0] + 0.001
    found = solver.solve(FiniteGame(losses))
    assert found.weights[1] == found.weights[3] == 0
    value, lam, _ = full_linear_program(losses[..., [0, 2]].numpy())
    assert found.value == pytest.approx(value, abs=1e-9)
    np.testing.assert_allclose(found.weights[[0, 2]], lam, atol=1e-7)


@pytest.mark.parametrize("num_groups", [1, 7, 128])
@pytest.mark.parametrize("kind", ["real", "zero-one", "masked"])
def test_cuts_of_examples_and_of_groups_agree(num_groups, kind):
    losses = random_losses(n=150, m=12, members=6, seed=8)
    mask = torch.rand(150, 12, generator=torch.Generator().manual_seed(1)) < 0.6 if kind == "masked" else None
    if mask is not None:
        mask[:, 4] = True
    game = FiniteGame(losses > 0.4 if kind == "zero-one" else losses, mask)
    apart = LinearProgram(cuts="examples").solve(game)
    summed = LinearProgram(cuts="aggregated", num_groups=num_groups).solve(game)
    for found in (apart, summed):
        check_equilibrium(found, game.losses, mask)
        assert np.sort(found.weights)[-3] > 1e-3
    assert summed.value == pytest.approx(apart.value, abs=3e-9)
    # More rows a response, fewer responses.
    assert num_groups > 1 or apart.num_attacks < summed.num_attacks


@pytest.mark.parametrize(("n", "cuts"), [(60, "examples"), (61, "aggregated")])
def test_few_examples_have_cuts_of_their_own(n, cuts):
    game = FiniteGame(random_losses(n=n, m=12, members=6, seed=8))
    held = {
        name: LinearProgram(cuts=name, num_groups=30).solve(game).history["num_cuts"]
        for name in ("auto", "examples", "aggregated")
    }
    assert held["auto"] == held[cuts]
    assert held["examples"] != held["aggregated"]


# --- shapes, scales and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", BOTH_CUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (5, 4, 1), (5, 1, 3), (1, 4, 3), (200, 1, 1)])
def test_games_with_a_single_something(solver, shape):
    losses = random_losses(*shape, seed=4)
    found = solver.solve(FiniteGame(losses))
    check_equilibrium(found, losses, tolerance=1e-15)
    value, _, _ = full_linear_program(losses.numpy())
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.status == "converged"


@pytest.mark.parametrize("solver", BOTH_CUTS)
@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
@pytest.mark.parametrize("offset", [0.0, 7.0])
def test_scales_and_offsets_of_the_losses(solver, scale, offset):
    losses = random_losses(n=20, m=6, members=4, seed=5)
    plain = solver.solve(FiniteGame(losses))
    found = solver.solve(FiniteGame((losses + offset) * scale))
    assert found.status == "converged"
    torch.testing.assert_close(found.weights, plain.weights, rtol=0, atol=1e-6)
    assert found.value / scale - offset == pytest.approx(plain.value, abs=2e-8)
    assert 0 <= found.gap / scale <= 1e-9 * (losses + offset).abs().max().item()


@pytest.mark.parametrize("cuts", ["examples", "aggregated"])
def test_a_large_common_loss_does_not_hide_small_differences(cuts):
    """Within rounding of the largest loss the solution is still that of the differences."""
    losses = random_losses(n=20, m=6, members=4, seed=5)
    value, lam, _ = full_linear_program(losses.numpy())
    found = LinearProgram(tolerance=2e-16, cuts=cuts, num_groups=4).solve(FiniteGame(losses + 1e9))
    np.testing.assert_allclose(found.weights, lam, atol=1e-6)
    assert found.value - 1e9 == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("solver", BOTH_CUTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(solver, dtype):
    losses = (random_losses(n=40, m=6, members=4, seed=5) > 0.3).to(dtype)
    if dtype.is_floating_point:
        losses = random_losses(n=40, m=6, members=4, seed=5).to(dtype)
    found = solver.solve(FiniteGame(losses))
    check_equilibrium(found, losses.double().numpy())
    value, _, _ = full_linear_program(losses.double().numpy())
    assert found.value == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize("solver", BOTH_CUTS)
def test_masked_losses_may_be_anything_and_examples_of_mass_zero_do_not_count(solver):
    losses, masses = random_losses(n=6, m=5, members=3, seed=9), torch.tensor([0.3, 0.0, 0.2, 0.0, 0.4, 0.1])
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0, 2] = mask[4, 0] = False
    value, _, _ = full_linear_program(losses[[0, 2, 4, 5]].numpy(), masses[[0, 2, 4, 5]], mask[[0, 2, 4, 5]])
    hidden = losses.clone()
    hidden[0, 2], hidden[4, 0] = math.nan, math.inf
    hidden[[1, 3]] *= 1e3
    found = solver.solve(FiniteGame(hidden, mask, masses))
    assert found.value == pytest.approx(value, abs=1e-7)
    assert not found.attack[[1, 3]].any()
    assert not found.attack[~mask].any()


def test_masses_of_very_different_size():
    losses = random_losses(n=12, m=5, members=4, seed=6)
    masses = 10.0 ** -torch.arange(0, 36, 3, dtype=torch.float64)
    masses /= masses.sum()
    for solver in BOTH_CUTS:
        check_equilibrium(solver.solve(FiniteGame(losses, masses=masses)), losses, masses=masses.numpy())


@pytest.mark.parametrize("solver", BOTH_CUTS)
def test_a_game_without_losses_leaves_the_weights_alone(solver):
    lam0 = torch.tensor([0.25, 0.5, 0.25])
    found = solver.solve(FiniteGame(torch.zeros(5, 4, 3)), lam0=lam0)
    assert found.weights.tolist() == lam0.tolist()
    assert found.value == found.gap == found.lower_bound == 0.0
    assert (found.status, found.num_attacks) == ("converged", 1)


def test_the_losses_are_never_copied_whole(monkeypatch):
    """Losses of one byte: anything of the game's size in float64 would be eight times as large."""
    game = FiniteGame(torch.rand(4000, 50, 8, generator=torch.Generator().manual_seed(0)) < 0.3)
    sizes, convert = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        found = convert(tensor, *args, **kwargs)
        if found.dtype == torch.float64:
            sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "to", to)
    LinearProgram().solve(game)
    assert max(sizes) < game.losses.numel()


POINTS = arrays(np.float64, (4, 3, 3), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]))


@settings(max_examples=60, deadline=None)
@given(POINTS, arrays(np.bool_, (4, 3)), arrays(np.float64, 4, elements=st.sampled_from([0.0, 0.25, 1.0])))
def test_masks_and_masses(losses, mask, masses):
    mask[:, 1] |= ~mask.any(1)
    masses[0] += masses.sum() == 0
    masses /= masses.sum()
    held = masses > 0
    value, _, _ = full_linear_program(losses[held], masses[held], mask[held])
    for solver in BOTH_CUTS:
        found = solver.solve(play(losses, mask, masses))
        if np.abs(losses[mask]).max() > 0:
            check_equilibrium(found, losses, mask, masses)
        assert found.value == pytest.approx(value, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, 3, elements=st.floats(0, 1)).filter(lambda lam: lam.sum() > 0.1))
def test_any_start_on_the_simplex_reaches_the_value_and_is_never_lost(lam0):
    losses = random_losses(seed=11)
    value, _, _ = full_linear_program(losses.numpy())
    lam0 = torch.from_numpy(lam0 / lam0.sum())
    for solver in BOTH_CUTS:
        found = solver.solve(FiniteGame(losses), lam0=lam0)
        assert found.value == pytest.approx(value, abs=1e-8)
        np.testing.assert_allclose(found.history["weights"][0], lam0, atol=1e-14)
        assert found.value <= found.history["value"][0]


# --- the record, and how it ends -----------------------------------------------------------------------------


def test_the_record_of_a_solution():
    game = FiniteGame(random_losses(n=60, m=8, members=5, seed=2))
    found = LinearProgram(cuts="aggregated", num_groups=6).solve(game)
    history = found.history
    assert set(history) == {"value", "best_value", "weights", "lower_bound", "num_cuts"}
    assert found.num_attacks == len(history["value"]) > 3
    assert history["lower_bound"] == sorted(history["lower_bound"])
    assert history["best_value"] == np.minimum.accumulate(history["value"]).tolist()
    assert found.value == min(history["value"])
    for value, weights in zip(history["value"], history["weights"], strict=True):
        assert best_value(game.losses, weights) == pytest.approx(value, abs=1e-13)
    assert found.lower_bound == pytest.approx(history["lower_bound"][-1], abs=1e-13)
    assert found.average_weights is None


def test_running_out_of_rounds_is_said():
    game = FiniteGame(random_losses(n=60, m=8, members=5, seed=2))
    whole = LinearProgram().solve(game)
    with pytest.warns(RuntimeWarning, match=r"program stopped with a gap of .* max_rounds were too few"):
        found = LinearProgram(max_rounds=2).solve(game)
    assert (found.status, found.num_attacks) == ("stopped", 2)
    assert found.gap > 1e-6
    assert found.lower_bound <= whole.value <= found.value


def test_a_tolerance_below_rounding_stalls_and_says_so():
    # No sum of sevenths is exact, so some of these games end a rounding error above zero.
    losses = random_losses(n=31, m=8, members=5, seed=2) / 7
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        endings = [LinearProgram(tolerance=0).solve(FiniteGame(losses + shift / 6)) for shift in range(12)]
    stalled = [found for found in endings if found.status == "stalled"]
    assert stalled
    assert {found.status for found in endings} <= {"stalled", "converged"}
    assert max(found.gap for found in endings) <= 1e-14
    assert max(found.num_attacks for found in endings) < 100
    assert len(caught) == len(stalled)
    assert "program stalled with a gap of" in str(caught[0].message)
    assert "rounding errors allow no better" in str(caught[0].message)


def test_a_looser_tolerance_ends_earlier():
    game = FiniteGame(random_losses(n=300, m=10, members=6, seed=2))
    tight, loose = LinearProgram().solve(game), LinearProgram(tolerance=1e-2).solve(game)
    assert loose.num_attacks < tight.num_attacks
    assert 1e-9 * game.max_loss < loose.gap <= 1e-2 * game.max_loss
    assert loose.status == tight.status == "converged"


def test_the_time_limit_is_an_error_that_names_the_remedy():
    game = FiniteGame(random_losses(n=300, m=10, members=6, seed=2))
    with pytest.raises(RuntimeError, match="out of time: raise time_limit, loosen tolerance"):
        LinearProgram(time_limit=1e-6).solve(game)
    assert LinearProgram(time_limit=60).solve(game).status == "converged"


@pytest.mark.parametrize(
    ("status", "message"), [(1, "out of time: raise time_limit"), (4, "HiGHS failed .* of 58 cuts and 6 members: bad")]
)
def test_failures_of_highs_are_errors(monkeypatch, status, message):
    seen = []

    def failing(*args, options, **kwargs):
        seen.append(options)
        return scipy.optimize.OptimizeResult(status=status, message="bad day.", x=None)

    monkeypatch.setattr(scipy.optimize, "linprog", failing)
    before = time.perf_counter()
    with pytest.raises(RuntimeError, match=message):
        LinearProgram(time_limit=50).solve(FiniteGame(random_losses(n=40, m=6, members=6, seed=2)))
    assert all(50 - (time.perf_counter() - before) - 1 <= options["time_limit"] <= 50 for options in seen)
    # A numerical failure is tried once more, by another path.
    assert [options["presolve"] for options in seen] == ([False] if status == 1 else [False, True])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": -1e-9}, "tolerance must be >= 0 and finite"),
        ({"tolerance": math.nan}, "tolerance must be >= 0 and finite"),
        ({"attack_tolerance": math.inf}, "attack_tolerance must be >= 0 and finite"),
        ({"max_rounds": 0}, "max_rounds must be an integer >= 1, got 0"),
        ({"num_groups": 1.5}, "num_groups must be an integer >= 1, got 1.5"),
        ({"num_rounds": True}, "num_rounds must be an integer >= 1, got True"),
        ({"num_samples": -1}, "num_samples must be an integer >= 0, got -1"),
        ({"recent_batches": -1}, "recent_batches must be an integer >= 0"),
        ({"time_limit": 0}, "time_limit must be positive, in seconds, or None"),
        ({"time_limit": math.nan}, "time_limit must be positive"),
        ({"cuts": "all"}, "cuts must be one of auto, examples, aggregated, got 'all'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearProgram(**settings)


def test_the_start_is_checked():
    with pytest.raises(ValueError, match=r"lam0 must be \[3\]"):
        LinearProgram().solve(FiniteGame(random_losses()), lam0=torch.ones(2) / 2)


def test_it_is_a_solver_with_a_price():
    solver = LinearProgram(num_rounds=3)
    assert isinstance(solver, LambdaSolver)
    assert solver.adapts
    assert solver.attack_cost() == 5.0
    assert solver.recent_batches == 4


# --- cuts ----------------------------------------------------------------------------------------------------


def test_cuts_are_added_where_they_are_new_and_dropped_where_they_idle():
    game = FiniteGame(random_losses(n=50, m=10, members=4, seed=7))
    lam = torch.full((4,), 0.25, dtype=torch.float64)
    choice = game.best_response(lam).choice
    planes = CuttingPlanes(game, choice, num_groups=8, keep=1)
    assert len(planes) == 0
    assert planes.add(lam, choice)
    held = len(planes)
    assert 4 < held <= 8
    # The same response is no news, nor is a worse one.
    assert not planes.add(lam, choice)
    assert not planes.add(lam, (game.losses @ lam).argmin(1))
    assert len(planes) == held
    bounds = []
    for _ in range(12):
        lam = planes.solve()
        assert is_distribution(lam, atol=1e-14)
        bounds.append(planes.bound)
        assert game.response_value(planes.attack()) == pytest.approx(planes.bound, abs=1e-13)
        if not planes.add(lam, game.best_response(lam).choice):
            break
    assert bounds == sorted(bounds)
    # A group needs one cut, a mixed solution L - 1 more; those of the last two solutions are all that is left.
    assert len(planes) <= 2 * (held + 3) + held


def test_examples_that_tell_members_apart_alike_share_a_group():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    kinds = torch.randint(5, (2000,), generator=generator)
    # A loss that all members share says nothing about their weights.
    shared = 100 * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    losses = centres[kinds] + 0.01 * torch.randn(2000, 4, generator=generator, dtype=torch.float64) + shared
    grouping = Grouping.learn(losses[::3], 5)
    assert (grouping.num_groups, grouping.copies) == (5, 1)
    group = grouping.assign(losses)
    assert {(kind, g) for kind, g in zip(kinds.tolist(), group.tolist(), strict=True)} == {
        (kind, int(group[kinds == kind][0])) for kind in range(5)
    }
    assert len(set(group.tolist())) == 5
    parts = [grouping.assign(losses[:700]), grouping.assign(losses[700:], first=700)]
    assert torch.equal(torch.cat(parts), group)


@pytest.mark.parametrize("number", [0.0, 0.1])
def test_examples_that_agree_are_grouped_by_position(number):
    # The mean of many tenths is not a tenth.
    losses = torch.full((1000, 3), number, dtype=torch.float64) * torch.tensor([1.0, -2.0, 1.0])
    grouping = Grouping.learn(losses, 8)
    assert (grouping.splits, grouping.num_groups) == ((), 8)
    sizes = torch.cat([grouping.assign(losses[:13]), grouping.assign(losses[13:], first=13)]).bincount()
    assert sizes.tolist() == [125] * 8


# --- games played by attacks ---------------------------------------------------------------------------------


@dataclass
class Attacked:
    """A finite game that reveals one best response at a time; counts its attacks."""

    hidden: FiniteGame
    exact: bool = False
    moves: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    attacks: int = 0

    @property
    def num_members(self):
        return self.hidden.num_members

    def respond(self, lam):
        self.attacks += 1
        choice = self.hidden.best_response(lam).choice
        self.moves.append(self.hidden.losses[torch.arange(len(choice)), choice])

    def best_response(self, lam):
        self.asked.append(lam)
        self.respond(lam)
        response = self.known().best_response(lam)
        return BestResponse(response.gradient, response.value, response.max_loss)

    def known(self):
        return FiniteGame(torch.stack(self.moves, dim=1), masses=self.hidden.masses)

    def pool(self, lam, num_samples, include_attack_points, generator=None):
        assert include_attack_points
        for _ in range(num_samples):
            drawn = torch.randint(self.hidden.num_perturbations, (self.hidden.num_examples,), generator=generator)
            self.moves.append(self.hidden.losses[torch.arange(len(drawn)), drawn])
        for vertex in [lam, *torch.eye(self.num_members, dtype=torch.float64)]:
            self.respond(vertex)
        return self.known()


def double_oracle_game(seed=5):
    losses = random_losses(n=25, m=40, members=4, seed=seed)
    masses = torch.arange(1, 26, dtype=torch.float64) / 325
    return Attacked(FiniteGame(losses, masses=masses)), full_linear_program(losses.numpy(), masses)[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_double_oracle_reaches_the_equilibrium(seed):
    game, value = double_oracle_game(seed)
    assert isinstance(game, Game)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LinearProgram(num_rounds=60, attack_tolerance=1e-9).solve(game)
    assert found.status == "converged"
    assert found.value == pytest.approx(value, abs=1e-7)
    assert game.hidden.value(found.weights) == pytest.approx(value, abs=1e-7)
    assert found.lower_bound == pytest.approx(value, abs=1e-7)
    assert found.lower_bound <= value + 1e-12
    history = found.history
    rounds = len(history["value"])
    assert 2 <= rounds < 60
    assert history["lower_bound"] == sorted(history["lower_bound"])
    assert history["num_perturbations"] == list(range(6, 6 + rounds))
    assert history["weights"] == [lam.tolist() for lam in game.asked]
    assert history["best_value"] == np.minimum.accumulate(history["value"]).tolist()
    assert found.num_attacks == game.attacks == 5 + rounds
    assert found.gap is found.attack is found.average_weights is None


def test_the_double_oracle_with_a_budget_says_that_it_is_spent():
    game, value = double_oracle_game()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LinearProgram(num_rounds=2, attack_tolerance=0).solve(game)
    assert found.status == "stopped"
    assert len(game.asked) == 2
    assert found.lower_bound <= value <= game.hidden.value(found.weights)
    assert found.value == pytest.approx(game.known().value(found.weights), abs=1e-14)
    # The best of all that was attacked, members alone included; the bound is that of all points known.
    attacked = [torch.full((4,), 0.25), *torch.eye(4), *game.asked]
    assert found.value == pytest.approx(min(game.known().value(lam) for lam in attacked), abs=1e-14)
    known = game.known()
    assert found.lower_bound == pytest.approx(full_linear_program(known.losses.numpy(), known.masses)[0], abs=1e-8)
    assert found.lower_bound > found.history["lower_bound"][-1]


def test_a_loose_attack_tolerance_ends_the_double_oracle_early():
    game, value = double_oracle_game()
    found = LinearProgram(num_rounds=60, attack_tolerance=0.05).solve(game)
    assert found.status == "converged"
    size = game.known().max_loss
    assert game.hidden.value(found.weights) - value <= 0.05 * size
    patient = LinearProgram(num_rounds=60, attack_tolerance=1e-9).solve(double_oracle_game()[0])
    assert len(found.history["value"]) < len(patient.history["value"])
    # The tolerance is relative to the losses.
    scaled = Attacked(FiniteGame(game.hidden.losses * 1e-6, masses=game.hidden.masses))
    assert len(LinearProgram(num_rounds=60, attack_tolerance=1e-9).solve(scaled).history["value"]) == len(
        patient.history["value"]
    )


def test_the_pool_gets_the_start_the_samples_and_the_generator():
    lam0 = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = []
    for seed in (8, 8, 9):
        game, _ = double_oracle_game()
        solver = LinearProgram(num_rounds=1, attack_tolerance=0, num_samples=7)
        found.append(solver.solve(game, lam0, torch.Generator().manual_seed(seed)))
        assert len(game.moves) == 7 + 5 + 1
        chosen = game.hidden.best_response(lam0.double()).choice
        assert torch.equal(game.moves[7], game.hidden.losses[torch.arange(25), chosen])
    assert torch.equal(found[0].weights, found[1].weights)
    assert not torch.equal(found[0].weights, found[2].weights)


@pytest.mark.parametrize(
    ("overlooked", "lam0", "best", "value"),
    [
        # The risks are max(0.9 l, 1 - l, overlooked) at lam = (l, 1 - l); without the last, l = 10/19 looks best.
        ([0.9, 1.0], [0.0, 1.0], [1.0, 0.0], 0.9),
        ([0.8, 0.85], [0.9, 0.1], [0.9, 0.1], 0.81),
    ],
    ids=["member", "start"],
)
def test_a_member_or_the_start_may_be_best_once_more_is_known(overlooked, lam0, best, value):
    """The attacks of the pool overlook a perturbation that the first round finds."""

    class Careless(Attacked):
        def respond(self, lam):
            self.attacks += 1
            tried = 2 if self.attacks <= 3 else 3
            choice = (self.hidden.losses[:, :tried] @ lam).argmax(1)
            self.moves.append(self.hidden.losses[torch.arange(len(choice)), choice])

    losses = torch.tensor([[[0.9, 0.0], [0.0, 1.0], overlooked]], dtype=torch.float64)
    game = Careless(FiniteGame(losses))
    found = LinearProgram(num_rounds=1).solve(game, torch.tensor(lam0))
    np.testing.assert_allclose(game.asked[0], [10 / 19, 9 / 19], atol=1e-12)
    np.testing.assert_allclose(found.weights, best, atol=1e-7)
    assert found.value == pytest.approx(value, abs=1e-7)
    assert found.value < found.history["value"][0]
    assert found.lower_bound == pytest.approx(full_linear_program(losses.numpy())[0], abs=1e-9)


def test_the_time_limit_holds_for_the_double_oracle():
    with pytest.raises(RuntimeError, match="out of time"):
        LinearProgram(time_limit=1e-6).solve(double_oracle_game()[0])


def test_a_pool_of_other_members_is_refused():
    class Other(Attacked):
        def pool(self, lam, num_samples, include_attack_points, generator=None):
            return FiniteGame(torch.zeros(1, 1, 3))

    with pytest.raises(ValueError, match="4 members, but its pool has 3"):
        LinearProgram().solve(Other(double_oracle_game()[0].hidden))


# --- the entropic solver's tolerance -------------------------------------------------------------------------


def test_an_entropic_tolerance_out_of_reach_is_said():
    game = FiniteGame(random_losses(n=20, m=6, members=8, seed=1))
    with pytest.warns(RuntimeWarning, match=r"stopped after 5 steps with a smoothed gap of .* take more num_steps"):
        found = AcceleratedEntropic(0.05, 5, tolerance=1e-9).solve(game)
    assert found.status == "stopped"
    assert len(found.history["value"]) == 6
