"""Which game the weights phases play, and where a training starts: payoff, attacks, images, theta_0 and lambda_0."""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch.optim import SGD

from builders.data import digits_module
from builders.networks import same_tensors, untrained_members
from builders.runs import read_metrics, read_results
from builders.stops import Interrupted, SaveAndStop
from conftest import QUIET, run_command
from mixadv.attacks import ARC, PGD, SubsetAttack
from mixadv.errors import UserError
from mixadv.game import Equilibrium
from mixadv.lambda_solvers import AcceleratedEntropic, LambdaSolver, OracleSubgradient
from mixadv.losses import ZeroOne
from mixadv.members.store import WEIGHTS_FILE, load_mixture, read_config, save_mixture
from mixadv.mixture import Mixture
from mixadv.tasks.train import phase_that_never_comes
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining, Schedule, WeightsPhase
from mixadv.training.learning_rate import constant

LAM = [0.25, 0.5, 0.25]
BARRE = WeightsPhase("zero_one", {"arc": ARC(2), "subsets": SubsetAttack(2)}, num_images=22)


@dataclass(frozen=True)
class Watching(LambdaSolver):
    """Asks the game once, notes it and the answer, and leaves the weights."""

    seen: list = field(default_factory=list)
    recent_batches: ClassVar[int] = 2

    def attack_cost(self):
        return 1.0

    def solve(self, game, lam0=None, generator=None):
        response = game.best_response(lam0)
        self.seen.append((game, lam0, response, game.known().losses))
        return Equilibrium(lam0, response.value, None, None, "completed", {}, 1, None, None)


def training(mixture=None, **settings):
    settings = {"T_theta": 2, "seed": 7, "kind": "shared", "scheduler": constant, **settings}
    return MixtureTraining(
        mixture or Mixture(untrained_members(mean=(0.3,), std=(0.4,)), LAM),
        ThreatModel("linf", 0.1),
        attack=PGD(2),
        validation_attack=PGD(2),
        optimizer=partial(SGD, lr=0.05, momentum=0.9),
        **settings,
    )


def fit(module, batches=6, epochs=1, callbacks=(), data=None, **more):
    trainer = pl.Trainer(
        max_epochs=epochs, **QUIET, limit_train_batches=batches, limit_val_batches=0, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data or digits_module(seed=3), **more)
    return module


# --- payoff, attacks, images ---------------------------------------------------------------------------------------


def test_every_phase_plays_the_zero_one_loss_on_the_same_validation_images():
    """The payoff counted by hand: which members err at x and at the points that the two attacks find."""
    solver, data = Watching(), digits_module(seed=3)
    module = fit(training(solver=solver, phase=BARRE), data=data)
    assert len(solver.seen) == 2
    (first, lam0, _, _), (second, *_) = solver.seen
    assert lam0.tolist() == LAM
    assert torch.equal(first.x, second.x)
    assert isinstance(first.loss, ZeroOne)
    assert list(first.attacks) == list(BARRE.attacks.values())
    # They are images of the validation split with their labels, none of them twice, 2 or 3 of each class.
    split = data.val_images.float() / 255
    places = [int((split == image).flatten(1).all(1).nonzero()[0, 0]) for image in first.x]
    assert len(set(places)) == 22
    assert torch.equal(data.val_labels[places], first.y)
    assert sorted(set(first.y.bincount(minlength=10).tolist())) == [2, 3]
    # The members do not change in the last phase of the training.
    game, lam, response, losses = solver.seen[1]
    assert losses.shape == (22, 3, 3)
    module.mixture.eval()
    with torch.no_grad():
        wrong = torch.stack([member(first.x).argmax(1) != first.y for member in module.mixture.members], dim=1)
    assert torch.equal(losses[:, 0], wrong.double())
    assert set(losses.unique().tolist()) == {0.0, 1.0}
    assert response.value == pytest.approx(float((losses @ lam).amax(1).mean()), abs=1e-12)
    assert response.value > (losses[:, 0] @ lam).mean()
    # Batches of the members' phases have no place among validation images.
    assert game.known().losses.shape == (22, 3, 3)


def test_attacks_of_ones_own_play_the_loss_of_the_training_on_the_batch():
    solver = Watching()
    module = fit(training(solver=solver, phase=WeightsPhase(attacks={"arc": ARC(2)})), 3)
    (game, _, response, losses), data = solver.seen[0], digits_module(seed=3)
    assert game.loss is module.loss
    assert len(game.x) == 16
    # Two batches before it join, as without attacks of one's own.
    assert losses.shape == (48, 2, 3)
    data.setup()
    held = data.train_images.float() / 255
    assert all((held == image).flatten(1).all(1).any() for image in game.x)
    assert response.value > 0


def test_the_zero_one_phase_finds_the_better_member():
    """One member of three is trained, the others always answer 0 or 1: lambda goes there, with T_lambda = 1 as well."""
    members = untrained_members(mean=(0.3,), std=(0.4,))
    for k in (0, 2):
        with torch.no_grad():
            members[k].net[1].weight.zero_()
            members[k].net[1].bias.copy_(5 * torch.eye(10)[k // 2])
    trained = training(Mixture([members[1]]), T_theta=1, kind="shared")
    fit(trained, None, epochs=8)
    for num_steps in (1, 20):
        module = training(Mixture(members), solver=OracleSubgradient(num_steps), phase=BARRE, T_theta=1)
        module.optimizer = partial(SGD, lr=1e-9)
        before = float(module.mixture.weights[1])
        fit(module, None, epochs=2)
        assert module.mixture.weights[1] > 0.9 > before


def test_a_phase_that_cannot_be_played_is_refused_before_the_first_batch():
    with pytest.raises(UserError, match="num_images=41, but the validation split has 40 images"):
        fit(training(phase=WeightsPhase(num_images=41)))
    solver = AcceleratedEntropic([0.1, 0.2], num_steps=1)
    with pytest.raises(UserError, match="alpha has 2 temperatures, but a weights phase has 16 images"):
        fit(training(solver=solver))
    with pytest.raises(UserError, match="alpha has 2 temperatures, but a weights phase has 5 images"):
        fit(training(solver=solver, phase=WeightsPhase(num_images=5)))
    fit(training(solver=AcceleratedEntropic([0.1] * 16, num_steps=1, num_samples=1)), 3)
    for settings, message in (
        ({"payoff": "accuracy"}, "payoff must be one of loss, zero_one"),
        ({"payoff": "zero_one"}, "payoff=zero_one needs attacks made for mixtures"),
        ({"num_images": 0}, "num_images must be a whole number of at least 1"),
        ({"num_images": True}, "num_images must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightsPhase(**settings)


def test_a_training_with_phases_of_its_own_goes_on_bit_for_bit(tmp_path):
    settings = {"solver": OracleSubgradient(2), "phase": BARRE}
    whole = fit(training(**settings), epochs=2)
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Interrupted):
        fit(training(**settings), epochs=2, callbacks=[SaveAndStop(path, 7)])
    torch.manual_seed(99)
    module = fit(training(**settings), epochs=2, ckpt_path=path)
    assert same_tensors(module.state_dict(), whole.state_dict())
    assert module.mixture.weights.tolist() != LAM
    assert MixtureTraining.load_from_checkpoint(path).phase == BARRE
    with pytest.raises(UserError, match="the checkpoint was trained with phase="):
        fit(training(solver=OracleSubgradient(2)), epochs=2, ckpt_path=path)


# --- a phase that never comes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "T_theta", "batches", "most"), [("sampled", 50, 150, 49), ("shared", 50, 50, 49), ("sampled", 2, 3, None)]
)
def test_a_phase_that_never_comes_is_said(kind, T_theta, batches, most):
    said = phase_that_never_comes(Schedule(kind, 3, T_theta), batches)
    first = 3 * T_theta + 1 if kind == "sampled" else T_theta + 1
    assert f"the first weights phase is batch {first}, and this training has {batches} batches" in said
    assert "\n" not in said
    if most is None:
        assert "raise trainer.max_epochs" in said
    else:
        assert f"schedule.T_theta={most} or less" in said
        assert any(Schedule(kind, 3, most).is_weights_phase(t) for t in range(1, batches + 1))
        assert not any(Schedule(kind, 3, most + 1).is_weights_phase(t) for t in range(1, batches + 1))
    assert phase_that_never_comes(Schedule(kind, 3, T_theta), first) == ""
    assert phase_that_never_comes(Schedule(kind, 3, T_theta, weights_phases=False), batches) == ""


# --- theta_0 and lambda_0 on the command line -----------------------------------------------------------------------

QUICK = (
    *("protocol.diagnosed=0", "protocol.attacks.pgd-20.num_steps=2", "protocol.attacks.pgd-20.restarts=1"),
    *("protocol.attacks.arc.num_steps=1", "protocol.attacks.subsets.num_steps=1", "trainer.accelerator=cpu"),
    *("attack.num_steps=2", "protocol.validation.num_steps=2", "logger=csv", "trainer.enable_progress_bar=false"),
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, trained):
    """`three`, the trained linear mixture, and `deep`, one member of another architecture."""
    cwd = tmp_path_factory.mktemp("shelf")
    config = read_config(trained.path)
    save_mixture(load_mixture(trained.path), cwd / "three", config, "")
    deep = Mixture(untrained_members(1, "mlp", mean=(0.3,), std=(0.4,), hidden=[12]))
    recipe = {"name": "mlp", "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.4], "hidden": [12]}
    save_mixture(deep, cwd / "deep", {**config, "L": 1, "model": recipe}, "")
    return cwd


def test_a_training_starts_from_members_and_weights_that_are_given(shelf):
    """With hardly a step: the exported members are those that were named, and lambda is as given."""
    argv = ("members=[three,deep,deep]", "weights=[0.125,0.25,0.125,0.25,0.25]", "lambda_solver=uniform", *QUICK)
    finished = run_command(shelf, *argv, "optimizer.lr=1e-12", "trainer.max_epochs=1", "name=still")
    assert finished.rc == 0, finished.err
    path = shelf / "outputs" / "train" / "still"
    results = read_results(path)
    assert results["weights"] == results["config"]["weights"] == [0.125, 0.25, 0.125, 0.25, 0.25]
    assert [member["source"] for member in results["members"]] == ["three", "three", "three", "deep", "deep"]
    assert [member["name"] for member in results["members"]][2:] == ["three#2", "deep", "deep (2)"]
    now, three, deep = (
        load_file(folder / WEIGHTS_FILE) for folder in (path / "mixture", shelf / "three", shelf / "deep")
    )
    for old, before, after in ((three, 0, 0), (three, 1, 1), (three, 2, 2), (deep, 0, 3), (deep, 0, 4)):
        held = {key: value for key, value in old.items() if key.startswith(f"members.{before}.")}
        assert held
        for key, value in held.items():
            place = key.replace(f"members.{before}.", f"members.{after}.")
            np.testing.assert_allclose(now[place], value, atol=1e-7)
    config = json.loads((path / "mixture" / "config.json").read_text())
    assert [model["name"] for model in config["models"]] == ["linear"] * 3 + ["mlp"] * 2
    assert config["started_from"] == ["three", "three", "three", "deep", "deep"]
    rows = read_metrics(path)
    assert [rows[0][f"lambda/{k}"] for k in range(5)] == [0.125, 0.25, 0.125, 0.25, 0.25]


def test_a_fine_tuned_mixture_learns_its_weights_on_zero_one_losses(shelf):
    argv = (
        *("members=[three]", "weights=[0.5,0.25,0.25]", "schedule=shared", "schedule.T_theta=4", "name=tuned"),
        *("lambda_solver.payoff=zero_one", "lambda_solver.attacks=[arc,subsets]", "lambda_solver.num_images=33"),
        *("lambda_solver.num_steps=3", "lambda_solver.select=last", "trainer.max_epochs=1", "optimizer.lr=0.01"),
        *("eps=0.12", *QUICK),
    )
    finished = run_command(shelf, *argv)
    assert finished.rc == 0, finished.err
    path = shelf / "outputs" / "train" / "tuned"
    results, rows = read_results(path), read_metrics(path)
    assert [rows[0][f"lambda/{k}"] for k in range(3)] == [0.5, 0.25, 0.25]
    phases = [row for row in rows if "weights/value" in row]
    assert len(phases) == 2
    assert all(0 <= row["weights/value"] <= 1 for row in phases)
    assert results["weights"] != [0.5, 0.25, 0.25]
    assert sum(results["weights"]) == pytest.approx(1)
    assert results["config"]["lambda_solver"]["attacks"] == ["arc", "subsets"]
    # Data and norm are those of the members, eps is that of the command.
    assert results["threat_model"] == {"norm": "linf", "eps": 0.12}
    again = run_command(shelf, *argv)
    assert "is done" in again.out


def test_fresh_members_may_start_with_weights_that_are_given(shelf):
    argv = ("data=digits", "model=linear", "eps=0.05", "L=2", "weights=[0.75,0.25]", "data.num_train=64", *QUICK)
    finished = run_command(
        shelf, *argv, "baseline=true", "data.batch_size=16", "data.num_test=20", "trainer.max_epochs=1", "name=fresh"
    )
    assert finished.rc == 0, finished.err
    assert "lambda stays as it starts: the first weights phase is batch 101, and this training has 8" in finished.out
    assert read_results(shelf / "outputs" / "train" / "fresh")["weights"] == [0.75, 0.25]
    assert read_results(shelf / "outputs" / "train" / "fresh" / "baseline")["weights"] == [1.0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["members=[three]", "L=3"], "L=3: task=train counts the members that are named; leave it out"),
        (["members=[three]", "weights=[0.5,0.5]"], "weights=[...] has 2 numbers, but members=[...] holds 3: three#0"),
        (["members=[three]", "baseline=true"], "baseline=true trains a fresh single model"),
        (["members=[nothing]"], "there is nothing at nothing"),
        (["L=3", "weights=[0.5,0.5]"], "weights=[0.5,0.5] has 2 numbers, but L=3: give one for each member"),
        (["data=digits", "lambda_solver.attacks=[none]"], "lambda_solver.attacks=['none']: give a list of attacks of"),
        (["data=digits", "lambda_solver.payoff=zero_one"], "lambda_solver.payoff=zero_one needs attacks made for mix"),
        (
            ["members=[three]", "task=solve", "lambda_solver.payoff=zero_one", "lambda_solver.attacks=[arc]"],
            "are for task=train: task=solve plays the 0/1 loss",
        ),
    ],
)
def test_what_cannot_start_a_training_is_refused(shelf, argv, said):
    assert said in run_command(shelf, *argv, *QUICK, "name=refused").refusal()
    assert not (shelf / "outputs" / "train" / "refused" / "config.yaml").exists()
