"""Auto-PGD: projected gradient ascent with momentum and step sizes that it halves itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss, Objective, TargetedLoss
from mixadv.attacks.search import Climb, SearchAttack
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example

LOSSES = ("ce", "margin", "dlr", "dlr-targeted")
STARTS = ("uniform", "none")
DEFAULT_TARGETS = 9


def checkpoints(num_steps: int) -> tuple[int, ...]:
    """The numbers of steps w_j = ceil(p_j N) after which step sizes are reviewed.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), for all p_j <= 1 (Croce & Hein, ICML 2020,
    section 3). w_0 = 0 is left out. If N is small, several p_j share one step, which is listed once.
    """
    # In whole percent: in floating point 0.57 * 100 is above 57, and its ceiling would be 58.
    before, percent = 0, 22
    steps = set()
    while percent <= 100:
        steps.add(-(-percent * num_steps // 100))
        before, percent = percent, percent + max(percent - before - 3, 6)
    return tuple(sorted(steps))


@dataclass(frozen=True)
class APGD(SearchAttack):
    """Auto-PGD (Croce & Hein, ICML 2020, Algorithm 1) on an objective of the whole mixture, differentiated exactly.

    With eta_0 = 2 eps, z = P(x_k + eta * direction of the gradient) and P the projection, a step is
        x_{k+1} = P(x_k + momentum (z - x_k) + (1 - momentum) (x_k - x_{k-1})),    x_1 = z.
    At each of `checkpoints(num_steps)`, for each example separately, eta is halved and the search goes back to the best
    point of the run if, since the last checkpoint, the objective rose in fewer than the fraction rho of the steps, or
    if eta was not halved at the last checkpoint and the best objective has not changed since.

    num_steps: gradient steps N of each run: N + 1 forward and N backward passes per member.
    restarts: independent starts for each target; one with start="none", where all starts coincide.
    loss: the objective is its expectation sum_k lambda_k loss(f_k(x')): "ce", "margin", "dlr", or "dlr-targeted" (one
        run per target class).
    targets: the number T of targets of "dlr-targeted": the T most probable wrong classes of the averaged prediction
        at x, or all of them if there are fewer; None means 9, as in AutoAttack.
    objective: any other objective of `mixadv.attacks.objectives`, in place of `loss`.
    rho, momentum: see above; momentum=1 switches the momentum off.
    start: "uniform" in the ball, "none" (x).

    DLR needs 3 classes, targeted DLR 4. With fewer classes the margin (the targeted margin) takes its place: it has
    the same sign, but is not invariant to the scale of the logits.

    To measure the ensemble, attack `Mixture([mixture])`, whose only member is the averaged prediction: then the
    accuracy of the ensemble decides which point is the worst.

    Logits so large that a loss saturates in floating point are not rescaled: the cross-entropy then has no gradient,
    DLR has one. Warns if NaN gradients kept it from climbing.

    Raises ValueError for unknown names, numbers out of range, settings that exclude each other; for an objective
    without a gradient.
    """

    transfers: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    num_steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    targets: int | None = None
    objective: Objective | None = None
    rho: float = 0.75
    momentum: float = 0.75
    start: str = "uniform"

    def __post_init__(self) -> None:
        self.require({"num_steps": 0, "restarts": 1}, {"loss": LOSSES, "start": STARTS})
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho is {self.rho}: it is a fraction of steps, from 0 to 1")
        if not (math.isfinite(self.momentum) and 0 < self.momentum <= 1):
            raise ValueError(f"momentum is {self.momentum}: the weight of the new step must be above 0, at most 1")
        if self.targets is not None and self.loss != "dlr-targeted":
            raise ValueError(f"targets is {self.targets}, but loss={self.loss} has none: use loss=dlr-targeted")
        if self.targets is not None:
            self.require({"targets": 1})
        if self.objective is not None and self.loss != "ce":
            raise ValueError("objective takes the place of loss: give only one of them")

    def objectives(self, num_classes: int) -> tuple[Objective, ...]:
        """The objectives for C classes; each is run `restarts` times."""
        if self.objective is not None:
            return (self.objective,)
        if self.loss == "dlr-targeted":
            loss = "dlr" if num_classes >= 4 else "margin"
            targets = min(DEFAULT_TARGETS if self.targets is None else self.targets, num_classes - 1)
            # With a single class, TargetedLoss refuses rank 1 and names the reason.
            return tuple(TargetedLoss(loss, rank) for rank in range(1, max(targets, 1) + 1))
        return (ExpectedLoss("margin" if self.loss == "dlr" and num_classes < 3 else self.loss),)

    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        with torch.no_grad():
            clean = mixture.member_logits(x)
        objectives = self.objectives(clean.shape[-1])
        climb = Climb.begin(mixture, objectives[0], x, y, clean=clean)
        # Restarts are the outer loop, so that more restarts begin with the same runs as fewer.
        for _ in range(1 if self.start == "none" else self.restarts):
            for objective in objectives:
                self._climb(replace(climb, objective=objective), threat_model, generator)
        self.warn_of_nan_gradients(climb.blind, "climb")
        return climb.worst.x

    def _climb(self, climb: Climb, threat_model: ThreatModel, generator: torch.Generator | None) -> None:
        """One start; its points are offered to `climb.worst`."""
        rows = climb.worst.unfinished()
        if not len(rows):
            return
        origin = climb.x[rows]
        x = threat_model.random_start(origin, generator) if self.start == "uniform" else origin
        if not self.num_steps:
            climb.score(x, rows)
            return
        value, grad = climb.score_with_gradient(x, rows)
        state = _State.begin(rows, origin, x, grad, value, 2 * threat_model.eps)
        reviews, reviewed = checkpoints(self.num_steps), 0
        for step in range(1, self.num_steps + 1):
            unfinished = climb.worst.accuracy[state.rows] > 0
            if not bool(unfinished.all()):
                state.keep(unfinished)
                if not len(state.rows):
                    return
            x = threat_model.ascent_step(state.x, state.grad, state.step_size)
            x = threat_model.project(x, state.origin)
            if step > 1:
                x = torch.lerp(state.x, x, self.momentum).add_(state.x - state.previous, alpha=1 - self.momentum)
                x = threat_model.project(x, state.origin)
            if step == self.num_steps:
                climb.score(x, state.rows)
                return
            value, grad = climb.score_with_gradient(x, state.rows)
            state.move(x, grad, value)
            if step in reviews:
                state.review(self.rho * (step - reviewed))
                reviewed = step


@dataclass
class _State:
    """The state of a run for the R examples that can still get worse, [R] or [R, ...].

    rows: their places in the batch. origin: the clean inputs. x, grad, value: the iterate, its gradient and objective.
    previous: the iterate before. best_*: the best of this run. rises: steps since the last review on which the
    objective rose. reviewed_value: the best objective at the last review. halved: whether the last review halved
    step_size.
    """

    rows: Tensor
    origin: Tensor
    previous: Tensor
    x: Tensor
    grad: Tensor
    value: Tensor
    best_x: Tensor
    best_grad: Tensor
    best_value: Tensor
    reviewed_value: Tensor
    rises: Tensor
    halved: Tensor
    step_size: Tensor

    @classmethod
    def begin(cls, rows: Tensor, origin: Tensor, x: Tensor, grad: Tensor, value: Tensor, step_size: float) -> _State:
        """The state at the start x, with one step size for all examples."""
        no = torch.zeros_like(rows, dtype=torch.bool)
        steps = torch.full(rows.shape, step_size, dtype=x.dtype, device=x.device)
        return cls(rows, origin, x, x, grad, value, x, grad, value, value, torch.zeros_like(rows), no, steps)

    def keep(self, mask: Tensor) -> None:
        """Drop the examples where the mask [R] is False."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[mask])

    def move(self, x: Tensor, grad: Tensor, value: Tensor) -> None:
        """Move to x [R, ...], with its gradient and objective [R]."""
        self.rises = self.rises + (value > self.value)
        self.previous, self.x, self.grad, self.value = self.x, x, grad, value
        better = value > self.best_value
        self.best_value = torch.where(better, value, self.best_value)
        self.best_x = torch.where(per_example(better, x), x, self.best_x)
        self.best_grad = torch.where(per_example(better, x), grad, self.best_grad)

    def review(self, wanted_rises: float) -> None:
        """Halve the step size and go back to the best point where condition 1 or 2 of Algorithm 1 holds."""
        stuck = ~self.halved & (self.best_value == self.reviewed_value)
        self.halved = (self.rises < wanted_rises) | stuck
        self.step_size = torch.where(self.halved, self.step_size / 2, self.step_size)
        halved = per_example(self.halved, self.x)
        self.x = torch.where(halved, self.best_x, self.x)
        self.grad = torch.where(halved, self.best_grad, self.grad)
        self.value = torch.where(self.halved, self.best_value, self.value)
        self.reviewed_value, self.rises = self.best_value, torch.zeros_like(self.rises)
