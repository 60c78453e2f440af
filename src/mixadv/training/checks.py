"""What a training refuses before it begins."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    Timer,
    WeightAveraging,
)
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.biased import network_of
from mixadv.errors import UserError
from mixadv.lambda_solvers import LambdaSolver, LinearProgram
from mixadv.training.growth import Growth
from mixadv.training.learning_rate import build_scheduler
from mixadv.training.members_phase import MembersPhase
from mixadv.training.replicas import Replicas


def check_optimizer(
    optimizer: Callable[[Iterable[Tensor]], Optimizer], scheduler: Callable[..., Any], members: Sequence[nn.Module]
) -> None:
    """Build both once, for the first member.

    Args:
        optimizer: called with a member's parameters, makes its optimizer.
        scheduler: see `build_scheduler`.
        members: of the mixture.

    Raises:
        ValueError: one of them cannot be built, would learn nothing, or two members have one network.
    """
    try:
        built = optimizer(members[0].parameters())
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {error}") from error
    first: dict[int, int] = {}
    for k, member in enumerate(members):
        network = id(network_of(member))
        if first.setdefault(network, k) != k:
            raise ValueError(f"members {first[network]} and {k} are the same module, or share one: build one for each")
    for group in built.param_groups:
        for name, value in group.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"optimizer: {name}={value} must be finite")
        if not group["lr"] > 0:
            raise ValueError(f"optimizer: lr={group['lr']} would learn nothing: give a positive rate, as lr=0.1")
    try:
        build_scheduler(scheduler, built, 100)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scheduler: {error}") from error


def check_growth(growth: Growth, phase: MembersPhase, solver: LambdaSolver, members: Sequence[nn.Module]) -> None:
    """Refuse what a growing mixture cannot do.

    Raises:
        ValueError: its weights do not come from linear programs, members cannot start as copies, or settings of the
            members' phases would be ignored.
    """
    if not isinstance(solver, LinearProgram):
        raise ValueError(
            f"a mixture that grows is weighed by linear programs, not by {type(solver).__name__}: choose "
            "lambda_solver=held_out or lp (LinearProgram)"
        )
    shapes = [{name: tensor.shape for name, tensor in member.state_dict().items()} for member in members]
    if growth.start == "last" and any(shape != shapes[0] for shape in shapes):
        raise ValueError("schedule.start=last copies members, but these are not alike: use schedule.start=fresh")
    if growth.response == "equilibrium" and len(members) > 1 and (changed := phase.changed()):
        raise ValueError(
            "schedule.response=equilibrium trains later members on points of a solved game, and ignores "
            f"{', '.join(f'attack.{name}' for name in changed)}: leave that out, or use schedule.response=adaptive or "
            "fixed"
        )


def check_trainer(trainer: pl.Trainer, members: Sequence[nn.Module], grows: bool = False) -> None:
    """Refuse what Algorithm 2, or a mixture that `grows`, cannot do under Lightning's Trainer.

    Raises:
        UserError: the message says what works instead.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, Replicas)):
        raise UserError(
            f"{type(strategy).__name__} cannot train a mixture, whose members are updated one at a time: use one "
            "device, or several with strategy=mixadv.training.Replicas()"
        )
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise UserError(f"precision={trainer.precision}: attacks need images in float32; use bf16-mixed")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, (BatchSizeFinder, LearningRateFinder)) for callback in callbacks):
        raise UserError(
            "BatchSizeFinder and LearningRateFinder try batches that the training then leaves out: give numbers; "
            "micro_batch_size serves a batch that memory does not hold in parts"
        )
    limits = [name for name in ("min_epochs", "min_steps") if getattr(trainer, name)]
    limits += ["max_steps"] if trainer.max_steps != -1 and not trainer.fast_dev_run else []  # type: ignore[attr-defined]
    limits += [type(one).__name__ for one in callbacks if isinstance(one, (EarlyStopping, Timer, WeightAveraging))]
    if grows and (limits or not isinstance(strategy, SingleDeviceStrategy)):
        raise UserError(
            "schedule=grow ends with its last stage, or when a member adds nothing, and runs in one process: leave "
            f"out {', '.join(limits) or 'further devices'}"
        )
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise UserError("the learning rate follows the share of the training that is done: set max_epochs")
    for k, member in enumerate(members):
        if not any(p.requires_grad for p in member.parameters()):
            raise UserError(f"member {k} has no parameter that can be trained: leave it out, or unfreeze it")
