"""The game on a batch: payoffs recomputed by hand, and linear members whose worst case lies at a corner."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from builders.networks import untrained_mixture
from mixadv.attacks import PGD, InnerLoss
from mixadv.game import FiniteGame
from mixadv.lambda_solvers import AcceleratedEntropic, LinearProgram, OracleSubgradient
from mixadv.losses import AT, TRADES, ZeroOne
from mixadv.mixture import Mixture
from mixadv.mixture_game import AttackedBatch, MixtureGame
from mixadv.threat_model import ThreatModel
from oracles_game import full_linear_program

LAM = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)


class Recorder:
    """Attacks as PGD does, and notes the weights it met and the points it found."""

    def __init__(self, attack):
        self.attack, self.weights, self.points = attack, [], []

    def __call__(self, mixture, x, y, threat_model, generator=None):
        x_adv = self.attack(mixture, x, y, threat_model, generator)
        self.weights.append(mixture.weights.tolist())
        self.points.append(x_adv)
        return x_adv


def mixture_in_train_mode():
    """Batch norm with statistics of its own, in train mode, so that a forward in the wrong mode shows."""
    mixture = untrained_mixture("small_resnet", seed=3, num_classes=4, width=2).train()
    for member in mixture.members:
        member(torch.rand(16, 1, 8, 8))
    return mixture


def game_on(mixture, loss, seed=9, batch=5):
    torch.manual_seed(1)
    x, y = torch.rand(batch, 1, 8, 8), torch.arange(batch) % 4
    attack = Recorder(PGD(num_steps=3, objective=InnerLoss(loss), start=loss.start, keep="objective"))
    generator = torch.Generator().manual_seed(seed)
    return MixtureGame(mixture, x, y, ThreatModel("linf", 0.1), [attack], loss, generator), attack


def losses_by_hand(mixture, loss, game, x_adv):
    """[L][B] in float64, from torch's own functions, in evaluation mode."""
    table = []
    modes = [(module, module.training) for module in mixture.modules()]
    mixture.eval()
    for member in mixture.members:
        with torch.no_grad():
            attacked, clean = member(x_adv).double(), member(game.x).double()
        if isinstance(loss, AT):
            table.append(F.cross_entropy(attacked, game.y, reduction="none"))
        else:
            divergence = F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
            table.append(F.cross_entropy(clean, game.y, reduction="none") + loss.beta * divergence)
    for module, mode in modes:
        module.training = mode
    return torch.stack(table)


LOSSES = pytest.mark.parametrize("loss", [AT(), TRADES(beta=4.0)], ids=["at", "trades"])


@LOSSES
def test_best_response_is_the_mean_member_loss_at_the_points_of_the_attack(loss):
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, loss)
    state = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    response = game.best_response(LAM)
    assert attack.weights == [pytest.approx(LAM.tolist(), abs=1e-7)]
    by_hand = losses_by_hand(mixture, loss, game, attack.points[0])
    assert response.gradient.dtype == torch.float64
    torch.testing.assert_close(response.gradient, by_hand.mean(1), rtol=1e-5, atol=1e-6)
    assert response.value == pytest.approx(float(by_hand.mean(1) @ LAM), rel=1e-5)
    assert response.max_loss == pytest.approx(float(by_hand.abs().max()), rel=1e-5)
    assert response.choice is None
    assert not game.exact
    assert game.num_members == 3
    assert (attack.points[0] - game.x).abs().max() > 0.05
    after = mixture.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert all(module.training for module in mixture.modules())
    assert all(p.requires_grad and p.grad is None for p in mixture.parameters())


@LOSSES
def test_pool_holds_x_uniform_points_and_the_responses_to_lam_and_to_every_member(loss):
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, loss)
    weights = mixture.weights.clone()
    pool = game.pool(LAM, 2, True, torch.Generator().manual_seed(77))
    assert pool.losses.shape == (5, 1 + 2 + 4, 3)
    assert attack.weights == [pytest.approx(w, abs=1e-7) for w in (LAM.tolist(), [1.0], [1.0], [1.0])]
    assert torch.equal(mixture.weights, weights)
    draws = torch.Generator().manual_seed(77)
    low, high = (game.x - 0.1).clamp(0, 1), (game.x + 0.1).clamp(0, 1)
    samples = [low + (high - low) * torch.rand(game.x.shape, generator=draws) for _ in range(2)]
    for j, point in enumerate([game.x, *samples, *attack.points]):
        by_hand = losses_by_hand(mixture, loss, game, point).T
        torch.testing.assert_close(pool.losses[:, j], by_hand, rtol=1e-4, atol=1e-5)


def test_pool_without_attack_points_is_pure_monte_carlo_from_the_games_own_generator():
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, AT(), seed=21)
    pool = game.pool(LAM, 3, False)
    assert pool.losses.shape == (5, 3, 3)
    assert attack.points == []
    again, _ = game_on(mixture, AT())
    explicit = again.pool(LAM, 3, False, torch.Generator().manual_seed(21))
    assert torch.equal(pool.losses, explicit.losses)
    other, _ = game_on(mixture, AT(), seed=22)
    assert not torch.equal(pool.losses, other.pool(LAM, 3, False).losses)


def test_a_failing_attack_leaves_the_weights():
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, AT())
    before = mixture.weights.clone()

    def fail(*arguments):
        raise RuntimeError("no attack today")

    attack.attack = fail
    with pytest.raises(RuntimeError, match="no attack today"):
        game.best_response(LAM)
    assert torch.equal(mixture.weights, before)


def test_trades_payoff_at_x_is_the_clean_cross_entropy():
    game, _ = game_on(mixture_in_train_mode(), TRADES())
    at, _ = game_on(game.mixture, AT())
    torch.testing.assert_close(game.member_losses(game.x), at.member_losses(game.x), rtol=1e-5, atol=1e-6)


# --- linear members: convex in x', so the worst point of a box is one of its corners ------------------------

EPS = 0.6


@pytest.fixture(scope="module")
def lines():
    """Three linear classifiers of the plane, 12 points, and the losses [N, 4, L] at the corners of the balls."""
    directions = [[1.6, 0.3], [-0.5, 1.4], [-1.0, -1.1]]
    members = []
    for k, direction in enumerate(directions):
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.0, 0.0], direction]))
            layer.bias.copy_(torch.tensor([0.0, 0.4 - 0.3 * k]))
        members.append(layer.double())
    torch.manual_seed(8)
    x, y = torch.randn(12, 2, dtype=torch.float64), torch.tensor([0, 1, 1] * 4)
    corners = torch.tensor(list(itertools.product([-EPS, EPS], repeat=2)), dtype=torch.float64)
    losses = torch.zeros(12, 4, 3, dtype=torch.float64)
    for i, j, k in itertools.product(range(12), range(4), range(3)):
        point = x[i] + corners[j]
        z = float(members[k].weight[1].detach() @ point + members[k].bias[1].detach())
        losses[i, j, k] = math.log1p(math.exp(-z if y[i] == 1 else z))
    attack = PGD(num_steps=12, step_size=0.5, restarts=5, objective=InnerLoss(AT()), keep="objective")
    generator = torch.Generator().manual_seed(0)
    game = MixtureGame(Mixture(members), x, y, ThreatModel("linf", EPS, None), [attack], AT(), generator)
    return game, losses


def risk(losses, lam):
    return float((losses @ torch.as_tensor(lam, dtype=torch.float64)).amax(1).mean())


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_pure_strategy_reaches_its_closed_form(lines, k):
    """log(1 + exp(-(margin - eps ||w||_1))): the least margin of a linear classifier over the ball."""
    game, losses = lines
    member = game.mixture.members[k]
    with torch.no_grad():
        z = game.x @ member.weight[1] + member.bias[1]
        margin = torch.where(game.y == 1, z, -z) - EPS * member.weight[1].abs().sum()
    closed = float(torch.log1p(torch.exp(-margin)).mean())
    lam = torch.eye(3, dtype=torch.float64)[k]
    assert game.best_response(lam).value == pytest.approx(closed, rel=1e-9)
    assert risk(losses, lam) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("lam", [[0.5, 0.2, 0.3], [0.15, 0.25, 0.6], [0.4, 0.6, 0.0]])
def test_a_mixed_strategy_reaches_the_best_corner(lines, lam):
    game, losses = lines
    response = game.best_response(torch.tensor(lam, dtype=torch.float64))
    # The weights travel through the mixture's float32 buffer; the attack can only fall short.
    assert risk(losses, lam) * (1 - 1e-3) <= response.value <= risk(losses, lam) * (1 + 1e-9)


def test_algorithm_1_approaches_the_value_of_the_linear_program(lines):
    """Best over lam_0..lam_{T-1} <= V + 2 delta + 2 M sqrt(L / T), and in fact much closer."""
    game, losses = lines
    linear_program = full_linear_program(losses.numpy())
    value = linear_program[0]
    T = 25
    solution = OracleSubgradient(num_steps=T).solve(game)
    reached = risk(losses, solution.weights)
    bound = 2 * max(solution.history["max_loss"]) * math.sqrt(3 / T)
    assert value - 1e-9 <= reached <= value + bound
    assert reached == pytest.approx(value, abs=0.02)
    assert reached - 0.01 <= solution.value <= reached + 1e-9
    assert solution.lower_bound <= value + 1e-9
    assert solution.gap is None
    assert solution.num_attacks == T + 1
    pure = min(risk(losses, row) for row in torch.eye(3))
    assert reached < pure - 0.02
    assert len(set(torch.round(solution.weights, decimals=2).tolist())) == 3


def test_the_entropic_solver_plays_on_its_pool(lines):
    game, losses = lines
    value = full_linear_program(losses.numpy())[0]
    solver = AcceleratedEntropic(alpha=1e-3, num_steps=400, num_samples=8)
    solution = solver.solve(game, lam0=LAM, generator=torch.Generator().manual_seed(4))
    pool = game.pool(LAM, 8, True, torch.Generator().manual_seed(4))
    # The pool holds real points only: its value is a lower estimate, and the solver solves the pool.
    assert solution.value <= risk(losses, solution.weights) + 1e-9
    pool_value = full_linear_program(pool.losses.numpy())[0]
    assert pool_value <= value + 1e-9
    assert solution.value == pytest.approx(pool_value, abs=0.02)
    assert risk(losses, solution.weights) == pytest.approx(value, abs=0.1)
    assert game.mixture.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_the_pure_pool_holds_the_uniform_points_and_not_x():
    """Each loss of the pool is that of the members at the point that the generator draws; x, where it is 0, is out."""
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, AT())
    pool = game.pool(LAM, 3, False, torch.Generator().manual_seed(5))
    assert attack.points == []
    assert pool.losses.shape == (5, 3, 3)
    draws = torch.Generator().manual_seed(5)
    for j in range(3):
        by_hand = losses_by_hand(mixture, AT(), game, game.threat_model.sample(game.x, draws)).T
        torch.testing.assert_close(pool.losses[:, j], by_hand, rtol=1e-4, atol=1e-5)
    # The points stay known, beside x.
    assert torch.equal(game.known().losses[:, 1:], pool.losses)
    found = AcceleratedEntropic(num_steps=5, num_samples=4, include_attack_points=False).solve(game)
    assert attack.points == []
    assert found.value == pytest.approx(FiniteGame(game.known().losses[:, -4:]).value(found.weights), abs=1e-12)


def test_examples_may_have_masses_and_radii_of_their_own():
    """As batches by hand: the value is sum_i mass_i max_j, and each example moves by its own radius."""
    mixture = mixture_in_train_mode()
    torch.manual_seed(1)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5) % 4
    masses = torch.tensor([0.5, 0.05, 0.25, 0.0, 0.2])
    radii = torch.tensor([0.1, 0.02, 0.0, 0.05, 0.1])
    attack = Recorder(PGD(5, start="none", keep="last"))
    ball = ThreatModel("linf", radii)
    game = MixtureGame(mixture, x, y, ball, [attack], AT(), masses=masses, batch_size=2)
    response = game.best_response(LAM)
    moved = torch.cat(attack.points)
    np.testing.assert_allclose((moved - x).abs().flatten(1).amax(1), radii, atol=1e-6)
    losses = torch.stack([losses_by_hand(mixture, AT(), game, point).T for point in (x, moved)], dim=1)
    by_hand = (losses @ LAM).amax(1) @ masses.double()
    assert response.value == pytest.approx(float(by_hand), rel=1e-5)
    pool = game.pool(LAM, 2, False, torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool.masses, masses.double(), rtol=0, atol=1e-7)
    recent = [AttackedBatch(x, x, y)]
    with pytest.raises(ValueError, match="masses are those of the batch alone"):
        MixtureGame(mixture, x, y, ball, [attack], AT(), masses=masses, recent=recent)
    with pytest.raises(ValueError, match="masses must sum to 1"):
        MixtureGame(mixture, x, y, ball, [attack], AT(), masses=masses / 2).known()


# --- what the attacker knows -------------------------------------------------------------------------------


def test_x_is_known_from_the_start_and_every_move_stays_known():
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, AT())
    assert game.known().losses.shape == (5, 1, 3)
    game.best_response(LAM)
    game.pool(LAM, 1, True, torch.Generator().manual_seed(5))
    known = game.known().losses
    assert known.shape == (5, 1 + 1 + 1 + 4, 3)
    for j, point in ((0, game.x), (1, attack.points[0]), (3, attack.points[1]), (6, attack.points[4])):
        by_hand = losses_by_hand(mixture, AT(), game, point).T
        torch.testing.assert_close(known[:, j], by_hand, rtol=1e-4, atol=1e-5)


def test_every_attack_makes_a_move_in_batches_of_any_size():
    mixture = mixture_in_train_mode()
    torch.manual_seed(1)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5) % 4
    attacks = [PGD(2, start="none", keep="last"), PGD(3, 0.5, start="none", keep="last")]
    seen = []
    ball = ThreatModel("linf", 0.1)
    game = MixtureGame(mixture, x, y, ball, attacks, AT(), batch_size=2, on_attack=seen.append)
    game.best_response(LAM)
    assert seen == [2, 2, 1] * 2
    assert game.known().losses.shape == (5, 3, 3)
    mixture.set_weights(LAM)
    for j, attack in enumerate(attacks, 1):
        by_hand = losses_by_hand(mixture, AT(), game, attack(mixture, x, y, ball)).T
        torch.testing.assert_close(game.known().losses[:, j], by_hand, rtol=1e-4, atol=1e-5)


@LOSSES
def test_recent_batches_join_with_the_payoffs_of_the_members_as_they_are(loss):
    mixture = mixture_in_train_mode()
    torch.manual_seed(6)
    recent = [AttackedBatch(torch.rand(n, 1, 8, 8), torch.rand(n, 1, 8, 8), torch.randint(4, (n,))) for n in (3, 2)]
    game, attack = game_on(mixture, loss)
    alone = game.best_response(LAM)
    game = MixtureGame(mixture, game.x, game.y, game.threat_model, [attack], loss, recent=recent)
    attack.points.clear()
    torch.manual_seed(0)
    game.best_response(LAM)
    game.best_response(LAM)
    assert [len(points) for points in attack.points] == [5, 5]
    known = game.known()
    assert known.losses.shape == (5 + 3 + 2, 3, 3)
    assert known.mask.tolist() == [[True] * 3] * 5 + [[True, True, False]] * 5
    row = 5
    for batch in recent:
        at = MixtureGame(mixture, batch.x, batch.y, game.threat_model, [], loss)
        for j, point in enumerate((batch.x, batch.x_adv)):
            by_hand = losses_by_hand(mixture, loss, at, point).T
            torch.testing.assert_close(known.losses[row : row + len(batch.y), j], by_hand, rtol=1e-4, atol=1e-5)
        row += len(batch.y)
    response, known = game.best_response(LAM), game.known()
    scores = (known.losses @ LAM).masked_fill(~known.mask, -math.inf)
    assert response.value == pytest.approx(float(scores.amax(1).mean()), rel=1e-6)
    assert response.value != pytest.approx(alone.value, rel=1e-3)


def test_before_any_attack_recent_batches_know_more_than_the_batch():
    mixture = mixture_in_train_mode()
    batch = AttackedBatch(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.tensor([1, 3]))
    game = MixtureGame(
        mixture, torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]), ThreatModel("linf", 0.1), [], AT(), recent=[batch]
    )
    assert game.known().mask.tolist() == [[True, False]] * 3 + [[True, True]] * 2


# --- the double oracle -------------------------------------------------------------------------------------


def test_the_double_oracle_solves_the_game_on_linear_members(lines):
    """The corners of the box hold the exact game; the attack finds them one response at a time."""
    game, losses = lines
    value = full_linear_program(losses.numpy())[0]
    fresh = MixtureGame(
        game.mixture, game.x, game.y, game.threat_model, game.attacks, AT(), torch.Generator().manual_seed(3)
    )
    found = LinearProgram(num_rounds=12, attack_tolerance=1e-4).solve(fresh)
    assert found.status == "converged"
    assert risk(losses, found.weights) == pytest.approx(value, abs=2e-3)
    # Certain: the points are real, so their game is worth no more than the whole one.
    assert found.lower_bound <= value + 1e-9
    assert found.lower_bound == pytest.approx(value, abs=2e-3)
    # Its value on the points known after each of its rounds, by the full program: the pool only grows.
    moves = fresh.known().losses.numpy()
    values = [full_linear_program(moves[:, :count])[0] for count in range(5, moves.shape[1] + 1)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(values))
    np.testing.assert_allclose(found.history["lower_bound"], values[: len(found.history["lower_bound"])], atol=1e-7)
    assert values[-1] > full_linear_program(moves[:, :1])[0] + 1e-3
    assert found.value >= found.lower_bound - 1e-12
    assert found.gap is None
    assert found.value == pytest.approx(fresh.known().value(found.weights))


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_points_outside_the_ball_prove_nothing(value):
    game, _ = game_on(mixture_in_train_mode(), AT())
    rogue = MixtureGame(game.mixture, game.x, game.y, game.threat_model, [lambda m, x, *_: x + value], AT())
    with pytest.raises(RuntimeError, match="left the threat model at example 0"):
        LinearProgram().solve(rogue)


def test_zero_one_payoffs_count_the_members_that_err():
    mixture = mixture_in_train_mode()
    game, attack = game_on(mixture, AT())
    game = MixtureGame(mixture, game.x, game.y, game.threat_model, [attack], ZeroOne())
    response = game.best_response(LAM)
    mixture.eval()
    with torch.no_grad():
        wrong = [torch.stack([m(x).argmax(1) != game.y for m in mixture.members]) for x in (game.x, attack.points[0])]
    by_hand = torch.stack([LAM @ w.double() for w in wrong]).amax(0).mean()
    assert response.value == pytest.approx(float(by_hand), abs=1e-9)
    assert response.value > 0
