"""Batches in parts: the same training as in one, refusals, and that a run keeps its choices."""

import copy
import itertools
import json
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import SGD

from builders.data import digits_module, set_up
from builders.networks import WEIGHTS, InFloat64, untrained_members
from builders.processes import started_process
from conftest import QUIET, TINY
from mixadv.attacks import PGD
from mixadv.checkpoint_files import read_checkpoint
from mixadv.errors import UserError
from mixadv.lambda_solvers import OracleSubgradient
from mixadv.losses import AT, TRADES
from mixadv.mixture import Mixture
from mixadv.runs.choices import Choices
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.shared_attack import parts_of
from recorded_rows import Rows


@pytest.fixture(scope="module")
def digits():
    return set_up(digits_module(seed=3))


def group_norm_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10)
    )


def trained_in_parts(nets, data, loss, kind, micro, batches=4):
    module = MixtureTraining(
        Mixture(copy.deepcopy(nets), WEIGHTS[: len(nets)] if len(nets) > 1 else None),
        loss=loss,
        threat_model=ThreatModel("linf", 0.1),
        attack=PGD(num_steps=2, step_size=0.4),
        validation_attack=PGD(num_steps=1, keep="last"),
        solver=OracleSubgradient(num_steps=2),
        kind=kind,
        T_theta=2 if kind == "shared" else 1,
        optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        seed=7,
        micro_batch_size=micro,
    )
    trainer = pl.Trainer(
        max_epochs=1,
        **QUIET | {"logger": Rows()},
        limit_train_batches=batches,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    return module, [numbers for _, numbers in trainer.logger.rows]


@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize("loss", [AT(), TRADES(beta=6.0)], ids=["at", "trades"])
@pytest.mark.parametrize("name", ["small_cnn", "linear", "group_norm"])
def test_parts_give_what_the_whole_batch_gives(digits, name, loss, kind):
    """Parameters, momentum, weights, generators and what is reported, over members phases and a weights phase."""
    torch.manual_seed(5)
    nets = [group_norm_net() for _ in range(3)] if name == "group_norm" else untrained_members(3, name)
    nets = [InFloat64(net) for net in nets]
    whole, said = trained_in_parts(nets, digits, loss, kind, None)
    # The first row tells the start.
    assert ["weights/value" in row for row in said] == [False] + (
        [False, False, True, False] if kind == "shared" or len(nets) == 1 else [False, False, False, True]
    )
    assert sum("train/loss" in row for row in said) == 3
    assert max(net.most for net in whole.mixture.members) == 16
    for micro, largest in ((1, 1), (7, 6), (100, 16)):
        parts, told = trained_in_parts(nets, digits, loss, kind, micro)
        assert max(net.most for net in parts.mixture.members) == largest
        exact = micro == 100
        for key, tensor in whole.state_dict().items():
            difference = (parts.state_dict()[key].double() - tensor.double()).abs().max()
            # The weights are kept in float32.
            assert difference <= (0 if exact else 1e-6 if key.endswith("weights") else 1e-11), (key, micro)
        for ours, theirs in zip(told, said, strict=True):
            assert ours == pytest.approx(theirs, abs=0 if exact else 1e-6)
        assert torch.equal(parts.attack_generator.get_state(), whole.attack_generator.get_state())


def test_batch_norm_sees_each_part_alone(digits):
    nets = untrained_members(1, "small_resnet", width=2)
    counted = {}
    for micro in (None, 100, 6):
        module, _ = trained_in_parts(nets, digits, AT(), "shared", micro)
        state = module.mixture.members[0].state_dict()
        counted[micro] = {int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert counted == {None: {4}, 100: {4}, 6: {12}}


def test_parts_are_as_few_and_as_equal_as_can_be():
    for count, most in itertools.product(range(1, 30), range(1, 32)):
        sizes = [part.stop - part.start for part in parts_of(count, most)]
        assert np.concatenate([np.arange(count)[part] for part in parts_of(count, most)]).tolist() == list(range(count))
        assert max(sizes) <= most
        assert len(sizes) == -(-count // most)
        assert max(sizes) - min(sizes) <= 1
    assert parts_of(0, 3) == [slice(0, 0)]
    assert parts_of(9, None) == [slice(0, 9)]


@pytest.mark.slow
def test_two_processes_take_parts_of_their_shares(tmp_path):
    setting = ("schedule=shared", "loss=trades", "optimizer.lr=0.02", "lambda_solver.num_steps=4")
    # Batch norm would see the statistics of each part.
    setting = (*TINY, "model=small_cnn", "model.width=3", "L=3", *setting)
    # Targets are drawn for the whole batch, so they do not depend on how processes and parts divide it.
    setting = (*setting, "attack.targets=random", "attack.eps_ramp=0.5")
    runs = [
        started_process(tmp_path, *setting, "name=one"),
        started_process(
            tmp_path, *setting, "trainer=ddp_cpu", "trainer.accelerator=cpu", "micro_batch_size=3", "name=two"
        ),
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    one, two = (tmp_path / "outputs" / "train" / name for name in ("one", "two"))
    for name in ("last.ckpt", "best.ckpt"):
        states = [read_checkpoint(run / "checkpoints" / name) for run in (one, two)]
        for key, tensor in states[0]["state_dict"].items():
            torch.testing.assert_close(states[1]["state_dict"][key], tensor, atol=2e-5, rtol=0, msg=key)
        for key in ("t", "member_updates"):
            assert states[0]["mixadv"][key] == states[1]["mixadv"][key]
        assert torch.equal(*(state["mixadv"]["attack_generator"] for state in states))


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "half"])
def test_what_is_no_number_of_images(command, value):
    refusal = command(*TINY, f"micro_batch_size={value}").refusal()
    assert f"micro_batch_size={value}" in refusal
    assert ("at least 1" if value in ("0", "-1") else "Integer") in refusal


def test_out_of_memory_names_the_remedy(command, monkeypatch):
    def starved(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PGD, "search", starved)
    refusal = command(*TINY).refusal()
    assert refusal.startswith("out of memory with L=2 and data.batch_size=20: set micro_batch_size")


def test_choices_are_made_once(tmp_path):
    (tmp_path / "config.yaml").touch()
    choices = Choices(tmp_path)
    assert choices.settle("size", lambda: 7) == 7
    assert Choices(tmp_path).settle("size", lambda: 8) == 7
    assert Choices(tmp_path, rank=1).settle("size", lambda: 9) == 7
    assert Choices(tmp_path).settle("other", lambda: None) is None
    assert json.loads((tmp_path / "choices.json").read_text()) == {"size": 7, "other": None}
    (tmp_path / "choices.json").write_text("{")
    with pytest.raises(UserError, match="resume=never"):
        Choices(tmp_path)


def test_choices_of_a_refused_command_are_not_kept(tmp_path):
    choices = Choices(tmp_path)
    assert choices.settle("size", lambda: 7) == 7
    assert choices.settle("size", lambda: 8) == 7
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").touch()
    choices.keep()
    assert Choices(tmp_path).settle("size", lambda: 9) == 7


def test_a_process_waits_for_the_first_one(tmp_path, monkeypatch):
    monkeypatch.setattr("mixadv.runs.choices.PATIENCE", 0.2)
    with pytest.raises(UserError, match="process 1 finds no choice of size"):
        Choices(tmp_path, rank=1).settle("size", lambda: 7)
