"""The zero-sum game between a mixture's weights and an attacker, on tensors alone.

The mixture chooses lam on the simplex over L members. The attacker chooses for each example i one perturbation j (or
a distribution over them) and receives the expected loss. The risk of lam and the value of the game are

    R(lam) = sum_i mass_i max_j sum_k lam_k l_k(i, j),        V = min over lam of R(lam),

(Meunier et al., "Mixed Nash Equilibria in the Adversarial Examples Game", ICML 2021). The maximum is outside the
expectation over members, because the attacker does not see which member is drawn.
"""

from mixadv.game.finite import FiniteGame
from mixadv.game.protocol import BestResponse, Equilibrium, Game

__all__ = ["BestResponse", "Equilibrium", "FiniteGame", "Game"]
