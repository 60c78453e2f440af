"""The base class and the driver loop of the solvers: start, checks, history and certificate.

A solver is a generator of `Iterate`s; `drive` resumes it only after an iterate has passed the checks, so that a
solver never computes with a value that is not finite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mixadv.errors import UserError
from mixadv.game import BestResponse, Equilibrium, FiniteGame, Game
from mixadv.simplex import is_distribution, project_simplex, uniform


class SolverError(UserError, RuntimeError):
    """A solver cannot continue: it ran out of time, or HiGHS failed. The message names the remedy."""


class LambdaSolver(ABC):
    """min over lam on the simplex of R(lam), for any `Game`.

    Attributes:
        adapts: whether the weights depend on the game; if False a caller may skip the call.
        recent_batches: how many recently attacked batches Algorithm 2 adds to the game of a weights phase.
    """

    adapts: ClassVar[bool] = True
    recent_batches: int = 0

    @property
    def num_examples(self) -> int | None:
        """The number N of examples that the settings are made for; None if they fit every game."""
        return None

    def require_counts(self, **least: int) -> None:
        """Check settings that are counts, each with its least value.

        Raises:
            ValueError: one is no integer, or smaller.
        """
        for name, bound in least.items():
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < bound:
                raise ValueError(f"{name} must be an integer >= {bound}, got {number}")

    @abstractmethod
    def attack_cost(self) -> float:
        """The cost of one call of `solve` on a mixture, in attacks on the whole mixture."""

    @abstractmethod
    def solve(self, game: Game, lam0: Tensor | None = None, generator: torch.Generator | None = None) -> Equilibrium:
        """Solve the game.

        Args:
            game: the game.
            lam0: [L], the weights to start from; None starts from 1/L.
            generator: the source of all randomness of the solver.

        Raises:
            ValueError: lam0 is not a distribution over the members; the game returned a value, gradient or bound that
                is not finite (the message names the step); or its `exact` responses contradict weak duality.
        """


@dataclass(frozen=True, eq=False)
class Iterate:
    """One step of a solver: weights [L], their value without regularisation, its gradient [L], numbers to record."""

    weights: Tensor
    value: float
    gradient: Tensor
    record: dict[str, float] = field(default_factory=dict)
    converged: bool = False


@dataclass(frozen=True, eq=False)
class Trace:
    """The result of the loop: the best iterate, means over all iterates, the history, and the status."""

    weights: Tensor
    value: float
    average_weights: Tensor
    average_gradient: Tensor
    history: dict[str, list[Any]]
    status: str
    num_steps: int


def start(game: Game, lam0: Tensor | None) -> Tensor:
    """lam0 in float64 on the CPU, projected onto the simplex to remove its rounding error, or the uniform weights.

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
    """The game's best response, with its gradient in the dtype and on the device of lam.

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


def draw_pool(
    game: Game, lam: Tensor, num_samples: int, include_attack_points: bool, generator: Generator | None
) -> FiniteGame:
    """`game.pool` with these arguments.

    Raises:
        ValueError: the pool has other members than the game.
    """
    pool = game.pool(lam, num_samples, include_attack_points, generator)
    if pool.num_members != game.num_members:
        raise ValueError(f"the game has {game.num_members} members, but its pool has {pool.num_members}")
    return pool


def require_selection(select: str, known: Sequence[str]) -> None:
    """Check the setting `select`.

    Raises:
        ValueError: it is none of the selections `known`.
    """
    if select not in known:
        raise ValueError(f"select must be one of {', '.join(known)}, got {select!r}")


def best_of(game: Game, candidates: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The weights of least value among `candidates` (the first on ties), and that value."""
    values = [respond(game, lam).value for lam in candidates]
    best = min(range(len(values)), key=values.__getitem__)
    return candidates[best], values[best]


def drive(iterates: Iterable[Iterate]) -> Trace:
    """Run a solver to its end or to its first converged iterate.

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
    # The mean of points of the simplex leaves it by rounding errors, which the projection removes.
    average = project_simplex(weights_sum / steps)
    return Trace(best.weights, best.value, average, gradient_sum / steps, history, status, steps)


def certified_gap(game: Game, value: float, lower_bound: float) -> float | None:
    """value - lower_bound if the game's responses are exact, else None (the true value may be higher).

    Raises:
        ValueError: the gap is negative beyond rounding, so the responses are not exact.
    """
    if not game.exact:
        return None
    gap = value - lower_bound
    # A value of 0 may be a sum of losses that cancel; its rounding error is that of the losses.
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
