"""With trainer.deterministic=true torch refuses, on GPUs, operations that have no deterministic kernel there.

No test has a GPU. So every operation of attacks, trainings and measurements is watched here, and those that the page of
`torch.use_deterministic_algorithms` says it refuses on CUDA are an error. The watch sees backward passes too.
"""

import dataclasses
import os
import traceback
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from builders.data import digits_module
from builders.networks import untrained_members, untrained_mixture
from conftest import QUIET
from mixadv.attacks import PGD, AttackSuite
from mixadv.evaluation import evaluate
from mixadv.lambda_solvers import AcceleratedEntropic, LinearProgram, OracleSubgradient
from mixadv.losses import AT, TRADES
from mixadv.models import MODELS
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.learning_rate import constant
from mixadv.vote import Vote

REFUSED = {
    *("put_", "histc", "kthvalue", "median.dim", "grid_sampler_2d_backward", "_ctc_loss_backward"),
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward"),
    *("avg_pool3d_backward", "max_pool3d_with_indices_backward", "fractional_max_pool2d_backward", "max_unpool2d"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad1d_backward"),
    *("replication_pad2d_backward", "nll_loss2d_forward", "nll_loss2d_backward", "upsample_linear1d_backward"),
    *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
}
# File and function of what is computed on the CPU on every machine: projections of weights, patterns of Square.
ON_CPU = {("simplex.py", "project_simplex"), ("square.py", "half")}


def on_cpu():
    frames = traceback.extract_stack()
    return bool(ON_CPU & {(os.path.basename(frame.filename), frame.name) for frame in frames})


class Watch(TorchDispatchMode):
    """Collects the names of refused operations, those of `ON_CPU` left out."""

    def __init__(self):
        super().__init__()
        self.refused = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = args[0] if args else None
        name = str(function).removeprefix("aten.")
        plain = name.partition(".")[0]
        weighted = plain == "bincount" and {**dict(enumerate(args)), **(kwargs or {})}.get(1) is not None
        summed = plain in ("cumsum", "cumsum_") and given.is_floating_point()
        if (weighted or summed or REFUSED & {name, plain}) and not on_cpu():
            self.refused.add(name)
        return function(*args, **(kwargs or {}))


def short(attack):
    """The attack with few steps or queries."""
    lengths = {"num_steps": 4, "num_queries": 12, "num_samples": 3}
    names = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{key: value for key, value in lengths.items() if key in names})


def test_the_watch_sees_forward_and_backward():
    with Watch() as watch:
        torch.arange(3).cumsum(0)
        torch.bincount(torch.arange(3))
        x = torch.rand(1, 1, 4, 4, requires_grad=True)
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear").sum().backward()
    assert watch.refused == {"upsample_bilinear2d_backward.default"}
    with Watch() as watch:
        torch.rand(3).cumsum(0)
    assert watch.refused == {"cumsum.default"}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_and_measurements_have_deterministic_kernels(norm):
    mixture = untrained_mixture("small_cnn", width=2).eval()
    ball, generator = ThreatModel(norm, 0.1), torch.Generator().manual_seed(0)
    x = torch.rand(9, 1, 8, 8, generator=generator)
    # What a member answers, so that attacks have something to change.
    y = mixture.member_logits(x).argmax(-1)[torch.arange(9) % 3, torch.arange(9)]
    attacks = AttackSuite.from_protocol("strict").attacks | AttackSuite.from_protocol("fast").attacks
    with Watch() as watch:
        for attack in attacks.values():
            given = {"starts": x} if getattr(attack, "warm_starts", False) else {}
            short(attack)(mixture, x, y, ball, generator, **given)
        evaluate(mixture, [(x, y)], {}, ball, vote=Vote(mixture.weights.tolist()))
    assert watch.refused == set()


SOLVERS = {
    "oracle": OracleSubgradient(num_steps=2),
    "entropic": AcceleratedEntropic(num_steps=2, num_samples=2),
    "lp": LinearProgram(num_rounds=2),
}


@pytest.mark.parametrize(("solver", "loss"), [("oracle", AT()), ("entropic", TRADES()), ("lp", AT())], ids=str)
def test_trainings_have_deterministic_kernels(solver, loss):
    module = MixtureTraining(
        untrained_mixture("small_cnn", width=4),
        ThreatModel("linf", 0.1),
        loss=loss,
        attack=PGD(2),
        validation_attack=PGD(2),
        solver=SOLVERS[solver],
        kind="sampled",
        T_theta=2,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        scheduler=constant,
    )
    data = digits_module(batch_size=16, num_train=64, num_val=20, num_test=20, padding=1, flip=True)
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    with Watch() as watch:
        trainer.fit(module, datamodule=data)
    assert module.t > 6
    assert watch.refused == set()


@pytest.mark.parametrize("name", MODELS)
def test_models_have_deterministic_kernels(name):
    small = {"wrn_28_10": {"depth": 10, "widen_factor": 1}}.get(name, {})
    (member,) = untrained_members(1, name, image_shape=(3, 16, 16), **small)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    with Watch() as watch:
        member(x).logsumexp(1).sum().backward()
    assert watch.refused == set()
