"""The interface between solvers and games: what a solver asks of a game, what it gets, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Generator, Tensor

if TYPE_CHECKING:
    from mixadv.game.finite import FiniteGame


@dataclass(frozen=True, eq=False)
class BestResponse:
    """The attacker's answer to the weights lam.

    Attributes:
        gradient: [L] float64, g_k = sum_i mass_i l_k(i, response_i): a subgradient of R at lam if the response is an
            exact maximum.
        value: sum_k lam_k g_k: R(lam) if the response is exact, else a lower estimate of it.
        max_loss: a bound on |l_k(i, j)| over the responses, in a finite game over all allowed entries.
        choice: [N] long, the perturbation chosen for each example of a finite game; else None.
    """

    gradient: Tensor
    value: float
    max_loss: float
    choice: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """The result of a solver.

    Attributes:
        weights: [L] float64 on the CPU, the mixture's strategy lam: the iterate that the solver selects, by default
            its best.
        value: the risk R(weights), without regularisation, on the game or on the pool drawn from it.
        gap: value - lower_bound >= 0, a bound on value - V; None if the game's responses are not exact.
        attack: [N, m], the attacker's strategy Q with sum_j Q[i, j] = mass_i; None if there is no fixed list of
            perturbations.
        status: "completed" (all steps ran), "converged" (the tolerance was reached), "stopped" (the steps did not
            suffice for the tolerance), "stalled" (rounding errors prevent further progress) or "fixed".
        history: one entry per step under each key.
        num_attacks: number of best responses, including those that a game computed for its pool.
        average_weights: [L], the mean of the iterates; None unless the method has a guarantee for it.
        lower_bound: the least expected loss of a member against one fixed distribution of perturbations, so <= V.
    """

    weights: Tensor
    value: float
    gap: float | None
    attack: Tensor | None
    status: str
    history: dict[str, list[Any]]
    num_attacks: int
    average_weights: Tensor | None
    lower_bound: float | None


@runtime_checkable
class Game(Protocol):
    """The interface through which a solver plays: a `FiniteGame`, or attacks on a mixture of networks."""

    @property
    def num_members(self) -> int:
        """L."""
        ...

    @property
    def exact(self) -> bool:
        """Whether `best_response` is an exact maximum; False for attacks."""
        ...

    def best_response(self, lam: Tensor) -> BestResponse:
        """The attacker's answer to lam [L] (float64, on the CPU)."""
        ...

    def pool(
        self, lam: Tensor, num_samples: int, include_attack_points: bool, generator: Generator | None = None
    ) -> FiniteGame:
        """A finite game on `num_samples` random perturbations per example and, on request, on everything known.

        With `include_attack_points` it is `known()` after L + 1 attacks; else it holds the random perturbations alone.
        """
        ...

    def known(self) -> FiniteGame:
        """The game restricted to the moves that the attacker has made so far (a finite game: itself)."""
        ...
