"""The zero-sum game between a mixture's weights and an attacker, on tensors alone.

The mixture chooses lam on the simplex over L members. The attacker chooses for each example i one perturbation j (or
a distribution over them) and receives the expected loss. The risk of lam and the value of the game are

    R(lam) = sum_i mass_i max_j sum_k lam_k l_k(i, j),        V = min over lam of R(lam),

(Meunier et al., "Mixed Nash Equilibria in the Adversarial Examples Game", ICML 2021). The maximum is outside the
expectation over members, because the attacker does not see which member is drawn.

`conflicts` and `ceiling` are about the same game over all classifiers, on given points.
"""

from typing import TYPE_CHECKING, Any

from mixadv.game.finite import FiniteGame
from mixadv.game.protocol import BestResponse, Equilibrium, Game

if TYPE_CHECKING:
    from mixadv.game.conflict_graph import Conflicts, conflicts
    from mixadv.game.optima import Ceiling, ceiling, over_radii

__all__ = [
    "BestResponse",
    "Ceiling",
    "Conflicts",
    "Equilibrium",
    "FiniteGame",
    "Game",
    "ceiling",
    "conflicts",
    "over_radii",
]


def __getattr__(name: str) -> Any:
    """Import what needs scipy when it is first used, because most commands do not."""
    if name in ("Conflicts", "conflicts"):
        from mixadv.game import conflict_graph

        return getattr(conflict_graph, name)
    if name in ("Ceiling", "ceiling", "over_radii"):
        from mixadv.game import optima

        return getattr(optima, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
