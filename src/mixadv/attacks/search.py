"""The base class of the attacks: checks of the batch, gradients of an objective, and the worst point found so far."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mixadv.attacks.objectives import ExpectedObjective, Objective
from mixadv.correctness import as_labels, check_classes, correct
from mixadv.mixture import Mixture, as_mixture
from mixadv.threat_model import ThreatModel

NO_GRADIENT = (
    "the objective has no gradient with respect to the input: no member is differentiable; use an attack without "
    "gradients"
)


class Attack(Protocol):
    """Anything that maps a mixture and a batch to perturbed images inside the threat model."""

    def __call__(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """Perturbed images of the shape of x [B, ...], for labels y [B]."""


class SearchAttack(ABC):
    """An attack that searches S_eps(x) for the worst point of each example.

    A call checks the batch once and returns x_adv in the shape and dtype of x, detached. The mixture is attacked in
    eval mode with frozen parameters and left unchanged; members of weight 0 are not evaluated.

    Unless an attack says otherwise, it returns for each example the worst of x and all points that it tried: the
    point of lowest exact expected accuracy sum_k lambda_k 1[f_k(x') = y], and among equals that of highest objective.
    An example whose expected accuracy is 0 cannot get worse, so the search leaves it out from then on.

    transfers: whether its points against one member or the averaged twin are worth replaying on the mixture.
    differentiates: whether `search` runs with gradients enabled.
    """

    transfers: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False

    def require(self, least: Mapping[str, int], one_of: Mapping[str, Sequence[str]] | None = None) -> None:
        """Check settings by name.

        Args:
            least: the smallest value of each count; a `step_size`, if there is one, must be positive, and a
                `kappa` at least 0.
            one_of: the allowed values of each name.

        Raises:
            ValueError: a setting is out of its range.
        """
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {bound}")
        size = getattr(self, "step_size", 1.0)
        if not (math.isfinite(size) and size > 0):
            raise ValueError(f"step_size is {size}: it must be positive (in units of eps)")
        depth = getattr(self, "kappa", 0.0)
        if not (math.isfinite(depth) and depth >= 0):
            raise ValueError(f"kappa is {depth}: it must be at least 0 (in units of eps)")
        for name, known in (one_of or {}).items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")

    @property
    def checks_box(self) -> bool:
        """Whether a call checks that x lies in the box; reading the answer waits for the device."""
        return True

    def warn_of_nan_gradients(self, blind: Tensor, verb: str) -> None:
        """Warn the caller of the attack if NaN gradients kept it from moving on examples, marked in `blind` [B]."""
        count = int(blind.sum())
        if count:
            warnings.warn(
                f"{type(self).__name__} met NaN gradients on {count} of {len(blind)} examples and could not {verb} "
                "there: robustness measured with it is overstated",
                stacklevel=4,  # past `search` and `__call__`
            )

    def __call__(
        self,
        mixture: Mixture | nn.Module,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
        **more: Tensor | None,
    ) -> Tensor:
        """Attack x `[B, ...]` with labels y `[B]`; a plain module counts as a mixture of one member.

        Args:
            more: further arguments of `search`.

        Raises:
            ValueError: as `check_batch`, or the attack cannot work on this mixture.
        """
        y = check_batch(x, y, threat_model if self.checks_box else None)
        if isinstance(threat_model.eps, Tensor):
            return self._by_radius(mixture, x, y, threat_model, generator, more)
        if threat_model.eps == 0 or x.numel() == 0:
            return x.detach().clone()
        mixture = as_mixture(mixture).support()
        # Tensors made under inference_mode can neither be differentiated through nor written to; their clones can.
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiates), mixture.attack_mode():
            return self.search(mixture, x.detach().clone(), y.clone(), threat_model, generator, **more)

    def _by_radius(
        self,
        mixture: Mixture | nn.Module,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        more: Mapping[str, Tensor | None],
    ) -> Tensor:
        """One call for the examples of each radius, so that a search has one radius."""
        found = x.detach().clone()
        for rows, ball in threat_model.by_radius(x):
            own = {name: None if value is None else value[rows] for name, value in more.items()}
            found[rows] = self(mixture, x[rows], y[rows], ball, generator, **own)
        return found

    @abstractmethod
    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """The perturbed images, for a batch that was checked and a mixture in attack mode."""


class WorstPoints:
    """The worst point seen so far for each example: lowest expected accuracy, then highest objective.

    A point that is not finite is never kept; an objective that is NaN counts as -inf. A member whose logits are not
    finite is wrong.

    Args:
        mixture: its exact expected accuracy is sum_k lambda_k 1[f_k(x') = y].
        x: [B, ...], the clean inputs; offer them first, so that no worst point is better for the mixture than x.
        y: labels [B].
        by_accuracy: False compares objectives alone.

    Attributes:
        x: [B, ...], the worst points; accuracy: [B] float64, their expected accuracy, and objective: [B] float64.
    """

    def __init__(self, mixture: Mixture, x: Tensor, y: Tensor, by_accuracy: bool = True) -> None:
        self.mixture, self.y, self.by_accuracy = mixture, y, by_accuracy
        self.x = x.clone()
        # Apple's devices have no float64, see `Mixture.expectation`.
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        self.objective = torch.full((len(x),), float("-inf"), dtype=wide, device=x.device)
        self.accuracy = torch.full((len(x),), float("inf"), dtype=wide, device=x.device)

    def offer(self, x: Tensor, logits: Tensor, objective: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compare one more point of each example `rows` with its worst point so far.

        Args:
            x: [R, ...]; logits: of all members at x, [L, R, C]; objective: [R]; rows: [R] long, None for all in order.

        Returns:
            [R] bool, True where the new point is worse for the mixture and was kept.
        """
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        objective = objective.to(self.objective)
        objective = objective.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        worse = objective > self.objective[rows]
        if self.by_accuracy:
            accuracy = self.mixture.expectation(correct(logits, self.y[rows])).to(self.accuracy)
            worse = (accuracy < self.accuracy[rows]) | ((accuracy == self.accuracy[rows]) & worse)
        worse &= x.flatten(1).isfinite().all(1)
        kept = rows[worse]
        if self.by_accuracy:
            self.accuracy[kept] = accuracy[worse]
        self.objective[kept] = objective[worse]
        self.x[kept] = x[worse]
        return worse

    def unfinished(self) -> Tensor:
        """[R] long, the examples that can still get worse: some member of positive weight is right."""
        return (self.accuracy > 0).nonzero().flatten()


def gradient(objective: Tensor, x_adv: Tensor, retain_graph: bool = False) -> Tensor:
    """d sum_i objective_i / dx. Examples do not interact in eval mode, so each gets the gradient of its own objective.

    Raises:
        ValueError: the objective does not depend on x_adv differentiably.
    """
    if not objective.requires_grad:
        raise ValueError(NO_GRADIENT)
    (grad,) = torch.autograd.grad(objective.sum(), x_adv, retain_graph=retain_graph)
    return grad


def value_and_gradient(
    mixture: Mixture, objective: Objective, x: Tensor, y: Tensor, clean_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The members' logits at x [L, R, C], the objective there [R] and its gradient in x [R, ...], all detached.

    One forward and one backward pass per network. If the objective is an expectation, the networks take turns, so that
    the activations of one at a time are held. Of members with networks of their own the result is bit for bit that of
    all members at once.

    Args:
        mixture: in attack mode. x: [R, ...]; y: [R]; clean_logits: [L, R, C] if the objective needs them.

    Raises:
        ValueError: no member is differentiable, or as `Mixture.member_logits`.
    """
    x = x.detach().requires_grad_(True)
    weights = mixture.weights
    if mixture.num_members == 1 or not isinstance(objective, ExpectedObjective):
        joint = mixture.member_logits(x)
        value = objective(joint, y, weights, clean_logits)
        return joint.detach(), value.detach(), gradient(value, x)
    logits: dict[int, Tensor] = {}
    total: Tensor | None = None
    # Backward passes of a sum begin with its last term, and gradients add up in that order.
    for members in reversed(mixture.by_network()):
        z = mixture.network_logits(members[0], x)
        losses = []
        for k in members:
            one = mixture.from_network(k, z)
            logits[k] = one.detach()
            loss = objective.of_member(k, one, y, clean_logits)
            if loss.requires_grad:
                losses.append(weights[k].to(loss) * loss)
        if losses:
            grad = gradient(torch.stack(losses).sum(0), x)
            total = grad if total is None else total + grad
    if total is None:
        raise ValueError(NO_GRADIENT)
    every = mixture.stack_logits([logits[k] for k in range(mixture.num_members)])
    return every, objective(every, y, weights, clean_logits), total


@dataclass(frozen=True)
class Climb:
    """One search: the objective, the mixture and the batch, and what has been found so far.

    Attributes:
        clean: [L, B, C], the members' logits at x.
        worst: the worst points so far.
        blind: [B] bool, the examples on which a gradient was NaN.
    """

    mixture: Mixture
    objective: Objective
    x: Tensor
    y: Tensor
    clean: Tensor
    worst: WorstPoints
    blind: Tensor

    @classmethod
    def begin(
        cls,
        mixture: Mixture,
        objective: Objective,
        x: Tensor,
        y: Tensor,
        by_accuracy: bool = True,
        clean: Tensor | None = None,
    ) -> Climb:
        """Start with x as the first of the worst points; clean: the members' logits at x, if they are known."""
        if clean is None:
            with torch.no_grad():
                clean = mixture.member_logits(x)
        check_classes(y, clean.shape[-1])
        worst = WorstPoints(mixture, x, y, by_accuracy)
        worst.offer(x, clean, objective(clean, y, mixture.weights, clean))
        blind = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return cls(mixture, objective, x, y, clean, worst, blind)

    def score(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Offer one point of each example `rows` [R]; the members' logits [L, R, C] and the objective [R] there."""
        with torch.no_grad():
            logits = self.mixture.member_logits(points)
            return logits, self.offer(points, logits, rows)

    def offer(self, points: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """Compare points whose logits [L, R, C] are known with the worst ones; the objective [R] there."""
        value = self.objective(logits, self.y[rows], self.mixture.weights, self._clean(rows))
        self.worst.offer(points, logits, value, rows)
        return value

    def score_with_gradient(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `score`, but returns the objective [R] (NaN counts as -inf) and its gradient [R, ...]."""
        clean = self._clean(rows)
        logits, value, grad = value_and_gradient(self.mixture, self.objective, points, self.y[rows], clean)
        self.worst.offer(points, logits, value, rows)
        self.blind[rows] |= grad.flatten(1).isnan().any(1)
        return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), grad

    def _clean(self, rows: Tensor) -> Tensor | None:
        return self.clean[:, rows] if self.objective.needs_clean else None


def check_points(name: str, x_adv: Tensor, x: Tensor, threat_model: ThreatModel) -> None:
    """Check the points that an attack returned; attacks share no code with this check.

    Raises:
        RuntimeError: a point is not finite, or outside ball or box: a defect of the attack, never corrected silently.
    """
    inside = threat_model.contains(x_adv, x)
    if not bool(inside.all()):
        index = int((~inside).nonzero()[0])
        raise RuntimeError(f"attack {name} left the threat model at example {index} of a batch: this is a defect")


def check_batch(x: Tensor, y: Tensor, threat_model: ThreatModel | None = None) -> Tensor:
    """Check that a batch can be attacked; returns the labels as torch.long.

    Raises:
        ValueError: x is not float32 or float64 (half precision is too coarse for the ball), labels do not match, or,
            if a threat model is given, x is not finite or outside its box (reading the answer waits for the device).
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}: convert it to float32 (or float64), in the units of the threat model")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected a batch [B, ...]")
    y = as_labels(y, len(x))
    if threat_model is not None and not bool(threat_model.contains(x, x).all()):
        raise ValueError(f"x is not finite or lies outside the box {threat_model.bounds} of the threat model")
    return y
