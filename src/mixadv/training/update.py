"""What a member's update needs of one batch: its gradient, part after part, and the statistics that move with it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixadv.correctness import answered, correct
from mixadv.losses import RobustLoss
from mixadv.training.shared_attack import parts_of


def add_gradient(
    member: nn.Module,
    loss: RobustLoss,
    class_weights: Tensor,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    micro_batch_size: int | None,
    backward: Callable[[Tensor], None],
) -> Tensor:
    """Add the gradient of the mean over i of W[y_i] outer_i, on x, x_adv [B, ...], y [B], to the member's parameters.

    Args:
        member: in train mode.
        loss: its `outer` is minimised.
        class_weights: W [C] of this member.
        micro_batch_size: the most images in one forward-backward pass; None for no limit. The losses of the parts are
            summed and divided by B; batch norm in train mode sees each part alone.
        backward: adds the gradient of a scalar; Lightning's ``manual_backward``.

    Returns:
        [2], the mean loss and the accuracy at x_adv, float32. The loss is NaN if a logit is not finite.
    """
    parts = parts_of(len(y), micro_batch_size)
    seen = []
    for part in parts:
        clean_logits = member(x[part]) if loss.needs_clean else None
        logits = member(x_adv[part])
        losses = loss.outer(logits, clean_logits, y[part])
        losses = class_weights.to(losses)[y[part]] * losses
        hits = correct(logits.detach(), y[part]).float()
        if len(parts) == 1:
            share, accuracy = losses.mean(), hits.mean()
        else:
            share, accuracy = losses.sum() / len(y), hits.sum() / len(y)
        backward(share)
        # A loss may be finite although a logit is not: the cross-entropy does not see -inf for a wrong class.
        finite = torch.stack([answered(z).all() for z in (logits, clean_logits) if z is not None]).all()
        seen.append(torch.stack([torch.where(finite, share.detach().float(), torch.nan), accuracy]))
        # The graph of a part ends before the next begins.
        del clean_logits, logits, losses, share
    return torch.stack(seen).sum(dim=0)


def running_statistics(member: nn.Module) -> list[Tensor]:
    """Running means and variances of batch norm, which have to be the same on all processes."""
    return [
        buffer
        for layer in member.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
