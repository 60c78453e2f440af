"""Linearised decision boundaries of single members, for ARC and the subset attacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mixadv.attacks.search import gradient
from mixadv.losses import at_least_float32
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel, per_example

# Beyond this ratio of the gradients of two logits, the larger one alone decides where their difference leads.
SATURATED_RATIO = 10.0


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
    rescaled: Tensor | None = None,
) -> Boundary:
    """The boundary of smallest distance between a class to leave and the highest `num_runner_ups` other classes.

    Costs one forward pass, and one backward pass per runner-up, for the whole batch.

    Args:
        member: frozen, in eval mode, maps points [R, ...] to logits [R, C].
        points: [R, ...]; y: labels [R].
        num_runner_ups: how many classes are tried; C - 1 if there are fewer.
        leave_top: the class to leave is the one that the member answers; by default it is the label, so that a member
            that errs already has a negative distance (the most negative one over the runner-ups).
        rival: classes [R], which take the place of the runner-ups; -1 leaves it to the highest of them.
        rescaled: [R] bool, points whose normal and direction are those of w = grad f_t / ||grad f_t||_2 -
            grad f_j / ||grad f_j||_2, j the highest other class. A function applied to each logit, such as a tanh, does
            not change this w, see `squashed_at`. Costs two more backward passes for the whole batch.

    Raises:
        ValueError: the member has no gradient.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        logits = at_least_float32(member(points))
        here = logits.detach()
        leave = (here.argmax(-1) if leave_top else y).unsqueeze(1)
        count = min(num_runner_ups, here.shape[1] - 1)
        rivals = here.scatter(1, leave, float("-inf")).topk(count, dim=1).indices
        if rival is not None:
            count, rivals = 1, torch.where(rival[:, None] >= 0, rival[:, None], rivals[:, :1])
        leads = logits.gather(1, leave) - logits.gather(1, rivals)
        again = rescaled is not None
        slopes = [gradient(leads[:, i], points, retain_graph=again or i + 1 < count) for i in range(count)]
        classes = _class_gradients(logits, leave, rivals[:, :1], points) if again else []
    best = _linearised(leads[:, 0].detach(), slopes[0], here, threat_model)
    for i in range(1, count):
        best = _nearer(_linearised(leads[:, i].detach(), slopes[i], here, threat_model), best)
    if rescaled is not None:
        slope = _unit(classes[0]) - _unit(classes[1])
        other = _linearised(leads[:, 0].detach(), slope, here, threat_model)
        wide = per_example(rescaled, other.normal)
        normal, direction = (
            torch.where(wide, other.normal, best.normal),
            torch.where(wide, other.direction, best.direction),
        )
        best = replace(best, normal=normal, direction=direction)
    return best


def squashed_at(member: nn.Module, points: Tensor, y: Tensor) -> Tensor:
    """Where the gradients of the label's logit and of the highest other one differ more than tenfold in length, [R].

    Such points are common if a function is applied to each logit, such as 20 tanh(z): the gradient of a margin then
    leads where the less sure class leads. Costs one forward pass and two backward passes.

    Args:
        member: frozen, in eval mode, maps points [R, ...] to logits [R, C]; y: labels [R].
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        logits = at_least_float32(member(points))
        label = y.unsqueeze(1)
        rival = logits.detach().scatter(1, label, float("-inf")).argmax(1, keepdim=True)
        label_size, rival_size = map(_length, _class_gradients(logits, label, rival, points))
    uneven = (label_size > SATURATED_RATIO * rival_size) | (rival_size > SATURATED_RATIO * label_size)
    # Where one gradient is 0, scaling changes no direction: for instance logits (0, w x) of two classes.
    return uneven & (label_size > 0) & (rival_size > 0)


def _class_gradients(logits: Tensor, one: Tensor, other: Tensor, points: Tensor) -> list[Tensor]:
    """The gradients [R, ...] of two logits of each point, given as classes [R, 1]; NaN counts as 0."""
    first = gradient(logits.gather(1, one), points, retain_graph=True)
    return [first.nan_to_num(nan=0.0), gradient(logits.gather(1, other), points).nan_to_num(nan=0.0)]


def _length(slope: Tensor) -> Tensor:
    """||slope||_2 of each example, [R]; scaled first, because the squares of tiny gradients underflow."""
    largest = slope.flatten(1).abs().amax(1)
    scale = largest.clamp_min(torch.finfo(slope.dtype).tiny)
    return torch.linalg.vector_norm(slope.flatten(1) / scale[:, None], dim=1) * scale


def _unit(slope: Tensor) -> Tensor:
    """slope / ||slope||_2 of each example; 0 stays 0."""
    tiny = torch.finfo(slope.dtype).tiny
    slope = slope / per_example(slope.flatten(1).abs().amax(1).clamp_min(tiny), slope)
    return slope / per_example(_length(slope).clamp_min(tiny), slope)


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
