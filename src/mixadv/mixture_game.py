"""The adversarial examples game played by a mixture on a batch: the best response is an attack."""

import torch
from torch import Tensor

from mixadv.attacks.pgd import PGD
from mixadv.game import BestResponse, FiniteGame
from mixadv.losses import RobustLoss
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel


class MixtureGame:
    """Weights against an attacker, on one batch, members fixed (the inner game of Algorithm 2).

    The classifier chooses `lam` in the simplex, the attacker one x'_i in the ball of every example; the payoff is
    ``(1/B) sum_i sum_k lam_k l_k(x'_i, y_i)`` with l_k the outer loss of member k, members in evaluation mode.
    The best response is as good as the attack, so values are lower estimates of the risk R(lam). The loss of any
    point found is real, so lower bounds that solvers derive from such points are certain for the batch.

    Every point that the attacker plays stays known for the life of the game, so later responses are never weaker.

    Args:
        mixture: the members; its weights are left as they are.
        x: images [B, C, H, W]; y: labels [B].
        threat_model: the ball.
        attack: the approximate best-response oracle.
        loss: the robust loss whose outer part is the payoff.
        generator: source of the attack's random starts and of `pool`'s uniform points, on x's device.
    """

    exact = False

    def __init__(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        attack: PGD,
        loss: RobustLoss,
        generator: torch.Generator | None = None,
    ) -> None:
        self.mixture, self.x, self.y = mixture, x, y
        self.threat_model, self.attack, self.loss = threat_model, attack, loss
        self.generator = generator
        self._clean_logits: Tensor | None = None
        self._moves: list[Tensor] = []

    @property
    def num_members(self) -> int:
        """L."""
        return self.mixture.num_members

    def member_losses(self, x_adv: Tensor) -> Tensor:
        """Losses l_k(x', y) of every member at `x_adv` [B, ...] -> float64 [L, B]."""
        with self.mixture.attack_mode(), torch.no_grad():
            if self.loss.needs_clean and self._clean_logits is None:
                self._clean_logits = self.mixture.member_logits(self.x)
            losses = self.loss.outer(self.mixture.member_logits(x_adv), self._clean_logits, self.y)
        return losses.double()

    def respond(self, lam: Tensor) -> Tensor:
        """Attack the mixture with weights `lam` [L]; the perturbed batch [B, ...]."""
        with self.mixture.using_weights(lam):
            return self.attack(self.mixture, self.x, self.y, self.threat_model, self.generator)

    def known(self) -> FiniteGame:
        """The finite game [B, m, L] on all points that the attacker has played so far.

        Raises:
            ValueError: none yet.
        """
        if not self._moves:
            raise ValueError("the attacker has not moved yet: ask for a best response first")
        return FiniteGame(torch.stack(self._moves, dim=1))

    def best_response(self, lam: Tensor) -> BestResponse:
        """Approximate best response to `lam`: for each example the worst of a new attack's point and all before it."""
        self._moves.append(self.member_losses(self.respond(lam)).T.cpu())
        response = self.known().best_response(lam.cpu().double())
        # Points, not a fixed list of perturbations: their numbers mean nothing outside.
        return BestResponse(response.gradient, response.value, response.max_loss, choice=None)

    def pool(
        self,
        lam: Tensor,
        num_samples: int,
        include_attack_points: bool,
        generator: torch.Generator | None = None,
    ) -> FiniteGame:
        """A finite game [B, m, L] on sampled moves of the attacker.

        The moves are x itself, `num_samples` uniform points of the ball and, with `include_attack_points`, the
        responses to `lam` and to every pure member: without the latter the weights could run to a vertex whose
        attacks the pool has never seen.
        """
        generator = generator if generator is not None else self.generator
        points = [self.x] + [self.threat_model.sample(self.x, generator) for _ in range(num_samples)]
        if include_attack_points:
            # A member alone costs one network, a mixture with all its weight on it L.
            singles = [Mixture([member]) for member in self.mixture.members]
            points.append(self.respond(lam))
            points += [self.attack(single, self.x, self.y, self.threat_model, self.generator) for single in singles]
        losses = torch.stack([self.member_losses(point) for point in points], dim=1)
        return FiniteGame(losses.permute(2, 1, 0).cpu())
