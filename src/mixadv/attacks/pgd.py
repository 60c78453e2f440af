"""Projected gradient ascent on the expected loss of a mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import WorstPoints, check_batch, value_and_gradient, warn_of_nan_gradients
from mixadv.mixture import Mixture, as_mixture
from mixadv.threat_model import ThreatModel

STARTS = ("uniform", "gaussian", "none")
KEEPS = ("accuracy", "objective", "last")


@dataclass(frozen=True)
class PGD:
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

    Calling it returns x_adv in the shape and dtype of x, detached. The mixture is attacked in eval mode with
    frozen parameters, and left as found. Under autocast the iterates stay in the dtype of x.

    Warns where NaN gradients kept it from climbing (not for keep="last": asking would stall the accelerator).

    Raises ValueError for unknown names, step counts or sizes out of range; for x not float32 or float64 (half
    precision cannot hold a point of the ball), labels that do not match, x outside the box (not looked at for
    keep="last", for the same reason); for an objective without a gradient.
    """

    num_steps: int = 20
    step_size: float = 0.25
    restarts: int = 1
    objective: Objective = field(default_factory=ExpectedLoss)
    start: str = "uniform"
    keep: str = "accuracy"

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"num_steps is {self.num_steps}: it must be at least 0")
        if self.restarts < 1:
            raise ValueError(f"restarts is {self.restarts}: it must be at least 1")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size is {self.step_size}: it must be positive (in units of eps)")
        if self.start not in STARTS:
            raise ValueError(f"unknown start {self.start!r}: choose one of {', '.join(STARTS)}")
        if self.keep not in KEEPS:
            raise ValueError(f"unknown keep {self.keep!r}: choose one of {', '.join(KEEPS)}")

    def __call__(
        self,
        mixture: Mixture | nn.Module,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
        start_at: Tensor | None = None,
    ) -> Tensor:
        """Attack x `[B, ...]` with labels y `[B]`; a plain module counts as a mixture of one member.

        start_at: points of the ball, of the shape of x, that take the place of the first start; further restarts
            begin as `start` says. A run of K steps continued from its last iterate is a run of more steps, bit for bit.
        """
        check_batch(x, y, None if self.keep == "last" else threat_model)
        if start_at is not None and start_at.shape != x.shape:
            raise ValueError(f"start_at has shape {tuple(start_at.shape)}, x has {tuple(x.shape)}")
        if threat_model.eps == 0 or len(x) == 0:
            return x.detach().clone()
        mixture = as_mixture(mixture).support()
        # Tensors made under inference_mode cannot be differentiated through; their clones outside it can.
        with torch.inference_mode(False), torch.enable_grad(), mixture.attack_mode():
            first = None if start_at is None else start_at.detach().to(x.dtype, copy=True)
            return self._attack(mixture, x.detach().clone(), y.clone(), threat_model, generator, first)

    def _attack(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        first: Tensor | None,
    ) -> Tensor:
        weights = mixture.weights
        worst: WorstPoints | None = None
        clean_logits: Tensor | None = None
        if self.objective.needs_clean or self.keep != "last":
            with torch.no_grad():
                clean = mixture.member_logits(x)
                clean_logits = clean if self.objective.needs_clean else None
                if self.keep != "last":
                    worst = WorstPoints(mixture, x, y, self.keep == "accuracy")
                    worst.offer(x, clean, self.objective(clean, y, weights, clean_logits))
        if worst is None:
            return self._climb(mixture, x, y, threat_model, clean_logits, generator, first)

        blind = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for run in range(1 if self.start == "none" else self.restarts):
            start = first if run == 0 else None
            self._search(mixture, x, y, threat_model, clean_logits, generator, worst, blind, start)
        warn_of_nan_gradients("PGD", blind, "climb", stacklevel=3)
        return worst.x

    def _climb(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        clean_logits: Tensor | None,
        generator: torch.Generator | None,
        first: Tensor | None,
    ) -> Tensor:
        """The last iterate, and nothing but the passes that it takes."""
        x_adv = self.starting_points(x, threat_model, generator) if first is None else first
        for _ in range(self.num_steps):
            grad = value_and_gradient(mixture, self.objective, x_adv, y, clean_logits)[2]
            x_adv = threat_model.ascent_step(x_adv, grad, self.step_size * threat_model.eps)
            x_adv = threat_model.project(x_adv, x)
        return x_adv

    def _search(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        clean_logits: Tensor | None,
        generator: torch.Generator | None,
        worst: WorstPoints,
        blind: Tensor,
        first: Tensor | None,
    ) -> None:
        """One start, whose points go to `worst`; `blind` marks the examples that met NaN gradients."""
        rows = torch.arange(len(x), device=x.device)
        x_adv: Tensor | None = None
        for step in range(self.num_steps + 1):
            if self.keep == "accuracy":
                open_ = worst.accuracy[rows] > 0
                if not bool(open_.all()):
                    rows = rows[open_]
                    x_adv = None if x_adv is None else x_adv[open_]
            if not len(rows):
                return
            if x_adv is None:
                x_adv = self.starting_points(x[rows], threat_model, generator) if first is None else first[rows]
            clean = None if clean_logits is None else clean_logits[:, rows]
            if step == self.num_steps:
                with torch.no_grad():
                    logits = mixture.member_logits(x_adv)
                    worst.offer(x_adv, logits, self.objective(logits, y[rows], mixture.weights, clean), rows)
                return
            logits, value, grad = value_and_gradient(mixture, self.objective, x_adv, y[rows], clean)
            worst.offer(x_adv, logits, value, rows)
            blind[rows] |= grad.flatten(1).isnan().any(1)
            x_adv = threat_model.ascent_step(x_adv, grad, self.step_size * threat_model.eps)
            x_adv = threat_model.project(x_adv, x[rows])

    def starting_points(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        """Points of the ball where a run begins, drawn as `start` says: [B, ...]."""
        if self.start == "none":
            return x.clone()
        if self.start == "uniform":
            return threat_model.sample(x, generator)
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        return threat_model.project(x + 1e-3 * noise, x)
