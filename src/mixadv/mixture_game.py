"""The adversarial examples game of a mixture on images: the best response is an attack."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from mixadv.attacks.search import Attack, check_points
from mixadv.correctness import as_labels
from mixadv.game import BestResponse, FiniteGame
from mixadv.losses import RobustLoss, ZeroOne
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel


class AttackedBatch(NamedTuple):
    """Images x [R, C, H, W] of an earlier attack, its points x_adv, and labels y [R]."""

    x: Tensor
    x_adv: Tensor
    y: Tensor


class MixtureGame:
    """Weights against an attacker, on one set of images, members fixed (the inner game of Algorithm 2).

    The mixture chooses `lam` in the simplex, the attacker one x'_i in the ball of every example; the payoff is
    ``sum_i mass_i sum_k lam_k l_k(x'_i, y_i)`` with l_k the outer loss of member k, members in eval mode.

    The game keeps every point that the attacker has played, and begins with x itself, so later responses are never
    weaker. The points are real, so the value of the finite game `known()` is a certain lower bound of the value V on
    these images. The best response is only as good as the attacks, so the value of given weights is a lower estimate of
    their risk R(lam), and no upper bound.

    Args:
        mixture: the members; its weights do not change.
        x: images [B, C, H, W]; y: labels [B].
        threat_model: the ball.
        attacks: the approximate best-response oracle: every response runs all of them.
        loss: the robust loss; its outer part is the payoff.
        generator: source of the attacks' random starts and of `pool`'s uniform points, on x's device.
        batch_size: images per call of an attack or a member; None takes all at once.
        recent: batches that were attacked earlier, B' further examples. Their payoffs are the losses of the current
            members at x and at x_adv; they are not attacked again.
        masses: [B], the probabilities of the examples, which sum to 1; None means 1/N each. Not together with `recent`.
        on_attack: called with the number of images after each attacked batch.

    Raises:
        ValueError: masses together with `recent`.
        RuntimeError: in a response, if an attack left ball or box: its points would prove nothing.
    """

    exact = False

    def __init__(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        attacks: Sequence[Attack],
        loss: RobustLoss,
        generator: torch.Generator | None = None,
        *,
        batch_size: int | None = None,
        recent: Sequence[AttackedBatch] = (),
        masses: Tensor | None = None,
        on_attack: Callable[[int], None] | None = None,
    ) -> None:
        self.mixture, self.x, self.y = mixture, x, as_labels(y, len(x))
        self.num_members = mixture.num_members
        self.threat_model, self.attacks, self.loss = threat_model, tuple(attacks), loss
        self.generator, self.on_attack = generator, on_attack
        self._batch_size = batch_size or max(1, len(x))
        self._clean_logits: Tensor | None = None
        self._moves: list[Tensor] = [self.member_losses(x).T.cpu()]
        self._recent = [self._payoffs_of(batch) for batch in recent]
        if masses is not None and self._recent:
            raise ValueError("masses are those of the batch alone: leave them out, or give no recent batches")
        self.masses = None if masses is None else masses.cpu()

    def member_losses(self, x_adv: Tensor) -> Tensor:
        """Losses l_k(x', y) of every member at `x_adv` [B, ...] -> float64 [L, B]."""
        with self._attack_mode(), torch.no_grad():
            if self.loss.needs_clean and self._clean_logits is None:
                self._clean_logits = self._logits(self.x)
            return self.loss.outer(self._logits(x_adv), self._clean_logits, self.y).double()

    def _attack_mode(self) -> AbstractContextManager[None]:
        # 0/1 losses are reported, so they need the reference precision; losses for training may use the fast one.
        return self.mixture.attack_mode(plain=isinstance(self.loss, ZeroOne))

    def _logits(self, x: Tensor) -> Tensor:
        return torch.cat([self.mixture.member_logits(part) for part in x.split(self._batch_size)], dim=1)

    def _payoffs_of(self, batch: AttackedBatch) -> Tensor:
        """The losses of all members at x and at x_adv, [R, 2, L]."""
        with self._attack_mode(), torch.no_grad():
            clean, attacked = self._logits(batch.x), self._logits(batch.x_adv)
            losses = [self.loss.outer(logits, clean, batch.y).double() for logits in (clean, attacked)]
        return torch.stack(losses, dim=2).permute(1, 2, 0).cpu()

    def respond(self, lam: Tensor) -> list[Tensor]:
        """Attack the mixture with weights `lam` [L]; returns the perturbed images [B, ...] of each attack."""
        with self.mixture.using_weights(lam):
            return [self._attacked(attack, self.mixture) for attack in self.attacks]

    def _attacked(self, attack: Attack, mixture: Mixture) -> Tensor:
        found = []
        for first in range(0, max(1, len(self.x)), self._batch_size):
            rows = slice(first, first + self._batch_size)
            x, y, ball = self.x[rows], self.y[rows], self.threat_model.rows(rows)
            x_adv = attack(mixture, x, y, ball, self.generator)
            check_points(type(attack).__name__, x_adv, x, ball)
            found.append(x_adv)
            if self.on_attack is not None:
                self.on_attack(len(x))
        return torch.cat(found)

    def _play(self, points: Sequence[Tensor]) -> None:
        self._moves += [self.member_losses(point).T.cpu() for point in points]

    def known(self) -> FiniteGame:
        """The finite game on x and all points that the attacker has played so far, losses [B + B', m, L]."""
        here = torch.stack(self._moves, dim=1)
        if not self._recent:
            return FiniteGame(here, masses=self.masses)
        before = torch.cat(self._recent)
        width = max(here.shape[1], before.shape[1])
        losses = torch.zeros(len(here) + len(before), width, self.num_members, dtype=here.dtype)
        mask = torch.zeros(losses.shape[:2], dtype=torch.bool)
        for rows, part in ((slice(len(here)), here), (slice(len(here), None), before)):
            losses[rows, : part.shape[1]] = part
            mask[rows, : part.shape[1]] = True
        return FiniteGame(losses, mask)

    def best_response(self, lam: Tensor) -> BestResponse:
        """Approximate best response to `lam`: for each example the worst point of these attacks and all before."""
        self._play(self.respond(lam))
        response = self.known().best_response(lam.cpu().double())
        # No `choice`: the indices refer to points found so far and mean nothing to callers.
        return BestResponse(response.gradient, response.value, response.max_loss, choice=None)

    def pool(
        self,
        lam: Tensor,
        num_samples: int,
        include_attack_points: bool,
        generator: torch.Generator | None = None,
    ) -> FiniteGame:
        """A finite game on `num_samples` uniform points of each ball, alone or with what attacks find.

        With `include_attack_points` the attacker also plays its responses to `lam` and to every member alone, and the
        pool is `known()` after that: x and all points so far. Without the attacks on single members a solver could put
        all weight on one member although the pool has no attack on it. Without `include_attack_points` the pool holds
        the uniform points and nothing else, not even x.
        """
        generator = generator if generator is not None else self.generator
        drawn = [self.threat_model.sample(self.x, generator) for _ in range(num_samples)]
        self._play(drawn)
        if not include_attack_points:
            return FiniteGame(torch.stack(self._moves[len(self._moves) - len(drawn) :], dim=1), masses=self.masses)
        self._play(self.respond(lam))
        for member in self.mixture.members:
            # Attacking one member costs one network; a mixture with all weight on it would cost L.
            single = Mixture([member])
            self._play([self._attacked(attack, single) for attack in self.attacks])
        return self.known()
