"""Projected gradient ascent on the expected loss of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import Climb, SearchAttack, value_and_gradient
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

STARTS = ("uniform", "gaussian", "none")
KEEPS = ("accuracy", "objective", "last")


@dataclass(frozen=True)
class PGD(SearchAttack):
    """Projected gradient ascent (Madry et al., ICLR 2018) on sum_k lambda_k loss_k, differentiated exactly.

    num_steps: gradient steps K of each restart.
    step_size: length of each step, relative to eps.
    restarts: independent starts. Only one is run with start="none" (all starts are equal) and with keep="last" (only
        the last run would count).
    objective: what the attack maximises, see `mixadv.attacks.objectives`.
    start: "uniform" in the ball, "gaussian" (x + 0.001 N(0, I), projected: the start of TRADES), "none" (x).
    keep: the point that is returned for each example.
        "last": the last iterate, for training; exactly K forward and backward passes per member (and one more
            forward pass if the objective needs clean logits).
        "objective": the one of highest objective among x, all starts and all iterates.
        "accuracy": the worst of the same points, see `SearchAttack`.

    The keyword start_at=... of a call gives the first start: points of the ball, in the shape of x. Further restarts
    begin as `start` says. A run of K steps that is continued from its last iterate equals one longer run, bit for bit.
    Under autocast the iterates stay in the dtype of x.

    Warns if NaN gradients kept it from climbing. With keep="last" it neither warns nor checks that x lies in the box,
    because reading the answer would stall an accelerator.

    Raises ValueError for unknown names, step counts or sizes out of range; for an objective without a gradient.
    """

    transfers: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    num_steps: int = 20
    step_size: float = 0.25
    restarts: int = 1
    objective: Objective = field(default_factory=ExpectedLoss)
    start: str = "uniform"
    keep: str = "accuracy"

    def __post_init__(self) -> None:
        self.require({"num_steps": 0, "restarts": 1}, {"start": STARTS, "keep": KEEPS})

    @property
    def checks_box(self) -> bool:
        return self.keep != "last"

    def search(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        start_at: Tensor | None = None,
    ) -> Tensor:
        if start_at is not None:
            if start_at.shape != x.shape:
                raise ValueError(f"start_at has shape {tuple(start_at.shape)}, x has {tuple(x.shape)}")
            start_at = start_at.detach().to(x.dtype, copy=True)
        if self.keep == "last":
            return self._last_iterate(mixture, x, y, threat_model, generator, start_at)
        climb = Climb.begin(mixture, self.objective, x, y, self.keep == "accuracy")
        for run in range(1 if self.start == "none" else self.restarts):
            self._climb(climb, threat_model, generator, start_at if run == 0 else None)
        self.warn_of_nan_gradients(climb.blind, "climb")
        return climb.worst.x

    def _last_iterate(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        first: Tensor | None,
    ) -> Tensor:
        """The last iterate of one start, without a pass that the steps do not need."""
        clean: Tensor | None = None
        if self.objective.needs_clean:
            with torch.no_grad():
                clean = mixture.member_logits(x)
        x_adv = self.starting_points(x, threat_model, generator) if first is None else first
        for _ in range(self.num_steps):
            grad = value_and_gradient(mixture, self.objective, x_adv, y, clean)[2]
            x_adv = self._step(x_adv, grad, x, threat_model)
        return x_adv

    def _climb(
        self, climb: Climb, threat_model: ThreatModel, generator: torch.Generator | None, first: Tensor | None
    ) -> None:
        """One start; its points are offered to `climb.worst`."""
        x, worst = climb.x, climb.worst
        rows = worst.unfinished() if self.keep == "accuracy" else torch.arange(len(x), device=x.device)
        x_adv = self.starting_points(x[rows], threat_model, generator) if first is None else first[rows]
        for _ in range(self.num_steps):
            if not len(rows):
                return
            grad = climb.score_with_gradient(x_adv, rows)[1]
            x_adv = self._step(x_adv, grad, x[rows], threat_model)
            if self.keep == "accuracy":
                unfinished = worst.accuracy[rows] > 0
                if not bool(unfinished.all()):
                    rows, x_adv = rows[unfinished], x_adv[unfinished]
        if len(rows):
            climb.score(x_adv, rows)

    def _step(self, x_adv: Tensor, grad: Tensor, x: Tensor, threat_model: ThreatModel) -> Tensor:
        x_adv = threat_model.ascent_step(x_adv, grad, self.step_size * threat_model.eps)
        return threat_model.project(x_adv, x)

    def starting_points(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """The points of the ball at which a run begins, drawn according to `start`: [B, ...]."""
        if self.start == "none":
            return x.clone()
        if self.start == "uniform":
            return threat_model.random_start(x, generator)
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        return threat_model.project(x + 1e-3 * noise, x)
