"""ARC: a perturbation that grows one member at a time, each turning it just enough."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.attacks.boundaries import (
    Boundary,
    inner,
    members_with_gradient,
    nearest_boundary,
    per_example,
)
from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import Climb, SearchAttack, WorstPoints, warn_of_nan_gradients
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

ORDERS = ("random", "weights")
VARIANTS = ("exact", "published")
# How far beyond a boundary a crossing aims, in units of the step: rounding must not decide what was fooled.
OVERSHOOT = 1e-3
# The published margin beyond a boundary, in units of eps.
PUBLISHED_MARGIN = 0.05


@dataclass(frozen=True)
class ARC(SearchAttack):
    """Attacking randomized ensembles (Dbouk & Shanbhag, Adversarial Vulnerability of Randomized Ensembles, ICML 2022).

    A perturbation delta is kept for each example. K times, a local step v starts at 0 and the members of positive
    weight are visited. With (zeta, n, d) the distance, normal and direction of member k's nearest boundary, see
    `mixadv.attacks.boundaries`, v' = s (v + beta d) / ||v + beta d|| is a step of length s that turns v towards that
    boundary; while v = 0 it is s d. The point x + delta + v', projected onto ball and box, is accepted per example if
    the exact expected accuracy sum_k lambda_k 1[f_k(x') = y] does not rise; then v = v'. After the members, v is
    folded into delta.

    num_steps: K.
    step_size: the first s, relative to eps.
    decay: the last s relative to the first; between them s falls geometrically. The authors keep it (decay=1).
    num_runner_ups: among how many classes beside the one to leave the nearest boundary is sought (a backward pass
        each).
    order: of the visits: "random", a new permutation for each of the K steps, or "weights", decreasing lambda.
    restarts: independent starts, the first at x, the others uniform in the ball.
    variant:
        "exact": boundaries at x + delta; beta >= 0 is the smallest number for which v' crosses the linearised
            boundary, that is <n, v'> >= zeta + 0.001 s, and s where no step of length s does. A member that errs
            at x + delta has zeta < 0 and is not turned while v leaves it erring.
        "published": as the authors' code has it: boundaries at x + delta + v, between the class that the member
            answers (right or wrong) and the others; beta = s / (s - zeta) |zeta - <n, v>| + 0.05 eps, and s where
            zeta >= s. The accuracy of a start is measured at that start in both variants.

    Per example, the worst of x and all points tried is returned: the lowest expected accuracy, and among equals the
    highest expected margin. An example whose expected accuracy has reached 0 is left alone from there on.

    A step as long as eps finds most on linear members; where members bend on the scale of eps short ones are needed
    too, so the steps shrink. Decreasing weights try one order only, and may find less than random orders.

    Members without gradient are not turned, but count. Warns where NaN gradients kept it from moving.

    Raises ValueError for unknown names, counts or sizes out of range; where no member has a gradient.
    """

    num_steps: int = 20
    step_size: float = 1.0
    decay: float = 0.1
    num_runner_ups: int = 3
    order: str = "random"
    restarts: int = 1
    variant: str = "exact"

    def __post_init__(self) -> None:
        least = {"num_steps": 0, "num_runner_ups": 1, "restarts": 1}
        self.require(least, {"order": ORDERS, "variant": VARIANTS})
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}: it must be positive and at most 1 (a constant step)")

    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        climb, worst = Climb.begin(mixture, ExpectedLoss("margin"), x, y)
        turnable = members_with_gradient(mixture, x)
        search = _Search(self, climb, worst, threat_model, generator, turnable)
        for restart in range(self.restarts):
            search.run(from_x=restart == 0)
        warn_of_nan_gradients("ARC", climb.blind, "move", stacklevel=3)
        return worst.x


@dataclass(frozen=True, eq=False)
class _Search:
    """One call of ARC; turnable: the members that have a gradient."""

    settings: ARC
    climb: Climb
    worst: WorstPoints
    threat_model: ThreatModel
    generator: torch.Generator | None
    turnable: list[int]

    def measure(self, points: Tensor, rows: Tensor) -> Tensor:
        """The exact expected accuracy at one point of each example `rows`, [R]; the worst points see it too."""
        logits, _ = self.climb.look(points, rows)
        return self.climb.mixture.expectation(logits.argmax(-1) == self.climb.y[rows])

    def run(self, from_x: bool) -> None:
        """One start and K steps, for the examples that can still get worse."""
        rows = self.worst.open()
        if not len(rows):
            return
        x = self.climb.x[rows]
        if from_x:
            points, accuracy = x, self.worst.accuracy[rows]
        else:
            points = self.threat_model.sample(x, self.generator)
            accuracy = self.measure(points, rows)
        last = max(1, self.settings.num_steps - 1)
        for k in range(self.settings.num_steps):
            open_ = accuracy > 0
            if not bool(open_.all()):
                rows, points, accuracy = rows[open_], points[open_], accuracy[open_]
            if not len(rows):
                return
            step = self.settings.step_size * self.settings.decay ** (k / last) * self.threat_model.eps
            points, accuracy = self.visit_members(points, accuracy, rows, step)

    def visit_members(self, points: Tensor, accuracy: Tensor, rows: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """One of the K steps, local steps being `step` long: from x + delta [R, ...] and its accuracy [R] on."""
        published = self.settings.variant == "published"
        x, y = self.climb.x[rows], self.climb.y[rows]
        v = torch.zeros_like(points)
        # What v leads to is known when v is accepted, and as good as x + delta: folding it in needs no pass.
        folded, accuracy = points.clone(), accuracy.clone()
        for k in self.order():
            origin = points + v if published else points
            boundary = nearest_boundary(
                self.climb.mixture.members[k], origin, y, self.threat_model, self.settings.num_runner_ups, published
            )
            self.climb.blind[rows] |= boundary.blind
            if published:
                beta = published_length(boundary, v, step, PUBLISHED_MARGIN * self.threat_model.eps)
            else:
                beta = crossing_length(boundary, v, step, self.threat_model.norm)
            moving = (beta > 0).nonzero().flatten()
            if not len(moving):
                continue
            turned = (v + per_example(beta, v) * boundary.direction)[moving]
            size = self.threat_model.distance(turned, torch.zeros_like(turned))
            turned = turned * per_example(torch.where(size > 0, step / size, 0.0), turned)
            candidates = self.threat_model.project(points[moving] + turned, x[moving])
            found = self.measure(candidates, rows[moving])
            accepted = found <= accuracy[moving]
            chosen = moving[accepted]
            v[chosen], folded[chosen], accuracy[chosen] = turned[accepted], candidates[accepted], found[accepted]
        return folded, accuracy

    def order(self) -> list[int]:
        """The members in the order of one step's visits."""
        if self.settings.order == "weights":
            order = self.climb.mixture.weights.argsort(descending=True, stable=True).tolist()
        else:
            device = "cpu" if self.generator is None else self.generator.device
            order = torch.randperm(self.climb.mixture.num_members, generator=self.generator, device=device).tolist()
        return [k for k in order if k in self.turnable]


def crossing_length(boundary: Boundary, v: Tensor, step: float, norm: str) -> Tensor:
    """The smallest beta >= 0 for which v' = step (v + beta d) / ||v + beta d|| crosses, [R].

    <n, v'> does not fall as beta grows, for either norm, so the smallest beta is where it reaches the distance (with
    the overshoot), in closed form: for l2 from the angle between v' and n, for linf as the extreme of three linear
    conditions, one for each piece of ||v + beta d||.

    Args:
        boundary: of one member; v: [R, ...], of norm `step` or 0; norm: "linf" or "l2".

    Returns:
        [R]; `step` where no step of this length crosses; where v = 0, `step`, or 0 for a member that errs already.
    """
    target = (boundary.distance / step + OVERSHOOT).to(v)
    v = v / step
    along = inner(boundary.normal, v)
    t = target.clamp(-1 + 1e-6, 1 - 1e-6)
    if norm == "l2":
        across = (1 - along.square()).clamp_min(0).sqrt()
        beta = across * t / (1 - t.square()).sqrt() - along
    else:
        infinite = float("inf")
        still = (boundary.direction == 0).flatten(1)
        aligned = (v * boundary.direction).flatten(1)
        largest = aligned.masked_fill(still, -infinite).amax(1)
        smallest = aligned.masked_fill(still, infinite).amin(1)
        unmoved = v.flatten(1).abs().masked_fill(~still, 0).amax(1)
        pieces = torch.stack(
            [
                (t * largest - along) / (1 - t),
                -(along + t * smallest) / (1 + t),
                t * unmoved - along,
            ]
        )
        beta = torch.where(t >= 0, pieces.amax(0), pieces.amin(0))
    beta = torch.where(target >= 1, 1.0, beta.clamp_min(0))
    beta = torch.where(target <= -1, 0.0, beta)
    at_rest = (v == 0).flatten(1).all(1)
    return step * torch.where(at_rest, (target > 0).to(beta), beta)


def published_length(boundary: Boundary, v: Tensor, step: float, margin: float) -> Tensor:
    """beta = step / (step - zeta) |zeta - <n, v>| + margin, [R]; `step` where zeta >= step, or v = 0."""
    zeta = boundary.distance.to(v)
    beta = step / (step - zeta) * (zeta - inner(boundary.normal, v)).abs() + margin
    at_rest = (v == 0).flatten(1).all(1)
    return torch.where((zeta < step) & ~at_rest, beta, step)
