"""What a classifier must be before attacks and games can use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixadv.errors import UserError
from mixadv.evaluation.probes import answers, nothing_to_climb
from mixadv.members.source import LoadedMember
from mixadv.mixture import Mixture

_CHOOSE = "choose the data=... it takes, or wrap it in a factory"
# What an evaluation flags, see `answers`, is refused of a member beforehand.
_REFUSED = {
    "probabilities": "outputs probabilities, not logits: return log-probabilities or logits",
    "random-outputs": "answers the same images differently each time: remove what is random in eval mode",
    "batch-dependent": "answers an image differently in another batch: use batch norm's running statistics",
}


def check_members(members: Sequence[LoadedMember], x: Tensor) -> int:
    """The number of classes C, after every member has shown on a batch that attacks and games can use it.

    Each maps x `[B, ...]` to finite logits `[B, C]` (log-probabilities are logits too) with the same C, not to
    probabilities; leaves x as it is; gives the same when asked again and in smaller batches; and has a gradient with
    respect to x, finite, and not zero throughout where the logits depend on x. Probes and thresholds are those of the
    flags of an evaluation, see `mixadv.evaluation.probes`.

    Args:
        members: what a `Source` gave.
        x: images in [0, 1], B >= 2; moved to each member's device. Smaller batches begin at B = 3.

    Raises:
        ValueError: fewer than two images, or no members.
        UserError: one of them is not such a map; the message names it.
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
            seen = x.clone()
            logits = member.module(seen)
    except Exception as error:
        raise UserError(f"{this} fails on images {tuple(x.shape[1:])} ({_reason(error)}): {_CHOOSE}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{this} returns {got} for {len(x)} images, not logits [batch, classes]: wrap it in a factory")
    if not logits.is_floating_point() or not logits.isfinite().all():
        raise UserError(f"{this} returns logits that are not all finite numbers: check its file and its inputs")
    if not torch.equal(seen, x):
        raise UserError(f"{this} changes its input in place: make its first layer return a new tensor")
    try:
        found = answers(Mixture([member.module]), x.clone())
    # This batch it has answered.
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
            # Weights that differ: the gradient of a plain sum of log-probabilities may vanish.
            weighted = (logits * torch.arange(1.0, logits.shape[1] + 1, device=logits.device)).sum(1)
            gradient = torch.autograd.grad(weighted.sum(), leaf)[0]
    except Exception as error:
        raise UserError(
            f"{this} is not differentiable with respect to its input ({_reason(error)}): attacks need gradients; "
            "remove detach and no_grad from its forward"
        ) from error
    if not gradient.isfinite().all():
        raise UserError(f"{this} has gradients that are not finite: attacks need them; smooth its forward")
    # Rounding and thresholds: an attack would find nothing, and the member would look robust.
    if (logits != logits[0]).any() and nothing_to_climb(gradient, weighted.detach().abs()).all():
        raise UserError(f"{this} has no gradient though its answers vary: remove rounding and steps from its forward")
