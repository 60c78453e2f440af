"""The cost model of docs/performance.md: images that members see, forward and backward, counted and by formula."""

from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.optim import SGD

from builders.data import digits_module, set_up
from builders.networks import untrained_members
from conftest import QUIET
from mixadv.attacks import PGD
from mixadv.lambda_solvers import AcceleratedEntropic, LambdaSolver, LinearProgram, OracleSubgradient, Uniform
from mixadv.losses import AT, TRADES
from mixadv.mixture import Mixture
from mixadv.mixture_game import AttackedBatch, MixtureGame
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.learning_rate import constant

BATCH, PER_PASS, K, T_THETA, VALIDATION = 16, 6, 3, 2, 5
BALL = ThreatModel("linf", 0.1)


class Passes:
    """Passes of single members through one full batch: `forward`, and `backward` from the logits of one forward."""

    def __init__(self, mixture):
        self.images = {"forward": 0, "backward": 0}
        for member in mixture.members:
            member.register_forward_hook(self._seen)

    def _seen(self, member, inputs, logits):
        self.images["forward"] += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._returned(gradient))

    def _returned(self, gradient):
        self.images["backward"] += len(gradient)

    @property
    def counted(self):
        return self.images["forward"] / BATCH, self.images["backward"] / BATCH


@pytest.fixture(scope="module")
def digits():
    return set_up(digits_module(batch_size=BATCH, eval_batch_size=BATCH, num_train=PER_PASS * BATCH, num_val=BATCH))


def mixture_of(count):
    # Narrow networks that err on most images: the attacks of validation may stop early, but not those of training.
    return Mixture(untrained_members(count, "small_cnn", seed=4, width=2))


def train_one_epoch(data, mixture, kind, loss, solver=None, validate=False):
    solver = solver or Uniform()
    module = MixtureTraining(
        mixture,
        loss=loss,
        threat_model=BALL,
        attack=PGD(num_steps=K),
        validation_attack=PGD(num_steps=VALIDATION),
        solver=solver,
        kind=kind,
        T_theta=T_THETA,
        optimizer=partial(SGD, lr=0.01),
        scheduler=constant,
    )
    passes = Passes(mixture)
    trainer = pl.Trainer(max_epochs=1, **QUIET, limit_val_batches=None if validate else 0)
    trainer.fit(module, datamodule=data)
    return passes.counted


def epoch_of_members(kind, members, clean):
    """(forward, backward) of one epoch per model; `clean` is 1 where the loss needs clean logits (TRADES), else 0."""
    if kind == "sampled":
        return (
            PER_PASS * members * (members * (K + clean) + 1 + clean),
            PER_PASS * members * (members * K + 1 + clean),
        )
    return PER_PASS * members * (K + 1 + 2 * clean), PER_PASS * members * (K + 1 + clean)


def phase(members, clean, responses, pooled, samples, recent=0):
    """(forward, backward) of one weights phase: x, `responses` attacks on the mixture, those on members, points."""
    forward = members * (1 + clean + samples + 2 * recent) + responses * members * (K + 3)
    backward = responses * members * K
    if pooled:
        forward += members * (K + 2 + members)
        backward += members * K
    return forward, backward


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("loss", [AT(), TRADES()], ids=["at", "trades"])
@pytest.mark.parametrize("kind", ["sampled", "shared"])
def test_an_epoch_without_weights_phases_takes_the_passes_of_the_formula(digits, kind, loss, members):
    clean = int(isinstance(loss, TRADES))
    assert train_one_epoch(digits, mixture_of(members), kind, loss) == epoch_of_members(kind, members, clean)


def test_the_schedules_in_units_of_a_forward_pass():
    # A backward pass to the input costs one forward pass, one to the parameters too costs two.
    for members in (1, 2, 4, 8):
        sampled, shared, one = (
            forward + backward + PER_PASS * members_updated
            for (forward, backward), members_updated in (
                (epoch_of_members("sampled", members, 0), members),
                (epoch_of_members("shared", members, 0), members),
                (epoch_of_members("shared", 1, 0), 1),
            )
        )
        assert shared == members * one
        assert sampled / one == pytest.approx(members * (2 * K * members + 3) / (2 * K + 3))


class Levelling(LambdaSolver):
    """Plays as another solver does and keeps the weights 1/L: members of weight 0 would cost nothing afterwards."""

    def __init__(self, player):
        self.player = player

    def attack_cost(self):
        return self.player.attack_cost()

    def solve(self, game, lam0=None, generator=None):
        solution = self.player.solve(game, lam0=lam0, generator=generator)
        return replace(solution, weights=torch.full_like(solution.weights, 1 / game.num_members))


SOLVERS = {
    # A response for each step, and one that judges the last iterate.
    "oracle": (OracleSubgradient(num_steps=2), {"responses": 3, "pooled": False, "samples": 0}),
    "oracle, last": (OracleSubgradient(num_steps=2, select="last"), {"responses": 2, "pooled": False, "samples": 0}),
    "entropic": (AcceleratedEntropic(num_steps=3, num_samples=5), {"responses": 1, "pooled": True, "samples": 5}),
    "entropic, samples alone": (
        AcceleratedEntropic(num_steps=3, num_samples=4, include_attack_points=False),
        {"responses": 0, "pooled": False, "samples": 4},
    ),
}


@pytest.mark.parametrize("loss", [AT(), TRADES()], ids=["at", "trades"])
@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_phases_add_theirs(digits, kind, loss, solver):
    members, clean = 3, int(isinstance(loss, TRADES))
    played, settings = SOLVERS[solver]
    found = train_one_epoch(digits, mixture_of(members), kind, loss, Levelling(played))
    phases = PER_PASS // T_THETA
    without = epoch_of_members(kind, members, clean)
    each = phase(members, clean, **settings)
    assert found == tuple(a + phases * b for a, b in zip(without, each, strict=True))


@pytest.mark.parametrize("recent", [0, 2])
def test_the_program_takes_at_most_its_rounds(digits, recent):
    members, rounds = 3, 2
    mixture = mixture_of(members)
    passes = Passes(mixture)
    x, y = digits.train_images[:BATCH] / 255.0, digits.train_labels[:BATCH]
    attack = PGD(num_steps=K, keep="objective")
    before = [AttackedBatch(x, x, y)] * recent
    game = MixtureGame(mixture, x, y, BALL, [attack], AT(), torch.Generator().manual_seed(0), recent=before)
    solution = LinearProgram(num_rounds=rounds).solve(game)
    most, least = (phase(members, 0, 1 + n, pooled=True, samples=0, recent=recent) for n in (rounds, 1))
    assert all(a <= b for a, b in zip(passes.counted, most, strict=True))
    # Members of weight 0 may be passed over in a round.
    assert passes.counted[0] > least[0] - members * (K + 3)
    assert 1 <= len(solution.history["value"]) <= rounds


def test_validation_takes_at_most_its_steps_and_three_plain_passes(digits):
    members, batches = 3, 1
    trained = train_one_epoch(digits, mixture_of(members), "shared", AT())
    both = train_one_epoch(digits, mixture_of(members), "shared", AT(), validate=True)
    forward, backward = (b - a for a, b in zip(trained, both, strict=True))
    # Images that every member gets wrong are left alone.
    assert batches * members * 4 <= forward <= batches * members * (VALIDATION + 2 + 3)
    assert backward <= batches * members * VALIDATION
