"""Projected gradient ascent on the expected loss of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import Climb, SearchAttack, warn_of_nan_gradients
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

STARTS = ("uniform", "gaussian", "none")
KEEPS = ("accuracy", "objective", "last")


@dataclass(frozen=True)
class PGD(SearchAttack):
    """Projected gradient ascent (Madry et al., ICLR 2018) on sum_k lambda_k loss_k, differentiated exactly.

    num_steps: gradient steps K of each restart.
    step_size: relative to eps: every step is step_size * eps long.
    restarts: independent starts. With start="none" they would coincide, with keep="last" all but the last
        would be thrown away: a single one is run.
    objective: what is climbed, see `mixadv.attacks.objectives`.
    start: "uniform" in the ball, "gaussian" (x + 0.001 N(0, I), projected: the start of TRADES), "none" (x).
    keep: what is returned, per example.
        "last": the last iterate, for training; exactly K forward and backward passes per member (one more
            forward pass where the objective needs clean logits).
        "objective": the highest objective among x itself, all starts and all iterates.
        "accuracy": over the same points, the lowest exact expected accuracy sum_k lambda_k 1[f_k(x') = y],
            and among equals the highest objective. An example whose expected accuracy has reached 0 cannot get
            worse, and is left alone from there on.

    It may be called with start_at=..., points of the ball, of the shape of x, that take the place of the first start;
    further restarts begin as `start` says. A run of K steps continued from its last iterate is a run of more steps, bit
    for bit. Under autocast the iterates stay in the dtype of x.

    Warns where NaN gradients kept it from climbing (not for keep="last": asking would stall the accelerator).

    Raises ValueError for unknown names, step counts or sizes out of range; for an objective without a gradient. With
    keep="last" it is not looked whether x lies in the box, for the same reason.
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
    def asks_for_box(self) -> bool:
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
        warn_of_nan_gradients("PGD", climb.blind, "climb", stacklevel=3)
        return worst.x

    def _run(
        self, climb: Climb, threat_model: ThreatModel, generator: torch.Generator | None, first: Tensor | None
    ) -> Tensor:
        """One start and where it ends, after nothing but the passes that this takes."""
        x, worst = climb.x, climb.worst
        # All examples without a copy of them, or those that can still get worse.
        rows: Any = slice(None) if worst is None else torch.arange(len(x), device=x.device)
        x_adv: Tensor | None = None
        for step in range(self.num_steps + 1):
            if worst is not None and self.keep == "accuracy":
                open_ = worst.accuracy[rows] > 0
                if not bool(open_.all()):
                    rows = rows[open_]
                    x_adv = None if x_adv is None else x_adv[open_]
                if not len(rows):
                    break
            if x_adv is None:
                x_adv = self.starting_points(x[rows], threat_model, generator) if first is None else first[rows]
            if step < self.num_steps:
                grad = climb.up(x_adv, rows)[1]
                x_adv = threat_model.ascent_step(x_adv, grad, self.step_size * threat_model.eps)
                x_adv = threat_model.project(x_adv, x[rows])
            elif worst is not None:
                climb.look(x_adv, rows)
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
