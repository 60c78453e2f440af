"""Attacks on sets of members: the worst point fools some set of members, so a few members have each set tried."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.attacks.boundaries import members_with_gradient, nearest_boundary, squashed_at
from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import Climb, SearchAttack
from mixadv.correctness import correct
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example

# The step size falls geometrically to this share of the first step.
LAST_STEP = 0.02
# Tolerance for comparing sums of weights.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class SubsetAttack(SearchAttack):
    """For each of a fixed list of sets S of members, searches for a point that fools all of S.

    The exact expected accuracy sum_k lambda_k 1[f_k(x') = y] takes at most 2^L values, one for each set of fooled
    members. Climbing a sum of losses over all members stalls where their gradients oppose each other. For a set S the
    attack minimises

        sum_{k in S} max(margin_k(x'), -kappa eps),   margin_k = (f_k,y - max_{j != y} f_k,j) / ||grad of the same||_q

    over ball and box, q dual to the norm: margin_k is the linearised distance to member k's boundary, in input units,
    positive while k is right. So the logit scale of a member does not matter, and a member stops pulling once it is
    fooled by kappa eps. (On random linear pairs and triples in the plane under linf, with logit scales spread over two
    decades, plain differences of logits miss the optimum in 2 to 4 % of cases, these margins in at most 0.5 %.) The
    step is the steepest one of the norm (sign of the gradient for linf, its direction for l2); its length falls
    geometrically from step_size * eps to 0.02 of that, and the projection follows.

    Sets are tried by decreasing weight. A set is skipped for the examples that it cannot make worse, because the other
    members alone weigh as much as the lowest expected accuracy found. The search for a set ends when all of it is
    fooled.

    num_steps: gradient steps for each set and start.
    step_size: length of the first step relative to eps.
    restarts: starts for each set, the first at x, the others uniform in the ball; all sets have their n-th start
        before any set has the next.
    kappa: the depth at which a fooled member stops pulling, relative to eps.
    max_subsets: all nonempty sets of members of positive weight are tried if there are no more than this (15: up to
        L = 4), otherwise this many of the heaviest. Among more members most images need other sets: `LatticeClimber`
        chooses sets for each image.

    Where the gradients of two logits of a member differ more than tenfold at x, both are scaled to the same length
    first (`nearest_boundary`), so that logits squashed by a tanh or a sigmoid do not stop the attack.

    Returns the worst points, see `SearchAttack`; the objective is the expected margin.

    Members without gradient do not pull, but count for the accuracy. Warns if NaN gradients kept it from moving.

    Raises ValueError for counts or sizes out of range; if no member has a gradient.
    """

    num_steps: int = 20
    step_size: float = 1.0
    restarts: int = 1
    kappa: float = 0.01
    max_subsets: int = 15

    def __post_init__(self) -> None:
        self.require({"num_steps": 1, "restarts": 1, "max_subsets": 1})

    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        climb = Climb.begin(mixture, ExpectedLoss("margin"), x, y)
        weights, turnable = mixture.weights, members_with_gradient(mixture, x)
        search = _Search(self, climb, threat_model, generator, weights, turnable, _squashed(climb, turnable))
        sets = heaviest_subsets(weights.tolist(), self.max_subsets)
        for restart, members in itertools.product(range(self.restarts), sets):
            search.run(members, from_x=restart == 0)
        self.warn_of_nan_gradients(climb.blind, "move")
        return climb.worst.x

    def sets_of(self, num_members: int) -> int:
        """How many sets of members are tried, if `num_members` have positive weight."""
        return min(self.max_subsets, 2**num_members - 1)


@dataclass(frozen=True, eq=False)
class _Search:
    """One call of SubsetAttack.

    turnable: the members that have a gradient. squashed: for some of them the images [B] where `squashed_at` holds.
    """

    settings: SubsetAttack
    climb: Climb
    threat_model: ThreatModel
    generator: torch.Generator | None
    weights: Tensor
    turnable: list[int]
    squashed: dict[int, Tensor]

    def run(self, members: Sequence[int], from_x: bool) -> None:
        """One start for one set, for the examples that it can make worse."""
        pulling = [k for k in members if k in self.turnable]
        rest = 1.0 - float(self.weights[list(members)].sum())
        rows = (self.climb.worst.accuracy > rest + TOLERANCE).nonzero().flatten()
        if not pulling or not len(rows):
            return
        x = self.climb.x[rows]
        points = x if from_x else self.threat_model.random_start(x, self.generator)
        for step in range(self.settings.num_steps):
            length = self.settings.step_size * self.threat_model.eps * LAST_STEP ** (step / self.settings.num_steps)
            logits, pull = self.pull(points, rows, pulling)
            self.climb.offer(points, logits, rows)
            moved = self.threat_model.ascent_step(points, pull, length)
            unfooled = correct(logits[list(members)], self.climb.y[rows]).any(0)
            rows, points = rows[unfooled], moved[unfooled]
            if not len(rows):
                return
            points = self.threat_model.project(points, self.climb.x[rows])
        self.climb.score(points, rows)

    def pull(self, points: Tensor, rows: Tensor, pulling: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The logits of all members [L, R, C], and the descent direction of the set `pulling`, [R, ...]."""
        kappa = self.settings.kappa * self.threat_model.eps
        total = torch.zeros_like(points)
        logits = []
        for k, member in enumerate(self.climb.mixture.members):
            if k not in pulling:
                logits.append(member(points))
                continue
            rescaled = self.squashed[k][rows] if k in self.squashed else None
            boundary = nearest_boundary(member, points, self.climb.y[rows], self.threat_model, rescaled=rescaled)
            logits.append(boundary.logits)
            self.climb.blind[rows] |= boundary.blind
            total += per_example((boundary.distance > -kappa).to(total), total) * boundary.normal
        return torch.stack([z.to(logits[0]) for z in logits]), total


def _squashed(climb: Climb, members: Sequence[int]) -> dict[int, Tensor]:
    """For each of the members that has such images: the images [B] that can get worse where `squashed_at` holds."""
    rows = climb.worst.unfinished()
    found = {}
    for k in members if len(rows) else ():
        where = torch.zeros(len(climb.x), dtype=torch.bool, device=climb.x.device)
        where[rows] = squashed_at(climb.mixture.members[k], climb.x[rows], climb.y[rows])
        if bool(where.any()):
            found[k] = where
    return found


def heaviest_subsets(weights: Sequence[float], count: int) -> list[tuple[int, ...]]:
    """The `count` heaviest nonempty sets of members, or all if there are fewer, by decreasing weight.

    Args:
        weights: lambda of L members, all positive.
    """
    chosen = list(itertools.islice(_heaviest_first(weights), count))
    return sorted(chosen, key=lambda s: (-sum(weights[k] for k in s), s))


def _heaviest_first(weights: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """All nonempty sets by decreasing weight, one at a time: their complements by increasing weight."""
    order = sorted(range(len(weights)), key=lambda k: weights[k])
    everything = set(range(len(weights)))
    yield tuple(sorted(everything))
    # A complement with positions p_1 < ... < p_n has two successors: p_n + 1 is added, or replaces p_n.
    heap: list[tuple[float, tuple[int, ...]]] = [(weights[order[0]], (0,))]
    while heap:
        weight, positions = heapq.heappop(heap)
        if len(positions) < len(weights):
            yield tuple(sorted(everything - {order[p] for p in positions}))
        last = positions[-1]
        if last + 1 < len(weights):
            following = weights[order[last + 1]]
            heapq.heappush(heap, (weight + following, (*positions, last + 1)))
            heapq.heappush(heap, (weight + following - weights[order[last]], (*positions[:-1], last + 1)))
