"""ARC: an attack on mixtures that turns one perturbation towards the boundary of one member after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.attacks.boundaries import Boundary, inner, members_with_gradient, nearest_boundary
from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import Climb, SearchAttack
from mixadv.correctness import correct
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example

ORDERS = ("random", "weights")
VARIANTS = ("exact", "published")
# A crossing ends this far beyond the boundary, in units of the step, so that rounding does not decide who is fooled.
OVERSHOOT = 1e-3
# The published margin beyond a boundary, in units of eps.
PUBLISHED_MARGIN = 0.05


@dataclass(frozen=True)
class ARC(SearchAttack):
    """Attacking randomized ensembles (Dbouk & Shanbhag, Adversarial Vulnerability of Randomized Ensembles, ICML 2022).

    The attack keeps a perturbation delta for each example. K times, a local step v starts at 0 and the members of
    positive weight are visited. With (zeta, n, d) the distance, normal and direction of member k's nearest boundary,
    see `mixadv.attacks.boundaries`, v' = s (v + beta d) / ||v + beta d|| is a step of length s that turns v towards
    that boundary; if v = 0 it is s d. The point x + delta + v', projected onto ball and box, is accepted per example
    if the exact expected accuracy sum_k lambda_k 1[f_k(x') = y] does not rise; then v = v'. After all members, v is
    added to delta.

    num_steps: K.
    step_size: the first s, relative to eps.
    decay: the last s relative to the first; between them s falls geometrically. The authors use decay=1.
    num_runner_ups: the nearest boundary is sought among this many of the highest other classes (a backward pass each).
    order: of the visits: "random", a new permutation for each of the K steps, or "weights", decreasing lambda.
    restarts: independent starts, the first at x, the others uniform in the ball.
    variant:
        "exact": boundaries at x + delta; beta >= 0 is the smallest number for which v' crosses the linearised
            boundary, that is <n, v'> >= zeta + 0.001 s, and s if no step of length s crosses it. A member that errs
            at x + delta has zeta < 0, and v is not turned for it as long as it errs at x + delta + v too.
        "published": as in the authors' code: boundaries at x + delta + v, between the class that the member answers
            (right or wrong) and the others; beta = s / (s - zeta) |zeta - <n, v>| + 0.05 eps, and s if zeta >= s.
            In both variants the accuracy of a random start is measured at that start.

    Returns the worst points, see `SearchAttack`; the objective is the expected margin.

    On linear members a step as long as eps finds most; members that bend on the scale of eps need short steps too, so
    the steps shrink. order="weights" tries a single order, and may find less than random orders.

    Members without gradient turn no step, but count for the accuracy. Warns if NaN gradients kept it from moving.

    Raises ValueError for unknown names, counts or sizes out of range; if no member has a gradient.
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
        climb = Climb.begin(mixture, ExpectedLoss("margin"), x, y)
        turnable = members_with_gradient(mixture, x)
        search = _Search(self, climb, threat_model, generator, turnable)
        for restart in range(self.restarts):
            search.run(from_x=restart == 0)
        self.warn_of_nan_gradients(climb.blind, "move")
        return climb.worst.x


@dataclass(frozen=True, eq=False)
class _Search:
    """One call of ARC; turnable: the members that have a gradient."""

    settings: ARC
    climb: Climb
    threat_model: ThreatModel
    generator: torch.Generator | None
    turnable: list[int]

    def accuracy_at(self, points: Tensor, rows: Tensor) -> Tensor:
        """The exact expected accuracy [R] at one point of each example `rows`; offers the points, too."""
        logits, _ = self.climb.score(points, rows)
        return self.climb.mixture.expectation(correct(logits, self.climb.y[rows]))

    def run(self, from_x: bool) -> None:
        """One start and K steps, for the examples that can still get worse."""
        rows = self.climb.worst.unfinished()
        if not len(rows):
            return
        x = self.climb.x[rows]
        if from_x:
            points, accuracy = x, self.climb.worst.accuracy[rows]
        else:
            points = self.threat_model.random_start(x, self.generator)
            accuracy = self.accuracy_at(points, rows)
        last = max(1, self.settings.num_steps - 1)
        for k in range(self.settings.num_steps):
            unfinished = accuracy > 0
            if not bool(unfinished.all()):
                rows, points, accuracy = rows[unfinished], points[unfinished], accuracy[unfinished]
            if not len(rows):
                return
            step = self.settings.step_size * self.settings.decay ** (k / last) * self.threat_model.eps
            points, accuracy = self.visit_members(points, accuracy, rows, step)

    def visit_members(self, points: Tensor, accuracy: Tensor, rows: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """One of the K steps, with local steps of length `step`, from x + delta [R, ...] and its accuracy [R] on."""
        published = self.settings.variant == "published"
        x, y = self.climb.x[rows], self.climb.y[rows]
        v = torch.zeros_like(points)
        # An accepted v leads to a point of known accuracy, no better than x + delta: adding v to delta costs no pass.
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
            found = self.accuracy_at(candidates, rows[moving])
            accepted = found <= accuracy[moving]
            chosen = moving[accepted]
            v[chosen], folded[chosen], accuracy[chosen] = turned[accepted], candidates[accepted], found[accepted]
        return folded, accuracy

    def order(self) -> list[int]:
        """The members in the order in which one step visits them."""
        if self.settings.order == "weights":
            order = self.climb.mixture.weights.argsort(descending=True, stable=True).tolist()
        else:
            device = "cpu" if self.generator is None else self.generator.device
            order = torch.randperm(self.climb.mixture.num_members, generator=self.generator, device=device).tolist()
        return [k for k in order if k in self.turnable]


def crossing_length(boundary: Boundary, v: Tensor, step: float, norm: str) -> Tensor:
    """The smallest beta >= 0 for which v' = step (v + beta d) / ||v + beta d|| crosses, [R].

    For either norm <n, v'> does not fall as beta grows, so the smallest beta is the one at which it reaches the
    distance plus the overshoot. It has a closed form: for l2 from the angle between v' and n, for linf as the extreme
    of three linear conditions, one for each piece of ||v + beta d||.

    Args:
        boundary: of one member; v: [R, ...], of norm `step` or 0; norm: "linf" or "l2".

    Returns:
        [R]; `step` if no step of this length crosses; if v = 0, `step`, or 0 for a member that errs already.
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
    """beta = step / (step - zeta) |zeta - <n, v>| + margin, [R]; `step` if zeta >= step or v = 0."""
    zeta = boundary.distance.to(v)
    beta = step / (step - zeta) * (zeta - inner(boundary.normal, v)).abs() + margin
    at_rest = (v == 0).flatten(1).all(1)
    return torch.where((zeta < step) & ~at_rest, beta, step)
