"""Projected gradient ascent on the expected loss of a mixture."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mixadv.attacks.objectives import ExpectedLoss, Objective
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
            and among equals the highest objective.

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
    ) -> Tensor:
        """Attack x `[B, ...]` with labels y `[B]`; a plain module counts as a mixture of one member."""
        _check_batch(x, y)
        if self.keep != "last" and not bool(threat_model.check(x, x).all()):
            raise ValueError(f"x is not finite or lies outside the box {threat_model.bounds} of the threat model")
        if threat_model.eps == 0 or len(x) == 0:
            return x.detach().clone()
        mixture = as_mixture(mixture)
        # Tensors made under inference_mode cannot be differentiated through; their clones outside it can.
        with torch.inference_mode(False), torch.enable_grad(), mixture.attack_mode():
            return self._attack(mixture, x.detach().clone(), y.clone(), threat_model, generator)

    def _attack(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
    ) -> Tensor:
        weights = mixture.weights
        best: _Best | None = None
        clean_logits: Tensor | None = None
        if self.objective.needs_clean or self.keep != "last":
            with torch.no_grad():
                clean = mixture.member_logits(x)
                clean_logits = clean if self.objective.needs_clean else None
                if self.keep != "last":
                    best = _Best(mixture, x, y, self.keep == "accuracy")
                    best.offer(x, clean, self.objective(clean, y, weights, clean_logits))

        x_adv = x
        for _ in range(1 if self.keep == "last" or self.start == "none" else self.restarts):
            x_adv = self._start(x, threat_model, generator)
            for _ in range(self.num_steps):
                x_adv.requires_grad_(True)
                logits = mixture.member_logits(x_adv)
                objective = self.objective(logits, y, weights, clean_logits)
                grad = _gradient(objective, x_adv)
                x_adv = x_adv.detach()
                if best is not None:
                    best.offer(x_adv, logits.detach(), objective.detach())
                    best.masked |= grad.flatten(1).isnan().any(1)
                x_adv = threat_model.ascent_step(x_adv, grad, self.step_size * threat_model.eps)
                x_adv = threat_model.project(x_adv, x)
            if best is not None:
                with torch.no_grad():
                    logits = mixture.member_logits(x_adv)
                    best.offer(x_adv, logits, self.objective(logits, y, weights, clean_logits))
        if best is None:
            return x_adv
        if bool(best.masked.any()):
            warnings.warn(
                f"PGD met NaN gradients on {int(best.masked.sum())} of {len(x)} examples and could not climb "
                "there: robustness measured with it is overstated",
                stacklevel=3,
            )
        return best.x

    def _start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator | None) -> Tensor:
        if self.start == "none":
            return x.clone()
        if self.start == "uniform":
            return threat_model.sample(x, generator)
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        return threat_model.project(x + 1e-3 * noise, x)


class _Best:
    """The best point seen so far for each example: lowest expected accuracy (if `by_accuracy`), then highest
    objective. Points that are not finite, and objectives that are NaN, never win."""

    def __init__(self, mixture: Mixture, x: Tensor, y: Tensor, by_accuracy: bool) -> None:
        self.mixture, self.y, self.by_accuracy = mixture, y, by_accuracy
        self.x = x
        self.masked = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.objective = torch.full((len(x),), float("-inf"), device=x.device)
        self.accuracy = torch.full((len(x),), float("inf"), device=x.device)

    def offer(self, x: Tensor, logits: Tensor, objective: Tensor) -> None:
        objective = objective.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        better = objective > self.objective
        if self.by_accuracy:
            accuracy = self.mixture.expectation(logits.argmax(-1) == self.y)
            better = (accuracy < self.accuracy) | ((accuracy == self.accuracy) & better)
        better &= x.flatten(1).isfinite().all(1)
        if self.by_accuracy:
            self.accuracy = torch.where(better, accuracy, self.accuracy.to(accuracy.dtype))
        self.objective = torch.where(better, objective, self.objective.to(objective.dtype))
        self.x = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), x, self.x)


def _gradient(objective: Tensor, x_adv: Tensor) -> Tensor:
    """d sum_i objective_i / dx: the examples do not interact in eval mode, so each gets its own gradient."""
    if not objective.requires_grad:
        raise ValueError(
            "the objective has no gradient with respect to the input: no member is differentiable; "
            "use an attack without gradients"
        )
    (grad,) = torch.autograd.grad(objective.sum(), x_adv)
    return grad


def _check_batch(x: Tensor, y: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}: convert it to float32 (or float64), in the units of the threat model")
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} do not match: expected [B, ...] and [B]")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"labels are {y.dtype}: expected class numbers (torch.long)")
