"""The attack on the vote of a mixture's members. The vote is a counterpart of the mixture in every evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixadv.attacks.boundaries import Boundary, has_gradient, nearest_boundary
from mixadv.attacks.subsets import LAST_STEP
from mixadv.losses import at_least_float32
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example
from mixadv.vote import Vote


@dataclass(frozen=True)
class _VoteGame:
    """R examples x [R, ...] with labels y [R], each with the wrong class `target` [R] to which the vote is to turn.

    turnable: the members that have a gradient.
    """

    mixture: Mixture
    vote: Vote
    turnable: list[int]
    x: Tensor
    y: Tensor
    target: Tensor
    threat_model: ThreatModel

    def rows(self, rows: Tensor) -> _VoteGame:
        """The examples `rows`."""
        return replace(self, x=self.x[rows], y=self.y[rows], target=self.target[rows])

    def boundaries(self, points: Tensor) -> list[Boundary]:
        """Of every member, the boundary between label and target."""
        return [
            nearest_boundary(member, points, self.y, self.threat_model, rival=self.target)
            if k in self.turnable
            else _fixed(member, points, self.target)
            for k, member in enumerate(self.mixture.members)
        ]


@dataclass(frozen=True)
class VoteAttack:
    """Turns the vote of the members (`mixadv.vote.Vote`), as cheaply as their linearised boundaries allow.

    A vote falls when enough members answer with one wrong class. For a class c, each step takes the members in the
    order of their linearised distances to the boundary between label and c, until their weight suffices to turn the
    vote (`Vote.to_turn`). Those not yet beyond it by kappa eps pull together, as in `SubsetAttack`.

    It is called as the attacks of `mixadv.attacks` are, but it does not attack the randomized classifier: it returns,
    for each example, the first point found at which the vote is wrong, and where there is none the last point tried.

    threshold: of the vote, for two classes; None: the most votes win.
    num_steps: gradient steps for each class and start; the step length falls from eps to 0.02 eps.
    targets: the number of wrong classes c, the most probable ones of the members' average at x first; C - 1 if there
        are fewer. All are tried from `starts` (or from x).
    restarts: further starts for each class, at random points of the ball, with the members in a random order.
    kappa: the depth at which a member stops pulling, relative to eps.

    Members without gradient do not pull, but have their vote; if no member has a gradient, the points to start from are
    returned.
    """

    warm_starts: ClassVar[bool] = True

    threshold: float | None = None
    num_steps: int = 20
    targets: int = 3
    restarts: int = 1
    kappa: float = 0.01

    def __call__(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Perturbed images [B, ...]; `starts`: points of the ball, [B, ...]."""
        x = x.detach()
        if threat_model.eps == 0:
            return x.clone()
        mixture = mixture.support()
        with mixture.attack_mode():
            return self._search(mixture, x, y, threat_model, generator, starts)

    def _search(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        starts: Tensor | None,
    ) -> Tensor:
        found = (x if starts is None else starts).clone()
        turnable = [k for k in range(mixture.num_members) if has_gradient(mixture.members[k], x)]
        if not turnable:
            return found
        vote = Vote(tuple(mixture.weights.tolist()), self.threshold)
        with torch.no_grad():
            wrong = mixture(x).scatter(1, y[:, None], float("-inf"))
        classes = wrong.topk(min(self.targets, wrong.shape[1] - 1), dim=1).indices
        standing = torch.ones_like(y, dtype=torch.bool)
        for restart in range(1 + self.restarts):
            begin = found.clone() if restart == 0 else None
            for target in classes.T:
                rows = standing.nonzero().flatten()
                if not len(rows):
                    break
                if begin is not None:
                    points, order = begin[rows], None
                else:
                    points = threat_model.random_start(x[rows], generator)
                    order = _orders(mixture.num_members, len(x), x.device, generator)[:, rows]
                game = _VoteGame(mixture, vote, turnable, x[rows], y[rows], target[rows], threat_model)
                found[rows], turned = self._towards(game, points, order)
                standing[rows[turned]] = False
        return found

    def _towards(self, game: _VoteGame, points: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """One run from `points` [R, ...] towards the class of each example.

        Args:
            game: the R examples.
            order: of the members, [L, R]; None: the nearest first, anew in each step.

        Returns:
            The first points at which the vote is wrong, else the last ones tried; and [R] bool, where it is wrong.
        """
        points, turned = points.clone(), torch.zeros_like(game.y, dtype=torch.bool)
        for step in range(self.num_steps + 1):
            rows = (~turned).nonzero().flatten()
            left = game.rows(rows)
            at = left.boundaries(points[rows])
            fell = left.vote(torch.stack([one.logits for one in at])) != left.y
            turned[rows[fell]] = True
            if step == self.num_steps or bool(fell.all()):
                break
            distance = torch.stack([one.distance for one in at])
            first = distance.argsort(0) if order is None else order[:, rows]
            eps = left.threat_model.eps
            pull = self._pull(at, distance, first, left.mixture.weights, left.vote.to_turn(left.y), self.kappa * eps)
            length = eps * LAST_STEP ** (step / self.num_steps)
            moved = left.threat_model.ascent_step(points[rows], pull, length)
            rows, moved, x = rows[~fell], moved[~fell], left.x[~fell]
            points[rows] = left.threat_model.project(moved, x)
        return points, turned

    @staticmethod
    def _pull(
        at: list[Boundary], distance: Tensor, order: Tensor, weights: Tensor, needed: Tensor, kappa: float
    ) -> Tensor:
        """The sum of the normals [R, ...] of the first members whose weight suffices, those beyond kappa left out."""
        lam = weights.to(needed)[order]
        # Summed one by one, because cumsum has no deterministic kernel on GPUs.
        summed = torch.stack(list(accumulate(lam)))
        # [L, R]: whether the members before this one do not suffice.
        wanted = torch.zeros_like(distance, dtype=torch.bool).scatter(0, order, summed - lam < needed)
        pulling = wanted & (distance > -kappa)
        total = torch.zeros_like(at[0].normal)
        for one, mine in zip(at, pulling, strict=True):
            total += per_example(mine.to(one.normal), one.normal) * one.normal
        return total


def _orders(count: int, examples: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A random order of the members for each example: [L, B]."""
    at = device if generator is None else generator.device
    return torch.rand(count, examples, generator=generator, device=at).argsort(0).to(device)


def _fixed(member: nn.Module, points: Tensor, target: Tensor) -> Boundary:
    """A member that cannot be turned: its distance to the class `target` [R] is -inf where it answers with it."""
    with torch.no_grad():
        logits = at_least_float32(member(points))
    endless = torch.where(logits.argmax(-1) == target, float("-inf"), float("inf"))
    return Boundary(
        endless, torch.zeros_like(points), torch.zeros_like(points), logits, torch.zeros_like(target).bool()
    )
