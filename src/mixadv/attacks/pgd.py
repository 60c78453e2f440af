"""Projected gradient ascent on the expected loss of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import Climb, SearchAttack
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

STARTS = ("uniform", "gaussian", "none")
KEEPS = ("accuracy", "objective", "last")


@dataclass(frozen=True)
class PGD(SearchAttack):
    """Projected gradient ascent (Madry et al., ICLR 2018) on sum_k lambda_k loss_k, differentiated exactly.

    num_steps: gradient steps K of each restart.
    step_size: length of each step, relative to eps.
    restarts: independent starts. A single one is run with start="none", where all starts coincide, and with
        keep="last", which would discard all but the last.
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
            with torch.no_grad():
                clean = mixture.member_logits(x) if self.objective.needs_clean else None
            blind = torch.zeros(0, dtype=torch.bool, device=x.device)
            climb = Climb(mixture, self.objective, x, y, clean, None, blind)
            return self._run(climb, threat_model, generator, start_at)
        climb, worst = Climb.begin(mixture, self.objective, x, y, self.keep == "accuracy")
        for run in range(1 if self.start == "none" else self.restarts):
            self._run(climb, threat_model, generator, start_at if run == 0 else None)
        self.warn_of_nan_gradients(climb.blind, "climb")
        return worst.x

    def _run(
        self, climb: Climb, threat_model: ThreatModel, generator: torch.Generator | None, first: Tensor | None
    ) -> Tensor:
        """The last iterate of one start."""
        x, worst = climb.x, climb.worst
        # A slice takes all examples without a copy; an index takes those that can still get worse.
        rows: Any = slice(None) if worst is None else torch.arange(len(x), device=x.device)
        x_adv: Tensor | None = None
        for step in range(self.num_steps + 1):
            if worst is not None and self.keep == "accuracy":
                unfinished = worst.accuracy[rows] > 0
                if not bool(unfinished.all()):
                    rows = rows[unfinished]
                    x_adv = None if x_adv is None else x_adv[unfinished]
                if not len(rows):
                    break
            if x_adv is None:
                x_adv = self.starting_points(x[rows], threat_model, generator) if first is None else first[rows]
            if step < self.num_steps:
                grad = climb.score_with_gradient(x_adv, rows)[1]
                x_adv = threat_model.ascent_step(x_adv, grad, self.step_size * threat_model.eps)
                x_adv = threat_model.project(x_adv, x[rows])
            elif worst is not None:
                climb.score(x_adv, rows)
        return x if x_adv is None else x_adv

    def starting_points(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """Points of the ball where a run begins, drawn as `start` says: [B, ...]."""
        if self.start == "none":
            return x.clone()
        if self.start == "uniform":
            return threat_model.sample(x, generator)
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        return threat_model.project(x + 1e-3 * noise, x)
