"""mixadv.lambda_solvers against linear programs, closed forms and the theorems' bounds."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp

from mixadv.game import BestResponse, FiniteGame, Game
from mixadv.lambda_solvers import AcceleratedEntropic, LambdaSolver, OracleSubgradient, Uniform
from mixadv.simplex import is_distribution, project_simplex
from oracles_game import full_linear_program, motivating_example, random_losses, smoothed_minimum

TWO_BY_TWO = torch.tensor([[[3.0, -1.0], [0.0, 1.0]]])
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
MASSES = torch.tensor([0.1, 0.2, 0.05, 0.4, 0.25], dtype=torch.float64)
ADAPTIVE = [OracleSubgradient(400), AcceleratedEntropic(alpha=5e-3, num_steps=250)]


@dataclass
class Attacked:
    """A game played by an attack that tries only the first perturbations; counts its calls."""

    losses: torch.Tensor
    tried: int
    exact: bool = False
    calls: int = 0
    pools: list = field(default_factory=list)

    @property
    def num_members(self):
        return self.losses.shape[2]

    def best_response(self, lam):
        self.calls += 1
        choice = (self.losses[:, : self.tried] @ lam).argmax(1)
        picked = self.losses[torch.arange(len(choice)), choice]
        gradient = picked.mean(0)
        return BestResponse(gradient, (gradient @ lam).item(), picked.abs().max().item(), choice)

    def known(self):
        return FiniteGame(self.losses[:, : self.tried])

    def pool(self, lam, num_samples, include_attack_points, generator=None):
        self.pools.append((lam, num_samples, include_attack_points, generator))
        drawn = torch.randint(self.losses.shape[1], (num_samples,), generator=generator)
        return FiniteGame(self.losses[:, drawn])


def check_certificate(game, found):
    """What must hold of any solution of any finite game, computed afresh."""
    assert is_distribution(found.weights, atol=1e-14)
    assert found.weights.dtype == torch.float64
    assert found.value == pytest.approx(game.value(found.weights), rel=1e-14)
    tolerance = {"rel": 1e-9, "abs": 1e-12 * game.max_loss}
    assert found.lower_bound == pytest.approx(game.response_value(found.attack), **tolerance)
    assert found.gap == pytest.approx(found.value - found.lower_bound, **tolerance)
    assert found.gap >= 0
    assert found.value <= min(found.history["value"])


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize(
    ("losses", "weights"),
    [(TWO_BY_TWO, [0.4, 0.6]), (TWO_BY_TWO.mT, [0.2, 0.8])],
    ids=["as is", "transposed"],
)
def test_two_by_two(solver, losses, weights):
    game = FiniteGame(losses)
    found = solver.solve(game)
    check_certificate(game, found)
    np.testing.assert_allclose(found.weights, weights, atol=0.01)
    assert found.value == pytest.approx(0.6, abs=0.02)
    assert found.lower_bound == pytest.approx(0.6, abs=0.06)
    attack = [0.2, 0.8] if weights == [0.4, 0.6] else [0.4, 0.6]
    np.testing.assert_allclose(found.attack, [attack], atol=0.06)


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("masked", [False, True])
def test_random_game_against_the_full_linear_program(solver, masked):
    losses = random_losses(seed=11)
    mask, masses = (MASK, MASSES) if masked else (None, None)
    game = FiniteGame(losses, mask, masses)
    value, lam, _ = full_linear_program(losses.numpy(), masses, mask)
    assert np.sort(lam)[-2] > 0.01
    found = solver.solve(game)
    check_certificate(game, found)
    assert value - 1e-12 <= found.value <= value + 2e-3
    assert value - 0.05 <= found.lower_bound <= value + 1e-12
    np.testing.assert_allclose(found.weights, lam, atol=0.01)
    assert value <= game.deterministic_values().min()


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_a_dominated_member_gets_no_weight(solver):
    losses = random_losses(seed=3)
    losses[..., 1] = losses[..., 0] + 0.5
    assert solver.solve(FiniteGame(losses)).weights[1] < 1e-6


@pytest.mark.parametrize("solver", [*ADAPTIVE, Uniform()])
def test_one_member(solver):
    game = FiniteGame(random_losses(members=1))
    found = solver.solve(game)
    check_certificate(game, found)
    assert found.weights.tolist() == [1.0]
    assert found.value == pytest.approx(game.deterministic_values().item(), abs=1e-15)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_motivating_example(solver):
    losses, masses = motivating_example()
    game = FiniteGame(losses, masses=masses)
    cold = solver.solve(game)
    assert cold.weights.tolist() == [0.5, 0.5]
    assert cold.value == 0.5
    warm = solver.solve(game, lam0=torch.tensor([0.9, 0.1]))
    check_certificate(game, warm)
    assert warm.value == pytest.approx(0.5, abs=5e-3)
    assert warm.lower_bound == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_oracle_keeps_the_bound_of_algorithm_1(seed, num_steps):
    losses = random_losses(n=6, m=5, members=4, seed=seed)
    game = FiniteGame(losses)
    value, _, _ = full_linear_program(losses.numpy())
    worst = torch.eye(4)[game.deterministic_values().argmax()]
    for lam0 in (None, worst):
        found = OracleSubgradient(num_steps).solve(game, lam0)
        assert found.value <= value + 2 * game.max_loss * math.sqrt(4 / num_steps)
        assert found.value == min(found.history["value"])
        # lam_0 .. lam_T, each with a response.
        assert len(found.history["value"]) == found.num_attacks == num_steps + 1


def test_oracle_follows_algorithm_1_step_by_step():
    losses = random_losses().numpy()
    found = OracleSubgradient(20).solve(FiniteGame(losses))
    lam, eta = np.full(3, 1 / 3), 2 / (np.abs(losses).max() * math.sqrt(3 * 20))
    seen, gradients = [], []
    for t in range(21):
        np.testing.assert_allclose(found.history["weights"][t], lam, atol=1e-14)
        choice = (losses @ lam).argmax(1)
        gradient = losses[np.arange(5), choice].mean(0)
        seen.append(lam)
        gradients.append(gradient)
        lam = project_simplex(torch.from_numpy(lam - eta * gradient)).numpy()
    np.testing.assert_allclose(found.average_weights, np.mean(seen, 0), atol=1e-14)
    assert found.lower_bound == pytest.approx(np.mean(gradients, 0).min(), abs=1e-14)
    np.testing.assert_allclose(found.history["step_size"], eta, rtol=1e-15)
    assert set(found.history) >= {"value", "best_value", "step_size", "weights", "max_loss"}
    assert found.history["best_value"] == np.minimum.accumulate(found.history["value"]).tolist()
    assert found.status == "completed"


def test_oracle_takes_the_running_largest_loss_of_a_game_that_knows_no_other():
    losses = random_losses(seed=2)
    game = Attacked(losses, tried=4)
    found = OracleSubgradient(50).solve(game)
    sizes = found.history["max_loss"]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= losses.abs().max()
    np.testing.assert_allclose(found.history["step_size"], [2 / (size * math.sqrt(150)) for size in sizes])


def test_oracle_step_size_of_ones_own():
    found = OracleSubgradient(3, step_size=0.25).solve(FiniteGame(TWO_BY_TWO))
    # At (1/2, 1/2) the scores are 1 and 1/2, so g = (3, -1): the first entry falls by 0.25 * 2.
    np.testing.assert_allclose(found.history["weights"][1], [0.0, 1.0], atol=1e-15)
    assert found.history["step_size"] == [0.25] * 4


def test_one_step_moves_the_weights():
    """Member 1 is plainly worse: the one step leads to member 0, and only lam_1 knows it."""
    game = FiniteGame(torch.tensor([[[0.0, 5.0], [0.0, 5.0]]]))
    for select in ("best", "last"):
        found = OracleSubgradient(1, select=select).solve(game)
        assert found.weights.tolist() == [1.0, 0.0]
        assert (found.value, found.gap) == (0.0, 0.0) if select == "best" else found.value == 0.0
    # A step that leads to a worse point is not taken, unless the last iterate is asked for.
    far = OracleSubgradient(1, step_size=10.0)
    assert far.solve(FiniteGame(TWO_BY_TWO)).weights.tolist() == [0.5, 0.5]
    last = OracleSubgradient(1, step_size=10.0, select="last").solve(FiniteGame(TWO_BY_TWO))
    assert last.weights.tolist() == [0.0, 1.0]
    assert last.value == 1.0


@pytest.mark.parametrize("num_steps", [1, 7, 100])
@pytest.mark.parametrize("select", ["best", "last", "average"])
def test_what_select_asks_for(num_steps, select):
    losses = random_losses(n=6, m=5, members=4, seed=3)
    game = FiniteGame(losses)
    found = OracleSubgradient(num_steps, select=select).solve(game)
    iterates = np.array(found.history["weights"])
    values = (losses.numpy() @ iterates.T).max(1).mean(0)
    wanted = {"best": iterates[values.argmin()], "last": iterates[-1], "average": iterates.mean(0)}[select]
    np.testing.assert_allclose(found.weights, wanted, atol=1e-14)
    assert found.value == pytest.approx((losses.numpy() @ wanted).max(1).mean(), abs=1e-14)
    assert found.gap == pytest.approx(found.value - found.lower_bound, abs=1e-14)
    if select != "last":
        value, _, _ = full_linear_program(losses.numpy())
        assert found.value <= value + 2 * game.max_loss * math.sqrt(4 / num_steps)


def test_against_attacks_the_last_iterate_costs_no_attack_of_its_own():
    losses = random_losses(seed=11)
    for select, calls in (("best", 6), ("last", 5), ("average", 6)):
        game, solver = Attacked(losses, tried=2), OracleSubgradient(5, select=select)
        found = solver.solve(game)
        assert found.num_attacks == game.calls == solver.attack_cost() == calls
        assert len(found.history["weights"]) == 6
        assert found.value == pytest.approx(game.known().value(found.weights), abs=1e-14)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 7, 100])
@pytest.mark.parametrize("level", [0.0, 30.0])
def test_centred_steps_keep_the_bound_with_the_spread_for_M(seed, num_steps, level):
    """A level that all members share changes neither the path nor the bound, which is tighter."""
    losses = random_losses(n=6, m=5, members=4, seed=seed) + level
    value, _, _ = full_linear_program(losses.numpy())
    found = OracleSubgradient(num_steps, centred=True).solve(FiniteGame(losses))
    picked = [(losses @ torch.tensor(lam, dtype=torch.float64)).argmax(1) for lam in found.history["weights"]]
    means = np.array([losses[torch.arange(6), choice].mean(0).numpy() for choice in picked])
    spread = np.maximum.accumulate((means.max(1) - means.min(1)) / 2)
    np.testing.assert_allclose(found.history["max_loss"], spread, rtol=1e-10)
    np.testing.assert_allclose(found.history["step_size"], 2 / (spread * math.sqrt(4 * num_steps)), rtol=1e-10)
    assert found.value <= value + 2 * spread[-1] * math.sqrt(4 / num_steps)
    plain = OracleSubgradient(num_steps, centred=True).solve(FiniteGame(losses - level))
    np.testing.assert_allclose(found.history["weights"], plain.history["weights"], atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 20, 200])
@pytest.mark.parametrize("delta", [0.05, 0.4])
def test_a_response_whose_losses_are_off_by_delta_for_every_member(seed, num_steps, delta):
    """The paper's delta: |E_Q~ l_k - E_Q* l_k| <= delta for each k, here chosen against the best weights."""
    losses = random_losses(n=6, m=5, members=4, seed=seed)
    value, lam, _ = full_linear_program(losses.numpy())
    exact = FiniteGame(losses)

    class Off:
        num_members, exact = 4, False

        def best_response(self, weights):
            right = FiniteGame(losses).best_response(weights)
            # Members that the best weights use look worse, the others better.
            error = delta * torch.where(torch.from_numpy(lam) > weights, 1.0, -1.0)
            gradient = right.gradient + error
            return BestResponse(gradient, (gradient @ weights).item(), right.max_loss + delta)

        def known(self):
            return exact

    found = OracleSubgradient(num_steps).solve(Off())
    size = max(found.history["max_loss"])
    assert value - 1e-9 <= found.value <= value + 2 * delta + 2 * size * math.sqrt(4 / num_steps)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_the_losses_scales_the_solution(scale):
    losses = random_losses(seed=5)
    pairs = [
        (OracleSubgradient(40), OracleSubgradient(40)),
        (AcceleratedEntropic(0.1, 40), AcceleratedEntropic(0.1 * scale, 40)),
    ]
    for plain, scaled in pairs:
        one, other = plain.solve(FiniteGame(losses)), scaled.solve(FiniteGame(losses * scale))
        torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=1e-9)
        assert other.value == pytest.approx(one.value * scale, rel=1e-9, abs=0)


@pytest.mark.parametrize("alpha", [1e-6, 1e3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_entropic_at_extreme_temperatures_and_scales(alpha, scale):
    game = FiniteGame(random_losses(seed=5) * scale)
    found = AcceleratedEntropic(alpha, 30).solve(game)
    check_certificate(game, found)
    for value, smoothed in zip(found.history["value"], found.history["smoothed_value"], strict=True):
        assert 0 <= value - smoothed <= alpha * math.log(4) + 4e-16 * abs(value)


def test_entropic_at_a_huge_temperature_minimises_the_mean_over_perturbations():
    game = FiniteGame(random_losses(seed=5))
    last = AcceleratedEntropic(1e3, 50).solve(game).history["weights"][-1]
    np.testing.assert_allclose(last, np.eye(3)[game.losses.mean((0, 1)).argmin()], atol=1e-12)


@pytest.mark.parametrize("alpha", [1e-1, 1e-2])
def test_entropic_has_the_rate_of_accelerated_gradient(alpha):
    losses = random_losses(n=20, m=6, members=8, seed=1)
    game = FiniteGame(losses)
    minimum, lam = smoothed_minimum(losses.numpy(), alpha)
    lam0 = torch.eye(8, dtype=torch.float64)[6]
    found = AcceleratedEntropic(alpha, 120).solve(game, lam0)
    errors = np.array(found.history["smoothed_value"]) - minimum
    # Beck and Teboulle, theorem 4.4: error <= 2 C distance^2 / (T + 1)^2.
    distance = ((lam0.numpy() - lam) ** 2).sum()
    steps = np.arange(1, 121)
    assert (errors >= -1e-9).all()
    assert (errors[1:] <= 2 * game.smoothness(alpha) * distance / (steps + 1) ** 2 + 1e-9).all()
    # Without acceleration the same steps end far behind.
    plain = lam0
    for _ in range(120):
        plain = project_simplex(plain - game.smoothed_gradient(plain, alpha) / game.smoothness(alpha))
    assert errors[-1] < 0.1 * (game.smoothed_value(plain, alpha) - minimum)


@pytest.mark.parametrize(("n", "m", "members", "seed", "alpha"), [(5, 4, 3, 11, 1e-3), (20, 6, 8, 1, 1e-2)])
def test_entropic_restarts_keep_the_rate(n, m, members, seed, alpha):
    losses = random_losses(n, m, members, seed)
    game = FiniteGame(losses)
    minimum, _ = smoothed_minimum(losses.numpy(), alpha)
    found = AcceleratedEntropic(alpha, 450).solve(game)
    errors = np.array(found.history["smoothed_value"][1:]) - minimum
    assert (errors <= 100 * game.smoothness(alpha) / np.arange(1, 451) ** 2).all()


def test_entropic_restarts_reach_further():
    game = FiniteGame(random_losses(20, 6, 8, seed=1))
    found = AcceleratedEntropic(1e-2, 450).solve(game)
    # Momentum that never restarts has a gap of 5e-3 after as many steps.
    assert found.history["smoothed_gap"][-1] < 1e-5


def test_entropic_gap_of_the_relaxation_is_a_bound_and_stops_the_loop():
    losses, alpha = random_losses(n=20, m=6, members=8, seed=1), 0.05
    minimum, _ = smoothed_minimum(losses.numpy(), alpha)
    found = AcceleratedEntropic(alpha, 2000, tolerance=1e-6).solve(FiniteGame(losses))
    smoothed, gaps = np.array(found.history["smoothed_value"]), np.array(found.history["smoothed_gap"])
    assert (smoothed - minimum <= gaps + 1e-10).all()
    assert found.status == "converged"
    assert gaps[-1] <= 1e-6 < gaps[:-1].min()
    assert len(gaps) < 2001
    assert AcceleratedEntropic(alpha, 5).solve(FiniteGame(losses)).status == "completed"


@pytest.mark.parametrize("kind", [list, np.array, lambda alphas: torch.tensor(alphas, dtype=torch.float64)])
def test_each_example_may_have_its_own_temperature(kind):
    """min over lam of sum_i mass_i alpha_i log mean_j exp(...) by scipy, for alphas over two orders of magnitude."""
    losses, alphas = random_losses(seed=11), [0.02, 0.5, 0.1, 2.0, 0.05]
    game = FiniteGame(losses, masses=MASSES)
    solver = AcceleratedEntropic(kind(alphas), 600, select="relaxed")
    assert solver == AcceleratedEntropic(tuple(alphas), 600, select="relaxed")
    assert solver.num_examples == 5

    def relaxed(lam):
        scores = losses.numpy() @ lam
        smooth = [a * logsumexp(row / a, b=1 / len(row)) for a, row in zip(alphas, scores, strict=True)]
        return float(MASSES.numpy() @ smooth)

    found = solver.solve(game)
    simplex = {"type": "eq", "fun": lambda lam: lam.sum() - 1}
    starts = [np.full(3, 1 / 3), *np.eye(3)]
    settings = {"method": "SLSQP", "bounds": [(0, 1)] * 3, "constraints": simplex, "options": {"ftol": 1e-14}}
    best = min((minimize(relaxed, start, **settings) for start in starts), key=lambda one: one.fun)
    np.testing.assert_allclose(found.weights, best.x, atol=1e-4)
    assert relaxed(found.weights.numpy()) == pytest.approx(best.fun, abs=1e-7)
    assert min(found.history["smoothed_value"]) == pytest.approx(relaxed(found.weights.numpy()), abs=1e-12)
    # The same temperature everywhere has another minimiser.
    same = AcceleratedEntropic(float(np.mean(alphas)), 600, select="relaxed").solve(game)
    assert (same.weights - found.weights).abs().max() > 0.01


def test_temperatures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="alpha has 3 temperatures, but the game has 5 examples"):
        AcceleratedEntropic([0.1, 0.2, 0.3]).solve(FiniteGame(random_losses()))
    for wrong, message in (([0.1, -1.0], "positive and finite, got -1"), ([], "shape"), ([[1.0]], "shape")):
        with pytest.raises(ValueError, match=message):
            AcceleratedEntropic(wrong)


def test_the_entropic_solver_returns_the_weights_that_select_asks_for():
    """At a high temperature the minimisers of R and of F differ."""
    losses, alpha = random_losses(n=30, m=6, seed=4), 1.0
    game = FiniteGame(losses)
    found = {name: AcceleratedEntropic(alpha, 300, select=name).solve(game) for name in ("best", "relaxed", "last")}
    minimum, lam = smoothed_minimum(losses.numpy(), alpha)
    np.testing.assert_allclose(found["relaxed"].weights, lam, atol=1e-5)
    assert game.smoothed_value(found["relaxed"].weights, alpha) == pytest.approx(minimum, abs=1e-9)
    assert found["last"].weights.tolist() == found["last"].history["weights"][-1]
    assert game.smoothed_value(found["best"].weights, alpha) > minimum + 1e-3
    assert found["best"].value < found["relaxed"].value - 1e-3
    for one in found.values():
        assert one.value == pytest.approx(game.value(one.weights), abs=1e-14)
        assert one.gap == pytest.approx(one.value - one.lower_bound, abs=1e-14)


@pytest.mark.parametrize("solver", [OracleSubgradient, AcceleratedEntropic])
def test_an_unknown_selection_is_refused(solver):
    with pytest.raises(ValueError, match=r"select must be one of best, .*got 'worst'"):
        solver(select="worst")


def test_continuation_in_the_temperature_beats_a_cold_start():
    losses = random_losses(n=50, m=20, members=8, seed=0)
    game = FiniteGame(losses)
    cold = AcceleratedEntropic(1e-4, 200).solve(game)
    lam = None
    for alpha in (1e-1, 1e-2, 1e-3, 1e-4):
        warm = AcceleratedEntropic(alpha, 50).solve(game, lam)
        lam = warm.weights
    value, _, _ = full_linear_program(losses.numpy())
    assert warm.value - value < 0.5 * (cold.value - value)


def test_entropic_of_a_linear_game_goes_straight_to_the_vertex():
    losses = torch.tensor([[[0.5, 0.2, 0.9]], [[0.1, 0.3, 0.2]]])
    found = AcceleratedEntropic(num_steps=1).solve(FiniteGame(losses))
    assert found.weights.tolist() == [0.0, 1.0, 0.0]
    assert found.gap == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("solver", [*ADAPTIVE, Uniform()])
def test_a_game_without_losses_leaves_the_weights_alone(solver):
    found = solver.solve(FiniteGame(torch.zeros(5, 4, 3)))
    assert found.weights.tolist() == [1 / 3] * 3
    assert found.value == found.gap == 0.0


@pytest.mark.parametrize("solver", [OracleSubgradient(1), AcceleratedEntropic(num_steps=1)])
def test_warm_start_is_the_first_iterate_and_never_lost(solver):
    game = FiniteGame(random_losses(seed=11))
    _, lam, _ = full_linear_program(game.losses.numpy())
    found = solver.solve(game, lam0=torch.tensor(lam, dtype=torch.float32))
    np.testing.assert_allclose(found.history["weights"][0], lam, atol=1e-7)
    assert found.value <= game.value(torch.from_numpy(lam)) + 1e-6


def test_uniform_reports_the_value_of_equal_weights():
    game = FiniteGame(random_losses(), MASK, MASSES)
    found = Uniform().solve(game, lam0=torch.tensor([1.0, 0.0, 0.0]))
    check_certificate(game, found)
    assert found.weights.tolist() == [1 / 3] * 3
    assert (found.status, found.num_attacks) == ("fixed", 1)
    assert torch.equal(found.average_weights, found.weights)


def test_only_uniform_does_not_adapt():
    assert [solver.adapts for solver in (OracleSubgradient(), AcceleratedEntropic(), Uniform())] == [
        True,
        True,
        False,
    ]
    assert all(isinstance(solver, LambdaSolver) for solver in (OracleSubgradient(), AcceleratedEntropic(), Uniform()))


def test_a_game_played_by_an_attack_has_a_lower_bound_but_no_gap():
    losses = random_losses(seed=11)
    game = Attacked(losses, tried=2)
    assert isinstance(game, Game)
    value, _, _ = full_linear_program(losses.numpy())
    weaker, _, _ = full_linear_program(losses[:, :2].numpy())
    found = OracleSubgradient(30).solve(game)
    assert found.gap is None
    assert found.attack is None
    assert found.num_attacks == game.calls == 31
    # Points that an attack found are real: they bound V from below, whatever the attack overlooked.
    assert found.lower_bound <= weaker + 1e-12 < value
    assert found.value == pytest.approx(min(found.history["value"]), rel=1e-14)
    assert found.value >= weaker - 1e-12
    fixed = Uniform().solve(game)
    assert fixed.gap is None
    assert fixed.num_attacks == game.calls - 31 == 1


def test_a_lucky_answer_of_an_attack_does_not_choose_the_weights():
    """An attack that misses once gives a low value there; against all its points that iterate is no better."""

    @dataclass
    class Unsteady(Attacked):
        def best_response(self, lam):
            self.tried = 1 if self.calls == 3 else 3
            response = super().best_response(lam)
            self.tried = 3
            return response

    game = Unsteady(random_losses(seed=5), tried=3)
    found = OracleSubgradient(8).solve(game)
    whole = [game.known().value(torch.tensor(w, dtype=torch.float64)) for w in found.history["weights"]]
    assert min(found.history["value"]) == found.history["value"][3] < min(whole)
    assert found.value == pytest.approx(min(whole), rel=1e-14)
    assert found.weights.tolist() == found.history["weights"][whole.index(min(whole))]
    assert found.lower_bound <= found.value


def test_entropic_draws_one_pool_and_plays_on_it():
    losses = random_losses(m=40, seed=11)
    games = [Attacked(losses, tried=2) for _ in range(2)]
    solver = AcceleratedEntropic(1e-2, 20, num_samples=9, include_attack_points=False)
    lam0 = torch.tensor([0.5, 0.25, 0.25])
    first, second = (solver.solve(game, lam0, torch.Generator().manual_seed(8)) for game in games)
    assert torch.equal(first.weights, second.weights)
    ((lam, num_samples, include_attack_points, generator),) = games[0].pools
    assert (lam.tolist(), num_samples, include_attack_points) == (lam0.tolist(), 9, False)
    assert isinstance(generator, torch.Generator)
    assert first.gap is None
    assert first.attack is None
    assert first.num_attacks == games[0].calls == 0
    pool = games[0].pool(lam, 9, False, torch.Generator().manual_seed(8))
    assert first.value == pytest.approx(pool.value(first.weights), abs=1e-15)
    assert first.lower_bound <= first.value
    other = solver.solve(games[0], lam0, torch.Generator().manual_seed(9))
    assert not torch.equal(first.weights, other.weights)


@dataclass
class Broken:
    """A game whose answer number `when` is spoiled."""

    when: int
    spoil: dict
    num_members: int = 2
    exact: bool = True
    calls: int = 0

    def best_response(self, lam):
        answer = {
            "gradient": torch.tensor([1.0, 2.0]),
            "value": (lam[0] + 2 * lam[1]).item(),
            "max_loss": 2.0,
        }
        if self.calls == self.when:
            answer |= self.spoil
        self.calls += 1
        return BestResponse(**answer)

    def pool(self, lam, num_samples, include_attack_points, generator=None):
        return FiniteGame(torch.zeros(1, 1, 3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"value": math.nan}, "step 4: the value is nan"),
        ({"value": math.inf}, "step 4: the value is inf"),
        ({"gradient": torch.tensor([0.0, math.nan])}, "step 4: the .*nan"),
        ({"max_loss": math.nan}, "step 4: the max_loss is nan"),
    ],
)
def test_what_is_not_finite_is_reported_with_its_step(spoil, message):
    game = Broken(4, spoil)
    with pytest.raises(ValueError, match=message):
        OracleSubgradient(10).solve(game)
    assert game.calls == 5


def test_uniform_reports_what_is_not_finite():
    with pytest.raises(ValueError, match="step 0: the gradient of member 1 is nan"):
        Uniform().solve(Broken(0, {"gradient": torch.tensor([0.0, math.nan])}))


def test_overflow_in_a_finite_game_is_reported():
    spread = torch.tensor([[[1.7e308, -1.7e308], [-1.7e308, 1.7e308]]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"smoothness constant (inf|nan): divide"):
        AcceleratedEntropic(num_steps=2).solve(FiniteGame(spread))
    same = torch.full((1, 1, 2), 1.7e308, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"smoothness constant|step 0: .*inf"):
        AcceleratedEntropic(num_steps=2).solve(FiniteGame(same))


def test_a_gradient_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"gradient of shape \[3\] for 2 members"):
        OracleSubgradient(2).solve(Broken(0, {"gradient": torch.zeros(3)}))


def test_a_pool_of_other_members_is_refused():
    with pytest.raises(ValueError, match="2 members, but its pool has 3"):
        AcceleratedEntropic().solve(Broken(0, {}))


def test_a_false_claim_of_exact_responses_is_refused():
    class Liar(Broken):
        def best_response(self, lam):
            answer = super().best_response(lam)
            return BestResponse(answer.gradient, -5.0, answer.max_loss)

    with pytest.raises(ValueError, match=r"contradicts weak duality.*`exact` must be False"):
        OracleSubgradient(5).solve(Liar(0, {}))


@pytest.mark.parametrize(
    ("lam0", "message"),
    [
        (torch.ones(2) / 2, r"lam0 must be \[3\], one weight per member, got shape \[2\]"),
        (torch.tensor([0.5, 0.6, 0.2]), "lam0 must be non-negative and sum to 1"),
        (torch.tensor([1.5, -0.5, 0.0]), "lam0 must be non-negative and sum to 1"),
        (torch.tensor([math.nan, 0.5, 0.5]), "lam0 must be non-negative and sum to 1"),
    ],
)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_lam0_is_checked(solver, lam0, message):
    with pytest.raises(ValueError, match=message):
        solver.solve(FiniteGame(random_losses()), lam0=lam0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OracleSubgradient(0), "num_steps must be an integer >= 1, got 0"),
        (lambda: OracleSubgradient(2.5), "num_steps must be an integer >= 1, got 2.5"),
        (lambda: OracleSubgradient(5, step_size=0.0), "step_size must be positive"),
        (lambda: OracleSubgradient(5, step_size=math.nan), "step_size must be positive"),
        (lambda: AcceleratedEntropic(alpha=0), "alpha must be positive and finite, got 0"),
        (lambda: AcceleratedEntropic(alpha=math.inf), "alpha must be positive and finite"),
        (lambda: AcceleratedEntropic(num_steps=0), "num_steps must be an integer >= 1"),
        (lambda: AcceleratedEntropic(num_samples=-1), "num_samples must be an integer >= 0"),
        (lambda: AcceleratedEntropic(num_samples=0, include_attack_points=False), "pool would be empty"),
        (lambda: AcceleratedEntropic(tolerance=-1e-3), "tolerance must be >= 0"),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("seed", range(8))
def test_rounding_around_a_value_of_zero_is_no_contradiction(seed):
    """Every member loses the same at every perturbation, and the masses cancel the losses."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(20, 1, 1, dtype=torch.float64, generator=generator).expand(20, 3, 4)
    game = FiniteGame(torch.cat([half, -half]))
    for solver in (OracleSubgradient(7), AcceleratedEntropic(num_steps=7), Uniform()):
        assert solver.solve(game).gap == pytest.approx(0, abs=1e-12)
