"""What the solvers share: the start, the loop with its checks and its record, and the certificate.

A solver is a generator of `Iterate`s; `drive` resumes it only after an iterate has passed the checks, so that
a solver never computes on a value that is not finite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixadv.errors import UserError
from mixadv.game import BestResponse, Equilibrium, FiniteGame, Game
from mixadv.simplex import is_distribution, project_simplex, uniform


class SolverError(UserError, RuntimeError):
    """A solver cannot go on: out of time, or the library below it failed; the message names the remedy."""


class LambdaSolver(ABC):
    """min over lam on the simplex of R(lam), for any `Game`.

    Attributes:
        adapts: whether the weights depend on the game; False lets a caller skip the call.
        recent_batches: how many recently attacked batches Algorithm 2 lets join the game of a weights phase.
    """

    adapts: ClassVar[bool] = True
    recent_batches: int = 0

    @abstractmethod
    def attack_cost(self) -> float:
        """What one call of `solve` costs on a mixture, in attacks on the whole mixture."""

    @abstractmethod
    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """Plays the game.

        Args:
            game: the game.
            lam0: [L], the weights to start from; None starts from 1/L.
            generator: the source of all randomness of the solver.

        Raises:
            ValueError: lam0 is not a distribution over the members, or the game gave a value, gradient or
                bound that is not finite (the message names the step), or claims exact responses that
                contradict weak duality.
        """


@dataclass(frozen=True, eq=False)
class Iterate:
    """One step of a solver: weights [L], their un-regularised value, the gradient there [L], numbers to
    record.
    """

    weights: Tensor
    value: float
    gradient: Tensor
    record: dict[str, float] = field(default_factory=dict)
    converged: bool = False


@dataclass(frozen=True, eq=False)
class Trace:
    """What the loop saw: the best iterate, means over all iterates, the record, and how it ended."""

    weights: Tensor
    value: float
    average_weights: Tensor
    average_gradient: Tensor
    history: dict[str, list[Any]]
    status: str
    num_steps: int


def start(game: Game, lam0: Tensor | None) -> Tensor:
    """lam0 in float64 on the CPU with its rounding error projected away, or the uniform weights.

    Raises:
        ValueError: lam0 has another length than the game has members, or is not a distribution.
    """
    if lam0 is None:
        return uniform(game.num_members)
    lam = torch.as_tensor(lam0, dtype=torch.float64, device="cpu").detach()
    if lam.shape != (game.num_members,):
        raise ValueError(f"lam0 must be [{game.num_members}], one weight per member, got shape {list(lam.shape)}")
    if not is_distribution(lam):
        raise ValueError(f"lam0 must be non-negative and sum to 1, got {lam.tolist()}: see project_simplex")
    return project_simplex(lam)


def respond(game: Game, lam: Tensor) -> BestResponse:
    """The game's best response with its gradient in float64 beside lam.

    Raises:
        ValueError: the gradient does not have one entry per member.
    """
    response = game.best_response(lam)
    if response.gradient.shape != lam.shape:
        raise ValueError(
            f"the game's best response has a gradient of shape {list(response.gradient.shape)} "
            f"for {len(lam)} members: it must be [{len(lam)}]"
        )
    gradient = response.gradient.detach().to(lam)
    return BestResponse(gradient, float(response.value), float(response.max_loss), response.choice)


def drive(iterates: Iterable[Iterate]) -> Trace:
    """Runs a solver to its end or to its first converged iterate.

    Raises:
        ValueError: weights, value, gradient or a recorded number of some step are not finite.
    """
    history: dict[str, list[Any]] = {"value": [], "best_value": [], "weights": []}
    best: Iterate | None = None
    weights_sum = gradient_sum = torch.zeros(())
    steps, status = 0, "completed"
    for step, iterate in enumerate(iterates):
        _check_finite(step, iterate)
        if best is None or iterate.value < best.value:
            best = iterate
        weights_sum = weights_sum + iterate.weights
        gradient_sum = gradient_sum + iterate.gradient
        history["value"].append(iterate.value)
        history["best_value"].append(best.value)
        history["weights"].append(iterate.weights.tolist())
        for name, number in iterate.record.items():
            history.setdefault(name, []).append(number)
        steps += 1
        if iterate.converged:
            status = "converged"
            break
    if best is None:
        raise ValueError("a solver needs at least one step")
    # The mean of points of the simplex is one of them up to rounding, which the projection removes.
    average = project_simplex(weights_sum / steps)
    return Trace(best.weights, best.value, average, gradient_sum / steps, history, status, steps)


def certified_gap(game: Game, value: float, lower_bound: float) -> float | None:
    """value - lower_bound where the game's responses are exact, else None (the true value may be higher).

    Raises:
        ValueError: the gap is negative beyond rounding, so that the game's claim to be exact is false.
    """
    if not game.exact:
        return None
    gap = value - lower_bound
    # A value of 0 is a sum of losses that cancel: its rounding is theirs.
    scale = game.max_loss if isinstance(game, FiniteGame) else 0.0
    if gap < -1e-9 * max(abs(value), abs(lower_bound)) - 1e-12 * scale:
        raise ValueError(
            f"the value {value} is below the lower bound {lower_bound}, which contradicts weak duality: "
            "the game's best responses are not maxima, so its `exact` must be False"
        )
    return max(gap, 0.0)


def _check_finite(step: int, iterate: Iterate) -> None:
    numbers = {"value": iterate.value, **iterate.record}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"step {step}: the {name} is {number}; look for NaN or overflow in the members' losses")
    for name, vector in (("gradient", iterate.gradient), ("weights", iterate.weights)):
        wrong = (~torch.isfinite(vector)).nonzero()
        if len(wrong):
            k = int(wrong[0])
            raise ValueError(
                f"step {step}: the {name} of member {k} is {vector[k].item()}; "
                "look for NaN or overflow in that member's losses"
            )
