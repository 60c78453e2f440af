"""Batches in parts: the same training as in one, what auto chooses, and that a run keeps its choices."""

import copy
import itertools
import json
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from conftest import QUIET, TINY
from mixadv.attacks import PGD
from mixadv.data.digits import Digits
from mixadv.errors import UserError
from mixadv.lambda_solvers import OracleSubgradient
from mixadv.losses import AT, TRADES
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.tasks import build
from mixadv.tasks.choices import Choices
from mixadv.threat_model import ThreatModel
from mixadv.training import MemberOptimizer, MixtureTraining
from mixadv.training.memory import (
    ATTACK_TENSORS,
    WORKING_TENSORS,
    MemoryEstimate,
    attack_memory,
    training_memory,
)
from mixadv.training.shared_attack import parts_of
from test_ddp import assert_same_numbers, begun

WEIGHTS = [0.5, 0.2, 0.3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    data = Digits(batch_size=16, num_train=96, num_val=40, num_test=20, seed=3)
    data.setup()
    return data


class InFloat64(nn.Module):
    """Computes in float64, so that sign() of a gradient does not depend on rounding; notes how many images it saw."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()
        self.most = 0

    def forward(self, x):
        self.most = max(self.most, len(x))
        return self.net(x.double())


def group_norm_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10)
    )


def members(name, wrap=InFloat64, count=3, **settings):
    torch.manual_seed(5)
    shipped = {"num_classes": 10, "image_shape": (1, 8, 8), **settings}
    return [wrap(group_norm_net() if name == "group_norm" else build_member(name, **shipped)) for _ in range(count)]


def trained(nets, data, loss, kind, micro, batches=4):
    module = MixtureTraining(
        Mixture(copy.deepcopy(nets), WEIGHTS[: len(nets)] if len(nets) > 1 else None),
        loss=loss,
        threat_model=ThreatModel("linf", 0.1),
        attack=PGD(num_steps=2, step_size=0.4),
        validation_attack=PGD(num_steps=1, keep="last"),
        solver=OracleSubgradient(num_steps=2),
        kind=kind,
        T_theta=2 if kind == "shared" else 1,
        optimizer=MemberOptimizer(lr=0.05, momentum=0.9, weight_decay=5e-4),
        updates_per_member=4,
        total_batches=batches,
        seed=7,
        micro_batch_size=micro,
    )
    data.batches_in_epoch = lambda epoch: batches
    outputs = []
    watch = pl.Callback()
    watch.on_train_batch_end = lambda trainer, module, output, *_: outputs.append(output)
    trainer = pl.Trainer(
        max_epochs=1,
        **QUIET,
        limit_val_batches=0,
        reload_dataloaders_every_n_epochs=1,
        inference_mode=False,
        callbacks=[watch],
    )
    trainer.fit(module, datamodule=data)
    return module, outputs


@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize("loss", [AT(), TRADES(beta=6.0)], ids=["at", "trades"])
@pytest.mark.parametrize("name", ["small_cnn", "linear", "group_norm"])
def test_parts_give_what_the_whole_batch_gives(digits, name, loss, kind):
    """Parameters, momentum, weights, generators and what is reported, over members phases and a weights phase."""
    nets = members(name)
    whole, said = trained(nets, digits, loss, kind, None)
    assert {output["phase"] for output in said} == {"members", "weights"}
    assert max(net.most for net in whole.mixture.members) == 16
    for micro, largest in ((1, 1), (7, 6), (100, 16)):
        parts, told = trained(nets, digits, loss, kind, micro)
        assert max(net.most for net in parts.mixture.members) == largest
        exact = micro == 100
        for key, tensor in whole.state_dict().items():
            difference = (parts.state_dict()[key].double() - tensor.double()).abs().max()
            # The weights are kept in float32.
            assert difference <= (0 if exact else 1e-6 if key.endswith("weights") else 1e-11), (key, micro)
        for ours, theirs in zip(told, said, strict=True):
            for key in set(theirs) - {"phase"}:
                assert np.asarray(ours[key]) == pytest.approx(np.asarray(theirs[key]), abs=0 if exact else 1e-6)
            assert ours["phase"] == theirs["phase"]
        assert torch.equal(parts.attack_generator.get_state(), whole.attack_generator.get_state())


def test_batch_norm_sees_each_part_alone(digits):
    nets = members("small_resnet", wrap=lambda net: net, count=1, width=2)
    counted = {}
    for micro in (None, 100, 6):
        module, _ = trained(nets, digits, AT(), "shared", micro)
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
    setting = ("schedule=shared", "loss=trades", "lambda_solver.num_steps=4")
    runs = [
        begun(tmp_path, *setting, "trainer=cpu", "name=one"),
        begun(tmp_path, *setting, "trainer=ddp_cpu", "micro_batch_size=3", "name=two"),
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert_same_numbers(tmp_path / "outputs" / "train" / "one", tmp_path / "outputs" / "train" / "two")


# --- the estimate -------------------------------------------------------------------------------------------


def test_what_autograd_keeps_of_a_network_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 10))
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    found = training_memory(net, 3, AT(), (1, 8, 8), 10, CPU)
    # Float32: the image, the output of the sigmoid (the linear layer keeps the same storage), log-probabilities; and
    # the label.
    kept = 4 * (64 + 4 * 64 + 10) + 8
    beside = WORKING_TENSORS * 4 * 256 + ATTACK_TENSORS * 4 * 64
    assert found.per_image == pytest.approx(kept + beside, abs=16)
    parameters = (9 * 4 + 4 + 2560 + 10) * 4
    one = training_memory(net, 1, AT(), (1, 8, 8), 10, CPU)
    # Two more members, each with gradient and momentum.
    assert found.fixed - one.fixed == 2 * 3 * parameters
    twice = training_memory(net, 3, TRADES(), (1, 8, 8), 10, CPU)
    assert 1.8 * kept < twice.per_image - beside < 2.3 * kept
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_an_attack_counts_every_member():
    nets = members("small_cnn", wrap=lambda net: net)
    alone, together = (attack_memory(some, (1, 8, 8), 10, CPU) for some in (nets[:1], nets))
    images = ATTACK_TENSORS * 4 * 64
    assert together.per_image - images == pytest.approx(3 * (alone.per_image - images))


def test_bfloat16_keeps_less():
    (net,) = members("small_cnn", wrap=lambda net: net, count=1)
    full, half = (training_memory(net, 1, AT(), (1, 8, 8), 10, CPU, bf16=bf16) for bf16 in (False, True))
    assert half.per_image < full.per_image


def test_the_largest_part_against_trying_all():
    draws = random.Random(0)
    for _ in range(300):
        batch, share = 64, draws.choice([64, 64, 32, 7])
        estimate = MemoryEstimate(draws.randrange(1000), draws.choice([0.0, 1.5]), draws.choice([1.0, 7.5, 40.0]))
        budget = draws.randrange(3500)
        fitting = [part for part in range(1, share + 1) if estimate.needed(batch, part) <= budget]
        found = estimate.largest_part(batch, budget, share)
        if not fitting:
            assert found is None
            continue
        assert found in fitting
        fewest = -(-share // max(fitting))
        parts = -(-share // found)
        assert fewest <= parts < max(2, 2 * fewest)
        if any(share % count == 0 for count in range(fewest, min(2 * fewest, share + 1))):
            assert share % found == 0
        else:
            assert parts == fewest
    assert MemoryEstimate(10, 1.0, 1.0).largest_part(64, None) == 64


# --- the command --------------------------------------------------------------------------------------------


# On a CPU, in a short run.
AS_IT_COMES = {"precision": "fp32", "compile": False}


def choices_of(cwd, name, task="train"):
    return json.loads((cwd / "outputs" / task / name / "choices.json").read_text())


def free_memory(monkeypatch, count):
    """What the estimates believe to be free, in bytes; building members is not told."""
    from mixadv.tasks import batch_sizes

    monkeypatch.setattr(batch_sizes, "budget", lambda cfg, device: count)


def test_a_batch_that_does_not_fit_is_divided_and_stays_so(command, tmp_path, monkeypatch):
    """model=linear has no batch norm: the divided run ends where the undivided does."""
    whole = command(*TINY, "L=2", "name=whole")
    assert whole.rc == 0, whole.err
    assert "Memory does not hold" not in whole.out
    assert choices_of(tmp_path, "whole") == AS_IT_COMES | {"micro_batch_size": 20}

    (net,) = members("linear", wrap=lambda net: net, count=1)
    estimate = training_memory(net, 2, AT(), (1, 8, 8), 10, CPU)
    free_memory(monkeypatch, estimate.needed(20, 6))
    parts = command(*TINY, "L=2", "name=parts", "trainer.max_epochs=2")
    assert parts.rc == 0, parts.err
    assert "Memory does not hold 20 images at once: batches are served in 4 parts of at most 5" in parts.out
    assert choices_of(tmp_path, "parts") == AS_IT_COMES | {"micro_batch_size": 5}
    ends = [json.loads((tmp_path / "outputs/train" / name / "results.json").read_text()) for name in ("whole", "parts")]
    assert ends[1]["weights"] == pytest.approx(ends[0]["weights"], abs=1e-4)
    assert ends[1]["clean"]["expected_accuracy"] == pytest.approx(ends[0]["clean"]["expected_accuracy"], abs=0.02)


def test_not_one_image_fits(command, monkeypatch, tmp_path):
    free_memory(monkeypatch, 1000)
    refusal = command(*TINY, "name=short").refusal()
    assert "one image of a batch of 20 needs" in refusal
    assert "choose a smaller data.batch_size" in refusal
    assert not (tmp_path / "outputs" / "train" / "short").exists()


def test_the_batch_size_that_fits(command, monkeypatch, tmp_path):
    (net,) = members("linear", wrap=lambda net: net, count=1)
    estimate = training_memory(net, 2, AT(), (1, 8, 8), 10, CPU)
    # 200 training images; 30 fit, so that batches of 32 are divided.
    cases = {"auto": (10**12, 128), "unknown": (None, 128), "tight": (estimate.needed(30), 32)}
    for name, (free, size) in cases.items():
        free_memory(monkeypatch, free)
        done = command(*TINY, "data.batch_size=auto", "trainer.max_epochs=1", f"name={name}")
        assert done.rc == 0, done.err
        assert f"data.batch_size=auto: batches of {size} images" in done.out
        assert choices_of(tmp_path, name)["data.batch_size"] == size
        recipe = json.loads((tmp_path / "outputs/train" / name / "mixture" / "config.json").read_text())
        assert recipe["data"]["batch_size"] == size
    free_memory(monkeypatch, 10**12)
    measured = command(
        *(word for word in TINY if not word.startswith(("data", "model", "schedule", "lambda"))),
        *("task=evaluate", "mixture=outputs/train/auto", "data.eval_batch_size=auto", "name=measured"),
    )
    assert measured.rc == 0, measured.err
    assert "attacks on 512 images at once" in measured.out
    assert choices_of(tmp_path, "measured", "evaluate") == {"data.eval_batch_size": 512, "compile": False}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "half"])
def test_what_is_no_number_of_images(command, value):
    refusal = command(*TINY, f"micro_batch_size={value}").refusal()
    assert "micro_batch_size=" in refusal
    assert "whole number of at least 1" in refusal


def test_out_of_memory_names_the_remedy(command, monkeypatch):
    def starved(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PGD, "_climb", starved)
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
    monkeypatch.setattr("mixadv.tasks.choices.PATIENCE", 0.2)
    with pytest.raises(UserError, match="process 1 finds no choice of size"):
        Choices(tmp_path, rank=1).settle("size", lambda: 7)


def test_half_a_machine_for_each_of_two_processes(compose, monkeypatch):
    from mixadv.tasks.batch_sizes import budget

    monkeypatch.setattr(build, "available_memory", lambda device: 1000)
    assert budget(compose("trainer=cpu"), CPU) == 800
    assert budget(compose("trainer=ddp_cpu"), CPU) == 400
