"""Linearised decision boundaries of single members, for ARC and the subset attacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixadv.attacks.search import gradient
from mixadv.losses import at_least_float32
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example


@dataclass(frozen=True)
class Boundary:
    """The nearest linearised boundary of one member at each of R points, in the geometry of a threat model.

    With t the class to leave, j the class beyond the boundary and w = grad f_t - grad f_j at the point, a step u
    crosses the boundary, to first order, where <normal, u> >= distance.

    Attributes:
        distance: [R], (f_t - f_j) / ||w||_q with q dual to the norm (linf: 1, l2: 2), in input units: the length of
            the shortest step that crosses. Negative if f_j is above f_t already; infinite, with the sign of
            f_t - f_j, if w = 0.
        normal: [R, ...], -w / ||w||_q, of dual norm 1 (0 if w = 0).
        direction: [R, ...], the direction of the shortest step, of norm 1: -sign(w) for linf, -w / ||w||_2 for l2.
        logits: [R, C], the logits of the member at the points.
        blind: [R] bool, True where a gradient was NaN (it counts as 0 there).
    """

    distance: Tensor
    normal: Tensor
    direction: Tensor
    logits: Tensor
    blind: Tensor


def nearest_boundary(
    member: nn.Module,
    points: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    num_runner_ups: int = 1,
    leave_top: bool = False,
    rival: Tensor | None = None,
) -> Boundary:
    """The boundary of smallest distance between a class to leave and the highest `num_runner_ups` other classes.

    Costs one forward pass, and one backward pass per runner-up, for the whole batch.

    Args:
        member: frozen, in eval mode, maps points [R, ...] to logits [R, C].
        points: [R, ...]; y: labels [R].
        num_runner_ups: how many classes are tried; C - 1 if there are fewer.
        leave_top: the class to leave is the one that the member answers; by default it is the label, so that a member
            that errs already has a negative distance (the most negative one over the runner-ups).
        rival: classes [R], which take the place of the runner-ups.

    Raises:
        ValueError: the member has no gradient.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        logits = at_least_float32(member(points))
        here = logits.detach()
        leave = (here.argmax(-1) if leave_top else y).unsqueeze(1)
        count = min(num_runner_ups, here.shape[1] - 1)
        if rival is None:
            rivals = here.scatter(1, leave, float("-inf")).topk(count, dim=1).indices
        else:
            count, rivals = 1, rival[:, None]
        leads = logits.gather(1, leave) - logits.gather(1, rivals)
        slopes = [gradient(leads[:, i], points, retain_graph=i + 1 < count) for i in range(count)]
    best = _linearised(leads[:, 0].detach(), slopes[0], here, threat_model)
    for i in range(1, count):
        best = _nearer(_linearised(leads[:, i].detach(), slopes[i], here, threat_model), best)
    return best


def _linearised(lead: Tensor, slope: Tensor, logits: Tensor, threat_model: ThreatModel) -> Boundary:
    blind = slope.flatten(1).isnan().any(1)
    slope = slope.nan_to_num(nan=0.0)
    direction = threat_model.ascent_step(torch.zeros_like(slope), -slope, 1.0)
    # The dual norm by Hölder's equality. Its definition has squares, which underflow for a member that is very sure.
    dual = -inner(slope, direction)
    endless = torch.where(lead < 0, float("-inf"), float("inf")).to(dual)
    distance = torch.where(dual > 0, lead.to(dual) / dual, endless)
    tiny = torch.finfo(dual.dtype).tiny
    normal = direction if threat_model.norm == "l2" else -slope / per_example(dual.clamp_min(tiny), slope)
    return Boundary(distance, normal, direction, logits, blind)


def _nearer(a: Boundary, b: Boundary) -> Boundary:
    """For each example the boundary of smaller distance; b if they are equal."""
    closer = a.distance < b.distance
    wide = per_example(closer, a.normal)
    return Boundary(
        torch.where(closer, a.distance, b.distance),
        torch.where(wide, a.normal, b.normal),
        torch.where(wide, a.direction, b.direction),
        b.logits,
        a.blind | b.blind,
    )


def has_gradient(member: nn.Module, x: Tensor) -> bool:
    """Whether the member's logits have a gradient with respect to the input, found at the first input of x [B, ...]."""
    with torch.enable_grad():
        return bool(member(x[:1].detach().requires_grad_(True)).requires_grad)


def members_with_gradient(mixture: Mixture, x: Tensor) -> list[int]:
    """The members whose logits have a gradient with respect to the input, found at the first input of x [B, ...].

    Raises:
        ValueError: there is none.
    """
    found = [k for k, member in enumerate(mixture.members) if has_gradient(member, x)]
    if not found:
        raise ValueError(
            "no member that may be drawn has a gradient with respect to the input: use an attack without gradients"
        )
    return found


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> per example, [R, ...] x [R, ...] -> [R]."""
    return (a * b).flatten(1).sum(1)
