"""When an answer is right: every accuracy and every 0/1 loss of mixadv is decided here."""

import torch
from torch import Tensor


def answered(logits: Tensor) -> Tensor:
    """Whether all logits [..., C] are finite; [...] bool. If not, the classifier has given no answer."""
    return logits.isfinite().all(-1)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the largest of the logits [..., B, C] is that of the label, for labels y [B]; [..., B] bool.

    An answer that is not there is wrong: with NaN or infinity among the logits, their argmax means nothing. Between
    equal largest logits argmax decides.
    """
    return (logits.argmax(-1) == y) & answered(logits)


def as_labels(y: Tensor, count: int) -> Tensor:
    """Class numbers [count] of any integer type as torch.long.

    Raises:
        ValueError: other types (bool is none of them) or shapes.
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"labels are a {type(y).__name__}: give a tensor of class numbers, one per image")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels are {y.dtype}: expected class numbers (torch.long)")
    if y.shape != (count,):
        raise ValueError(f"labels have shape {tuple(y.shape)}: expected ({count},), one class number per image")
    return y.long()


def check_classes(y: Tensor, num_classes: int) -> None:
    """Check labels against the number of classes; reading the answer waits for the device.

    Raises:
        ValueError: a label is not in 0, ..., num_classes - 1.
    """
    if not y.numel():
        return
    low, high = (int(end) for end in y.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"label {low if low < 0 else high} is none of the {num_classes} classes, which are numbered from 0 to "
            f"{num_classes - 1}"
        )
