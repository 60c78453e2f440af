"""Learning rates as functions of the share of its training that a member has done.

Each function takes the optimizer of one member and the number of updates that this member will make, and returns a
scheduler that is stepped once after every update of the member. Beyond that number, where a sampled schedule may lead a
member, the rate stays at its last value.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

# What schedulers call the number of their steps: ours, OneCycleLR and CosineAnnealingLR.
LENGTHS = ("updates", "total_steps", "T_max")


def _by_share(optimizer: Optimizer, updates: int, factor: Callable[[float], float]) -> LambdaLR:
    """Multiply the base rate by factor(s) for update number `done`, s = (done + 1/2) / updates."""
    return LambdaLR(optimizer, lambda done: factor((min(done, updates - 1) + 0.5) / updates))


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be a share of the training in [0, 1)")


def constant(optimizer: Optimizer, updates: int) -> LRScheduler:
    """The base rate, always."""
    return _by_share(optimizer, updates, lambda share: 1.0)


def piecewise(
    optimizer: Optimizer, updates: int, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> LRScheduler:
    """Multiply the rate by `gamma` at each milestone.

    Args:
        milestones: shares of the member's updates, in (0, 1). gamma: factor, at least 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    if any(not 0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"milestones={list(milestones)} must be shares of the training in (0, 1)")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma} must be at least 0 and finite")
    return LambdaLR(
        optimizer, lambda done: gamma ** sum(min(done, updates - 1) / updates >= milestone for milestone in milestones)
    )


def cosine(optimizer: Optimizer, updates: int, warmup: float = 0.0) -> LRScheduler:
    """Rise linearly from 0 for the share `warmup` of the updates, then fall as (1 + cos(pi s)) / 2 to 0.

    Args:
        warmup: share of the updates, in [0, 1).

    Raises:
        ValueError: it is out of its range.
    """
    _share("warmup", warmup)
    rising = warmup * updates

    def factor(done: int) -> float:
        done = min(done, updates - 1)
        if done < rising:
            return (done + 0.5) / rising
        return (1 + math.cos(math.pi * (done - rising) / (updates - rising))) / 2

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: Optimizer, updates: int, warmup: float = 0.25) -> LRScheduler:
    """Rise linearly from 0 for the share `warmup` of the updates, then fall linearly to 0; the first update moves.

    Args:
        warmup: share of the updates, in [0, 1).

    Raises:
        ValueError: it is out of its range.
    """
    _share("warmup", warmup)
    return _by_share(optimizer, updates, lambda share: share / warmup if share < warmup else (1 - share) / (1 - warmup))


def build_scheduler(make: Callable[..., Any], optimizer: Optimizer, updates: int) -> LRScheduler:
    """The scheduler that `make(optimizer)` returns; the length of the training is passed under the name it takes.

    Args:
        make: one of the functions above, or a class of ``torch.optim.lr_scheduler``, possibly with arguments bound by
            ``functools.partial``. A parameter named in `LENGTHS` that has no value yet gets `updates`.
        updates: updates that the member will make.

    Raises:
        ValueError: the arguments do not fit, or the scheduler waits for a validation metric.
    """
    bound = set(getattr(make, "keywords", {}))
    taken = inspect.signature(getattr(make, "func", make)).parameters
    length = {name: updates for name in LENGTHS if name in taken and name not in bound}
    scheduler = make(optimizer, **length)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau waits for a metric; members step their schedules after every update")
    if not isinstance(scheduler, LRScheduler):
        raise ValueError(f"it returned a {type(scheduler).__name__}, not a scheduler of torch.optim.lr_scheduler")
    return scheduler
