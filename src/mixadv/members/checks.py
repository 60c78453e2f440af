"""Checks that a classifier can be used by attacks and games."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixadv.errors import UserError
from mixadv.evaluation.probes import answers, nothing_to_climb
from mixadv.members.source import LoadedMember
from mixadv.mixture import Mixture

_CHOOSE = "choose the data=... it takes, or wrap it in a factory"
_CONVERT = "convert it with module.float() in the function that builds it"
# Flags of an evaluation (see `answers`) for which a member is refused -> message.
_REFUSED = {
    "probabilities": "outputs probabilities, not logits: return log-probabilities or logits",
    "random-outputs": "answers the same images differently each time: remove what is random in eval mode",
    "batch-dependent": "answers an image differently in another batch: use batch norm's running statistics",
}


def check_members(members: Sequence[LoadedMember], x: Tensor) -> int:
    """Check every member on a batch; returns the number of classes C.

    A member must map x `[B, ...]` to finite logits `[B, C]` (log-probabilities are logits, probabilities are refused)
    with the same C for all members. It must not change x in place, must return the same logits for the same images in a
    second call and in smaller batches, and its gradient with respect to x must be finite, and not zero for all images
    if the logits depend on x. Probes and thresholds are those of the flags of an evaluation, see
    `mixadv.evaluation.probes`.

    Args:
        members: from `Source.members`.
        x: images in [0, 1], B >= 2, moved to each member's device; B >= 3 for the test of smaller batches.

    Raises:
        ValueError: fewer than two images, or no members.
        UserError: a member fails a check; the message names it.
    """
    if len(x) < 2 or not members:
        raise ValueError(f"{len(members)} members and {len(x)} images: give a member and two images at least")
    counts = [_check_member(member, x) for member in members]
    for member, count in zip(members, counts, strict=True):
        if count != counts[0]:
            raise UserError(
                f"member {members[0].name} has {counts[0]} classes, member {member.name} has {count}: the members of "
                "a mixture must share their classes; leave one out"
            )
    return counts[0]


def _check_member(member: LoadedMember, x: Tensor) -> int:
    this = f"member {member.name}"
    tensors = (*member.module.parameters(), *member.module.buffers())
    x = x.to(tensors[0].device) if tensors else x
    try:
        with torch.no_grad():
            own = x.clone()
            logits = member.module(own)
    except Exception as error:
        if other := {p.dtype for p in member.module.parameters() if p.is_floating_point()} - {x.dtype}:
            raise UserError(f"{this} has parameters in {other.pop()}, the images are {x.dtype}: {_CONVERT}") from error
        raise UserError(f"{this} fails on images {tuple(x.shape[1:])} ({_reason(error)}): {_CHOOSE}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{this} returns {got} for {len(x)} images, not logits [batch, classes]: wrap it in a module whose forward "
            "returns these alone"
        )
    if logits.is_floating_point() and logits.dtype not in (torch.float32, torch.float64):
        raise UserError(f"{this} returns logits in {logits.dtype}, which attacks round away: {_CONVERT}")
    if not logits.is_floating_point() or not logits.isfinite().all():
        raise UserError(f"{this} returns logits that are not all finite numbers: check its file and its inputs")
    if not torch.equal(own, x):
        raise UserError(f"{this} changes its input in place: make its first layer return a new tensor")
    try:
        found = answers(Mixture([member.module]), x.clone())
    # The whole batch worked above, so the size of the batch must be the reason.
    except Exception as error:
        raise UserError(f"{this} {_REFUSED['batch-dependent']} ({_reason(error)})") from error
    for name, sentence in _REFUSED.items():
        if name in found:
            raise UserError(f"{this} {sentence}")
    _check_gradient(this, member.module, x)
    return int(logits.shape[1])


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_gradient(this: str, module: nn.Module, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            logits = module(leaf)
            # With different weights, because the gradient of a plain sum of log-probabilities may vanish.
            weighted = (logits * torch.arange(1.0, logits.shape[1] + 1, device=logits.device)).sum(1)
            gradient = torch.autograd.grad(weighted.sum(), leaf)[0]
    except Exception as error:
        raise UserError(
            f"{this} is not differentiable with respect to its input ({_reason(error)}): attacks need gradients; "
            "remove detach and no_grad from its forward"
        ) from error
    if not gradient.isfinite().all():
        raise UserError(f"{this} has gradients that are not finite: attacks need them; smooth its forward")
    # With rounding or thresholds an attack finds nothing, and the member would look robust.
    if (logits != logits[0]).any() and nothing_to_climb(gradient, weighted.detach().abs()).all():
        raise UserError(f"{this} has no gradient though its answers vary: remove rounding and steps from its forward")
