"""The lattice climber: grows, for each image, the set of members that one point fools together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.attacks.boundaries import inner, members_with_gradient, nearest_boundary
from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import Climb, SearchAttack
from mixadv.attacks.subsets import LAST_STEP, TOLERANCE
from mixadv.correctness import correct
from mixadv.losses import margin
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example

# Patterns kept for each image, and sets among which the next one is chosen.
POOL, CANDIDATES = 4, 16
# Random part of the order in which members are added, in units of eps (their distances are cut to [-1, 2]).
NOISE = 0.5
# Shares of the sets that are searched from a kept point, from x, and from a random point of the ball.
FROM_POOL, FROM_X = 0.5, 0.3
# Where such a set failed before: the share of members that are pulled to a fixed class, one of the nearest so many.
FIXED_SHARE, FIXED_CLASSES = 0.3, 2


@dataclass(frozen=True)
class LatticeClimber(SearchAttack):
    """Searches, for each image, for points that fool more and more members together.

    The exact expected accuracy sum_k lambda_k 1[f_k(x') = y] depends on the set of members that x' fools, and there
    are 2^L - 1 nonempty sets: too many to try each beyond a few members. The sets that can be fooled together at x are
    closed under taking subsets, so this attack climbs from those that it has found, as the Lattice Climber Attack does
    (Gnecco-Heredia, Negrevergne, Chevaleyre, arXiv 2307.10788 and 2506.10888).

    For each image it keeps the heaviest patterns: sets of members fooled by one point, with that point. The next set S
    comes from one of them: up to two members are left out, others are added, near ones first but partly at random,
    until S weighs more than the heaviest pattern, and members that are not needed for that go again. So every set
    that is tried would lower the accuracy, and no smaller part of it would. Among several such sets the attack prefers
    those that contain no set on which it failed, then those whose members' boundaries are nearest. It starts at the
    kept point, at x or at a random point, and minimises

        sum_{k in S} u_k max(margin_k(x'), -kappa eps),

    margin_k as in `SubsetAttack`: the linearised distance to the boundary of member k in input units, so that the scale
    of its logits does not matter. The u_k are uniform in [0, 2), so that members with opposite gradients do not hold
    each other. On images where such a set failed before, some members are pulled to a fixed one of their two highest
    wrong classes at x, because the highest class may lead into a corner. With momentum, g <- momentum g + (sum of the
    gradients) / ||the same||_q, each step is the steepest one along g (its sign for linf, its direction for l2). Its
    length falls geometrically from step_size eps to 0.02 of that. A set ends when all of it is fooled, or after
    steps_per_set steps; then the next one begins. Different images try different sets in the same pass, and a member is
    differentiated only on the images whose set holds it.

    num_steps: steps in all, for each image. Each costs a forward pass of every member and a backward pass of those
        in the set, so the cost is at most linear in L; there are about 3 forward passes more.
    steps_per_set: the most steps for one set.
    step_size: length of the first step for a set, relative to eps.
    momentum: in [0, 1).
    kappa: the depth at which a fooled member stops pulling, relative to eps.

    `search` takes `starts`, [S, B, ...] or [B, ...]: points of the ball that others have found. Their patterns are kept
    as its own.

    Returns the worst points, see `SearchAttack`; the objective is the expected margin.

    Members without gradient do not pull, but count for the accuracy. Warns if NaN gradients kept it from moving.

    Raises ValueError for counts or sizes out of range; if no member has a gradient.
    """

    warm_starts: ClassVar[bool] = True

    num_steps: int = 200
    steps_per_set: int = 20
    step_size: float = 1.0
    momentum: float = 0.75
    kappa: float = 0.01

    def __post_init__(self) -> None:
        self.require({"num_steps": 1, "steps_per_set": 1})
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}: it must be at least 0 and below 1")

    def search(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        starts: Tensor | None = None,
    ) -> Tensor:
        climb = Climb.begin(mixture, ExpectedLoss("margin"), x, y)
        turnable = torch.zeros(mixture.num_members, dtype=torch.bool, device=x.device)
        turnable[members_with_gradient(mixture, x)] = True
        if bool((climb.worst.accuracy > 0).any()):
            points = [] if starts is None else list(starts if starts.ndim > x.ndim else starts[None])
            _Search(self, climb, threat_model, generator, turnable).run(points)
        self.warn_of_nan_gradients(climb.blind, "move")
        return climb.worst.x

    @property
    def searches(self) -> int:
        """The least number of sets that are begun for an image that can still get worse; some may be alike."""
        return math.ceil(self.num_steps / (self.steps_per_set + 1))


class _Pool:
    """For each of B images the POOL heaviest patterns seen, and a point of each.

    Attributes:
        fooled: [B, P, L] bool; weight: [B, P], sum of lambda over the pattern, -1 where there is none; points:
            [B, P, ...]; distance: [B, P, L], of the members' boundaries there (estimated, in input units).
    """

    def __init__(self, x: Tensor, lam: Tensor) -> None:
        self.lam = lam
        self.fooled = torch.zeros(len(x), POOL, len(lam), dtype=torch.bool, device=x.device)
        self.weight = torch.full((len(x), POOL), -1.0, dtype=lam.dtype, device=x.device)
        self.distance = torch.zeros(len(x), POOL, len(lam), dtype=lam.dtype, device=x.device)
        self.points = x[:, None].repeat_interleave(POOL, 1)

    def offer(self, rows: Tensor, points: Tensor, fooled: Tensor, distance: Tensor) -> None:
        """Patterns fooled [R, L] of images `rows` [R]; a new one takes the place of the lightest if it is heavier."""
        weight = (fooled * self.lam).sum(1)
        known = ((self.fooled[rows] == fooled[:, None]).all(2) & (self.weight[rows] >= 0)).any(1)
        lightest, slot = self.weight[rows].min(1)
        new = ~known & (weight > lightest)
        rows, slot = rows[new], slot[new]
        self.fooled[rows, slot], self.weight[rows, slot] = fooled[new], weight[new]
        self.points[rows, slot], self.distance[rows, slot] = points[new], distance[new]


class _Search:
    """One call of LatticeClimber; turnable: [L] bool, the members that have a gradient."""

    def __init__(
        self,
        settings: LatticeClimber,
        climb: Climb,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        turnable: Tensor,
    ) -> None:
        self.settings, self.climb, self.threat_model = settings, climb, threat_model
        self.generator, self.turnable = generator, turnable
        self.lam = climb.mixture.weights.to(climb.worst.accuracy)
        images, members = len(climb.x), len(self.lam)
        self.pool = _Pool(climb.x, self.lam)
        # The dual norm of each member's gradient where it was last computed.
        self.slope = torch.ones(members, images, dtype=self.lam.dtype, device=climb.x.device)
        # The sets that were not fooled within their steps, and how many there are for each image.
        most = settings.num_steps // settings.steps_per_set + 1
        self.failed = torch.zeros(images, most, members, dtype=torch.bool, device=climb.x.device)
        # How hard each member pulls for the set that is tried now: opposite members of equal force would stand still.
        self.forces = torch.ones(images, members, dtype=self.lam.dtype, device=climb.x.device)
        self.failures = torch.zeros(images, dtype=torch.long, device=climb.x.device)

    def run(self, starts: list[Tensor]) -> None:
        """All steps, for the images that can still get worse."""
        settings, climb = self.settings, self.climb
        rows = climb.worst.unfinished()
        everybody = self.turnable.expand(len(rows), -1)
        for number, points in enumerate([climb.x, *starts]):
            # One gradient of every member at x, so that distances can be compared between members.
            self.look(points[rows], rows, everybody if number == 0 else torch.zeros_like(everybody))
        rows = climb.worst.unfinished()
        if not len(rows):
            return
        sets, targets, points = self.next_sets(rows)
        momentum, age = torch.zeros_like(points), torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for _ in range(settings.num_steps):
            fooled, pull = self.look(points, rows, sets, targets)
            open_ = climb.worst.accuracy[rows] > 0
            if not bool(open_.all()):
                rows, sets, targets, points, momentum, age, fooled, pull = (
                    part[open_] for part in (rows, sets, targets, points, momentum, age, fooled, pull)
                )
            if not len(rows):
                return
            momentum = settings.momentum * momentum + pull
            length = settings.step_size * LAST_STEP ** (age.to(points) / settings.steps_per_set)
            moved = self.threat_model.ascent_step(points, momentum, length * self.threat_model.eps)
            points, age = self.threat_model.project(moved, climb.x[rows]), age + 1
            # A set that weighs no more than what was found meanwhile cannot lower the accuracy.
            done = (fooled | ~sets).all(1) | ((sets * self.lam).sum(1) <= self.reached(rows) + TOLERANCE)
            late = ~done & (age > settings.steps_per_set)
            self.remember_failures(rows[late], sets[late])
            over = (done | late).nonzero().flatten()
            if len(over):
                sets[over], targets[over], points[over] = self.next_sets(rows[over])
                momentum[over], age[over] = 0.0, 0
        self.look(points, rows, torch.zeros_like(sets))

    def reached(self, rows: Tensor) -> Tensor:
        """The weight of the heaviest pattern of each image, [R]."""
        return 1 - self.climb.worst.accuracy[rows]

    def look(self, points: Tensor, rows: Tensor, sets: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evaluate all members at points [R, ...] and keep what is found.

        Args:
            sets: [R, L] bool, the members that pull.
            targets: [R, L], the classes to pull to, see `rivals`; None: the highest wrong class.

        Returns:
            fooled [R, L] bool, and the descent direction [R, ...] of dual norm 1 (or 0).
        """
        y = self.climb.y[rows]
        depth = self.settings.kappa * self.threat_model.eps
        total, logits = torch.zeros_like(points), []
        for k, member in enumerate(self.climb.mixture.members):
            pulling = sets[:, k] & self.turnable[k]
            mine, others = pulling.nonzero().flatten(), (~pulling).nonzero().flatten()
            parts = []
            if len(mine):
                rival = None if targets is None else targets[mine, k]
                boundary = nearest_boundary(member, points[mine], y[mine], self.threat_model, rival=rival)
                parts.append(boundary.logits)
                self.climb.blind[rows[mine]] |= boundary.blind
                above = (boundary.distance > -depth).to(total)
                total[mine] += per_example(above * self.forces[rows[mine], k].to(total), total) * boundary.normal
                slope = (margin(boundary.logits, y[mine]) / boundary.distance).abs().to(self.slope)
                usable = slope.isfinite() & (slope > 0)
                self.slope[k, rows[mine[usable]]] = slope[usable]
            if len(others):
                with torch.no_grad():
                    parts.append(member(points[others]))
            answers = torch.cat([part.to(parts[0]) for part in parts])
            logits.append(answers[torch.cat([mine, others]).argsort()])
        stacked = self.climb.mixture.stack_logits([z.to(logits[0]) for z in logits])
        self.climb.offer(points, stacked, rows)
        fooled = ~correct(stacked, y).T
        distance = -margin(stacked, y).to(self.slope) / self.slope[:, rows]
        self.pool.offer(rows, points, fooled, distance.T)
        # The dual norm, by Hölder's equality.
        size = inner(total, self.threat_model.ascent_step(torch.zeros_like(total), total, 1.0))
        return fooled, total / per_example(size.clamp_min(torch.finfo(size.dtype).tiny), total)

    def remember_failures(self, rows: Tensor, sets: Tensor) -> None:
        """Sets [R, L] that the images `rows` could not be brought to."""
        self.failed[rows, self.failures[rows]] = sets
        self.failures[rows] += 1

    def next_sets(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to try next on each image.

        Returns:
            A set that would lower its accuracy, [R, L] bool; the classes to pull to, [R, L], see `rivals`; the point
            to start from, [R, ...].
        """
        pool, eps = self.pool, self.threat_model.eps
        here = torch.arange(len(rows), device=rows.device)
        # Half of the candidates come from the heaviest pattern, the others from any.
        weight = pool.weight[rows]
        heaviest = weight.argmax(1)[:, None].expand(-1, CANDIDATES)
        anyone = torch.where((weight >= 0)[:, None], self.random(len(rows), CANDIDATES, POOL), -1.0).argmax(2)
        base = torch.where(self.random(len(rows), CANDIDATES) < 0.5, heaviest, anyone)
        fooled = pool.fooled[rows[:, None], base]
        near = (pool.distance[rows[:, None], base] / eps).nan_to_num(nan=-1.0).clamp(-1, 2)
        near = near + torch.where(self.turnable, 0.0, 3.0)
        sets = self.grown(fooled, near, self.reached(rows))
        lowering = (sets * self.lam).sum(2) > self.reached(rows)[:, None] + TOLERANCE
        # A set cannot be fooled where a part of it cannot.
        failed = self.failed[rows].to(near)
        size = failed.sum(2)[:, None]
        holds = (torch.einsum("rcl,rfl->rcf", sets.to(near), failed) == size) & (size > 0)
        hardness = (sets * near.clamp_min(0)).sum(2) + 1e3 * holds.sum(2)
        hardness = torch.where(lowering & (sets & self.turnable).any(2), hardness, math.inf)
        chosen = hardness.argmin(1)
        coin = self.random(len(rows))
        x = self.climb.x[rows]
        start = torch.where(
            per_example(coin < FROM_POOL + FROM_X, x), x, self.threat_model.random_start(x, self.generator)
        )
        start = torch.where(per_example(coin < FROM_POOL, x), pool.points[rows, base[here, chosen]], start)
        stuck = holds.any(2)[here, chosen]
        self.forces[rows] = 2 * self.random(len(rows), len(self.lam))
        return sets[here, chosen], self.rivals(rows, stuck), start

    def grown(self, fooled: Tensor, near: Tensor, reached: Tensor) -> Tensor:
        """Sets [R, C, L] that weigh just more than `reached` [R], from patterns `fooled` [R, C, L].

        near: [R, C, L], the distances of the members' boundaries, for the order in which members join and leave.
        """
        shape = fooled.shape
        # Up to two members leave.
        leaving = torch.where(fooled, self.random(*shape), 2.0).argsort(2).argsort(2)
        fooled = fooled & (leaving >= (3 * self.random(*shape[:2], 1)).floor())
        # Members join until the weight suffices: those of the pattern first, then by distance and chance.
        order = (near + NOISE * self.random(*shape) + torch.where(fooled, 0.0, 10.0)).argsort(2)
        lam = self.lam[order]
        # Summed one by one, because cumsum has no deterministic kernel on GPUs.
        summed = torch.stack(list(accumulate(lam.unbind(2))), dim=2)
        joined = summed - lam <= reached[:, None, None] + TOLERANCE
        # Members that are not needed leave again, the last first.
        slack = (lam * joined).sum(2) - reached[:, None] - TOLERANCE
        for place in reversed(range(shape[2])):
            unneeded = joined[..., place] & (lam[..., place] < slack)
            slack = slack - lam[..., place] * unneeded
            joined[..., place] &= ~unneeded
        return torch.zeros_like(joined).scatter(2, order, joined)

    def rivals(self, rows: Tensor, stuck: Tensor) -> Tensor:
        """For each image and member the class to pull to, [R, L]: -1 for the one that is highest at the point.

        Following the highest class leads into a corner where another class is the only one that can be reached. So on
        images that are `stuck` [R] some members are pulled to one of their highest wrong classes at x.
        """
        clean = self.climb.clean[:, rows]
        labels = self.climb.y[rows].expand(len(clean), -1)[..., None]
        nearest = clean.scatter(2, labels, -math.inf).topk(min(FIXED_CLASSES, clean.shape[2] - 1), dim=2).indices
        rank = (self.random(len(clean), len(rows), 1) * nearest.shape[2]).long()
        fixed = (self.random(len(rows), len(clean)) < FIXED_SHARE) & stuck[:, None]
        return torch.where(fixed, nearest.gather(2, rank)[..., 0].T, -1)

    def random(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        device = self.lam.device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, dtype=self.lam.dtype, device=device).to(self.lam.device)
